"""Ternary layers as Apple's MLX stores them: two bits per weight, `w = q * scale + bias`, groups of inputs.

A layer holds `weight` (N, K/16), uint32, of which the code of input 16 j + i is in bits 2 i + 1 and 2 i; and `scales`
and `biases` (N, K/g). It is ternary where bias = -scale: codes 0, 1, 2 are then -1, 0, +1. Source: `dequantize` of
MLX 0.32, mode "affine", which wrote `tests/data/forms/mlx.safetensors`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import reference
from .codes import unpack


NAME = "MLX"
MARK = "biases"  # what only a packed layer has
TENSORS = {"weight", "scales", MARK}


def decode(parts: Mapping[str, Tensor], name: str, scale_granularity: None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a layer.

    Args:
        parts (`dict[str, torch.Tensor]`): The tensors of the layer, by the names in `TENSORS`.
        name (`str`): Of the layer, for errors.
        scale_granularity: As the file says.

    Returns:
        Two `torch.Tensor`: T (N, K) int8, and the scale (N, K/g) float32.

    Raises:
        ValueError: A tensor is missing or does not fit, or the layer is not ternary.
    """
    if missing := TENSORS - parts.keys():
        raise ValueError(f"{name} has no `{sorted(missing)[0]}`. Download the file again.")
    words, scale, bias = (parts[key] for key in ("weight", "scales", MARK))
    if words.dtype != torch.uint32 or words.dim() != 2 or scale.dim() != 2 or bias.shape != scale.shape:
        raise ValueError(
            f"{name} is {reference.describe(words)}, with scales of {reference.describe(scale)} and biases of"
            f" {reference.describe(bias)}; MLX's two-bit layers are (N, K/16) uint32 and (N, K/g) floats. Download the"
            " file again."
        )
    scale, bias = scale.float(), bias.float()
    return unpack(words.contiguous().view(torch.uint8), scale, bias != -scale, name), scale

"""Ternary layers as gemlite stores them: two bits per weight, packed along the inputs and transposed.

A layer holds `W_q` (K/c, N) with c codes in each integer, the first input in the lowest bits; `scales` (K/g, N), and
`zeros` of that shape or one for all. w = (q - zero) * scale or, since gemlite folds them, q * scale + zero. It is
ternary where zero is 1 or, folded, -scale; where both hold they mean the same. Source: gemlite 0.6's
`GemLiteLinearTriton.pack`, which wrote `tests/data/forms/gemlite.pt`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..ops import reference
from .codes import unpack


NAME = "gemlite"
MARK = "W_q"  # what only a packed layer has
TENSORS = {MARK, "scales", "zeros", "metadata", "orig_shape", "meta_scale"}


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
    if missing := {MARK, "scales", "zeros"} - parts.keys():
        raise ValueError(f"{name} has no `{sorted(missing)[0]}`. Download the file again.")
    packed, scale, zero = (parts[key] for key in (MARK, "scales", "zeros"))
    further = parts.get("meta_scale", torch.zeros(1))
    matrices = packed.dim() == scale.dim() == 2 and not packed.is_floating_point()
    if not matrices or zero.numel() not in (1, scale.numel()) or not ((further == 0) | (further == 1)).all():
        raise ValueError(
            f"{name} is {reference.describe(packed)}, with scales of {reference.describe(scale)}, zeros of"
            f" {reference.describe(zero)} and a scale of scales of {further.flatten()[:1].tolist()}; only"
            " two-bit layers with a scale and a zero per group or row are read. Convert the repository of dense"
            " weights, often called `-unpacked`."
        )
    scale = scale.t().float().contiguous()  # (N, K/g)
    zero = zero.float() if zero.numel() == 1 else zero.view(scale.shape[::-1]).t().float()
    shifted = ((zero != 1) & (zero != -scale)).expand_as(scale)
    return unpack(packed.t().contiguous().view(torch.uint8), scale, shifted, name), scale

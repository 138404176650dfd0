"""Reorder packed weights between transformers' BitNet layout and this package's."""

import torch
from torch import Tensor

from ..ops import reference


def swap_bitnet_order(weight_packed: Tensor) -> Tensor:
    """Between transformers' BitNet layout and this package's: the same codes, the quarters in the opposite order.

    BitNet's `weight` holds the first quarter of the rows in bits 1:0, this package's `weight_packed` in bits 7:6. The
    function is its own inverse. BitNet's layers divide by their `weight_scale` where it was saved by
    `BitLinear`, and multiply by it in `AutoBitLinear`: take the reciprocal for the former.

    Args:
        weight_packed (`torch.Tensor`): (N/4, K), uint8.

    Returns:
        `torch.Tensor`: (N/4, K), uint8.

    Raises:
        ValueError: Not a uint8 matrix, or a code that is not ternary.
    """
    if not isinstance(weight_packed, Tensor) or weight_packed.dtype != torch.uint8 or weight_packed.dim() != 2:
        raise ValueError(f"Packed BitNet weights are a uint8 matrix, got {reference.describe(weight_packed)}.")
    if reference.has_invalid_code(weight_packed):
        raise ValueError("The weight holds code 3, which is not a ternary value. Load it from an undamaged file.")
    w = weight_packed
    return w >> 6 | (w >> 2) & 0b1100 | (w << 2) & 0b110000 | w << 6

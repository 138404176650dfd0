"""Ternary layers published as dense tensors: every value of a group is -scale, 0 or scale."""

from collections.abc import Mapping

from torch import Tensor

from ..ops import reference


NAME = "dense"
MARK = "weight"
TENSORS = {MARK}


def decode(parts: Mapping[str, Tensor], name: str, scale_granularity: str | int | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a layer.

    Args:
        parts (`dict[str, torch.Tensor]`): `weight` (N, K), float.
        name (`str`): Of the layer, for errors.
        scale_granularity (`str` or `int`, *optional*): What one scale covers; default the coarsest that fits.

    Returns:
        Two `torch.Tensor`: T (N, K) int8, and the scale (1,), (N, 1) or (N, K/g), float32.

    Raises:
        ValueError: The weight is not ternary.
    """
    if scale_granularity is None:
        scale_granularity = reference.find_granularity(parts[MARK], name)
    return reference.exact_codes(parts[MARK], scale_granularity, name)

"""Convert published ternary models: one file per form in which they are published."""

from .bitnet import swap_bitnet_order
from .dense import convert_dense_checkpoint, is_diffusers_checkpoint
from .terdit import convert_original_checkpoint


__all__ = [
    "convert_dense_checkpoint",
    "convert_original_checkpoint",
    "is_diffusers_checkpoint",
    "swap_bitnet_order",
]

"""Convert published ternary models: one file per form in which they are published."""

from .bitnet import swap_bitnet_order
from .published import convert_dense_checkpoint, convert_ternary_checkpoint, is_published_model
from .terdit import convert_original_checkpoint


__all__ = [
    "convert_dense_checkpoint",
    "convert_original_checkpoint",
    "convert_ternary_checkpoint",
    "is_published_model",
    "swap_bitnet_order",
]

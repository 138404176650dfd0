"""Ternary arithmetic. Imports torch only; numba and Triton where a kernel wants them.

`reference` is the truth in plain PyTorch, `torch_ops` registers it as ops, and the kernels of a device register
themselves there when its `choose` is imported.
"""

from . import reference
from .cpu import choose as _cpu  # noqa: F401 - registers the kernels
from .gpu import choose as _gpu  # noqa: F401
from .reference import dequantize, pack_ternary, unpack_ternary
from .torch_ops import (
    Choice,
    check_integers,
    choose_kernel,
    decode_weight,
    decoded_linear,
    float_linear,
    has_integer_kernel,
    held_codes,
    integer_linear,
    linear,
    linears,
    quantize_activations,
    ternarize,
    ternary_linear,
)


__all__ = [
    "Choice",
    "check_integers",
    "choose_kernel",
    "decode_weight",
    "decoded_linear",
    "dequantize",
    "float_linear",
    "has_integer_kernel",
    "held_codes",
    "integer_linear",
    "linear",
    "linears",
    "pack_ternary",
    "quantize_activations",
    "reference",
    "ternarize",
    "ternary_linear",
    "unpack_ternary",
]

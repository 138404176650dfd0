"""The linear ops on a GPU: decode the weight, let the vendor's library multiply.

The decoded matrix lives for one call; the caching allocator gives the next layer the same memory. `Decoder` is what
decodes: `unpack` below, in plain PyTorch, or the kernel of `triton_kernels`, with the same results.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference


Decoder = Callable[..., Tensor]  # (weight_packed, dtype, weight_scale=None) -> T or `scale * T`, (N, K)
FEWEST_ROWS = 17  # that `torch._int_mm` takes on CUDA; inputs and outputs in multiples of 8
INTEGER_MULTIPLE = 8


def unpack(weight_packed: Tensor, dtype: torch.dtype, weight_scale: Tensor | None = None) -> Tensor:
    """Return T, or `scale * T`: (N/4, K) uint8 -> (N, K) `dtype`."""
    if weight_scale is None:
        return reference.unpack_ternary(weight_packed, dtype)
    return reference.dequantize(reference.unpack_ternary(weight_packed, torch.int8), weight_scale).to(dtype)


def product(decode: Decoder, input: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute `reference.product`."""
    inner, _ = reference.split_scale(weight_scale, input.dtype)
    return F.linear(input, decode(weight_packed, input.dtype, inner))


def linear(decode: Decoder, input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `reference.ternary_linear` (uint8 `weight`) or `reference.float_linear` (float `weight`)."""
    if weight.dtype != torch.uint8:
        return reference.float_linear(input, weight, weight_scale, bias)
    output = product(decode, input, weight, weight_scale)
    _, outer = reference.split_scale(weight_scale, input.dtype)
    if bias is not None:
        return reference.scale_and_shift(output, outer, bias).to(input.dtype)
    # one kernel, which reads and writes `input`'s dtype and multiplies in float32, or float64
    return output if outer is None else output.mul_(outer.float().reshape(-1))


def linear_backward(
    decode: Decoder,
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.linear_backward`."""
    ternary = (
        decode(weight, grad.dtype)
        if weight.dtype == torch.uint8
        else reference.round_to_ternary(weight, reference.granularity_of(weight_scale, weight.shape[1])).to(grad.dtype)
    )
    return reference.linear_backward(grad, input, ternary, weight_scale, need_input_grad)


def takes_integers(out_features: int, in_features: int) -> bool:
    """Whether the vendor's 8-bit matmul takes a matrix of this size."""
    return out_features % INTEGER_MULTIPLE == 0 and in_features % INTEGER_MULTIPLE == 0


def integer_product(decode: Decoder, rows: Tensor, weight_packed: Tensor) -> Tensor:
    """Compute `reference.integer_product`."""
    if not takes_integers(4 * weight_packed.shape[0], weight_packed.shape[1]):
        return reference.integer_product(rows, weight_packed)
    count = len(rows)
    if count < FEWEST_ROWS:
        rows = F.pad(rows, (0, 0, 0, FEWEST_ROWS - count))
    return torch._int_mm(rows, decode(weight_packed, torch.int8).T)[:count]


def integer_linear(
    decode: Decoder, input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Compute `reference.integer_linear`."""
    multiply = partial(integer_product, decode)
    return reference.integer_linear_by_bytes(input, weight_packed, weight_scale, bias, bits, multiply)

"""The linear ops on a GPU: decode the weight, let the vendor's library multiply.

Each float weight was packed before (`torch_ops.pack`), so that forward and backward read two bits per weight; only one
with a number of outputs that no byte holds is ternarized in each of them.

The decoded matrix lives for one call; the caching allocator gives the next layer the same memory. `Decoder` is what
decodes: `unpack` below, in plain PyTorch, or the kernel of `triton_kernels`, with the same results.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference


Decoder = Callable[..., Tensor]  # (weight_packed, dtype, weight_scale=None, out=None) -> T or `scale * T`, (N, K)
_RETURNS_FLOAT32 = torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()  # sums of half precision
FIRST_WITH_BFLOAT16 = (8, 0)  # compute capability
FEWEST_ROWS = 17  # that `torch._int_mm` takes on CUDA; inputs and outputs in multiples of 8
INTEGER_MULTIPLE = 8
FP8_MULTIPLE = 16  # of inputs and outputs of `torch._scaled_mm`


def unpack(
    weight_packed: Tensor, dtype: torch.dtype, weight_scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Return T, or `scale * T`: (N/4, K) uint8 -> (N, K) `dtype`, in `out` where that is given."""
    if weight_scale is None:
        matrix = reference.unpack_ternary(weight_packed, dtype)
    else:
        matrix = reference.dequantize(reference.unpack_ternary(weight_packed, torch.int8), weight_scale).to(dtype)
    return matrix if out is None else out.copy_(matrix)


class Kernels(NamedTuple):
    """What decodes and packs a weight, and what surrounds a matmul of bytes."""

    unpack: Decoder
    pack: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # as `reference.pack_float`, and so on
    round_to_bytes: Callable[[Tensor, int], tuple[Tensor, Tensor]]
    scale_sums: Callable[..., Tensor]


IN_PYTORCH = Kernels(unpack, reference.pack_float, reference.round_to_bytes, reference.scale_sums)


def product(decode: Decoder, input: Tensor, weight_packed: Tensor, factor: Tensor | None) -> Tensor:
    """Compute `reference.product`."""
    return products(decode, input, [weight_packed], [factor])


def products(decode: Decoder, input: Tensor, weights_packed: list[Tensor], factors: list[Tensor | None]) -> Tensor:
    """Compute `reference.products` by one matmul of one matrix, which fills a GPU better than several."""
    in_pieces = takes_pieces(input.device, input.dtype, any(factor is not None for factor in factors))
    dtype = torch.bfloat16 if in_pieces else input.dtype
    if len(weights_packed) == 1:
        matrix = decode(weights_packed[0], dtype, factors[0])
    else:
        rows = [reference.CODES_PER_BYTE * len(weight) for weight in weights_packed]
        matrix = input.new_empty(sum(rows), input.shape[-1], dtype=dtype)
        for weight, factor, part in zip(weights_packed, factors, matrix.split(rows), strict=True):
            decode(weight, dtype, factor, part)
    return product_in_pieces(input, matrix.T) if in_pieces else F.linear(input, matrix)


@cache
def takes_pieces(device: torch.device, dtype: torch.dtype, scaled: bool) -> bool:
    """Whether matmuls of this dtype are `product_in_pieces`: of float32, without a scale inside the matrix."""
    if dtype != torch.float32 or scaled or device.type != "cuda" or not _RETURNS_FLOAT32:
        return False
    return torch.cuda.get_device_capability(device) >= FIRST_WITH_BFLOAT16


def product_in_pieces(input: Tensor, matrix: Tensor) -> Tensor:
    """`input @ matrix` in float32, on the tensor cores of bfloat16: several times as fast as those of float32.

    Three numbers of bfloat16 hold a float32, and bfloat16 holds T: the only rounding is that of the sums.

    Args:
        input (`torch.Tensor`): (..., K), float32.
        matrix (`torch.Tensor`): (K, N), bfloat16.

    Returns:
        `torch.Tensor`: (..., N), float32.
    """
    rest = input.reshape(-1, input.shape[-1])
    first = rest.to(matrix.dtype)
    rest = rest - first
    second = rest.to(matrix.dtype)
    output = product_in_float32((rest - second).to(matrix.dtype), matrix)  # the smallest first
    output += product_in_float32(second, matrix)
    output += product_in_float32(first, matrix)
    return output.reshape(*input.shape[:-1], matrix.shape[1])


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of two matrices, summed in float32 at least and returned in float32."""
    if a.is_cuda and a.dtype.itemsize == 2 and _RETURNS_FLOAT32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float() if a.is_cuda else a.float() @ b.float()


def times_ternary(decode: Decoder, grad: Tensor, weight_packed: Tensor, factor: Tensor | None = None) -> Tensor:
    """`grad @ (factor * T)`: (..., N) -> (..., K)."""
    if takes_pieces(grad.device, grad.dtype, factor is not None):
        return product_in_pieces(grad, decode(weight_packed, torch.bfloat16))
    return grad @ decode(weight_packed, grad.dtype, factor)


def product_backward(
    decode: Decoder,
    grad: Tensor,
    input: Tensor | None,
    weight_packed: Tensor,
    factor: Tensor | None,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.product_backward`."""
    input_grad = times_ternary(decode, grad, weight_packed, factor) if need_input_grad else grad.new_empty(0)
    if input is None:
        return input_grad, grad.new_empty(0, dtype=torch.float32)
    weight_grad = product_in_float32(grad.reshape(-1, grad.shape[-1]).T, input.reshape(-1, input.shape[-1]))
    return input_grad, reference.times(weight_grad, factor)


def linear(decode: Decoder, input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `reference.ternary_linear` (uint8 `weight`) or `reference.float_linear` (float `weight`)."""
    if weight.dtype != torch.uint8:
        return reference.float_linear(input, weight, weight_scale, bias)
    inner, outer = reference.split_scale(weight_scale, input.dtype)
    return reference.finish(product(decode, input, weight, inner), outer, bias)


def linear_backward(
    decode: Decoder,
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.linear_backward`."""
    if weight.dtype != torch.uint8:
        granularity = reference.granularity_of(weight_scale, weight.shape[1])
        ternary = reference.round_to_ternary(weight, granularity).to(grad.dtype)
        return reference.linear_backward(grad, input, ternary, weight_scale, need_input_grad)
    one_scale = weight_scale.dim() == 1 and grad.dtype != torch.float16  # where products overflow before the scale
    if input is None or not need_input_grad or not one_scale:
        return reference.linear_backward(grad, input, decode(weight, grad.dtype), weight_scale, need_input_grad)
    # Of one scale s the gradient is the sum of `input * (grad @ T)`: no pass over a matrix of the weight's size.
    unscaled = times_ternary(decode, grad, weight)
    wide = torch.promote_types(grad.dtype, torch.float32)
    scale_grad = (unscaled * input).sum(dtype=wide).float().reshape(1)
    scaled = torch.mul(grad, weight_scale, out=torch.empty_like(grad))
    rows, columns = scaled.reshape(-1, scaled.shape[-1]), input.reshape(-1, input.shape[-1])
    return unscaled.mul_(weight_scale), product_in_float32(rows.T, columns), scale_grad


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


def integer_linears(
    kernels: Kernels, input: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]], bits: int
) -> list[Tensor]:
    """Compute `reference.integer_linear` of each weight, (weight_packed, weight_scale, bias)."""
    if any(reference.is_grouped(scale) for _, scale, _ in weights):  # which no layer asks for
        return [reference.integer_linear(input, *weight, bits) for weight in weights]
    multiply = partial(integer_product, kernels.unpack)
    return reference.integer_linears_by_bytes(
        input, weights, bits, kernels.round_to_bytes, multiply, kernels.scale_sums
    )


def linears(
    kernels: Kernels,
    input: Tensor,
    weights_packed: list[Tensor],
    weight_scales: list[Tensor],
    biases: list[Tensor | None],
    bits: int | None,
) -> list[Tensor]:
    """Compute `reference.linears`. Exact ones are `products`, but in a graph that was made on another device."""
    weights = list(zip(weights_packed, weight_scales, biases, strict=True))
    if bits is None:
        return [linear(kernels.unpack, input, *weight) for weight in weights]
    return integer_linears(kernels, input, weights, bits)


def integer_linear(
    kernels: Kernels, input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Compute `reference.integer_linear`."""
    return integer_linears(kernels, input, [(weight_packed, weight_scale, bias)], bits)[0]


def takes_fp8(out_features: int, in_features: int, scale_granularity: str | int) -> bool:
    """Whether the vendor's matmul of fp8 takes a matrix of this size, and its scale."""
    fits = out_features % FP8_MULTIPLE == 0 and in_features % FP8_MULTIPLE == 0
    return fits and scale_granularity in ("tensor", "row")


def fp8_product(decode: Decoder, rows: Tensor, step: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute `reference.fp8_product`."""
    matrix = decode(weight_packed, torch.float8_e4m3fn).T
    if len(rows) == 0:
        return step.new_empty(0, matrix.shape[1], dtype=torch.bfloat16)
    scale = weight_scale.float().reshape(1, -1).expand(1, matrix.shape[1]).contiguous()
    return torch._scaled_mm(rows.contiguous(), matrix, step, scale, out_dtype=torch.bfloat16)

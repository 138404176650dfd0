"""The linear ops on a GPU: decode the weight, let the vendor's library multiply.

The decoded matrix lives for one call; the caching allocator gives the next layer the same memory. Decoding is one
Triton kernel where there is Triton, a C compiler for its launcher, and a GPU that it supports; elsewhere plain PyTorch
does it, with the same results.

`product` and `integer_product` are the part that `torch.compile` cannot look into: what surrounds them is written in
plain operations, so that it fuses the scale, the bias and the rounding of activations with the neighbours.
"""

import logging
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


logger = logging.getLogger(__name__)

OLDEST = (7, 5)  # compute capability that Triton supports, and the first with 8-bit tensor cores
FEWEST_ROWS = 17  # that `torch._int_mm` takes on CUDA; inputs and outputs in multiples of 8
INTEGER_MULTIPLE = 8


@cache
def kernels(device: torch.device) -> ModuleType | None:
    """`triton_kernels` where it runs on this device: it is tried, once."""
    if find_spec("triton") is None:
        logger.info("Triton is not installed; ternary weights are decoded by PyTorch (the same results, slower).")
        return None
    try:
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
            raise RuntimeError(f"{torch.cuda.get_device_name(device)} is too old for it")
        from . import triton_kernels

        packed = torch.arange(81, dtype=torch.uint8, device=device).reshape(9, 9)
        if not torch.equal(triton_kernels.unpack(packed, torch.float32), reference.unpack_ternary(packed)):
            raise RuntimeError("its kernel gave wrong results")
    except Exception as error:  # no C compiler, a broken installation, another driver: Triton raises what it likes
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        logger.info(f"Triton does not work on {device} ({reason}); PyTorch decodes ternary weights, slower.")
        return None
    return triton_kernels


def decode(weight_packed: Tensor, dtype: torch.dtype, weight_scale: Tensor | None = None) -> Tensor:
    """T, or `scale * T`: (N/4, K) uint8 -> (N, K) `dtype`."""
    triton_kernels = kernels(weight_packed.device)
    if triton_kernels is not None:
        return triton_kernels.unpack(weight_packed, dtype, weight_scale)
    if weight_scale is None:
        return reference.unpack_ternary(weight_packed, dtype)
    return reference.dequantize(reference.unpack_ternary(weight_packed, torch.int8), weight_scale).to(dtype)


def product(input: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """`input @ (f * T)^T` with the part f of the scale that belongs into the matrix: (..., K) -> (..., N)."""
    inner, _ = reference.split_scale(weight_scale, input.dtype)
    return F.linear(input, decode(weight_packed, input.dtype, inner))


def linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.ternary_linear` (uint8 `weight`) and `reference.float_linear` (float `weight`)."""
    if weight.dtype != torch.uint8:
        return reference.float_linear(input, weight, weight_scale, bias)
    output = product(input, weight, weight_scale)
    _, outer = reference.split_scale(weight_scale, input.dtype)
    if bias is not None:
        return reference.scale_and_shift(output, outer, bias).to(input.dtype)
    # one kernel, which reads and writes `input`'s dtype and multiplies in float32, or float64
    return output if outer is None else output.mul_(outer.float().reshape(-1))


def linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_backward`."""
    ternary = (
        decode(weight, grad.dtype)
        if weight.dtype == torch.uint8
        else reference.round_to_ternary(weight, reference.group_size(weight_scale, weight.shape[1])).to(grad.dtype)
    )
    return reference.linear_backward(grad, input, ternary, weight_scale, need_input_grad)


def takes_integers(weight_packed: Tensor) -> bool:
    """Whether the vendor's 8-bit matmul takes such a matrix."""
    out_features, in_features = 4 * weight_packed.shape[0], weight_packed.shape[1]
    return out_features % INTEGER_MULTIPLE == 0 and in_features % INTEGER_MULTIPLE == 0


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes of activations, (M, K) float32, as int8: (M, K), or for 16 bits (2M, K), the high bytes first."""
    if bits == 8:
        return codes.to(torch.int8)
    whole = codes.to(torch.int32)  # 256 * high + low
    low = ((whole + 128) & 255) - 128
    return torch.cat([(whole - low) >> 8, low]).to(torch.int8)


def integer_product(rows: Tensor, weight_packed: Tensor) -> Tensor:
    """`rows @ T^T` in integers: (R, K) int8 -> (R, N) int32."""
    count = len(rows)
    if count < FEWEST_ROWS:
        rows = F.pad(rows, (0, 0, 0, FEWEST_ROWS - count))
    return torch._int_mm(rows, decode(weight_packed, torch.int8).T)[:count]


def integer_linear(
    input: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int,
    multiply=integer_product,
) -> Tensor:
    """See `reference.integer_linear`, of whose bits these are; 16 bits are two passes of the 8-bit matmul in one."""
    if not takes_integers(weight_packed):
        return reference.integer_linear(input, weight_packed, weight_scale, bias, bits)
    codes, step = reference.round_activations(input.reshape(-1, input.shape[-1]), bits)  # (M, K), (M, 1)
    sums = multiply(to_bytes(codes, bits), weight_packed)
    if bits == 16:
        high, low = sums.chunk(2)
        sums = 256 * high + low
    output = reference.scale_and_shift(sums, weight_scale, None) * step
    output = output if bias is None else output + bias.float()
    # what a row with NaN or infinity has for codes does not matter: its step is NaN, or infinite
    return output.to(input.dtype).reshape(*input.shape[:-1], output.shape[-1])

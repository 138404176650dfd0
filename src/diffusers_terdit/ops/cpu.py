"""The linear ops on a CPU: the reference's arithmetic on one weight buffer per thread.

A fresh (N, K) tensor for every call costs more than decoding does: 100 MB of page faults for TerDiT-4.2B's widest
layer. So each thread keeps one buffer, as large as the largest layer it has seen, and decodes into it. It belongs to
the thread because two threads sharing one would read each other's weights.
"""

import threading

import torch
from torch import Tensor

from . import reference


_scratch = threading.local()


def _buffer(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """The first `numel` elements of this thread's buffer `name`; grown when too small or of another dtype."""
    buffer = getattr(_scratch, name, None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < numel:
        setattr(_scratch, name, None)  # free the old one before the new one is allocated
        with torch.inference_mode(False):  # a tensor born in inference mode could not be written to outside it
            buffer = torch.empty(numel, dtype=dtype)
        setattr(_scratch, name, buffer)
    return buffer[:numel]


def decode(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """T of a packed or a float weight, (N, K) in {-1, 0, +1}; valid until this thread's next call."""
    rows, columns = weight.shape
    if weight.dtype != torch.uint8:
        ternary = _buffer("rounded", weight.numel(), torch.float32).view(rows, columns)
        reference.round_to_ternary(weight, reference.group_size(weight_scale, columns), out=ternary)
        return ternary.to(dtype)
    ternary = _buffer("ternary", 4 * weight.numel(), dtype).view(4, rows, columns)
    codes = _buffer("codes", weight.numel(), torch.uint8).view(rows, columns)
    for quarter, shift in enumerate((6, 4, 2, 0)):
        torch.bitwise_right_shift(weight, shift, out=codes)
        ternary[quarter].copy_(codes.bitwise_and_(3).view(torch.int8).sub_(1))
    return ternary.view(4 * rows, columns)


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a matmul of `dtype` runs in here: float32 where the processor has no instructions for the half format.

    bfloat16 without AVX512-BF16 was measured 6-7 times slower than float32, and float16 overflows before the scale is
    applied.
    """
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.ternary_linear` (uint8 `weight`) and `reference.float_linear` (float `weight`)."""
    dtype = matmul_dtype(input.dtype)
    ternary = decode(weight, weight_scale, dtype)
    return reference.scaled_linear(input.to(dtype), ternary, weight_scale, bias).to(input.dtype)


def linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `linear_backward` in the package's `ops/__init__.py`."""
    dtype = matmul_dtype(grad.dtype)
    ternary = decode(weight, weight_scale, dtype)
    wide_input = None if input is None else input.to(dtype)
    grads = reference.linear_backward(grad.to(dtype), wide_input, ternary, weight_scale, need_input_grad)
    return grads[0].to(grad.dtype), grads[1], grads[2]

"""`ternary_linear` on a CPU: the reference's arithmetic on one decode buffer per thread.

A fresh (N, K) tensor for every call costs more than decoding does: 100 MB of page faults for TerDiT-4.2B's widest layer.
So each thread keeps one buffer, as large as the largest layer it has seen, and decodes into it. It belongs to the thread
because two threads sharing one would read each other's weights.
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


def decode(weight_packed: Tensor, dtype: torch.dtype) -> Tensor:
    """(N/4, K) uint8 -> (N, K) in {-1, 0, +1}, valid until this thread's next call."""
    rows, columns = weight_packed.shape
    ternary = _buffer("ternary", 4 * weight_packed.numel(), dtype).view(4, rows, columns)
    codes = _buffer("codes", weight_packed.numel(), torch.uint8).view(rows, columns)
    for quarter, shift in enumerate((6, 4, 2, 0)):
        torch.bitwise_right_shift(weight_packed, shift, out=codes)
        signed = codes.bitwise_and_(3).view(torch.int8).sub_(1)
        ternary[quarter].copy_(signed)
    return ternary.view(4 * rows, columns)


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a matmul of `dtype` runs in here: float32 where the processor has no instructions for the half format.

    bfloat16 without AVX512-BF16 or AMX was measured 6-7 times slower than float32, and float16 overflows before the
    scale is applied.
    """
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def ternary_linear(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.ternary_linear`."""
    dtype = matmul_dtype(input.dtype)
    return reference.scaled_linear(input.to(dtype), decode(weight_packed, dtype), weight_scale, bias).to(input.dtype)


def ternary_linear_input_grad(grad: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """See `reference.ternary_linear_input_grad`."""
    dtype = matmul_dtype(grad.dtype)
    ternary = decode(weight_packed, dtype)
    return reference.scaled_linear_input_grad(grad.to(dtype), ternary, weight_scale).to(grad.dtype)

"""The linear ops on a CPU: the reference's arithmetic on one weight buffer per thread.

A fresh (N, K) tensor for every call costs more than decoding does: 100 MB of page faults for TerDiT-4.2B's widest
layer. So each thread keeps one buffer, as large as the largest layer it has seen, and decodes into it. It belongs to
the thread because two threads sharing one would read each other's weights.
"""

import os
import threading
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from . import reference


_buffers = threading.local()
PROCESS = os.getpid()  # that imported this: in a fork of it the threads of torch's OpenMP are lost


def scratch(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """The first `numel` elements of this thread's buffer `name`; grown when too small or of another dtype."""
    buffer = getattr(_buffers, name, None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < numel:
        setattr(_buffers, name, None)  # free the old one before the new one is allocated
        with torch.inference_mode(False):  # a tensor born in inference mode could not be written to outside it
            buffer = torch.empty(numel, dtype=dtype)
        setattr(_buffers, name, buffer)
    return buffer[:numel]


def _decode_quarter(weight_packed: Tensor, quarter: int, out: Tensor) -> Tensor:
    """Rows `quarter * N/4` to `(quarter + 1) * N/4` of T, into `out`: (N/4, K)."""
    codes = scratch("codes", weight_packed.numel(), torch.uint8).view(weight_packed.shape)
    torch.bitwise_right_shift(weight_packed, 6 - 2 * quarter, out=codes)
    return out.copy_(codes.bitwise_and_(3).view(torch.int8).sub_(1))


def _round(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """T of a float weight: (N, K)."""
    ternary = scratch("rounded", weight.numel(), torch.float32).view(weight.shape)
    reference.round_to_ternary(weight, reference.group_size(weight_scale, weight.shape[1]), out=ternary)
    return ternary.to(dtype)


def decode(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """T of a packed or a float weight, (N, K) in {-1, 0, +1}; valid until this thread's next call."""
    if weight.dtype != torch.uint8:
        return _round(weight, weight_scale, dtype)
    ternary = scratch("matrix", 4 * weight.numel(), dtype).view(4, *weight.shape)
    for quarter in range(4):
        _decode_quarter(weight, quarter, ternary[quarter])
    return ternary.flatten(0, 1)


def decode_blocks(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The same in quarters, each valid until the next one, so that a packed weight needs a quarter of the memory.

    A float weight comes in the same quarters: the matmuls, and so the results, are the packed weight's bit for bit.
    """
    if weight.dtype != torch.uint8:
        ternary = _round(weight, weight_scale, dtype)
        rows = len(weight) // 4 if len(weight) % 4 == 0 else len(weight)
        for start in range(0, len(weight), rows):
            yield slice(start, start + rows), ternary[start : start + rows]
        return
    rows = len(weight)
    ternary = scratch("quarter", weight.numel(), dtype).view(weight.shape)
    for quarter in range(4):
        yield slice(quarter * rows, (quarter + 1) * rows), _decode_quarter(weight, quarter, ternary)


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a matmul of `dtype` runs in here: float32 where the processor has no instructions for the half format.

    bfloat16 without AVX512-BF16 was measured 6-7 times slower than float32, and float16 overflows before the scale is
    applied.
    """
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@cache
def integer_kernels() -> ModuleType | None:
    """`cpu_integer`, where numba is installed and the processor has one of the kernels' instruction sets."""
    if find_spec("numba") is None:
        return None
    from . import cpu_integer  # half a second, and an optional dependency

    return cpu_integer if cpu_integer.instruction_sets() else None


def linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.ternary_linear` (uint8 `weight`) and `reference.float_linear` (float `weight`)."""
    flat = input.reshape(-1, input.shape[-1]).to(matmul_dtype(input.dtype))  # (M, K)
    out_features = weight.shape[0] * (reference.CODES_PER_BYTE if weight.dtype == torch.uint8 else 1)
    output = flat.new_empty(len(flat), out_features)
    grouped = reference.is_grouped(weight_scale)
    for rows, ternary in decode_blocks(weight, weight_scale, flat.dtype):
        if grouped:  # in place; rounding the scale rounds `scale * T`
            scale = weight_scale[rows].float().to(flat.dtype).unsqueeze(-1)  # (rows, K/g, 1)
            ternary.unflatten(1, (scale.shape[1], -1)).mul_(scale)
        torch.mm(flat, ternary.T, out=output[:, rows])
    if output.dtype == torch.bfloat16:  # a few rows at a time: their float32 form stays in the cache
        for part in output.split(max(1, 2**18 // out_features)):
            part.copy_(reference.scale_and_shift(part, weight_scale, bias))
    else:
        output = reference.scale_and_shift(output, weight_scale, bias).to(input.dtype)
    return output.reshape(*input.shape[:-1], out_features)


def integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """See `reference.integer_linear`, which runs where there is no kernel."""
    kernels = integer_kernels()
    function = reference.integer_linear if kernels is None else kernels.linear
    return function(input, weight_packed, weight_scale, bias, bits)


def linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_backward`."""
    dtype = matmul_dtype(grad.dtype)
    ternary = decode(weight, weight_scale, dtype)
    wide_input = None if input is None else input.to(dtype)
    grads = reference.linear_backward(grad.to(dtype), wide_input, ternary, weight_scale, need_input_grad)
    return grads[0].to(grad.dtype), grads[1], grads[2]

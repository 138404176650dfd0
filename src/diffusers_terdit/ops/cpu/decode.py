"""Exact linear ops on a CPU, in torch alone: decode the weight into scratch, a quarter at a time, and multiply."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from . import scratch


WHOLE = 2**18  # values of a matrix that is decoded at once: 1 MB in float32
# Of a quarter's codes in their bytes.
SHIFTS = torch.tensor([6, 4, 2, 0], dtype=torch.uint8, device="cpu").view(4, 1, 1)


def _decode(weight_packed: Tensor, quarters: slice, out: Tensor) -> Tensor:
    """Quarters of the rows of T, into `out`: (quarters, N/4, K)."""
    codes = scratch.take("codes", out.numel(), torch.uint8).view(out.shape)
    torch.bitwise_right_shift(weight_packed, SHIFTS[quarters], out=codes)
    return out.copy_(codes.bitwise_and_(3).view(torch.int8).sub_(1))


def decode_matrix(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """T of a packed or a float weight, (N, K) in {-1, 0, +1}; valid until this thread's next call."""
    if weight.dtype == torch.uint8:
        ternary = scratch.take("matrix", 4 * weight.numel(), dtype).view(4, *weight.shape)
        return _decode(weight, slice(None), ternary).flatten(0, 1)
    ternary = scratch.take("matrix", weight.numel(), dtype).view(weight.shape)
    granularity = reference.granularity_of(weight_scale, weight.shape[1])
    if dtype == torch.float32:
        return reference.round_to_ternary(weight, granularity, out=ternary)
    rounded = scratch.take("rounded", weight.numel(), torch.float32).view(weight.shape)
    return ternary.copy_(reference.round_to_ternary(weight, granularity, out=rounded))


def decode_blocks(weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """T in quarters, each valid until the next one, so that a weight needs a quarter of the memory; a small T whole.

    A float weight comes in the same quarters and the same scratch: the matmuls, whose last bits may depend on where a
    matrix begins in memory, and so the results, are the packed weight's bit for bit.
    """
    if weight.numel() * (4 if weight.dtype == torch.uint8 else 1) <= WHOLE:
        yield slice(None), decode_matrix(weight, weight_scale, dtype)
        return
    if weight.dtype == torch.uint8:
        rows = len(weight)
        ternary = scratch.take("quarter", weight.numel(), dtype).view(1, *weight.shape)
        for quarter in range(4):
            decoded = _decode(weight, slice(quarter, quarter + 1), ternary)[0]
            yield slice(quarter * rows, (quarter + 1) * rows), decoded
        return
    rows = len(weight) // 4 if len(weight) % 4 == 0 else len(weight)
    granularity = reference.granularity_of(weight_scale, weight.shape[1])
    mean = reference.absmean(weight, granularity)
    ternary = scratch.take("quarter", rows * weight.shape[1], dtype).view(rows, -1)
    rounded = ternary
    if dtype != torch.float32:
        rounded = scratch.take("rounded", ternary.numel(), torch.float32).view(ternary.shape)
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        reference.round_to_ternary(weight[part], granularity, rounded, mean if mean.dim() == 1 else mean[part])
        yield part, ternary if rounded is ternary else ternary.copy_(rounded)


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a matmul of `dtype` runs in: float32 where the processor lacks the half format's.

    bfloat16 without AVX512-BF16 was measured 6-7 times slower than float32, and float16 overflows before the scale is
    applied.
    """
    if dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `reference.ternary_linear` (uint8 `weight`) or `reference.float_linear` (float `weight`)."""
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


def linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.linear_backward`."""
    dtype = matmul_dtype(grad.dtype)
    ternary = decode_matrix(weight, weight_scale, dtype)
    wide_input = None if input is None else input.to(dtype)
    grads = reference.linear_backward(grad.to(dtype), wide_input, ternary, weight_scale, need_input_grad)
    return grads[0].to(grad.dtype), grads[1], grads[2]

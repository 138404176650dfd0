"""The GPU kernels, in Triton: two bits per weight to a matrix of any dtype, and a float weight to two.

The matmuls themselves are the vendor's (`decode.py`). Imported only where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference


BLOCK = 1024  # bytes of a row that one program decodes: 8 per thread
STEPS = 16  # blocks that one program sums
WORDS = 256  # of four bytes, of a row that one program decodes
MOST_COLUMNS = 16384  # of a row that one program rounds
VALUES_PER_WARP = 512
MOST_WARPS = 16  # of 64 threads on ROCm: 1,024
MINUS_ONE = {torch.bfloat16: 0xBF80, torch.float16: 0xBC00, torch.float8_e4m3fn: 0xB8, torch.int8: 0xFF}  # its bits


# ---- decoding ----


@triton.jit
def _unpack(
    packed, scale, out, rows, columns, scale_stride, group,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of the packed matrix, one of N/4
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    byte = tl.load(packed + row * columns + column, mask=inside, other=0)
    for quarter in tl.static_range(4):
        out_row = quarter * rows + row
        value = ((byte >> (6 - 2 * quarter)) & 3).to(tl.float32) - 1
        if SCALED:
            scale_row = scale + out_row * scale_stride
            if GROUPED:
                value *= tl.load(scale_row + column // group, mask=inside, other=0)
            else:
                value *= tl.load(scale_row)
        tl.store(out + out_row * columns + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _unpack_words(packed, out, rows, words, WIDE: tl.constexpr, MINUS_ONE: tl.constexpr, WORDS: tl.constexpr):
    # A code T + 1 is 00, 01 or 10. Its lower bit says that T is 0, its upper one that it is +1: where the lower one is
    # not set the value is that of -1, and the upper one flips its sign. Two weights, or four, in a word at a time.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    word = tl.load(packed + row * words + column, mask=column < words, other=0)
    if WIDE:  # two words of 16-bit fields: each byte goes to the upper half of its own
        low = ((word & 0x000000FF) << 8) | ((word & 0x0000FF00) << 16)
        high = ((word & 0x00FF0000) >> 8) | (word & 0xFF000000)
        fields = tl.reshape(tl.join(low, high), (2 * WORDS,))
        width = 2 * words
        place = tl.program_id(1) * (2 * WORDS) + tl.arange(0, 2 * WORDS)
    else:
        fields = word
        width = words
        place = column
    ONES: tl.constexpr = 0x00010001 if WIDE else 0x01010101  # the lowest bit of each field
    SIGN: tl.constexpr = 0x80008000 if WIDE else 0x80808080  # and the highest
    LOWER: tl.constexpr = 14 if WIDE else 6  # where the first quarter's lower bit is in a field
    for quarter in tl.static_range(4):
        if MINUS_ONE == 0xFF:  # int8: code - 1 in each byte, without a borrow from its neighbor
            value = ((((fields >> (6 - 2 * quarter)) & 0x03030303) | SIGN) - ONES) ^ SIGN
        else:
            nonzero = ((fields >> (LOWER - 2 * quarter)) & ONES) ^ ONES
            value = (nonzero * MINUS_ONE) ^ ((fields << (2 * quarter)) & SIGN)
        tl.store(out + (quarter * rows + row) * width + place, value, mask=place < width)


def unpack(
    weight_packed: Tensor, dtype: torch.dtype, weight_scale: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """T, or `scale * T` computed in float32.

    Args:
        weight_packed (`torch.Tensor`): (N/4, K), uint8.
        dtype (`torch.dtype`): Of the result: a float dtype, or int8 or float8_e4m3fn without a scale.
        weight_scale (`torch.Tensor`, *optional*): (1,), (N, 1) or (N, K/g), float.
        out (`torch.Tensor`, *optional*): (N, K), `dtype`, contiguous: where to write it; `None` for a new matrix.

    Returns:
        `torch.Tensor`: (N, K), `dtype`: `out`, where given. Equal to `reference.unpack_ternary` and
        `reference.dequantize`.
    """
    packed = weight_packed.contiguous()
    rows, columns = packed.shape
    if out is None:
        out = torch.empty(4 * rows, columns, dtype=dtype, device=packed.device)
    if weight_scale is None and dtype in MINUS_ONE and columns % 4 == 0 and packed.storage_offset() % 4 == 0:
        words = columns // 4
        with torch.cuda.device_of(packed):  # Triton launches on the current device
            _unpack_words[(rows, triton.cdiv(words, WORDS))](
                packed.view(torch.uint32), out.view(torch.uint32), rows, words,
                WIDE=dtype.itemsize == 2, MINUS_ONE=MINUS_ONE[dtype], WORDS=WORDS,
            )  # fmt: skip
        return out
    scale = packed.new_empty(0, dtype=torch.float32) if weight_scale is None else weight_scale.float().contiguous()
    groups = scale.shape[1] if scale.dim() == 2 else 1
    stride = groups if scale.dim() == 2 else 0
    grid = (rows, triton.cdiv(columns, BLOCK))
    with torch.cuda.device_of(packed):
        _unpack[grid](
            packed, scale, out, rows, columns, stride, columns // groups,
            SCALED=weight_scale is not None, GROUPED=groups > 1, BLOCK=BLOCK,
        )  # fmt: skip
    return out


# ---- around a matmul of bytes ----


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _round_to_bytes(
    input, codes, step, rows, columns,
    TOP: tl.constexpr, WIDE: tl.constexpr, ROUNDING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    value = tl.load(input + row * columns + column, mask=inside, other=0).to(tl.float32)
    # The bits of absolute values, as integers, are in the order of the values, and NaN comes last.
    largest = tl.reduce(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0, _larger).to(tl.float32, bitcast=True)
    largest = tl.where(largest < 1e-12, 1e-12, largest)
    size = tl.div_rn(largest, TOP)  # a plain division would not be rounded to nearest
    tl.store(step + row, size)
    code = tl.div_rn(value, tl.broadcast_to(size, (BLOCK,)))
    # see `reference.ROUNDING`: the last bits of the sum are the integer
    code = (code + ROUNDING).to(tl.int32, bitcast=True) - 0x4B400000
    if WIDE:
        low = ((code + 128) & 255) - 128
        tl.store(codes + (rows + row) * columns + column, low.to(tl.int8), mask=inside)
        code = (code - low) >> 8
    tl.store(codes + row * columns + column, code.to(tl.int8), mask=inside)


def round_to_bytes(input: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Compute `reference.round_to_bytes`: each row is read once."""
    rows, columns = input.shape
    if columns > MOST_COLUMNS:
        return reference.round_to_bytes(input, bits)
    codes = torch.empty(rows * bits // 8, columns, dtype=torch.int8, device=input.device)
    step = torch.empty(rows, 1, dtype=torch.float32, device=input.device)
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(input):
        _round_to_bytes[(rows,)](
            input.contiguous(), codes, step, rows, columns,
            TOP=float(reference.LARGEST_CODE[bits]), WIDE=bits == 16, ROUNDING=reference.ROUNDING, BLOCK=block,
            num_warps=min(max(1, block // VALUES_PER_WARP), MOST_WARPS),
        )  # fmt: skip
    return codes, step


@triton.jit
def _scale_sums(
    sums, step, scale, bias, out, rows, columns,
    WIDE: tl.constexpr, BY_ROW: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.load(sums + row * columns + column, mask=inside, other=0)
    if WIDE:
        total = 256 * total + tl.load(sums + (rows + row) * columns + column, mask=inside, other=0)
    value = total.to(tl.float32)
    value *= tl.load(scale + column, mask=inside, other=0) if BY_ROW else tl.load(scale)
    value *= tl.load(step + row)
    if BIASED:
        value += tl.load(bias + column, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * columns + column, value.to(out.dtype.element_ty), mask=inside)


def scale_sums(sums: Tensor, step: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute `reference.scale_sums` in one pass."""
    rows, columns = len(step), sums.shape[1]
    out = torch.empty(rows, columns, dtype=dtype, device=sums.device)
    scale = weight_scale.float().contiguous()
    with torch.cuda.device_of(sums):
        _scale_sums[(rows, triton.cdiv(columns, BLOCK))](
            sums.contiguous(), step, scale, scale if bias is None else bias.contiguous(), out, rows, columns,
            WIDE=len(sums) != rows, BY_ROW=scale.dim() == 2, BIASED=bias is not None, BLOCK=BLOCK,
            enable_fp_fusion=False,  # the bias is added to the rounded product
        )  # fmt: skip
    return out


# ---- packing ----


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _absolute_sums(weight, sums, length, parts, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Sum the absolute values of a part of a row, in float64; rows of `length`, `parts` programs for each."""
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start = row.to(tl.int64) * length
    total = tl.full((BLOCK,), 0, tl.float64)
    for step in tl.static_range(STEPS):
        place = (part.to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(weight + start + place, mask=place < length, other=0)
        total += tl.abs(value.to(tl.float32)).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.reduce(total, 0, _add))


@triton.jit
def _pack(
    weight, mean, packed, rows, columns, mean_stride, group,
    EPS: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of the packed matrix, one of N/4
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    byte = tl.full((BLOCK,), 0, tl.int32)
    for quarter in tl.static_range(4):
        weight_row = quarter * rows + row
        value = tl.load(weight + weight_row * columns + column, mask=inside, other=0).to(tl.float32)
        mean_row = mean + weight_row * mean_stride
        limit = (tl.load(mean_row + column // group, mask=inside, other=1) if GROUPED else tl.load(mean_row)) + EPS
        # `round(value / limit)`, half to even and clamped, without a division: the quotient of two float32 is above
        # one half exactly where the value is above half of the limit
        code = 1 + (value > 0.5 * limit).to(tl.int32) - (value < -0.5 * limit).to(tl.int32)
        byte |= code << (6 - 2 * quarter)
    tl.store(packed + row * columns + column, byte.to(tl.uint8), mask=inside)


def absmean(weight: Tensor, scale_granularity: str | int) -> Tensor:
    """Compute `reference.absmean`."""
    shape = reference.scale_shape(weight.shape[0], weight.shape[1], scale_granularity)
    count = shape[0] * shape[1] if len(shape) == 2 else 1
    length = weight.numel() // count
    block = min(BLOCK, triton.next_power_of_2(length))
    steps = min(STEPS, triton.cdiv(length, block))
    parts = triton.cdiv(length, block * steps)
    sums = torch.empty(count, parts, dtype=torch.float64, device=weight.device)
    with torch.cuda.device_of(weight):
        _absolute_sums[(count * parts,)](weight.contiguous(), sums, length, parts, BLOCK=block, STEPS=steps)
    return (sums.sum(1) * (count / weight.numel())).float().reshape(shape)


def pack(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.pack_float`: two passes over the weight."""
    weight = weight.contiguous()
    mean = absmean(weight, reference.granularity_of(weight_scale, weight.shape[1]))
    rows, columns = len(weight) // reference.CODES_PER_BYTE, weight.shape[1]
    packed = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    groups = mean.shape[1] if mean.dim() == 2 else 1
    with torch.cuda.device_of(weight):
        _pack[(rows, triton.cdiv(columns, BLOCK))](
            weight, mean, packed, rows, columns, groups if mean.dim() == 2 else 0, columns // groups,
            EPS=reference.EPS, GROUPED=groups > 1, BLOCK=BLOCK,
        )  # fmt: skip
    return packed, mean

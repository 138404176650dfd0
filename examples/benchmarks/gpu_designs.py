"""Triton kernels that `gpu_shootout.py` compares with those of the package: other ways to decode, and fused products.

All inputs are contiguous. In Triton's interpreter bfloat16 products are wrong (it multiplies raw bits); float16 works.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


# Decode four columns per 32-bit word


@triton.jit
def _decode_words(
    packed, out, rows, words,
    BLOCK: tl.constexpr, WIDE: tl.constexpr, FIRST: tl.constexpr, QUARTERS: tl.constexpr,
):  # fmt: skip
    # With its lower bit inverted, a code (T + 1) reads {01, 00, 11} for T = {-1, 0, +1}: at the top of a 16-bit float
    # or a float8_e4m3fn that is {+2, 0, -2}, at the top of an int8 {64, 0, -64}.
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(packed + row * words + column, mask=column < words, other=0)
    if WIDE:
        low = ((word & 0xFF) << 8) | ((word & 0xFF00) << 16)
        high = ((word & 0xFF0000) >> 8) | (word & -16777216)  # 0xFF000000
        pair = tl.interleave(low, high)
        place = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        for quarter in tl.static_range(QUARTERS):
            value = ((pair << (2 * (FIRST + quarter))) ^ 0x40004000) & -1073692672  # 0xC000C000
            tl.store(out + (quarter * rows + row) * 2 * words + place, value, mask=place < 2 * words)
    else:
        for quarter in tl.static_range(QUARTERS):
            value = ((word << (2 * (FIRST + quarter))) ^ 0x40404040) & -1061109568  # 0xC0C0C0C0
            tl.store(out + (quarter * rows + row) * words + column, value, mask=column < words)


def decode_words(weight_packed: Tensor, out: Tensor, quarter: int | None = None) -> Tensor:
    """Decode (N/4, K) uint8 into `out`, and return it: -2 T in 16-bit floats and float8_e4m3fn, -64 T in int8.

    `out` is (N, K), or (N/4, K) for one `quarter` of the rows; K a multiple of 4.
    """
    source, target = weight_packed.view(torch.int32), out.view(torch.int32)
    rows, words = source.shape
    first, quarters = (0, 4) if quarter is None else (quarter, 1)
    _decode_words[(rows, triton.cdiv(words, 256))](
        source, target, rows, words, BLOCK=256, WIDE=out.element_size() == 2, FIRST=first, QUARTERS=quarters
    )
    return out


# Fused: two bits to the tensor cores, the decoded weight only in registers; weights packed along K


@triton.jit
def _field(byte, SHIFT: tl.constexpr, WIDE: tl.constexpr, TYPE: tl.constexpr):
    if WIDE:
        return ((byte.to(tl.uint16) << (8 + SHIFT)) & 0xC000).to(TYPE, bitcast=True)  # {0, +2, -2}
    return ((byte << SHIFT) & 0xC0).to(tl.int8, bitcast=True)  # {0, +64, -64}


@triton.jit
def _fields(byte, WIDE: tl.constexpr, ASM: tl.constexpr, TYPE: tl.constexpr):
    if ASM and WIDE:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 t, l, h; prmt.b32 l, $8, 0, 0x1404; prmt.b32 h, $8, 0, 0x3424;"
            " and.b32 $0, l, 0xC000C000; and.b32 $1, h, 0xC000C000;"
            " shl.b32 t, l, 2; and.b32 $2, t, 0xC000C000; shl.b32 t, h, 2; and.b32 $3, t, 0xC000C000;"
            " shl.b32 t, l, 4; and.b32 $4, t, 0xC000C000; shl.b32 t, h, 4; and.b32 $5, t, 0xC000C000;"
            " shl.b32 t, l, 6; and.b32 $6, t, 0xC000C000; shl.b32 t, h, 6; and.b32 $7, t, 0xC000C000; }",
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [byte],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
        a, b = a.to(TYPE, bitcast=True), b.to(TYPE, bitcast=True)
        c, d = c.to(TYPE, bitcast=True), d.to(TYPE, bitcast=True)
    elif ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .b32 t; and.b32 $0, $4, 0xC0C0C0C0; shl.b32 t, $4, 2; and.b32 $1, t, 0xC0C0C0C0;"
            " shl.b32 t, $4, 4; and.b32 $2, t, 0xC0C0C0C0; shl.b32 t, $4, 6; and.b32 $3, t, 0xC0C0C0C0; }",
            "=r,=r,=r,=r,r",
            [byte],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        a, b = _field(byte, 0, WIDE, TYPE), _field(byte, 2, WIDE, TYPE)
        c, d = _field(byte, 4, WIDE, TYPE), _field(byte, 6, WIDE, TYPE)
    return a, b, c, d


@triton.jit
def _tile(program, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a program's tile; GROUP tiles of one column follow each other and share its weights."""
    tall, wide = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = (program // (GROUP * wide)) * GROUP
    size = tl.minimum(tall - first, GROUP)
    return first + (program % (GROUP * wide)) % size, (program % (GROUP * wide)) // size


@triton.jit
def _fused_product(
    x, packed, out, scale, step, M, N, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(tl.program_id(0), M, N, BM, BN, GROUP)
    n, m = tile_n * BN + tl.arange(0, BN), tile_m * BM + tl.arange(0, BM)
    bytes = packed + (n % N)[:, None] * (K // 4) + tl.arange(0, BJ)[None, :]
    inputs = x + (m % M)[:, None] * K + tl.arange(0, 4 * BJ)[None, :]
    sums = tl.zeros((BN, BM), dtype=tl.float32 if WIDE else tl.int32)
    for _ in range(0, K, 4 * BJ):
        a, b, c, d = _fields(tl.load(bytes), WIDE, ASM, x.dtype.element_ty)
        joined = tl.join(tl.join(a, b), tl.join(c, d))  # (BN, BJ, 2, 2): field i + 2j
        weight = tl.reshape(tl.permute(joined, (0, 3, 2, 1)), (BN, 4 * BJ))
        sums = tl.dot(weight, tl.load(inputs).T, sums, out_dtype=tl.float32 if WIDE else tl.int32)
        bytes += BJ
        inputs += 4 * BJ
    if WIDE:
        value = sums * (tl.load(scale) * 0.5)
    else:
        factor = tl.load(step + m, mask=m < M, other=0) * (tl.load(scale) * 0.015625)  # 1/64
        value = sums.to(tl.float32) * factor[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m[:, None] * N + n[None, :], value.T.to(out.dtype.element_ty), mask=inside)


def pack_along_inputs(codes: Tensor, block: int) -> Tensor:
    """T (N, K) -> (N, K/4) uint8 in two's complement: byte (n, block*b + j) holds columns 4*block*b + block*i + j."""
    bits = torch.where(codes > 0, 1, torch.where(codes < 0, 3, 0)).to(torch.uint8)
    part = bits.view(len(bits), -1, 4, block)
    return (part[:, :, 0] << 6 | part[:, :, 1] << 4 | part[:, :, 2] << 2 | part[:, :, 3]).flatten(1).contiguous()


def fused_product(
    x: Tensor, packed: Tensor, out: Tensor, scale: Tensor, step: Tensor, config: tuple[int, int, int, int, int]
) -> Tensor:
    """Multiply into `out` (M, N), and return it; nothing is decoded to memory.

    Args:
        x (`torch.Tensor`): (M, K), a 16-bit float, or int8 with `step`.
        packed (`torch.Tensor`): (N, K/4) uint8, of `pack_along_inputs` with the block of `config`.
        scale (`torch.Tensor`): (1,) float32.
        step (`torch.Tensor`): (M,) float32, of the rows of an int8 `x`.
        config (`tuple`): Tile's rows, tile's columns, block, warps, stages.
    """
    bm, bn, bj, warps, stages = config
    m, k, n = *x.shape, len(packed)
    _fused_product[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
        x, packed, out, scale, step, m, n, K=k, BM=bm, BN=bn, BJ=bj, GROUP=8, WIDE=x.element_size() == 2,
        ASM=x.is_cuda, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


# int8 matmul on a weight decoded to -64 T, with the scale in the epilogue


@triton.jit
def _scaled_product(
    x, weight, out, scale, step, M, N, K: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile(tl.program_id(0), M, N, BM, BN, GROUP)
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for k in range(0, K, BK):
        sums = tl.dot(x.load([tile_m * BM, k]), weight.load([tile_n * BN, k]).T, sums, out_dtype=tl.int32)
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    factor = tl.load(step + m, mask=m < M, other=0) * (tl.load(scale) * -0.015625)  # -1/64
    value = (sums.to(tl.float32) * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + m[:, None] * N + n[None, :], value, mask=(m < M)[:, None] & (n < N)[None, :])


def scaled_product(
    x: Tensor, weight: Tensor, out: Tensor, scale: Tensor, step: Tensor, config: tuple[int, int, int, int, int]
) -> Tensor:
    """Multiply int8 `x` (M, K) and `weight` (N, K), -64 T, into `out` (M, N), and return it; see `fused_product`."""
    bm, bn, bk, warps, stages = config
    m, k, n = *x.shape, len(weight)
    inputs, weights = TensorDescriptor.from_tensor(x, [bm, bk]), TensorDescriptor.from_tensor(weight, [bn, bk])
    _scaled_product[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
        inputs, weights, out, scale, step, m, n, K=k, BM=bm, BN=bn, BK=bk, GROUP=8, num_warps=warps, num_stages=stages
    )
    return out

"""The designs of a ternary layer that `gpu-layers` compares: the package's, other ways to decode, fused products.

All inputs are contiguous. In Triton's interpreter bfloat16 products are wrong (it multiplies raw bits); float16 works.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import shared
from diffusers_terdit.ops import dequantize, reference, unpack_ternary
from diffusers_terdit.ops.gpu import choose, decode


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


# A block's layers

# Tile's rows, tile's columns, block of `pack_along_inputs` or of the sum, warps, stages
FUSED_16 = [
    (256, 128, 16, 8, 4),
    (128, 128, 16, 8, 4),
    (128, 128, 32, 8, 3),
    (128, 128, 16, 4, 4),
    (128, 64, 32, 4, 4),
]
FUSED_8 = [(256, 128, 32, 8, 3), (256, 128, 32, 8, 4), (128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (256, 64, 32, 4, 3)]
SCALED_8 = [(128, 256, 128, 8, 3), (128, 128, 128, 4, 4), (128, 128, 128, 8, 4), (256, 128, 128, 8, 3)]


class Weight:
    """Random codes of one matrix (N, K), in every form that a design needs."""

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: str):
        self.scale = torch.tensor([shared.power_of_two_scale(in_features)], device=device)
        self.packed = shared.random_codes(out_features, in_features, device)
        codes = unpack_ternary(self.packed)
        self.dense = dequantize(codes, self.scale).to(dtype)  # exact: the scale is a power of two
        self.along_inputs = {block: pack_along_inputs(codes, block) for block in (16, 32)}
        self.scales = self.scale.expand(1, out_features).contiguous()
        self.shape = (out_features, in_features)


class Input:
    """Random rows (M, K), and their roundings."""

    def __init__(self, rows: int, in_features: int, dtype: torch.dtype, device: str):
        self.plain = torch.randn(rows, in_features, device=device).to(dtype)
        codes, step = reference.round_activations(self.plain, 8)
        self.bytes, self.step = codes.to(torch.int8), step.flatten()
        codes, step = reference.round_activations(self.plain, 16)
        whole = codes.to(torch.int32)  # 256 * high + low
        low = ((whole + 128) & 255) - 128
        self.pairs, self.pair_step = torch.cat([(whole - low) >> 8, low]).to(torch.int8), step.flatten()
        self.fp8_step = self.plain.float().abs().amax(1, keepdim=True) / 448
        self.fp8 = (self.plain.float() / self.fp8_step).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Design:
    """`layer(weight)` runs a linear layer; `finish` is what a compiler would fuse behind it, in float64."""

    name: str
    layer: Callable[[Weight], Tensor]
    merged: bool = False  # q, k and v in one matrix, gate and up in another
    finish: Callable[[Tensor, Weight], Tensor] | None = lambda output, weight: output.double()  # None: not a product


def blocks_of(width: int, hidden: int, count: int, dtype: torch.dtype, device: str) -> dict[bool, list[list[Weight]]]:
    """Return the weights of blocks, {merged: [block]}."""
    separate = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    merged = [(3 * width, width), (width, width), (2 * hidden, width), (width, hidden)]
    return {
        key: [[Weight(*shape, dtype, device) for shape in shapes] for _ in range(count)]
        for key, shapes in ((False, separate), (True, merged))
    }


class Workspace:
    """Inputs, outputs and decoded weights at fixed addresses, as a model would keep them."""

    def __init__(self, width: int, hidden: int, rows: int, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.inputs = {size: Input(rows, size, dtype, device) for size in (width, hidden)}
        largest = max(2 * hidden, 3 * width) * width
        self.scratch = [torch.empty(2 * largest, dtype=torch.int8, device=device) for _ in range(2)]
        self.outputs = {
            size: torch.empty(rows, size, dtype=dtype, device=device)
            for size in (width, hidden, 3 * width, 2 * hidden)
        }

    def input(self, weight: Weight) -> Input:
        return self.inputs[weight.shape[1]]

    def output(self, weight: Weight) -> Tensor:
        return self.outputs[weight.shape[0]]

    def decoded(self, weight: Weight, dtype: torch.dtype, slot: int = 0) -> Tensor:
        count = weight.shape[0] * weight.shape[1] * dtype.itemsize
        return decode_words(weight.packed, self.scratch[slot][:count].view(dtype).view(weight.shape))


def designs(space: Workspace, hidden: int, all_configs: bool) -> Iterator[Design]:
    dtype = space.dtype

    def quarters(weight: Weight) -> Tensor:
        rows, columns = weight.packed.shape
        output = space.output(weight)
        for i in range(4):
            part = space.scratch[0][: 2 * rows * columns].view(dtype).view(rows, columns)
            decode_words(weight.packed, part, i)
            torch.mm(space.input(weight).plain, part.T, out=output[:, i * rows : (i + 1) * rows])
        return output

    def package_int8(weight: Weight) -> Tensor:
        x = space.input(weight)
        rows = x.pairs if weight.shape[1] == hidden else x.bytes
        return torch.ops.diffusers_terdit.integer_product(rows, weight.packed)

    def after_package_int8(output: Tensor, weight: Weight) -> Tensor:
        x = space.input(weight)
        if weight.shape[1] == hidden:  # `down_proj` stays at 16 bits
            high, low = output.double().chunk(2)
            return (256 * high + low) * x.pair_step[:, None] * weight.scale
        return output.double() * x.step[:, None] * weight.scale

    def after_package(output: Tensor, weight: Weight) -> Tensor:
        return output.double() * reference.split_scale(weight.scale, dtype)[1]

    def after_words(output: Tensor, weight: Weight) -> Tensor:
        return output.double() * (-0.5 * weight.scale)

    def after_int_mm(output: Tensor, weight: Weight) -> Tensor:
        return output.double() * space.input(weight).step[:, None] * (weight.scale / -64)

    def scaled_mm(weight: Weight) -> Tensor:
        x, decoded = space.input(weight), space.decoded(weight, torch.float8_e4m3fn)
        scales = {"scale_a": x.fp8_step, "scale_b": -0.5 * weight.scales}
        return torch._scaled_mm(x.fp8, decoded.T, **scales, out_dtype=torch.bfloat16)

    def fused_16(weight: Weight, config: tuple) -> Tensor:
        x, packed = space.input(weight), weight.along_inputs[config[2]]
        return fused_product(x.plain, packed, space.output(weight), weight.scale, x.step, config)

    def fused_8(weight: Weight, config: tuple) -> Tensor:
        x, packed = space.input(weight), weight.along_inputs[config[2]]
        return fused_product(x.bytes, packed, space.output(weight), weight.scale, x.step, config)

    def scaled_8(weight: Weight, config: tuple) -> Tensor:
        x, decoded = space.input(weight), space.decoded(weight, torch.int8)
        return scaled_product(x.bytes, decoded, space.output(weight), weight.scale, x.step, config)

    def dense(weight: Weight) -> Tensor:
        return F.linear(space.input(weight).plain, weight.dense)

    def package(weight: Weight) -> Tensor:
        inner, _ = reference.split_scale(weight.scale, dtype)
        return torch.ops.diffusers_terdit.product(space.input(weight).plain, weight.packed, inner, None)

    def decoded_by_package(weight: Weight) -> Tensor:
        packed = weight.packed
        return (choose.kernels(packed.device).unpack if packed.is_cuda else decode.unpack)(packed, dtype)

    def words(weight: Weight) -> Tensor:
        return F.linear(space.input(weight).plain, space.decoded(weight, dtype))

    def int_mm(weight: Weight) -> Tensor:
        return torch._int_mm(space.input(weight).bytes, space.decoded(weight, torch.int8).T)

    yield Design("dense", dense)
    yield Design("dense, merged", dense, merged=True)
    yield Design("exact, package", package, finish=after_package)
    yield Design("exact, words", words, finish=after_words)
    yield Design("exact, words, merged", words, merged=True, finish=after_words)
    yield Design("exact, words in quarters", quarters, finish=after_words)
    yield Design("decode alone, package", decoded_by_package, finish=None)
    yield Design("decode alone, words", lambda weight: space.decoded(weight, dtype), finish=None)
    yield Design("int8, package", package_int8, finish=after_package_int8)
    yield Design("int8, words + _int_mm", int_mm, merged=True, finish=after_int_mm)
    yield Design("fp8, words + _scaled_mm", scaled_mm, merged=True)
    for name, layer, configs in (
        ("exact, fused", fused_16, FUSED_16),
        ("int8, fused", fused_8, FUSED_8),
        ("int8, words + scaled product", scaled_8, SCALED_8),
    ):
        for config in configs if all_configs else configs[:1]:
            yield Design(f"{name} {'-'.join(map(str, config))}", partial(layer, config=config), merged=True)


def overlapped(space: Workspace, weights: list[Weight]) -> None:
    """Decode each next layer on a second stream while this one multiplies, into two buffers in turns."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    free: list[torch.cuda.Event | None] = [None, None]
    decoded: list[tuple[Weight, Tensor, torch.cuda.Event]] = []

    def multiply(i: int) -> None:
        weight, matrix, ready = decoded[i]
        main.wait_event(ready)
        F.linear(space.input(weight).plain, matrix)
        free[i % 2] = torch.cuda.Event()
        free[i % 2].record(main)

    for i, weight in enumerate(weights):
        if free[i % 2] is not None:
            side.wait_event(free[i % 2])
        with torch.cuda.stream(side):
            matrix, ready = space.decoded(weight, space.dtype, slot=i % 2), torch.cuda.Event()
            ready.record(side)
        decoded.append((weight, matrix, ready))
        if i:
            multiply(i - 1)
    multiply(len(weights) - 1)
    main.wait_stream(side)

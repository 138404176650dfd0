"""Exact products of bfloat16 inputs with AMX: tdpbf16ps multiplies 16 rows x 32 inputs by 32 inputs x 16 outputs.

-1, 0 and +1 are numbers of bfloat16, and the sums are float32's.

A panel is 64 outputs: 16 rows of the packed weight, all four quarters. For the gradient to the input it is 64 columns,
and the four quarters of the outputs are four groups of inputs. The codes of a block of 256 inputs are spread to
bfloat16 in a scratch in the first cache, and a strip of rows of the input passes by; then follows the next panel, and
when all panels of a share have seen the block, the next block.

The order of the sums does not depend on the number of rows or threads, nor do the bits of the result. They are not
those of `lookup`.
"""

from functools import cache
from typing import Any, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic
from torch import Tensor

from . import scratch
from .instructions import AMX, at, c_function, everywhere, from_cache, pointer, take, transpose
from .integer_amx import ROW, TILE, configure, instruction, register, release
from .lookup import ONE, ZERO, Layer, finish, of_groups, of_outputs, place
from .threads import new_job, run, threads_for


FEATURES = AMX | {"+amx-bf16"}
ROWS = LANES = 16  # of the input and of a vector of outputs, in a tile
PANEL = 4 * LANES
CHUNK = 32  # inputs of a tile
BLOCK = 8  # chunks, whose codes stay in the first cache
STRIP, SHARE = 16, 8  # tiles of rows and panels of a unit, at most: the sums stay in the second cache
SUMS, INPUT, CODES = (0, 1, 2, 3), 4, (5, 6, 7, 5)  # tile registers
BFLOAT16 = (0xBF80, 0, 0x3F80, 0x4000)  # -1, 0, +1 and, of a code that no packed weight may hold, 2


class Job(NamedTuple):
    """What a function works on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int  # counts the threads that came
    units: int
    rows: int  # M
    groups: int  # of inputs: those with a scale of their own, the quarters of the transposed weight, or 1
    size: int  # inputs of a group
    chunks: int  # of a group
    quarter: int  # N / 4
    width: int  # K
    outputs: int  # N, or K of the transposed weight
    tiles: int  # M / 16, rounded up
    strip: int  # tiles of a unit
    share: int  # panels of a unit
    input: int  # (M, groups, size) bfloat16
    tiled: int  # (tiles, groups * chunks, 16, 32) bfloat16: zero beyond a group and M
    packed: int  # (N / 4, K) uint8
    group_scale: int  # (groups, outputs) float32
    scale: int  # (outputs,) or (1,) float32
    to_scale: int  # bytes from one output's to the next's: 4 or 0
    bias: int  # as `scale`
    to_bias: int
    output: int  # (M, outputs) float32 or bfloat16
    scratch: int  # (threads, own) float32
    own: int


JOB = Job(*range(len(Job._fields)))


def _spread(builder: ir.IRBuilder, index: ir.Value) -> ir.Value:
    """`vpermd`: two codes, in the lowest four bits of each lane, to two numbers of bfloat16."""
    ints = ir.VectorType(ir.IntType(32), LANES)
    table = ir.Constant(ints, [BFLOAT16[pair % 4] | BFLOAT16[pair // 4] << 16 for pair in range(LANES)])
    function = builder.module.declare_intrinsic(
        "llvm.x86.avx512.permvar.si.512", (), ir.FunctionType(ints, [ints, ints])
    )
    return builder.call(function, [table, index])


def _pair(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Two codes in the lowest bits of each lane, one above the other."""
    return builder.or_(first, builder.shl(second, ir.Constant(first.type, [2] * LANES)))


@intrinsic
def _cut(typing_context, words, codes):
    """`codes` (4, 16 pairs of inputs, 16, 2) bfloat16 of `words` (8, 16) of a panel's packed rows; addresses."""

    def codegen(context, builder, signature, args):
        words, codes = args
        i64, ints = ir.IntType(64), ir.VectorType(ir.IntType(32), LANES)

        def code(word: ir.Value, bits: int) -> ir.Value:
            shifted = builder.lshr(word, ir.Constant(ints, [bits] * LANES))
            return builder.and_(shifted, ir.Constant(ints, [3] * LANES))

        with for_range(builder, i64(CHUNK // 4)) as loop:
            source = builder.add(words, builder.mul(loop.index, i64(4 * LANES)))
            target = builder.add(codes, builder.mul(loop.index, i64(2 * ROW)))
            word = builder.load(at(builder, source, 0, ints), align=4)
            for quarter in range(4):
                for half in range(2):
                    low = 16 * half + 6 - 2 * quarter
                    pair = _spread(builder, _pair(builder, code(word, low), code(word, low + 8)))
                    builder.store(pair, at(builder, target, TILE * quarter + ROW * half, ints), align=4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp), codegen


@intrinsic
def _cut_transposed(typing_context, source, stride, rows, bits, codes):
    """`codes` (4, 16 pairs of packed rows, 16, 2) bfloat16 of 64 bytes of each of 32 packed rows, of one quarter.

    Of `rows` fewer than 32, the last one stands for those that are missing. `source` and `codes` are addresses.
    """

    def codegen(context, builder, signature, args):
        source, stride, rows, bits, codes = args
        i32, i64 = ir.IntType(32), ir.IntType(64)
        ints, bytes_ = ir.VectorType(i32, LANES), ir.VectorType(ir.IntType(8), LANES)
        shift, last = everywhere(builder, builder.trunc(bits, i32), ints), builder.sub(rows, i64(1))

        def code(row: ir.Value, part: int) -> ir.Value:
            inside = builder.select(builder.icmp_signed("<", row, last), row, last)
            place = at(builder, builder.add(source, builder.mul(inside, stride)), LANES * part, bytes_)
            word = builder.zext(builder.load(place, align=1), ints)
            return builder.and_(builder.lshr(word, shift), ir.Constant(ints, [3] * LANES))

        with for_range(builder, i64(CHUNK // 2)) as loop:
            row = builder.mul(loop.index, i64(2))
            target = builder.add(codes, builder.mul(loop.index, i64(ROW)))
            for part in range(4):
                pair = _pair(builder, code(row, part), code(builder.add(row, i64(1)), part))
                builder.store(_spread(builder, pair), at(builder, target, TILE * part, ints), align=4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.intp, types.intp, types.intp, types.uintp), codegen


@intrinsic
def _tile(typing_context, x, codes, chunks, sums, first):
    """`sums` (16 rows, 4, 16) float32 = `x` (chunks, 16, 32) . `codes` (chunks, 4, 16, 16, 2), or += if not `first`.

    All but `chunks` and `first` are addresses.
    """

    def codegen(context, builder, signature, args):
        x, codes, chunks, sums, first = args
        i8, i64 = ir.IntType(8), ir.IntType(64)

        def move(name: str, number: int, address: ir.Value, offset: int, stride: int) -> None:
            instruction(builder, name, register(number), at(builder, address, offset, i8), i64(stride))

        with builder.if_else(builder.icmp_signed("!=", first, first.type(0))) as (then, otherwise):
            with then:
                for number in SUMS:
                    instruction(builder, "tilezero", register(number))
            with otherwise:
                for number in SUMS:
                    move("tileloadd64", number, sums, ROW * number, 4 * ROW)
        with for_range(builder, chunks) as loop:
            weights = builder.add(codes, builder.mul(loop.index, i64(4 * TILE)))
            move("tileloadd64", INPUT, builder.add(x, builder.mul(loop.index, i64(TILE))), 0, ROW)
            for number in SUMS:
                move("tileloadd64", CODES[number], weights, TILE * number, ROW)
                instruction(builder, "tdpbf16ps", *map(register, (number, INPUT, CODES[number])))
        for number in SUMS:
            move("tilestored64", number, sums, ROW * number, 4 * ROW)
        return context.get_dummy_value()

    address, size = types.uintp, types.intp
    return types.void(address, address, size, address, size), codegen


@intrinsic
def _add_scaled(typing_context, totals, sums, scales, first):
    """`totals` (16 rows, 4, 16) float32 = `sums`, as many, times `scales` (4, 16), or += if not `first`; addresses."""

    def codegen(context, builder, signature, args):
        totals, sums, scales, first = args
        i64, floats = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)

        def load(address: ir.Value, offset: int) -> ir.Value:
            return builder.load(at(builder, address, offset, floats), align=4)

        def rows(is_first: bool) -> None:
            scale = [load(scales, ROW * vector) for vector in range(4)]
            with for_range(builder, i64(ROWS)) as loop:
                offset = builder.mul(loop.index, i64(4 * ROW))
                source, target = builder.add(sums, offset), builder.add(totals, offset)
                for vector in range(4):
                    value = builder.fmul(load(source, ROW * vector), scale[vector])
                    if not is_first:
                        value = builder.fadd(load(target, ROW * vector), value)
                    builder.store(value, at(builder, target, ROW * vector, floats), align=4)

        with builder.if_else(builder.icmp_signed("!=", first, first.type(0))) as (then, otherwise):
            with then:
                rows(True)
            with otherwise:
                rows(False)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.intp), codegen


def _compile_tile(cached: bool) -> Any:
    field, fields = JOB, len(JOB)

    @c_function(cached, "tile of bfloat16")
    def tile(address):
        """A unit is a tile of rows."""
        job = numba.carray(pointer(address, "int64"), fields)
        groups, size, chunks = job[field.groups], job[field.size], job[field.chunks]
        input = numba.carray(pointer(job[field.input], "uint16"), (job[field.rows], groups, size))
        tiled = numba.carray(pointer(job[field.tiled], "uint16"), (job[field.tiles], groups, chunks, ROWS, CHUNK))
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            rows = min(ROWS, job[field.rows] - ROWS * unit)
            for group in range(groups):
                for chunk in range(chunks):
                    start = chunk * CHUNK
                    count = min(CHUNK, size - start)
                    own = tiled[unit, group, chunk]
                    if rows < ROWS or count < CHUNK:
                        own[:] = 0
                    for row in range(rows):
                        source, target = input[ROWS * unit + row, group, start : start + count], own[row]
                        for k in range(count):
                            target[k] = source[k]

    return tile


def _compile_multiply(transposed: int, grouped: int, half: int, cached: bool) -> Any:
    field, fields = JOB, len(JOB)
    bytes_of_output = 2 if half else 4

    @c_function(cached, "multiply of bfloat16", transposed, grouped, half)
    def multiply(address):
        """A unit is a strip of rows and a share of panels."""
        job = numba.carray(pointer(address, "int64"), fields)
        groups, size, chunks, quarter = job[field.groups], job[field.size], job[field.chunks], job[field.quarter]
        width, outputs, all_chunks = job[field.width], job[field.outputs], job[field.groups] * job[field.chunks]
        packed = numba.carray(pointer(job[field.packed], "uint8"), (quarter, width))
        group_scale = numba.carray(pointer(job[field.group_scale], "float32"), (groups, outputs))
        words = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        bytes_ = numba.carray(pointer(words, "uint8"), (16, LANES, 4))
        columns = numba.carray(pointer(words, "uint8"), (CHUNK, PANEL))
        scales = numba.carray(pointer(words + CHUNK * PANEL, "float32"), (4, LANES))
        codes = words + CHUNK * PANEL + 4 * PANEL
        sums_of_group = codes + BLOCK * 4 * TILE
        sums = sums_of_group + 4 * TILE
        of_panel = 4 * TILE * job[field.strip]  # bytes of its sums
        later = of_panel * job[field.share]  # from the sums of outputs to those of a group
        across = -(-job[field.tiles] // job[field.strip])
        apart, step, end = (LANES, PANEL, width) if transposed else (quarter, LANES, quarter)
        configure()
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                break
            left, top = unit // across * job[field.share], unit % across * job[field.strip]
            tiles, panels = (
                min(job[field.strip], job[field.tiles] - top),
                min(job[field.share], -(-end // step) - left),
            )
            for group in range(groups):
                for block in range(0, chunks, BLOCK):
                    count = min(BLOCK, chunks - block)
                    for panel in range(panels):
                        first = (left + panel) * step
                        inside = min(step, end - first)
                        for chunk in range(block, block + count):
                            start = chunk * CHUNK
                            many = min(CHUNK, size - start)
                            target = codes + 4 * TILE * (chunk - block)
                            if transposed:
                                source, stride = packed.ctypes.data + start * width + first, width
                                if inside < PANEL:
                                    for row in range(many):
                                        for i in range(inside):
                                            columns[row, i] = packed[start + row, first + i]
                                    source, stride = words, PANEL
                                _cut_transposed(source, stride, many, 6 - 2 * group, target)
                                continue
                            begin = group * size + start
                            pair = (chunk - block) % 2  # the words of two chunks are transposed at once
                            if size % CHUNK == 0 and inside == LANES and (pair or chunk + 1 < block + count):
                                if not pair:
                                    source = packed.ctypes.data + first * width + begin
                                    transpose(16, source, width, words, 4 * LANES)
                                _cut(words + pair * CHUNK * LANES, target)
                                continue
                            for row in range(inside):
                                for k in range(many):
                                    bytes_[k // 4, row, k % 4] = packed[first + row, begin + k]
                            _cut(words, target)
                        last = grouped and block + count == chunks
                        if last:
                            for part in range(4):
                                for i in range(inside):
                                    scales[part, i] = group_scale[group, part * quarter + first + i]
                        for tile in range(tiles):
                            chunk = (top + tile) * all_chunks + group * chunks + block
                            own = sums + of_panel * panel + 4 * TILE * tile
                            if grouped:
                                total, own = own, own + later if chunks > BLOCK else sums_of_group
                            is_first = block == 0 and (grouped or group == 0)
                            _tile(job[field.tiled] + TILE * chunk, codes, count, own, is_first)
                            if last:
                                _add_scaled(total, own, scales.ctypes.data, group == 0)
            for panel in range(panels):
                first = (left + panel) * step
                inside = min(step, end - first)
                for tile in range(tiles):
                    for row in range(min(ROWS, job[field.rows] - ROWS * (top + tile))):
                        line = ROWS * (top + tile) + row
                        for part in range(4):
                            column = first + part * apart
                            many = min(LANES, inside - LANES * part) if transposed else inside
                            if many <= 0:
                                break
                            source = sums + of_panel * panel + 4 * TILE * tile + 4 * ROW * row + ROW * part
                            target = job[field.output] + bytes_of_output * (line * outputs + column)
                            to_scale, to_shift = job[field.to_scale], job[field.to_bias]
                            scale, shift = job[field.scale] + to_scale * column, job[field.bias] + to_shift * column
                            finish(16, half, source, scale, to_scale, shift, to_shift, target, many)
        release()

    return multiply


@cache
def _compiled(name: str, *variant: int) -> Any:
    return from_cache(_compile_tile if name == "tile" else _compile_multiply, *variant)


def products(input: Tensor, layers: list[Layer], transposed: bool, dtype: torch.dtype) -> list[Tensor]:
    """Compute `lookup.products` of a bfloat16 input."""
    return [_product(input, layer, transposed, dtype) for layer in layers]


def _product(input: Tensor, layer: Layer, transposed: bool, dtype: torch.dtype) -> Tensor:
    packed, group_scale = layer[0].contiguous(), layer[1]
    quarter, width = packed.shape
    outputs = width if transposed else 4 * quarter
    groups = 4 if transposed else 1 if group_scale is None else group_scale.shape[1]
    size = quarter if transposed else width // groups
    rows, tiles = len(input), -(-len(input) // ROWS)
    flat, half, grouped = input.contiguous(), int(dtype == torch.bfloat16), int(group_scale is not None)
    chunks, strip = -(-size // CHUNK), min(STRIP, max(tiles, 1))
    threads = threads_for(rows * packed.numel())
    panels, strips = -(-width // PANEL) if transposed else -(-quarter // LANES), -(-tiles // strip)
    pieces = max(-(-panels // SHARE), -(-2 * threads // max(strips, 1)) if threads > 1 else 1)
    share = -(-panels // pieces)

    group_scales = of_groups(layer[1], outputs)
    group_scales = flat if group_scales is None else group_scales.T.contiguous()
    scale, bias = of_outputs(layer[2], outputs), of_outputs(layer[3], outputs)
    output = torch.empty(rows, outputs, dtype=torch.bfloat16 if half else torch.float32)
    tiled = scratch.take("tiled in halves", tiles * groups * chunks * ROWS * CHUNK, torch.int16)
    own = (CHUNK * PANEL + 4 * PANEL + (BLOCK + 1) * 4 * TILE + 4 * TILE * strip * share * (1 + grouped)) // 4
    buffers = scratch.take("panels of floats", threads * own, torch.float32)
    sizes = (rows, groups, size, chunks, quarter, width, outputs, tiles, strip, share)
    arrays = (flat, tiled, packed, group_scales)
    after = (*place(scale, ONE), *place(bias, ZERO))
    job = new_job(*sizes, *[a.data_ptr() for a in arrays], *after, output.data_ptr(), buffers.data_ptr(), own)
    run(_compiled("tile"), job, tiles, threads)
    run(_compiled("multiply", int(transposed), grouped, half), job, strips * -(-panels // share), threads)
    return output

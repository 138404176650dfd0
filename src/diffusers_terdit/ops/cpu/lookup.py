"""Exact products by lookup: one vector is added for four weights, and no weight is decoded.

Four codes are one of 81 cases. A tile of the input is a few rows side by side, a row in each lane of a vector. For
every four inputs, the 81 sums that they can give are written to a table of vectors; then each output adds, for every
four inputs, the one vector that its four codes index. That is one load and one addition for four multiply-adds of each
row. 32 inputs are a chunk, whose eight tables fit the first cache; the eight indices of an output are eight bytes in a
row, laid out in a scratch in every call: the packed weight is read as it is stored.

For a few rows that would cost more than it saves. There a vector holds outputs, and what their codes find is looked up
in a register: the nine sums of two inputs with AVX-512, else the three products of one.

All is float32, whatever the input's dtype. The order of the sums, and so every bit of the result, is the same for any
number of rows and threads and on any processor:

    table   (+-x0 +-x1) + (+-x2 +-x3), without the inputs whose code is 0
    chunk   ((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + t7))
    sum     of the chunks one after the other, each times its scale where groups of inputs have one
    output  sum * scale + bias

The gradient to the input is such a product, too: there a packed byte is four inputs of a table as it is.

Idea: Vec-LUT (https://arxiv.org/abs/2512.06443), which looks up integers.
"""

import ctypes
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic
from torch import Tensor
from torch.nn.functional import pad

from . import scratch
from .instructions import at, c_function, everywhere, from_cache, pointer, processor, take, to_bfloat16, transpose
from .threads import new_job, run, threads_for


INPUTS = 4  # of a table
CASES = 3**INPUTS
TABLES = 8  # of a chunk
CHUNK = INPUTS * TABLES
SPARE = 48  # vectors after the tables: a code 3, which no packed weight may hold, leads no further
MOST_OUTPUTS = 8192  # of a unit: their sums stay in the second cache
ROWS_LAID = 16  # of the packed weight: whole cache lines of indices
FEW = {8: 3, 16: 8}  # rows that are looked up in registers, by lanes (measured on Zen 3 and an Intel Xeon)
AHEAD = 512  # bytes: how far ahead in its row the packed weight is prefetched


class Job(NamedTuple):
    """What a function works on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int  # counts the threads that came
    units: int
    layers: int
    layer: int  # the one to work on, for a function that works on one
    rows: int  # M
    groups: int  # of inputs with a scale of their own, or 1
    size: int  # inputs of a group, or of each part of the input whose parts go side by side
    width: int  # K
    chunks: int
    outputs: int  # of all layers: N each, or K for the gradient to the input
    tiles: int  # M / lanes, rounded up
    share: int  # outputs of a unit, a multiple of 4
    own: int  # numbers of a thread's scratch
    placed: int  # (layers, 9) int64, a `Place` each
    input: int  # (M, groups * size * parts) float32
    tiled: int  # (tiles, chunks, 32, lanes) float32: the rows of a tile side by side; zero beyond a group and M.
    # For a few rows what `spread` makes of them, (M, chunks, 32, 4) or (M, chunks, 16, 16)
    indices: int  # (chunks, outputs, 8) uint8
    group_scale: int  # (groups, outputs) float32
    scratch: int  # (threads, own) float32


class Place(NamedTuple):
    """Where a layer's numbers are, int64 each; all but the first two are addresses, or bytes from one to the next."""

    begin: int  # its first output among those of all layers
    outputs: int  # N
    packed: int  # (N / 4, K) uint8
    output: int  # (M, N) float32 or bfloat16
    scale: int  # float32
    to_scale: int  # bytes from an output's scale to the next one's; 0 where they share it
    bias: int  # float32
    to_bias: int
    group_scale: int  # (N, groups) float32, or 0


JOB = Job(*range(len(Job._fields)))
PLACE = Place(*range(len(Place._fields)))


# ---- the vectors ----


def _index_of(builder: ir.IRBuilder, codes: ir.Value, type_: ir.VectorType) -> ir.Value:
    """27 c0 + 9 c1 + 3 c2 + c3 of words of four bytes, each in its lowest byte."""
    powers = sum(3 ** (3 - place) << 8 * (3 - place) for place in range(4))  # it is the highest byte of the product
    product = builder.mul(codes, ir.Constant(type_, [powers] * type_.count))
    return builder.lshr(product, ir.Constant(type_, [24] * type_.count))


@intrinsic(prefer_literal=True)
def _lay_words(typing_context, words, source, target, between_chunks, between_quarters):
    """`words` words of a packed row, each four inputs of four outputs, to the indices at four outputs; addresses."""
    count = words.literal_value

    def codegen(context, builder, signature, args):
        _, source, target, between_chunks, between_quarters = args
        i32, i8 = ir.IntType(32), ir.IntType(8)
        ints = ir.VectorType(i32, count)
        word = builder.load(at(builder, source, 0, ints), align=1)
        for quarter in range(4):
            codes = builder.lshr(word, ir.Constant(ints, [6 - 2 * quarter] * count))
            codes = builder.and_(codes, ir.Constant(ints, [0x03030303] * count))
            indices = builder.trunc(_index_of(builder, codes, ints), ir.VectorType(i8, count))
            place = target
            for first in range(0, count, TABLES):
                which = ir.Constant(ir.VectorType(i32, TABLES), list(range(first, first + TABLES)))
                chunk = builder.shuffle_vector(indices, indices, which)
                builder.store(chunk, at(builder, place, 0, chunk.type), align=1)
                place = builder.add(place, between_chunks)
            target = builder.add(target, between_quarters)
        return context.get_dummy_value()

    return types.void(words, types.uintp, types.uintp, types.intp, types.intp), codegen


@intrinsic
def _lay_bytes(typing_context, source, stride, target):
    """16 bytes of each of eight packed rows to the eight indices at each of 16 outputs; addresses."""

    def codegen(context, builder, signature, args):
        source, stride, target = args
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        bytes_ = ir.VectorType(i8, 16)

        def constant(value):
            return ir.Constant(bytes_, [value] * 16)

        rows = []
        for number in range(TABLES):
            byte = builder.load(at(builder, builder.add(source, builder.mul(stride, i64(number))), 0, bytes_), align=1)
            index = byte  # 64 c0 + 16 c1 + 4 c2 + c3
            for bits, less in ((6, 37), (4, 7), (2, 1)):
                code = builder.and_(builder.lshr(byte, constant(bits)), constant(3))
                index = builder.sub(index, builder.mul(code, constant(less)))
            rows.append(index)
        while len(rows) > 1:  # interleave those half the rows apart
            half, count = len(rows) // 2, rows[0].type.count
            order = [place for pair in zip(range(count), range(count, 2 * count), strict=True) for place in pair]
            mask = ir.Constant(ir.VectorType(i32, 2 * count), order)
            rows = [builder.shuffle_vector(rows[n], rows[n + half], mask) for n in range(half)]
        builder.store(rows[0], at(builder, target, 0, rows[0].type), align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.intp, types.uintp), codegen


@intrinsic(prefer_literal=True)
def _make_tables(typing_context, lanes, x, tables):
    """`tables` (8, 81, lanes) float32: the sums that each four of `x` (32, lanes) can give; addresses."""
    count = lanes.literal_value

    def codegen(context, builder, signature, args):
        _, x, tables = args
        i64, floats = ir.IntType(64), ir.VectorType(ir.FloatType(), count)
        with for_range(builder, i64(TABLES)) as loop:
            source = builder.add(x, builder.mul(loop.index, i64(4 * count * INPUTS)))
            target = builder.add(tables, builder.mul(loop.index, i64(4 * count * CASES)))
            pairs = []
            for first in range(0, INPUTS, 2):
                sums = [ir.Constant(floats, [0.0] * count)]
                for number in (first, first + 1):
                    value = builder.load(at(builder, source, 4 * count * number, floats), align=4)
                    sums = [s for sum_ in sums for s in (builder.fsub(sum_, value), sum_, builder.fadd(sum_, value))]
                pairs.append(sums)
            for case, pair in enumerate(itertools.product(*pairs)):
                builder.store(builder.fadd(*pair), at(builder, target, 4 * count * case, floats), align=4)
        return context.get_dummy_value()

    return types.void(lanes, types.uintp, types.uintp), codegen


def _add_in_pairs(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    while len(values) > 1:
        values = [builder.fadd(*values[pair : pair + 2]) for pair in range(0, len(values), 2)]
    return values[0]


def _add_to_pairs(builder: ir.IRBuilder, sums: list[ir.Value], value: ir.Value, number: int) -> None:
    """Add to the sums of `_add_in_pairs` its value of that number, as soon as it is there."""
    while number % 2:
        value, number = builder.fadd(sums.pop(), value), number // 2
    sums.append(value)


def _offsets(builder: ir.IRBuilder, word: ir.Value, entry: int) -> list[ir.Value]:
    """Each of eight bytes times `entry`, as int64.

    How many instructions that takes decides the speed of a product. An address may hold an index times 8; so the bytes
    become two words of four indices times `entry` / 8. A mask takes out the lowest of four, a shift the highest, and
    BMI's bit field extract, which Intel runs as two, those between. Written as shifts, LLVM would make three of it.
    """
    i64 = ir.IntType(64)
    if "+bmi" not in processor().features:
        return [builder.mul(builder.and_(builder.lshr(word, i64(8 * n)), i64(255)), i64(entry)) for n in range(TABLES)]
    extract = builder.module.declare_intrinsic("llvm.x86.bmi.bextr.64", (), ir.FunctionType(i64, [i64, i64]))
    bits = (entry // 8).bit_length() - 1
    fields = i64(0x00FF_00FF_00FF_00FF << bits)
    even = builder.and_(builder.shl(word, i64(bits)), fields)
    odd = builder.and_(builder.lshr(word, i64(8 - bits)), fields)
    indices = []
    for n in range(TABLES):
        word, place = (even, odd)[n % 2], n // 2
        if place in (1, 2):
            index = builder.call(extract, [word, i64(16 << 8 | 16 * place)])
        else:
            index = builder.lshr(word, i64(48)) if place else builder.and_(word, i64(0xFFFF))
        indices.append(builder.shl(index, i64(3)))
    return indices


@intrinsic(prefer_literal=True)
def _add_chunk(typing_context, lanes, grouped, unrolled, tables, indices, scales, outputs, sums):
    """`sums` (outputs, lanes) float32 += what `indices` (outputs, 8) find in the tables, times `scales` if `grouped`.

    All but `outputs`, a multiple of `unrolled`, are addresses.
    """
    count, has_scales, unroll = (literal.literal_value for literal in (lanes, grouped, unrolled))

    def codegen(context, builder, signature, args):
        tables, indices, scales, outputs, sums = args[3:]
        i64, floats = ir.IntType(64), ir.VectorType(ir.FloatType(), count)
        entry = 4 * count
        with for_range(builder, builder.udiv(outputs, i64(unroll))) as loop:
            first = builder.mul(loop.index, i64(unroll))
            own_indices = builder.add(indices, builder.mul(first, i64(TABLES)))
            own_scales = builder.add(scales, builder.mul(first, i64(4)))
            own_sums = builder.add(sums, builder.mul(first, i64(entry)))
            for number in range(unroll):
                found = []
                word = builder.load(at(builder, own_indices, TABLES * number, i64), align=1)
                for table, offset in enumerate(_offsets(builder, word, entry)):
                    place = builder.add(tables, offset)
                    found.append(builder.load(at(builder, place, entry * CASES * table, floats), align=4))
                total = _add_in_pairs(builder, found)
                if has_scales:
                    scale = builder.load(at(builder, own_scales, 4 * number, ir.FloatType()))
                    total = builder.fmul(total, everywhere(builder, scale, floats))
                cell = at(builder, own_sums, entry * number, floats)
                builder.store(builder.fadd(builder.load(cell, align=4), total), cell, align=4)
        return context.get_dummy_value()

    address = types.uintp
    return types.void(lanes, grouped, unrolled, address, address, address, types.intp, address), codegen


@intrinsic
def _prefetch(typing_context, address):
    """Prefetch the cache line of an address, which may lie outside any array."""

    def codegen(context, builder, signature, args):
        i8, i32 = ir.IntType(8), ir.IntType(32)
        place, numbers = at(builder, args[0], 0, i8), [i32(0), i32(3), i32(1)]  # to read, into all caches, data
        type_ = ir.FunctionType(ir.VoidType(), [place.type, i32, i32, i32])
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", (place.type,), type_), [place, *numbers])
        return context.get_dummy_value()

    return types.void(types.uintp), codegen


def _looked_up(builder: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """Look up each lane's index: 16 lanes hold one table, for four bits; each half of 8 lanes holds one, for two."""
    name = {8: "llvm.x86.avx.vpermilvar.ps.256", 16: "llvm.x86.avx512.permvar.sf.512"}[table.type.count]
    function = ir.FunctionType(table.type, [table.type, index.type])
    return builder.call(builder.module.declare_intrinsic(name, (), function), [table, index])


@intrinsic(prefer_literal=True)
def _add_few(typing_context, lanes, rows, grouped, words, x, between_rows, scales, sums):
    """`sums` (4, rows, lanes) float32 += a chunk of a panel: `words` (8, lanes) of its packed rows.

    `x` is what `spread` makes of the inputs, (32, 4) float32, or (16, 16) with 16 lanes; the next row is
    `between_rows` bytes on. `scales` (4, lanes) float32 multiply the chunk if `grouped`. Addresses.
    """
    count, many, has_scales = (literal.literal_value for literal in (lanes, rows, grouped))

    def codegen(context, builder, signature, args):
        words, x, between_rows, scales, sums = args[3:]
        i64, ints = ir.IntType(64), ir.VectorType(ir.IntType(32), count)
        floats = ir.VectorType(ir.FloatType(), count)
        rows_of_x = [builder.add(x, builder.mul(between_rows, i64(row))) for row in range(many)]
        together = max(1, 4 // many)  # quarters that share what is loaded of `x`, as the registers allow

        def shifted(word, bits):
            return builder.lshr(word, ir.Constant(ints, [bits] * count)) if bits else word

        def codes_of_two(word):
            """Four bits, the lowest, by the first input's place and the quarter."""
            low, high = (ir.Constant(ints, [mask] * count) for mask in (0x33333333, 0xCCCCCCCC))
            pairs = [
                builder.or_(builder.and_(shifted(word, bits), low), builder.and_(shifted(word, bits + 6), high))
                for bits in (0, 2)
            ]
            return {
                (place, 3 - which): shifted(pairs[which % 2], 8 * place + 4 * (which // 2))
                for place in (0, 2)
                for which in range(4)
            }

        def found_of_two(word, table, place, row, quarters):
            """The sum of two inputs' products of a row, by quarter."""
            if count == 16:
                sums_of_two = builder.load(at(builder, rows_of_x[row], 32 * (INPUTS * table + place), floats), align=4)
                indices = codes_of_two(word)
                return [_looked_up(builder, sums_of_two, indices[place, q]) for q in quarters]
            found = []
            for one in (place, place + 1):
                four = ir.VectorType(ir.FloatType(), 4)
                products = builder.load(at(builder, rows_of_x[row], 16 * (INPUTS * table + one), four), align=4)
                products = builder.shuffle_vector(
                    products, products, ir.Constant(ints, [lane % 4 for lane in range(count)])
                )
                indices = [shifted(word, 8 * one + 6 - 2 * q) for q in quarters]
                found.append([_looked_up(builder, products, index) for index in indices])
            return [builder.fadd(*products) for products in zip(*found, strict=True)]

        for quarters in (range(first, first + together) for first in range(0, 4, together)):
            found: dict[tuple[int, int], list[ir.Value]] = {(q, row): [] for q in quarters for row in range(many)}
            for table in range(TABLES):
                word = builder.load(at(builder, words, 4 * count * table, ints), align=4)
                for place, row in itertools.product((0, 2), range(many)):
                    for q, total in zip(quarters, found_of_two(word, table, place, row, quarters), strict=True):
                        _add_to_pairs(builder, found[q, row], total, (INPUTS * table + place) // 2)
            for q, row in found:
                (total,) = found[q, row]
                if has_scales:
                    scale = builder.load(at(builder, scales, 4 * count * q, floats), align=4)
                    total = builder.fmul(total, scale)
                cell = at(builder, sums, 4 * count * (many * q + row), floats)
                builder.store(builder.fadd(builder.load(cell, align=4), total), cell, align=4)
        return context.get_dummy_value()

    address = types.uintp
    return types.void(lanes, rows, grouped, address, address, types.intp, address, address), codegen


@intrinsic(prefer_literal=True)
def finish(typing_context, lanes, half, sums, scales, between_scales, shifts, between_shifts, output, width):
    """`width` outputs of a row, float32 or, with `half` 1, bfloat16: sum * scale + shift; addresses.

    The sums are a whole vector. Scales, and shifts, are four bytes apart, or 0: then there is one for all outputs.
    """
    count, to_half = lanes.literal_value, half.literal_value

    def codegen(context, builder, signature, args):
        sums, scales, between_scales, shifts, between_shifts, output, width = args[2:]

        def load(address, lanes):
            return builder.load(at(builder, address, 0, ir.VectorType(ir.FloatType(), lanes)), align=4)

        def load_all(address, between):
            with builder.if_else(builder.icmp_signed("==", between, between.type(0))) as (one, each):
                with one:
                    number = builder.load(at(builder, address, 0, ir.FloatType()), align=4)
                    same, from_one = everywhere(builder, number, ir.VectorType(number.type, count)), builder.block
                with each:
                    own, from_each = load(address, count), builder.block
            found = builder.phi(own.type)
            found.add_incoming(same, from_one)
            found.add_incoming(own, from_each)
            return found

        def store(address, sum_, scale, shift):
            value = builder.fadd(builder.fmul(sum_, scale), shift)
            value = to_bfloat16(builder, value) if to_half else value
            builder.store(value, at(builder, address, 0, value.type), align=2)

        with builder.if_else(builder.icmp_signed("==", width, width.type(count))) as (whole, part):
            with whole:
                scale, shift = load_all(scales, between_scales), load_all(shifts, between_shifts)
                store(output, load(sums, count), scale, shift)
            with part, for_range(builder, width) as loop:
                size, four = loop.index.type(2 if to_half else 4), loop.index.type(4)
                arrays = (output, size), (sums, four), (scales, between_scales), (shifts, between_shifts)
                place, *numbers = [builder.add(array, builder.mul(loop.index, between)) for array, between in arrays]
                store(place, *(load(number, 1) for number in numbers))
        return context.get_dummy_value()

    address = types.uintp
    size = types.intp
    return types.void(lanes, half, address, address, size, address, size, address, size), codegen


# ---- the functions ----


def _compile_lay(cached: bool) -> Any:
    field, fields = JOB, len(JOB)
    one, two = TABLES, 2 * TABLES

    @c_function(cached, "lay")
    def lay(address):
        """Indices of the outputs of a layer. A unit is `ROWS_LAID` rows of the packed weight."""
        job = numba.carray(pointer(address, "int64"), fields)
        groups, size = job[field.groups], job[field.size]
        chunks, inputs = -(-size // CHUNK), groups * size
        placed = numba.carray(pointer(job[field.placed], "int64"), (job[field.layers], len(PLACE)))
        own_place = placed[job[field.layer]]
        begin, quarter = own_place[PLACE.begin], own_place[PLACE.outputs] // 4
        packed = numba.carray(pointer(own_place[PLACE.packed], "uint8"), (quarter, inputs))
        own = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        rest = numba.carray(pointer(own, "uint8"), CHUNK)
        across, down = job[field.outputs] * TABLES, quarter * TABLES
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            top, bottom = unit * ROWS_LAID, min(unit * ROWS_LAID + ROWS_LAID, quarter)
            chunk = 0
            while chunk < groups * chunks:
                start = chunk // chunks * size + chunk % chunks * CHUNK
                count = min(CHUNK, size - chunk % chunks * CHUNK)
                pair = size % CHUNK == 0 and chunk + 1 < groups * chunks  # the next one follows in the packed weight
                for row in range(top, bottom):
                    source = packed.ctypes.data + row * inputs + start
                    target = job[field.indices] + chunk * across + (begin + row) * TABLES
                    if pair:
                        _lay_words(two, source, target, across, down)
                    elif count == CHUNK:
                        _lay_words(one, source, target, across, down)
                    else:
                        rest[:] = 0
                        for k in range(count):
                            rest[k] = packed[row, start + k]
                        _lay_words(one, own, target, across, down)
                chunk += 2 if pair else 1

    return lay


def _compile_lay_transposed(cached: bool) -> Any:
    field, fields = JOB, len(JOB)

    @c_function(cached, "lay transposed")
    def lay(address):
        """Indices of the inputs of the only layer. A unit is a chunk: eight rows of the packed weight."""
        job = numba.carray(pointer(address, "int64"), fields)
        quarter, width = job[field.size], job[field.width]
        placed = numba.carray(pointer(job[field.placed], "int64"), (job[field.layers], len(PLACE)))
        packed = numba.carray(pointer(placed[0, PLACE.packed], "uint8"), (quarter, width))
        indices = numba.carray(pointer(job[field.indices], "uint8"), (job[field.units], width, TABLES))
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            top, rows = unit * TABLES, min(TABLES, quarter - unit * TABLES)
            whole = width - width % 16 if rows == TABLES else 0
            for k in range(0, whole, 16):
                source = packed.ctypes.data + top * width + k
                _lay_bytes(source, width, indices.ctypes.data + TABLES * (unit * width + k))
            for k in range(whole, width):
                for row in range(rows):
                    byte = packed[top + row, k]
                    indices[unit, k, row] = 27 * (byte >> 6) + 9 * (byte >> 4 & 3) + 3 * (byte >> 2 & 3) + (byte & 3)
                for row in range(rows, TABLES):
                    indices[unit, k, row] = 0

    return lay


def _compile_tile(lanes: int, parts: int, cached: bool) -> Any:
    field, fields = JOB, len(JOB)

    @c_function(cached, "tile", lanes, parts)
    def tile(address):
        """Rows of a tile, a unit, side by side, and so the `parts` parts of a row."""
        job = numba.carray(pointer(address, "int64"), fields)
        groups, size = job[field.groups], job[field.size]
        inputs, padded = groups * size * parts, -(-size * parts // CHUNK) * CHUNK
        input = numba.carray(pointer(job[field.input], "uint32"), (job[field.rows], inputs))
        tiled = numba.carray(pointer(job[field.tiled], "uint32"), (job[field.tiles], groups, padded, lanes))
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            top = unit * lanes
            rows = min(lanes, job[field.rows] - top)
            for group in range(groups):
                for part in range(parts):
                    first = (group * parts + part) * size
                    whole = size - size % lanes if rows == lanes else 0
                    for k in range(0, whole, lanes):
                        source = input.ctypes.data + 4 * (top * inputs + first + k)
                        place = (unit * groups + group) * padded + k * parts + part
                        transpose(lanes, source, 4 * inputs, tiled.ctypes.data + 4 * lanes * place, 4 * lanes * parts)
                    for k in range(whole, size):
                        for row in range(rows):
                            tiled[unit, group, k * parts + part, row] = input[top + row, first + k]
                        for row in range(rows, lanes):
                            tiled[unit, group, k * parts + part, row] = 0
                tiled[unit, group, size * parts :] = 0

    return tile


def _compile_multiply(lanes: int, grouped: int, half: int, cached: bool) -> Any:
    field, fields = JOB, len(JOB)
    size = 2 if half else 4  # of an output, in bytes

    @c_function(cached, "multiply", lanes, grouped, half)
    def multiply(address):
        """A unit is a tile and `share` outputs."""
        job = numba.carray(pointer(address, "int64"), fields)
        outputs, share = job[field.outputs], job[field.share]
        tables = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        square = numba.carray(pointer(tables + 4 * lanes * (TABLES * CASES + SPARE), "float32"), (lanes, lanes))
        sums = numba.carray(pointer(square.ctypes.data + 4 * lanes * lanes, "float32"), (share + lanes, lanes))
        placed = numba.carray(pointer(job[field.placed], "int64"), (job[field.layers], len(PLACE)))
        chunks, per_group = job[field.chunks], job[field.chunks] // job[field.groups]
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            tile, first = unit % job[field.tiles], unit // job[field.tiles] * share
            count = min(share, outputs - first)
            fours = count - count % 4
            sums[: count + lanes] = 0
            for chunk in range(chunks):
                _make_tables(lanes, job[field.tiled] + 4 * lanes * CHUNK * (tile * chunks + chunk), tables)
                indices = job[field.indices] + TABLES * (chunk * outputs + first)
                scales = job[field.group_scale] + 4 * (chunk // per_group * outputs + first)
                _add_chunk(lanes, grouped, 4, tables, indices, scales, fours, sums.ctypes.data)
                if fours < count:
                    indices, scales = indices + TABLES * fours, scales + 4 * fours
                    last = sums.ctypes.data + 4 * lanes * fours
                    _add_chunk(lanes, grouped, 1, tables, indices, scales, count - fours, last)
            top = tile * lanes
            for layer in range(job[field.layers]):
                begin, many = placed[layer, PLACE.begin], placed[layer, PLACE.outputs]
                end = min(begin + many, first + count)
                for column in range(max(begin, first), end, lanes):
                    source = sums.ctypes.data + 4 * lanes * (column - first)
                    transpose(lanes, source, 4 * lanes, square.ctypes.data, 4 * lanes)
                    to_scale, to_bias = placed[layer, PLACE.to_scale], placed[layer, PLACE.to_bias]
                    scale = placed[layer, PLACE.scale] + to_scale * (column - begin)
                    bias = placed[layer, PLACE.bias] + to_bias * (column - begin)
                    width = min(lanes, end - column)
                    for row in range(min(lanes, job[field.rows] - top)):
                        source = square.ctypes.data + 4 * lanes * row
                        target = placed[layer, PLACE.output] + size * ((top + row) * many + column - begin)
                        finish(lanes, half, source, scale, to_scale, bias, to_bias, target, width)

    return multiply


def _compile_spread(lanes: int, cached: bool) -> Any:
    field, fields = JOB, len(JOB)
    inputs_of_table = lanes // 8

    @c_function(cached, "spread", lanes)
    def spread(address):
        """The products -x, 0, x of the inputs with a code, or the sums of two. A unit is a row."""
        job = numba.carray(pointer(address, "int64"), fields)
        rows, groups, size = job[field.rows], job[field.groups], job[field.size]
        padded = job[field.chunks] // groups * CHUNK // inputs_of_table
        input = numba.carray(pointer(job[field.input], "float32"), (rows, groups, size))
        tables = numba.carray(pointer(job[field.tiled], "float32"), (rows, groups, padded, 4**inputs_of_table))
        while True:
            row = take(address + 8 * field.unit)
            if row >= job[field.units]:
                return
            for group in range(groups):
                for k in range(padded):
                    for codes in range(4**inputs_of_table):
                        total = numba.float32(0)
                        for place in range(inputs_of_table):
                            number, code = k * inputs_of_table + place, codes >> 2 * place & 3
                            value = input[row, group, number] if number < size else numba.float32(0)
                            if code == 0:
                                total -= value
                            elif code == 2:
                                total += value
                        tables[row, group, k, codes] = total

    return spread


def _compile_few(lanes: int, rows: int, grouped: int, half: int, cached: bool) -> Any:
    field, fields = JOB, len(JOB)
    size_of_number, two = (2 if half else 4), 2 * TABLES

    @c_function(cached, "few", lanes, rows, grouped, half)
    def few(address):
        """A unit is a panel: `lanes` rows of a layer's packed weight, all `rows` rows of the input."""
        job = numba.carray(pointer(address, "int64"), fields)
        size, chunks = job[field.size], job[field.chunks]
        per_group, inputs = chunks // job[field.groups], job[field.width]
        placed = numba.carray(pointer(job[field.placed], "int64"), (job[field.layers], len(PLACE)))
        own_place = placed[job[field.layer]]
        quarter, to_scale, to_bias = own_place[PLACE.outputs] // 4, own_place[PLACE.to_scale], own_place[PLACE.to_bias]
        address_of_packed, output = own_place[PLACE.packed], own_place[PLACE.output]
        packed = numba.carray(pointer(address_of_packed, "uint8"), (quarter, inputs))
        shape = 4 * quarter, job[field.groups]
        group_scale = numba.carray(pointer(own_place[PLACE.group_scale], "float32"), shape)
        words = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        bytes_ = numba.carray(pointer(words, "uint8"), (two, lanes, 4))
        scales = numba.carray(pointer(words + 4 * lanes * two, "float32"), (4, lanes))
        sums = numba.carray(pointer(words + 4 * lanes * (two + 4), "float32"), (4, rows, lanes))
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            first = unit * lanes
            width = min(lanes, quarter - first)
            sums[:] = 0
            chunk = 0
            while chunk < chunks:
                start = chunk // per_group * size + chunk % per_group * CHUNK
                count = min(CHUNK, size - chunk % per_group * CHUNK)
                pair = size % CHUNK == 0 and chunk + 1 < chunks and width == lanes
                if pair:
                    ahead = start + AHEAD if start + AHEAD < inputs else start + AHEAD + (lanes - 1) * inputs
                    for row in range(lanes):  # near the end of a row: the beginning of the next panel's
                        _prefetch(address_of_packed + (first + row) * inputs + ahead)
                    for word in range(0, two, lanes):
                        source = packed.ctypes.data + first * inputs + start + 4 * word
                        transpose(lanes, source, inputs, words + 4 * lanes * word, 4 * lanes)
                else:
                    for k in range(count):
                        for row in range(width):
                            bytes_[k // 4, row, k % 4] = packed[first + row, start + k]
                for number_of_chunk in range(chunk, chunk + 2 if pair else chunk + 1):
                    if grouped and number_of_chunk % per_group == 0:
                        for part in range(4):
                            for row in range(width):
                                column = part * quarter + first + row
                                scales[part, row] = group_scale[column, number_of_chunk // per_group]
                    own_words = words + 4 * lanes * TABLES * (number_of_chunk - chunk)
                    x = job[field.tiled] + 2 * lanes * CHUNK * number_of_chunk
                    between = 2 * lanes * CHUNK * chunks
                    _add_few(lanes, rows, grouped, own_words, x, between, scales.ctypes.data, sums.ctypes.data)
                chunk += 2 if pair else 1
            for part in range(4):
                for row in range(rows):
                    column = part * quarter + first
                    source = sums.ctypes.data + 4 * lanes * (part * rows + row)
                    target = output + size_of_number * (4 * quarter * row + column)
                    scale, bias = own_place[PLACE.scale] + to_scale * column, own_place[PLACE.bias] + to_bias * column
                    finish(lanes, half, source, scale, to_scale, bias, to_bias, target, width)

    return few


@cache
def compiled(name: str, *variant: Any) -> Any:
    """Return a compiled C function of the address of a `Job`, from numba's cache on disk where it has it."""
    compile_: dict[str, Callable[..., Any]] = {
        "lay": _compile_lay,
        "lay transposed": _compile_lay_transposed,
        "tile": _compile_tile,
        "multiply": _compile_multiply,
        "spread": _compile_spread,
        "few": _compile_few,
    }
    return from_cache(compile_[name], *variant)


def _lanes(rows: int) -> int:
    return 16 if rows > 8 and "+avx512f" in processor().features else 8


# A packed weight, (N / 4, K) uint8, and what its sums are multiplied with and shifted by: `group_scale` (N, K / g),
# `scale` (1,) or (outputs,), `bias`. These may be shorter than the packed weight.
Layer = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


ONE, ZERO = ctypes.c_float(1), ctypes.c_float(0)


def of_outputs(values: Tensor | None, count: int) -> Tensor | None:
    """A scale or bias of a layer of so many outputs as the functions read it: float32, (1,) or (count,)."""
    if values is None:
        return None
    values = values.reshape(-1).float().contiguous()
    return values if len(values) in (1, count) else pad(values, (0, count - len(values)))


def place(values: Tensor | None, default: ctypes.c_float) -> tuple[int, int]:
    """The address of what `of_outputs` gave, and the bytes from one output's to the next's."""
    if values is None:
        return ctypes.addressof(default), 0
    return values.data_ptr(), 0 if len(values) == 1 else 4


def of_groups(group_scale: Tensor | None, count: int) -> Tensor | None:
    """The scales of groups of a layer of so many outputs, (count, groups) float32."""
    if group_scale is None:
        return None
    group_scale = group_scale.float().contiguous()
    return group_scale if len(group_scale) == count else pad(group_scale, (0, 0, 0, count - len(group_scale)))


def products(input: Tensor, layers: list[Layer], transposed: bool, dtype: torch.dtype) -> list[Tensor]:
    """`(input @ T^T) * scale + bias` of each layer, in float32: (M, K) -> (M, N) each.

    The layers have the same number of scales in a row, and share what is made of the input. With `transposed` there is
    one, and T is its transpose: (M, N) -> (M, K). The results are bfloat16 if `dtype` is, else float32.
    """
    input = input.float().contiguous()
    weights = [packed.contiguous() for packed, *_ in layers]
    (height, width), rows, group_scale = weights[0].shape, input.shape[0], layers[0][1]
    counts = [width if transposed else 4 * weight.shape[0] for weight in weights]
    outputs = sum(counts)
    groups, parts = (1 if group_scale is None else group_scale.shape[1]), (4 if transposed else 1)
    size = height if transposed else width // groups
    chunks = groups * -(-size * parts // CHUNK)
    threads, lanes = threads_for(rows * sum(map(Tensor.numel, weights))), _lanes(rows)
    grouped, half = int(group_scale is not None), int(dtype == torch.bfloat16)

    after = [
        (of_groups(group_scale, count), of_outputs(scale, count), of_outputs(bias, count))
        for (_, group_scale, scale, bias), count in zip(layers, counts, strict=True)
    ]
    results = [torch.empty(rows, count, dtype=torch.bfloat16 if half else torch.float32) for count in counts]
    widest = 16 if "+avx512f" in processor().features else 8
    indices = group_scales = input  # where there are none
    few = 0 < rows <= FEW[widest] and not transposed and "+avx2" in processor().features
    if few:
        tiles, share, lanes = 0, 0, widest
        tiled = scratch.take("tiled", rows * chunks * CHUNK * lanes // 2, torch.float32)
        own = lanes * (2 * TABLES + 4 + 4 * rows)
    else:
        tiles = -(-rows // lanes)
        pieces = max(-(-outputs // MOST_OUTPUTS), -(-2 * threads // max(tiles, 1)) if threads > 1 else 1)
        share = -(-outputs // (4 * pieces)) * 4
        tiled = scratch.take("tiled", tiles * chunks * CHUNK * lanes, torch.float32)
        indices = scratch.take("indices", chunks * outputs * TABLES, torch.uint8)
        if grouped:
            group_scales = torch.cat([scales for scales, *_ in after if scales is not None]).T.contiguous()
        own = lanes * (TABLES * CASES + SPARE + 2 * lanes + share)
    buffers = scratch.take("lookups", threads * own, torch.float32)
    places: list[int] = []
    begin = 0
    for weight, count, result, (scales, scale, bias) in zip(weights, counts, results, after, strict=True):
        addresses = weight.data_ptr(), result.data_ptr(), *place(scale, ONE), *place(bias, ZERO)
        places += Place(begin, count, *addresses, 0 if scales is None else scales.data_ptr())
        begin += count
    placed = (ctypes.c_int64 * len(places))(*places)
    sizes = (len(layers), 0, rows, groups, size, width, chunks, outputs, tiles, share, own)
    arrays = (input, tiled, indices, group_scales, buffers)
    job = new_job(*sizes, ctypes.addressof(placed), *[array.data_ptr() for array in arrays])

    def run_for_each_layer(function: Any, units: Callable[[int], int]) -> None:
        for number, weight in enumerate(weights):
            job[JOB.layer] = number
            run(function, job, units(weight.shape[0]), threads)

    if few:
        run(compiled("spread", lanes), job, rows, threads_for(rows * width * lanes))
        run_for_each_layer(compiled("few", lanes, rows, grouped, half), lambda quarter: -(-quarter // lanes))
        return results
    if transposed:
        run(compiled("lay transposed"), job, -(-height // TABLES), threads)
    else:
        run_for_each_layer(compiled("lay"), lambda quarter: -(-quarter // ROWS_LAID))
    run(compiled("tile", lanes, parts), job, tiles, threads)
    run(compiled("multiply", lanes, grouped, half), job, tiles * -(-outputs // share), threads)
    return results

"""Integer matmuls on packed weights for x86 processors, compiled by numba at first use (and cached on disk after).

`linear` is `reference.integer_linear` to the last bit: activations become integers per row (8 bits, or 16 as two
signed bytes, x = step * (256 high + low)), the products with the codes 0, 1, 2 are summed exactly in int32, and what
the codes' offset of one added, the sum of the row's integers, is subtracted. It reads the packed weight as it is
stored, so there is no second copy: 4 bytes (four inputs) of `PANEL` rows at a time are transposed into a scratch, the
two bits of a quarter are cut out of a block of it, and all rows of the input pass by while it is in the cache. The
rows' integers lie in the order in which they are read: the four inputs of each step, of all rows of a tile.

One inner loop, `tile`, in the instructions the processor has:

    "avx512_vnni_lookup"  three steps of seven by vpermw, below, and four by vpdpbusd: Zen 4
    "avx512_vnni"         vpdpbusd on 16 outputs
    "avx_vnni"            vpdpbusd on 8 outputs (also avx512_vnni with 256-bit registers)
    "avx2"                vpmaddubsw, summed in 16 bits for 64 steps: 64 * 2 * 2 * 128 = 2^15 is the most that fits

Zen 4 starts one vpdpbusd of 512 bits per cycle, 64 products, and can permute beside it. Three codes are one of 27
cases, so the 27 sums that three inputs can give fit a register of 32 words, in which vpermw looks up those of 32
outputs: 96 products. What is found is summed in 16 bits for a block of 70 steps, of which 30 are looked up in 40
tables: 40 * 3 * 2 * 128 < 2^15. A tile's tables are made anew for each block, so they serve many outputs: the block's
codes of up to `LOOKUP_PANELS` panels, all four quarters, are cut out first, then the rows pass by, and the sums of all
of them wait in the scratch.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.cgutils import for_range
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from torch import Tensor

from . import cpu, reference


class Shape(NamedTuple):
    """Of the inner loop: rows x vectors of outputs stay in registers, `steps` of 4 inputs are cut out at a time."""

    rows: int
    vectors: int
    lanes: int  # outputs per vector
    steps: int
    strip: int  # rows of integers that pass by a block of the weight: they stay in the second cache
    turn: int = 2  # steps of the inner loop's turn: there are whole turns


LOOKUP = "avx512_vnni_lookup"
SHAPES = {
    LOOKUP: Shape(rows=4, vectors=4, lanes=16, steps=70, strip=256, turn=7),
    "avx512_vnni": Shape(rows=8, vectors=3, lanes=16, steps=256, strip=256),
    "avx_vnni": Shape(rows=6, vectors=2, lanes=8, steps=256, strip=126),
    "avx2": Shape(rows=6, vectors=2, lanes=8, steps=256, strip=126),
}
AVX2_STEPS = 64
LOOKED_UP = 3  # steps of a turn
LOOKUP_PANELS = 24  # of outputs at a time: their codes of a block of steps fit the second cache
HALF_TURN = 640  # bytes: the indices of two tables and two steps of codes, of a panel


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those of `SHAPES` that numba compiles for on this machine, best first."""
    _, processor, listed = cpu_target.target_context.codegen().magic_tuple()
    features = set(listed.split(","))
    has = {
        LOOKUP: processor == "znver4" and {"+avx512vnni", "+avx512vl", "+avx512bw"} <= features,
        "avx512_vnni": {"+avx512vnni", "+avx512vl"} <= features,
        "avx_vnni": "+avxvnni" in features or {"+avx512vnni", "+avx512vl"} <= features,
        "avx2": "+avx2" in features,
    }
    return tuple(name for name in SHAPES if has[name])


def _dot(module: ir.Module, lanes: int) -> ir.Function:
    """`vpdpbusd`: (sums, unsigned bytes, signed bytes) -> sums, a product of four bytes in each lane of 32 bits."""
    ints = ir.VectorType(ir.IntType(32), lanes)
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
    return module.declare_intrinsic(name, (), ir.FunctionType(ints, [ints, ints, ints]))


def _permute(module: ir.Module) -> ir.Function:
    """`vpermw`: (table, indices) -> the table's words at the indices, of which the low five bits count."""
    shorts = ir.VectorType(ir.IntType(16), 32)
    return module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", (), ir.FunctionType(shorts, [shorts, shorts]))


def _at(builder: ir.IRBuilder, address: ir.Value, offset: int, type_: ir.Type) -> ir.Value:
    """The pointer to what lies `offset` bytes after an address."""
    return builder.inttoptr(builder.add(address, ir.IntType(64)(offset)), type_.as_pointer())


def _everywhere(builder: ir.IRBuilder, value: ir.Value, type_: ir.VectorType) -> ir.Value:
    """The vector with a value in every lane."""
    undefined, i32 = ir.Constant(type_, ir.Undefined), ir.IntType(32)
    filled = builder.insert_element(undefined, value, i32(0))
    return builder.shuffle_vector(filled, undefined, ir.Constant(ir.VectorType(i32, type_.count), [0] * type_.count))


@intrinsic(prefer_literal=True)
def _tile(typing_context, name, x, codes, steps, sums):
    """`sums` (rows, PANEL) int32 += `codes` (steps, PANEL, 4) uint8 . `x` (steps, rows, 4) int8; addresses.

    The steps are rounded up to whole turns: there `x` is zero.
    """
    isa = name.literal_value
    rows, vectors, lanes, _, _, unroll = SHAPES[isa]

    def codegen(context, builder, signature, args):
        _, x, codes, steps, sums = args
        i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
        ints = ir.VectorType(i32, lanes)
        module = builder.module

        def instruction(llvm_name, result, *parameters):
            function = module.declare_intrinsic(llvm_name, (), ir.FunctionType(result, parameters))
            return lambda *values: builder.call(function, values)

        if isa == "avx2":
            total, operand = ir.VectorType(i16, 2 * lanes), ir.VectorType(i8, 4 * lanes)
            multiply = instruction("llvm.x86.avx2.pmadd.ub.sw", total, operand, operand)
            widen = instruction("llvm.x86.avx2.pmadd.wd", ints, total, total)
            ones = ir.Constant(total, [1] * 2 * lanes)
        else:
            total = operand = ints
            dot = _dot(module, lanes)

        def load(address, offset, type_):
            return builder.load(_at(builder, address, offset, type_), align=1)

        start, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
        grid = [(row, vector) for row in range(rows) for vector in range(vectors)]
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(i64)
        step.add_incoming(i64(0), start)
        before = {cell: builder.phi(total) for cell in grid}
        after = dict(before)
        inputs = builder.add(x, builder.mul(step, i64(4 * rows)))
        base = builder.add(codes, builder.mul(step, i64(4 * vectors * lanes)))
        for turn in range(unroll):
            weights = [load(base, 4 * lanes * (turn * vectors + vector), operand) for vector in range(vectors)]
            for row in range(rows):
                four = _everywhere(builder, load(inputs, 4 * (turn * rows + row), i32), ints)
                for vector in range(vectors):
                    cell = row, vector
                    if isa == "avx2":
                        products = multiply(weights[vector], builder.bitcast(four, operand))
                        after[cell] = builder.add(after[cell], products)
                    else:
                        after[cell] = builder.call(dot, [after[cell], weights[vector], four])
        next_step = builder.add(step, i64(unroll))
        step.add_incoming(next_step, loop)
        for cell in grid:
            before[cell].add_incoming(ir.Constant(total, [0] * total.count), start)
            before[cell].add_incoming(after[cell], loop)
        builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, end)
        builder.position_at_end(end)
        for row, vector in grid:
            offset = 4 * lanes * (row * vectors + vector)
            result = widen(after[row, vector], ones) if isa == "avx2" else after[row, vector]
            address = _at(builder, sums, offset, ints)
            builder.store(builder.add(builder.load(address, align=1), result), address, align=1)
        return context.get_dummy_value()

    return types.void(name, types.uintp, types.uintp, types.intp, types.uintp), codegen


@intrinsic(prefer_literal=True)
def _transpose(typing_context, lanes, source, source_stride, target, target_stride):
    """`lanes` x `lanes` words of 32 bits: target[j, i] = source[i, j]; addresses, strides in bytes."""
    size = lanes.literal_value

    def codegen(context, builder, signature, args):
        _, source, source_stride, target, target_stride = args
        i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), size)

        def row(address, stride, number):
            return builder.inttoptr(builder.add(address, builder.mul(stride, i64(number))), vector.as_pointer())

        rows = [builder.load(row(source, source_stride, number), align=1) for number in range(size)]
        distance = 1
        while distance < size:  # swap the off-diagonal quarters of ever larger squares
            low = [lane if not lane & distance else size + lane - distance for lane in range(size)]
            high = [lane + distance if not lane & distance else size + lane for lane in range(size)]
            for number in range(size):
                if not number & distance:
                    one, other = rows[number], rows[number + distance]
                    masks = [ir.Constant(ir.VectorType(ir.IntType(32), size), mask) for mask in (low, high)]
                    rows[number] = builder.shuffle_vector(one, other, masks[0])
                    rows[number + distance] = builder.shuffle_vector(one, other, masks[1])
            distance *= 2
        for number in range(size):
            builder.store(rows[number], row(target, target_stride, number), align=1)
        return context.get_dummy_value()

    return types.void(lanes, types.uintp, types.intp, types.uintp, types.intp), codegen


@intrinsic(prefer_literal=True)
def _cut(typing_context, lanes, words, bits, target, count):
    """`count` vectors: target = words >> bits & 0x03030303; addresses."""
    size = lanes.literal_value

    def codegen(context, builder, signature, args):
        _, words, bits, target, count = args
        i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), size)
        shift = _everywhere(builder, builder.trunc(bits, ir.IntType(32)), vector)
        with for_range(builder, count) as loop:
            offset = builder.mul(loop.index, i64(4 * size))
            source = builder.inttoptr(builder.add(words, offset), vector.as_pointer())
            codes = builder.lshr(builder.load(source, align=1), shift)
            codes = builder.and_(codes, ir.Constant(vector, [0x03030303] * size))
            builder.store(codes, builder.inttoptr(builder.add(target, offset), vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(lanes, types.uintp, types.intp, types.uintp, types.intp), codegen


@intrinsic(prefer_literal=True)
def _finish(
    typing_context, name, parts, half, high, low, high_offset, low_offset, step, scales, shifts, output, apart
):
    """A row of a panel: output = sum * scale * step + shift, sum = 256 (high - its offset) + low - its offset.

    All but offsets, step and `apart`, the bytes from one vector of the output to the next, are addresses. With one
    part `high` is all there is; with `half` 1 the output is bfloat16, rounded half to even, else float32.
    """
    shape, two, to_half = SHAPES[name.literal_value], parts.literal_value == 2, half.literal_value
    lanes = shape.lanes

    def codegen(context, builder, signature, args):
        high, low, high_offset, low_offset, step, scales, shifts, output, apart = args[3:]
        i32 = ir.IntType(32)
        ints, floats, shorts = (ir.VectorType(type_, lanes) for type_ in (i32, ir.FloatType(), ir.IntType(16)))

        def constant(value):
            return ir.Constant(ints, [value] * lanes)

        def place(address, offset, type_):
            return _at(builder, address, offset, type_)

        high_offset, low_offset = (_everywhere(builder, offset, ints) for offset in (high_offset, low_offset))
        step = _everywhere(builder, step, floats)
        for offset in range(0, 4 * lanes * shape.vectors, 4 * lanes):
            total = builder.sub(builder.load(place(high, offset, ints), align=1), high_offset)
            if two:
                rest = builder.sub(builder.load(place(low, offset, ints), align=1), low_offset)
                total = builder.add(builder.shl(total, constant(8)), rest)
            value = builder.fmul(builder.sitofp(total, floats), builder.load(place(scales, offset, floats), align=1))
            value = builder.fadd(builder.fmul(value, step), builder.load(place(shifts, offset, floats), align=1))
            if to_half:
                word = builder.bitcast(value, ints)
                odd = builder.and_(builder.lshr(word, constant(16)), constant(1))
                rounded = builder.add(word, builder.add(odd, constant(0x7FFF)))
                word = builder.select(builder.fcmp_ordered("==", value, value), rounded, word)
                word = builder.trunc(builder.lshr(word, constant(16)), shorts)
                builder.store(word, place(output, 0, shorts), align=1)
            else:
                builder.store(value, place(output, 0, floats), align=1)
            output = builder.add(output, apart)
        return context.get_dummy_value()

    address, integer = types.uintp, types.int32
    numbers = address, address, integer, integer, types.float32, address, address, address, types.intp
    return types.void(name, parts, half, *numbers), codegen


@intrinsic
def _lookup_tables(typing_context, x, count, tables):
    """Of `x` (count, 3, 4 rows, 4) int8 `tables` (count, 4, 4 rows, 32) int16; addresses.

    Entry c0 + 3 c1 + 9 c2 is c0 x0 + c1 x1 + c2 x2, of the bytes at one place of three steps.
    """

    def codegen(context, builder, signature, args):
        x, count, tables = args
        i64, words = ir.IntType(64), ir.VectorType(ir.IntType(16), 16)
        four_rows, table = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.IntType(16), 32)
        codes = [ir.Constant(table, [entry // 3**step % 3 for entry in range(32)]) for step in range(LOOKED_UP)]
        with for_range(builder, count) as loop:
            source = builder.add(x, builder.mul(loop.index, i64(16 * LOOKED_UP)))
            target = builder.add(tables, builder.mul(loop.index, i64(64 * 16)))
            loaded = [builder.load(_at(builder, source, 16 * step, four_rows), align=1) for step in range(LOOKED_UP)]
            values = [builder.sext(value, words) for value in loaded]
            for number in range(16):
                row, place = number // 4, number % 4
                mask = ir.Constant(ir.VectorType(ir.IntType(32), 32), [number] * 32)
                spread = [builder.shuffle_vector(value, value, mask) for value in values]
                terms = [builder.mul(value, code) for value, code in zip(spread, codes, strict=True)]
                total = builder.add(builder.add(terms[0], terms[1]), terms[2])
                builder.store(total, _at(builder, target, 64 * (4 * place + row), table), align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.intp, types.uintp), codegen


@intrinsic
def _lookup_cut(typing_context, words, count, target):
    """Packed `words` (7 count, 16) uint32, those to look up first -> what `_lookup_tile` reads; addresses.

    The vectors are the quarters. Those of the indices hold two, an output of one and one of the next in turn, and two
    tables: a byte each.
    """

    def codegen(context, builder, signature, args):
        words, count, target = args
        i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), 16)

        def constant(value):
            return ir.Constant(vector, [value] * 16)

        def cut(address, number, quarter):
            word = builder.load(_at(builder, address, 64 * number, vector), align=1)
            return builder.and_(builder.lshr(word, constant(6 - 2 * quarter)), constant(0x03030303))

        def store(value, half, number):
            builder.store(value, _at(builder, base, HALF_TURN * half + 64 * number, vector), align=1)

        rest = builder.add(words, builder.mul(count, i64(64 * LOOKED_UP)))
        with for_range(builder, count) as loop:
            first = builder.add(words, builder.mul(loop.index, i64(64 * LOOKED_UP)))
            others = builder.add(rest, builder.mul(loop.index, i64(64 * 4)))
            base = builder.add(target, builder.mul(loop.index, i64(2 * HALF_TURN)))
            indices = [cut(first, 0, quarter) for quarter in range(4)]
            for quarter in range(4):
                for step in range(1, LOOKED_UP):  # no byte overflows into the next
                    term = builder.mul(cut(first, step, quarter), constant(3**step))
                    indices[quarter] = builder.add(indices[quarter], term)
            for pair in range(2):
                one, other = indices[2 * pair : 2 * pair + 2]
                store(builder.or_(builder.and_(one, constant(0xFFFF)), builder.shl(other, constant(16))), 0, pair)
                store(builder.or_(builder.lshr(one, constant(16)), builder.and_(other, constant(0xFFFF0000))), 1, pair)
            for step in range(4):
                for quarter in range(4):
                    store(cut(others, step, quarter), step // 2, 2 + 4 * (step % 2) + quarter)
        return context.get_dummy_value()

    return types.void(types.uintp, types.intp, types.uintp), codegen


@intrinsic
def _lookup_tile(typing_context, tables, x, weights, count, sums):
    """`sums` (4 rows, 4, 16) int32 += `count` half turns: two tables of each row, two steps of `x` (steps, 4 rows, 4).

    All but `count` are addresses.
    """

    def codegen(context, builder, signature, args):
        tables, x, weights, count, sums = args
        i32, i64 = ir.IntType(32), ir.IntType(64)
        ints, shorts = ir.VectorType(i32, 16), ir.VectorType(ir.IntType(16), 32)
        dot, permute = _dot(builder.module, 16), _permute(builder.module)

        def load(address, offset, type_):
            return builder.load(_at(builder, address, offset, type_), align=1)

        start, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        turn = builder.phi(i64)
        cells = [(shorts, row, pair) for row in range(4) for pair in range(2)]
        cells += [(ints, row, vector) for row in range(4) for vector in range(4)]
        before = {cell: builder.phi(cell[0]) for cell in cells}
        after = dict(before)
        sizes = (tables, 8 * 64), (x, 8 * 4), (weights, HALF_TURN)
        tables, x, weights = (builder.add(address, builder.mul(turn, i64(size))) for address, size in sizes)
        for step in range(2):
            indices = [load(weights, 64 * pair + step, shorts) for pair in range(2)]  # a byte on: of the other table
            for row in range(4):
                table = load(tables, 64 * (4 * step + row), shorts)
                for pair in range(2):
                    found = builder.call(permute, [table, indices[pair]])
                    after[shorts, row, pair] = builder.add(after[shorts, row, pair], found)
            codes = [load(weights, 64 * (2 + 4 * step + vector), ints) for vector in range(4)]
            for row in range(4):
                four = _everywhere(builder, load(x, 4 * (4 * step + row), i32), ints)
                for vector in range(4):
                    cell = ints, row, vector
                    after[cell] = builder.call(dot, [after[cell], codes[vector], four])
        next_turn = builder.add(turn, i64(1))
        turn.add_incoming(i64(0), start)
        turn.add_incoming(next_turn, loop)
        for cell in cells:
            before[cell].add_incoming(ir.Constant(cell[0], [0] * cell[0].count), start)
            before[cell].add_incoming(after[cell], loop)
        builder.cbranch(builder.icmp_signed("<", next_turn, count), loop, end)
        builder.position_at_end(end)
        half = ir.Constant(ints, [16] * 16)
        for row in range(4):
            for vector in range(4):
                both = builder.bitcast(after[shorts, row, vector // 2], ints)
                found = builder.ashr(both if vector % 2 else builder.shl(both, half), half)
                address = _at(builder, sums, 64 * (4 * row + vector), ints)
                total = builder.add(builder.load(address, align=1), builder.add(after[ints, row, vector], found))
                builder.store(total, address, align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.intp, types.uintp), codegen


@intrinsic
def _as_float(typing_context, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic(prefer_literal=True)
def _pointer(typing_context, address, element):
    """The pointer that `numba.carray` makes an array of; `element` is the name of a type."""
    result = types.CPointer(getattr(types, element.literal_value))

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return result(address, element), codegen


@intrinsic
def _take(typing_context, address):
    """The int64 at an address, then one more there: every thread gets another number."""

    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], i64.as_pointer()), i64(1), "seq_cst")

    return types.int64(address), codegen


f32, i32, u32 = numba.float32, numba.int32, numba.uint32


class Kernels(NamedTuple):
    """Two C functions of one argument, the address of a `Job`. Any number of threads run one at a time."""

    quantize: Any
    multiply: Any


class Job(NamedTuple):
    """What a kernel works on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int  # counts the threads that came
    units: int
    share: int  # of a unit: 4 quarters of a group of packed rows, or 1; for lookups panels of outputs
    rows: int  # M
    inputs: int  # K
    words: int  # K / 4, rounded up
    code_steps: int  # the same, rounded up to whole turns of the inner loop
    quarter: int  # N / 4
    tiles: int  # of rows: M * parts / rows of a tile, rounded up
    input: int  # (M, K) float32 or bfloat16
    codes: int  # (tiles, code_steps, rows of a tile, 4) int8; zero beyond K
    steps: int  # (M,) float32
    sums: int  # (parts * M,) int32, of the rows of `codes`
    packed: int  # (quarter, words) uint32
    scale: int  # (N,) float32
    bias: int  # (N,) float32
    output: int  # (M, N), as `input`
    scratch: int  # (threads, own) uint32
    own: int  # `scratch_words`


JOB = Job(*range(len(Job._fields)))


def scratch_words(isa: str, words: int, share: int) -> int:
    """Words of 32 bits that each thread needs.

    A transposed panel, a block of codes, its sums, a row of results, scales and shifts; or, earlier, a row's integers.
    For lookups a block of a transposed panel, a tile's tables, a row of results, and per panel scales, shifts, a block
    of codes and sums.
    """
    shape = SHAPES[isa]
    if isa == LOOKUP:
        panel, turns = shape.vectors * shape.lanes, shape.steps // shape.turn
        shared = shape.steps * shape.lanes + turns * 256 + panel
        needed = shared + share * (2 * panel + turns * HALF_TURN // 2 + shape.strip * panel)
        return max(needed, -(-2 * words // 16) * 16)  # whole cache lines
    return (words + shape.steps + shape.strip + 3) * shape.vectors * shape.lanes


def _function(cached: bool) -> Callable[[Callable], Any]:
    """Compile a function of an address to a C function, from numba's cache on disk if wanted and there.

    A damaged file there, which numba stops at, is written anew.
    """

    def compiled(function: Callable) -> Any:
        decorate = numba.cfunc(types.void(types.intp), nogil=True, cache=cached)
        try:
            return decorate(function)
        except Exception:
            if not cached:
                raise
            FunctionCache(function).flush()
            return decorate(function)

    return compiled


def _compile(isa: str, parts: int, half: bool, cached: bool) -> Kernels:
    rows, vectors, lanes, block, strip, _ = SHAPES[isa]
    panel = vectors * lanes
    tile_steps = AVX2_STEPS if isa == "avx2" else block
    rounding, largest_code, none = reference.ROUNDING, reference.LARGEST_CODE[8 * parts], 1e-12
    nan, infinity, magnitude = 0x7FC00000, 0x7F800000, 0x7FFFFFFF
    field, fields = JOB, len(JOB)
    number, size, shift, to_half = ("uint16", 2, 16, 1) if half else ("uint32", 4, 0, 0)

    @_function(cached)
    def quantize(address):
        """A unit is the rows of a tile."""
        job = numba.carray(_pointer(address, "int64"), fields)
        inputs, words, code_steps = job[field.inputs], job[field.words], job[field.code_steps]
        input = numba.carray(_pointer(job[field.input], number), (job[field.rows], inputs))
        codes = numba.carray(_pointer(job[field.codes], "uint32"), (job[field.tiles], code_steps, rows))
        steps = numba.carray(_pointer(job[field.steps], "float32"), job[field.rows])
        sums = numba.carray(_pointer(job[field.sums], "int32"), (job[field.rows], parts))
        own = job[field.scratch] + 4 * job[field.own] * _take(address + 8 * field.thread)
        own_codes = numba.carray(_pointer(own, "int8"), (parts, 4 * words))
        own_words = numba.carray(_pointer(own, "uint32"), (parts, words))
        high_codes, low_codes = own_codes[0], own_codes[parts - 1]
        high_codes[inputs:] = 0
        low_codes[inputs:] = 0
        while True:
            tile = _take(address + 8 * field.unit)
            if tile >= job[field.units]:
                return
            for m in range(tile * rows // parts, min((tile + 1) * rows // parts, job[field.rows])):
                row = input[m]
                largest = u32(0)  # magnitude, as bits: they are ordered as the numbers are
                for k in range(inputs):
                    largest = max(largest, u32(u32(u32(row[k]) << shift) & u32(magnitude)))
                finite = largest < u32(infinity)
                step = max(_as_float(largest), f32(none)) / f32(largest_code)
                steps[m] = step if finite else _as_float(u32(nan))
                high_sum, low_sum = i32(0), i32(0)
                for k in range(inputs):
                    code = i32((_as_float(u32(u32(row[k]) << shift)) / step + f32(rounding)) - f32(rounding))
                    code = code if finite else i32(0)
                    if parts == 2:
                        high = i32((code + i32(128)) >> i32(8))
                        high_codes[k] = high
                        high_sum += high
                        code = i32(code - (high << i32(8)))
                    low_codes[k] = code
                    low_sum += code
                sums[m, 0] = high_sum
                sums[m, parts - 1] = low_sum
                for part in range(parts):
                    place = m * parts + part - tile * rows
                    for k in range(words):
                        codes[tile, k, place] = own_words[part, k]
                    for k in range(words, code_steps):
                        codes[tile, k, place] = 0

    if isa == LOOKUP:
        return Kernels(quantize, _compile_lookup(parts, half, cached))

    @_function(cached)
    def multiply(address):
        """A unit is `panel` rows of the packed weight, or one quarter of them: `panel` outputs each."""
        job = numba.carray(_pointer(address, "int64"), fields)
        count, code_steps, quarter_rows = job[field.words], job[field.code_steps], job[field.quarter]
        steps = numba.carray(_pointer(job[field.steps], "float32"), job[field.rows])
        offsets = numba.carray(_pointer(job[field.sums], "int32"), (job[field.rows], parts))
        packed = numba.carray(_pointer(job[field.packed], "uint32"), (quarter_rows, count))
        scale = numba.carray(_pointer(job[field.scale], "float32"), 4 * quarter_rows)
        bias = numba.carray(_pointer(job[field.bias], "float32"), 4 * quarter_rows)
        output = numba.carray(_pointer(job[field.output], number), (job[field.rows], 4 * quarter_rows))

        own = job[field.scratch] + 4 * job[field.own] * _take(address + 8 * field.thread)
        words = numba.carray(_pointer(own, "uint32"), (count, panel))
        block_codes = own + 4 * panel * count
        sums = numba.carray(_pointer(block_codes + 4 * panel * block, "int32"), (strip, panel))
        rest = block_codes + 4 * panel * (block + strip)
        values = numba.carray(_pointer(rest, number), panel)
        scales = numba.carray(_pointer(rest + 4 * panel, "float32"), panel)
        shifts = numba.carray(_pointer(rest + 8 * panel, "float32"), panel)
        loaded = -1
        while True:
            unit = _take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            quarters = job[field.share]
            group, first_quarter = quarters * unit // 4, quarters * unit % 4
            first = group * panel
            width = min(panel, quarter_rows - first)
            if group != loaded:
                loaded = group
                whole, whole_width = count - count % lanes, width - width % lanes
                for r in range(0, whole_width, lanes):
                    for k in range(0, whole, lanes):
                        source = packed.ctypes.data + 4 * ((first + r) * count + k)
                        _transpose(lanes, source, 4 * count, words.ctypes.data + 4 * (k * panel + r), 4 * panel)
                for r in range(width):
                    for k in range(whole if r < whole_width else 0, count):
                        words[k, r] = packed[first + r, k]
            for block_unit in range(-(-job[field.tiles] * rows // strip) * quarters):
                # the same rows of the input for all quarters, while they are in the cache
                top, quarter = block_unit // quarters * strip, first_quarter + block_unit % quarters
                bottom = min(top + strip, job[field.tiles] * rows)
                sums[: bottom - top] = 0
                for k in range(0, count, block):
                    last = min(k + block, count)
                    source = words.ctypes.data + 4 * panel * k
                    _cut(lanes, source, 6 - 2 * quarter, block_codes, (last - k) * vectors)
                    for m in range(top, bottom, rows):
                        for j in range(k, last, tile_steps):
                            x = job[field.codes] + 4 * (m * code_steps + j * rows)
                            weights = block_codes + 4 * panel * (j - k)
                            total = sums.ctypes.data + 4 * panel * (m - top)
                            _tile(isa, x, weights, min(tile_steps, last - j), total)
                column = quarter * quarter_rows + first
                for r in range(width):
                    scales[r] = scale[column + r]
                    shifts[r] = bias[column + r]
                for m in range(top // parts, min(bottom // parts, job[field.rows])):
                    high = sums.ctypes.data + 4 * panel * (m * parts - top)
                    low = high + 4 * panel * (parts - 1)
                    ends = offsets[m, 0], offsets[m, parts - 1], steps[m]
                    target = output.ctypes.data + size * (m * 4 * quarter_rows + column)
                    if width < panel:
                        target = values.ctypes.data
                    one, other, apart = scales.ctypes.data, shifts.ctypes.data, size * lanes
                    _finish(isa, parts, to_half, high, low, ends[0], ends[1], ends[2], one, other, target, apart)
                    if width < panel:
                        for r in range(width):
                            output[m, column + r] = values[r]

    return Kernels(quantize, multiply)


def _compile_lookup(parts: int, half: bool, cached: bool) -> Any:
    rows, vectors, lanes, block, strip, turn = SHAPES[LOOKUP]
    panel, line = vectors * lanes, 4 * vectors * lanes  # outputs, bytes
    most_turns, field, fields = block // turn, JOB, len(JOB)
    number, size, to_half = ("uint16", 2, 1) if half else ("uint32", 4, 0)

    @_function(cached)
    def multiply(address):
        """A unit is `strip` rows of integers and `share` panels: 16 rows of the packed weight, their 64 outputs."""
        job = numba.carray(_pointer(address, "int64"), fields)
        count, code_steps = job[field.words], job[field.code_steps]
        quarter_rows, share = job[field.quarter], job[field.share]
        steps = numba.carray(_pointer(job[field.steps], "float32"), job[field.rows])
        offsets = numba.carray(_pointer(job[field.sums], "int32"), (job[field.rows], parts))
        packed = numba.carray(_pointer(job[field.packed], "uint32"), (quarter_rows, count))
        scale = numba.carray(_pointer(job[field.scale], "float32"), (4, quarter_rows))
        bias = numba.carray(_pointer(job[field.bias], "float32"), (4, quarter_rows))
        output = numba.carray(_pointer(job[field.output], number), (job[field.rows], 4, quarter_rows))

        own = job[field.scratch] + 4 * job[field.own] * _take(address + 8 * field.thread)
        words = numba.carray(_pointer(own, "uint32"), (block, lanes))
        tables = own + 4 * lanes * block
        codes = tables + 1024 * most_turns
        rest = codes + 2 * HALF_TURN * most_turns * share
        values = numba.carray(_pointer(rest, number), (4, lanes))
        scales = numba.carray(_pointer(rest + line, "float32"), (share, 4, lanes))
        shifts = numba.carray(_pointer(rest + line * (1 + share), "float32"), (share, 4, lanes))
        sums = numba.carray(_pointer(rest + line * (1 + 2 * share), "int32"), (strip * share, panel))
        all_panels = -(-quarter_rows // lanes)
        across = -(-all_panels // share)
        while True:
            unit = _take(address + 8 * field.unit)
            if unit >= job[field.units]:
                return
            left, top = unit % across * share, unit // across * strip
            bottom, panels = min(top + strip, job[field.tiles] * rows), min(share, all_panels - left)
            for p in range(panels):
                first = (left + p) * lanes
                for quarter in range(4):
                    for r in range(min(lanes, quarter_rows - first)):
                        scales[p, quarter, r] = scale[quarter, first + r]
                        shifts[p, quarter, r] = bias[quarter, first + r]
            sums[: (bottom - top) * panels] = 0
            for k in range(0, code_steps, block):
                last = min(k + block, code_steps)
                turns, whole = (last - k) // turn, min(last, count) - k
                for p in range(panels):
                    first = (left + p) * lanes
                    if first + lanes <= quarter_rows and whole >= lanes:
                        for j in range(0, whole, lanes):
                            start = min(j, whole - lanes)
                            source = packed.ctypes.data + 4 * (first * count + k + start)
                            _transpose(lanes, source, 4 * count, own + 4 * lanes * start, 4 * lanes)
                    else:
                        for r in range(min(lanes, quarter_rows - first)):
                            for j in range(whole):
                                words[j, r] = packed[first + r, k + j]
                    words[whole : last - k] = 0  # what lies there may be no code, and so change the index
                    _lookup_cut(own, turns, codes + 2 * HALF_TURN * turns * p)
                for m in range(top, bottom, rows):
                    x = job[field.codes] + 4 * (m * code_steps + k * rows)
                    _lookup_tables(x, turns, tables)
                    x += 4 * rows * LOOKED_UP * turns
                    totals = sums.ctypes.data + line * (m - top) * panels
                    for p in range(panels):
                        total = totals + line * rows * p
                        _lookup_tile(tables, x, codes + 2 * HALF_TURN * turns * p, 2 * turns, total)
                    if last < code_steps:
                        continue
                    for i in range(m // parts, min((m + rows) // parts, job[field.rows])):
                        for p in range(panels):
                            first = (left + p) * lanes
                            width = min(lanes, quarter_rows - first)
                            target = output.ctypes.data + size * (4 * i * quarter_rows + first)
                            apart = size * quarter_rows
                            if width < lanes:
                                target, apart = values.ctypes.data, size * lanes
                            high = totals + line * (rows * p + i * parts - m)
                            low, ends = high + line * (parts - 1), (offsets[i, 0], offsets[i, parts - 1], steps[i])
                            one, other = scales.ctypes.data + line * p, shifts.ctypes.data + line * p
                            _finish(
                                LOOKUP, parts, to_half, high, low, ends[0], ends[1], ends[2], one, other, target, apart
                            )
                            if width < lanes:
                                for quarter in range(4):
                                    for r in range(width):
                                        output[i, quarter, first + r] = values[quarter, r]

    return multiply


@cache
def kernels(isa: str, parts: int, half: bool) -> Kernels:
    """The compiled functions, from numba's cache on disk where it has one."""
    try:
        return _compile(isa, parts, half, cached=True)
    except Exception:  # no folder for the cache, a full disk: an error of ours comes again below
        return _compile(isa, parts, half, cached=False)


@cache
def _openmp() -> Callable | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch uses, if it has one.

    With a second pool of threads, torch's, which spin for milliseconds after each of its operations, and ours would
    share the cores: layers were 30 % slower on 2 of them.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel  # looked up in what the library links to
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="diffusers-terdit")


def _run(kernel: Any, job: Tensor, units: int, threads: int) -> None:
    job[JOB.unit] = job[JOB.thread] = 0
    job[JOB.units] = units
    address, threads = job.data_ptr(), min(threads, units)
    parallel = _openmp() if os.getpid() == cpu.PROCESS else None  # OpenMP's threads are lost in a fork
    if threads > 1 and parallel is not None:
        parallel(kernel.address, address, threads, 0)
        return
    helpers = [_pool(os.getpid(), threads - 1).submit(kernel.ctypes, address) for _ in range(threads - 1)]
    try:
        kernel.ctypes(address)
    finally:  # an interrupt must not free what they still read
        wait([helper for helper in helpers if not helper.cancel()])  # one that has not started has nothing left to do


def linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int, isa: str | None = None
) -> Tensor:
    """See `reference.integer_linear`.

    `isa` is for tests: one of `instruction_sets()` instead of the best.
    """
    isa = isa or instruction_sets()[0]
    shape, parts = SHAPES[isa], bits // 8
    out_features, in_features = 4 * weight_packed.shape[0], weight_packed.shape[1]
    half = input.dtype == torch.bfloat16
    flat = input.reshape(-1, in_features)
    flat = (flat if half else flat.float()).contiguous()
    rows, words = len(flat), -(-in_features // 4)
    tiles, code_steps = -(-rows * parts // shape.rows), -(-words // shape.turn) * shape.turn
    threads = torch.get_num_threads() if rows * weight_packed.numel() > 2**16 else 1

    packed = weight_packed.contiguous()
    if in_features % 4:
        packed = torch.nn.functional.pad(packed, (0, 4 * words - in_features))
    elif packed.data_ptr() % 4:
        packed = packed.clone()
    codes = cpu.scratch("integers", tiles * code_steps * shape.rows * 4, torch.int8)
    steps = torch.empty(rows, dtype=torch.float32)  # not the default dtype, which a load in another thread may change
    sums = torch.empty(rows * parts, dtype=torch.int32)
    scale = weight_scale.float().reshape(-1).expand(out_features).contiguous()
    shift = torch.zeros(out_features, dtype=torch.float32) if bias is None else bias.float().contiguous()
    output = flat.new_empty(rows, out_features)
    if isa == LOOKUP:
        groups, strips = -(-len(weight_packed) // shape.lanes), -(-tiles * shape.rows // shape.strip)
        chunks = max(-(-groups // LOOKUP_PANELS), -(-2 * threads // strips) if threads > 1 else 1)
        share = -(-groups // chunks)
        units = strips * -(-groups // share)
    else:
        groups = -(-len(weight_packed) // (shape.vectors * shape.lanes))
        share = 4 if groups >= 4 * threads else 1  # enough units for all threads
        units = groups * 4 // share
    own = scratch_words(isa, words, share)
    buffers = cpu.scratch("panels", threads * own, torch.int32)
    sizes = (rows, in_features, words, code_steps, len(weight_packed), tiles)
    arrays = (flat, codes, steps, sums, packed, scale, shift, output, buffers)
    job = torch.tensor([0, 0, 0, share, *sizes, *[array.data_ptr() for array in arrays], own])

    quantize, multiply = kernels(isa, parts, half)
    _run(quantize, job, tiles, threads)
    _run(multiply, job, units, threads)
    return output.to(input.dtype).reshape(*input.shape[:-1], out_features)

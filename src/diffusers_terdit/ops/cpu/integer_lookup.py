"""The integer kernel for Zen 4: three steps of seven are looked up by vpermw, four multiplied by vpdpbusd.

Zen 4 starts one vpdpbusd of 512 bits per cycle, 64 products, and can permute beside it. Three codes are one of 27
cases, so the 27 sums that three inputs can give fit a register of 32 words, in which vpermw looks up those of 32
outputs: 96 products. What is found is summed in 16 bits for a block of 70 steps, of which 30 are looked up in 40
tables: 40 * 3 * 2 * 128 < 2^15. A tile's tables are made anew for each block, so they serve many outputs: the block's
codes of up to `LOOKUP_PANELS` panels, all four quarters, are cut out first, then the rows pass by, and the sums of all
of them wait in the scratch.
"""

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from .instructions import at, c_function, dot, everywhere, finish, permute, pointer, take, transpose
from .integer import AVX512_VNNI, JOB, Kernel, Shape


LOOKED_UP = 3  # steps of a turn
LOOKUP_PANELS = 24  # of outputs at a time: their codes of a block of steps fit the second cache
HALF_TURN = 640  # bytes: the indices of two tables and two steps of codes, of a panel


@intrinsic
def _tables(typing_context, x, count, tables):
    """`tables` (count, 4, 4 rows, 32) int16 of the sums that `x` (count, 3, 4 rows, 4) int8 can give; addresses.

    Entry c0 + 3 c1 + 9 c2 is c0 x0 + c1 x1 + c2 x2, where x0, x1, x2 are the bytes at one place of three steps.
    """

    def codegen(context, builder, signature, args):
        x, count, tables = args
        i64, words = ir.IntType(64), ir.VectorType(ir.IntType(16), 16)
        four_rows, table = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.IntType(16), 32)
        codes = [ir.Constant(table, [entry // 3**step % 3 for entry in range(32)]) for step in range(LOOKED_UP)]
        with for_range(builder, count) as loop:
            source = builder.add(x, builder.mul(loop.index, i64(16 * LOOKED_UP)))
            target = builder.add(tables, builder.mul(loop.index, i64(64 * 16)))
            loaded = [builder.load(at(builder, source, 16 * step, four_rows), align=1) for step in range(LOOKED_UP)]
            values = [builder.sext(value, words) for value in loaded]
            for number in range(16):
                row, place = number // 4, number % 4
                mask = ir.Constant(ir.VectorType(ir.IntType(32), 32), [number] * 32)
                spread = [builder.shuffle_vector(value, value, mask) for value in values]
                terms = [builder.mul(value, code) for value, code in zip(spread, codes, strict=True)]
                total = builder.add(builder.add(terms[0], terms[1]), terms[2])
                builder.store(total, at(builder, target, 64 * (4 * place + row), table), align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.intp, types.uintp), codegen


@intrinsic
def _cut(typing_context, words, count, target):
    """`target`, what `_tile` reads, from packed `words` (7 count, 16) uint32, those to look up first; addresses.

    A vector of codes is a quarter's. A vector of indices is two quarters', an output of one and one of the other in
    turn, with a byte for each of two tables.
    """

    def codegen(context, builder, signature, args):
        words, count, target = args
        i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), 16)

        def constant(value):
            return ir.Constant(vector, [value] * 16)

        def cut(address, number, quarter):
            word = builder.load(at(builder, address, 64 * number, vector), align=1)
            return builder.and_(builder.lshr(word, constant(6 - 2 * quarter)), constant(0x03030303))

        def store(value, half, number):
            builder.store(value, at(builder, base, HALF_TURN * half + 64 * number, vector), align=1)

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
def _tile(typing_context, tables, x, weights, count, sums):
    """`sums` (4 rows, 4, 16) int32 += `count` half turns: two tables of each row, two steps of `x` (steps, 4 rows, 4).

    All but `count` are addresses.
    """

    def codegen(context, builder, signature, args):
        tables, x, weights, count, sums = args
        i32, i64 = ir.IntType(32), ir.IntType(64)
        ints, shorts = ir.VectorType(i32, 16), ir.VectorType(ir.IntType(16), 32)
        products_of_four, look_up = dot(builder.module, 16), permute(builder.module)

        def load(address, offset, type_):
            return builder.load(at(builder, address, offset, type_), align=1)

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
                    found = builder.call(look_up, [table, indices[pair]])
                    after[shorts, row, pair] = builder.add(after[shorts, row, pair], found)
            codes = [load(weights, 64 * (2 + 4 * step + vector), ints) for vector in range(4)]
            for row in range(4):
                four = everywhere(builder, load(x, 4 * (4 * step + row), i32), ints)
                for vector in range(4):
                    cell = ints, row, vector
                    after[cell] = builder.call(products_of_four, [after[cell], codes[vector], four])
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
                address = at(builder, sums, 64 * (4 * row + vector), ints)
                total = builder.add(builder.load(address, align=1), builder.add(after[ints, row, vector], found))
                builder.store(total, address, align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.intp, types.uintp), codegen


def _compile(shape: Shape, parts: int, half: bool, cached: bool) -> Any:
    rows, vectors, lanes, block, strip, turn = shape
    panel, line = vectors * lanes, 4 * vectors * lanes  # outputs, bytes
    most_turns, field, fields = block // turn, JOB, len(JOB)
    number, size, to_half = ("uint16", 2, 1) if half else ("uint32", 4, 0)

    @c_function(cached, shape, parts, half)
    def multiply(address):
        """A unit is `strip` rows of integers and `share` panels: 16 rows of the packed weight, their 64 outputs."""
        job = numba.carray(pointer(address, "int64"), fields)
        count, code_steps = job[field.words], job[field.code_steps]
        quarter_rows, share = job[field.quarter], job[field.share]
        steps = numba.carray(pointer(job[field.steps], "float32"), job[field.rows])
        offsets = numba.carray(pointer(job[field.sums], "int32"), (job[field.rows], parts))
        packed = numba.carray(pointer(job[field.packed], "uint32"), (quarter_rows, count))
        scale = numba.carray(pointer(job[field.scale], "float32"), (4, quarter_rows))
        bias = numba.carray(pointer(job[field.bias], "float32"), (4, quarter_rows))
        output = numba.carray(pointer(job[field.output], number), (job[field.rows], 4, quarter_rows))

        own = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        words = numba.carray(pointer(own, "uint32"), (block, lanes))
        tables = own + 4 * lanes * block
        codes = tables + 1024 * most_turns
        rest = codes + 2 * HALF_TURN * most_turns * share
        values = numba.carray(pointer(rest, number), (4, lanes))
        scales = numba.carray(pointer(rest + line, "float32"), (share, 4, lanes))
        shifts = numba.carray(pointer(rest + line * (1 + share), "float32"), (share, 4, lanes))
        sums = numba.carray(pointer(rest + line * (1 + 2 * share), "int32"), (strip * share, panel))
        all_panels = -(-quarter_rows // lanes)
        across = -(-all_panels // share)
        while True:
            unit = take(address + 8 * field.unit)
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
                            transpose(lanes, source, 4 * count, own + 4 * lanes * start, 4 * lanes)
                    else:
                        for r in range(min(lanes, quarter_rows - first)):
                            for j in range(whole):
                                words[j, r] = packed[first + r, k + j]
                    words[whole : last - k] = 0  # what lies there may be no code, and so change the index
                    _cut(own, turns, codes + 2 * HALF_TURN * turns * p)
                for m in range(top, bottom, rows):
                    x = job[field.codes] + 4 * (m * code_steps + k * rows)
                    _tables(x, turns, tables)
                    x += 4 * rows * LOOKED_UP * turns
                    totals = sums.ctypes.data + line * (m - top) * panels
                    for p in range(panels):
                        total = totals + line * rows * p
                        _tile(tables, x, codes + 2 * HALF_TURN * turns * p, 2 * turns, total)
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
                            finish(
                                vectors, lanes, parts, to_half, high, low, ends[0], ends[1], ends[2],
                                one, other, target, apart,
                            )  # fmt: skip
                            if width < lanes:
                                for quarter in range(4):
                                    for r in range(width):
                                        output[i, quarter, first + r] = values[quarter, r]

    return multiply


def _divide(shape: Shape, quarter_rows: int, tiles: int, threads: int) -> tuple[int, int]:
    """A unit is a strip of rows and a share of panels, each 16 rows of the packed weight."""
    panels, strips = -(-quarter_rows // shape.lanes), -(-tiles * shape.rows // shape.strip)
    chunks = max(-(-panels // LOOKUP_PANELS), -(-2 * threads // strips) if threads > 1 else 1)
    share = -(-panels // chunks)
    return share, strips * -(-panels // share)


def _scratch_words(shape: Shape, words: int, share: int) -> int:
    """Hold a block of a transposed panel, a tile's tables, a row of results; per panel scales, shifts, codes, sums.

    Or hold a row's integers, before that.
    """
    panel, turns = shape.vectors * shape.lanes, shape.steps // shape.turn
    shared = shape.steps * shape.lanes + turns * 256 + panel
    needed = shared + share * (2 * panel + turns * HALF_TURN // 2 + shape.strip * panel)
    return max(needed, -(-2 * words // 16) * 16)  # whole cache lines


KERNEL = Kernel(
    name="avx512_vnni_lookup",
    features=(frozenset(AVX512_VNNI | {"+avx512bw"}),),
    shape=Shape(rows=4, vectors=4, lanes=16, steps=70, strip=256, turn=7),
    divide=_divide,
    scratch_words=_scratch_words,
    compile=_compile,
    processor="znver4",  # measured there alone
)

"""The integer kernel for Zen 4: three steps of seven are looked up by vpermw, four multiplied by vpdpbusd.

Zen 4 starts one vpdpbusd of 512 bits per cycle, 64 products, and can permute, too. Three codes are one of 27
cases, so the 27 sums that three inputs can give fit a register of 32 words, in which vpermw looks up those of 32
outputs: 96 products. What is found is summed in 16 bits for a block of 70 steps, of which 30 are looked up in 40
tables: 40 * 3 * 2 * 128 < 2^15. A tile's tables are made again for each block, so they serve many outputs: the block's
codes of up to `PANELS` panels are cut out first, then the rows pass by, and the sums of all of them wait in the
scratch.
"""

from llvmlite import ir
from numba import types
from numba.core.cgutils import for_range
from numba.extending import intrinsic

from .instructions import at, dot, everywhere, permute
from .integer import AVX512_VNNI, Hooks, Kernel, Shape, add_or_store


LOOKED_UP = 3  # steps of a turn
PANELS = 24  # of outputs at a time: their codes of a block of steps fit the second cache
HALF_TURN = 640  # bytes: the indices of two tables and two steps of codes, of a panel


@intrinsic
def _tables(typing_context, x, steps, tables):
    """`tables` (turns, 4, 4 rows, 32) int16 of the sums that `x` (turns, 3, 4 rows, 4) int8 can give; addresses.

    Entry c0 + 3 c1 + 9 c2 is c0 x0 + c1 x1 + c2 x2, where x0, x1, x2 are the bytes at one place of three steps.
    """

    def codegen(context, builder, signature, args):
        x, steps, tables = args
        count = builder.sdiv(steps, steps.type(7))
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
def _cut(typing_context, words, steps, target, apart):
    """`target`, what `_tile` reads, from packed `words` (7 turns, 16) uint32, those to look up first; addresses.

    A vector of codes is a quarter's. A vector of indices is two quarters', an output of one and one of the other in
    turn, with a byte for each of two tables.
    """

    def codegen(context, builder, signature, args):
        words, steps, target, _ = args
        count = builder.sdiv(steps, steps.type(7))
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

    return types.void(types.uintp, types.intp, types.uintp, types.intp), codegen


@intrinsic
def _tile(typing_context, tables, x, weights, apart, steps, sums, first):
    """`sums` (4 rows, 4, 16) int32 of half turns: two tables of each row, two steps of `x` (steps, 4 rows, 4)."""

    def codegen(context, builder, signature, args):
        tables, x, weights, _, steps, sums, first = args
        turns = builder.sdiv(steps, steps.type(7))
        count = builder.mul(turns, turns.type(2))
        x = builder.add(x, builder.mul(turns, turns.type(16 * LOOKED_UP)))
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
        half, results = ir.Constant(ints, [16] * 16), {}
        for row in range(4):
            for vector in range(4):
                both = builder.bitcast(after[shorts, row, vector // 2], ints)
                found = builder.ashr(both if vector % 2 else builder.shl(both, half), half)
                results[64 * (4 * row + vector)] = builder.add(after[ints, row, vector], found)
        add_or_store(builder, builder.icmp_signed("!=", first, first.type(0)), sums, results)
        return context.get_dummy_value()

    address, size = types.uintp, types.intp
    return types.void(address, address, address, size, size, address, size), codegen


KERNEL = Kernel(
    name="avx512_vnni_lookup",
    features=frozenset(AVX512_VNNI | {"+avx512bw"}),
    shape=Shape(rows=4, lanes=16, vectors=4, steps=70, strip=256, panels=PANELS, turn=7, near=PANELS),
    hooks=Hooks(_cut, _tile, prepare=_tables, table_words=256),
    processors=("znver4", "znver5"),  # measured there alone
)

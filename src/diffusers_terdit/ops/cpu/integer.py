"""Integer matmuls on packed weights, compiled by numba at first use (and cached on disk after).

`linear` is `reference.integer_linear` to the last bit: activations become integers per row (8 bits, or 16 as two
signed bytes, x = step * (256 high + low)), the products with the codes 0, 1, 2 are summed exactly in int32, and what
the codes' offset of one added, the sum of the row's integers, is subtracted. It reads the packed weight as it is
stored, so there is no second copy. The rows' integers are in the order in which they are read, of all rows of a tile.
Each group of inputs with its own scales has its own steps and sums, and is padded to whole turns of the loop.

A panel is as many rows of the packed weight as a vector has lanes: four vectors of outputs, one of each quarter. All
kernels share one loop, `_compile_multiply`: it transposes 4 bytes (four inputs) of a panel's rows at a time into a
scratch, cuts the four quarters out of a block of it, and lets the rows of the input pass by while it is in the cache.
A `Kernel` says with what: the order of the codes, and `tile`, the inner loop. `KERNELS` have these:

    "avx512_vnni"         vpdpbusd on 16 outputs
    "avx_vnni"            vpdpbusd on 8 outputs
    "neon_sdot"           sdot on 4 outputs, on ARM
    "avx2"                vpmaddubsw, summed in 16 bits for 64 steps: 64 * 2 * 2 * 128 = 2^15 is the most that fits
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

from .. import reference
from . import scratch
from .instructions import (
    Processor,
    as_float,
    at,
    c_function,
    dot,
    everywhere,
    finish,
    pointer,
    rounded_ratio,
    take,
    transpose,
)
from .threads import new_job, run, threads_for


class Shape(NamedTuple):
    """Sizes of the loops. A step is 4 inputs."""

    rows: int  # of integers in a tile: those of the inner loop
    lanes: int  # outputs per vector, packed rows per panel
    vectors: int  # of the four of a panel whose codes of a step are side by side
    steps: int  # whose codes are cut out at a time: a block
    strip: int  # rows of integers that pass by a block of the weight: they stay in the second cache
    panels: int  # at most, by which the same rows pass in a unit of work
    turn: int = 2  # steps of the inner loop's turn: a group is whole turns
    run: int = 1  # steps of a row of integers that are together
    near: int = 1  # panels by which a tile of rows passes while it is in the first cache
    signed: int = 0  # 1: codes are -1, 0, 1, so that there is nothing to subtract from their sums


@intrinsic
def _no_setup(typing_context):
    return types.void(), lambda context, builder, signature, args: context.get_dummy_value()


@intrinsic
def _no_tables(typing_context, x, steps, tables):
    return types.void(x, steps, tables), lambda context, builder, signature, args: context.get_dummy_value()


class Hooks(NamedTuple):
    """What the loops of a kernel call: intrinsics, of addresses and numbers."""

    cut: Any  # (words (steps, lanes), steps, codes, apart): a panel's codes, in the order in which `tile` reads them
    tile: Any  # (tables, x, codes, apart, steps, sums, first): sums (rows, 4, lanes) = codes . x, or += unless `first`
    begin: Any = _no_setup  # (), of a thread
    end: Any = _no_setup
    prepare: Any = _no_tables  # (x, steps, tables): of a tile's rows, for all panels that are near
    table_words: int = 0  # of 32 bits, of a turn


class Kernel(NamedTuple):
    """An integer matmul for the processors that have its instructions."""

    name: str
    features: frozenset[str]  # that the processor has
    shape: Shape
    hooks: Hooks
    processors: tuple[str, ...] = ()  # that it is for alone, as LLVM spells them

    def runs_on(self, processor: Processor) -> bool:
        """Whether a processor has the instructions."""
        listed = not self.processors or processor.name in self.processors
        return listed and self.features <= processor.features


class Functions(NamedTuple):
    """Two C functions of one argument, the address of a `Job`. Any number of threads run one at a time."""

    quantize: Any
    multiply: Any


class Job(NamedTuple):
    """What a function works on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int  # counts the threads that came
    units: int
    strip: int  # rows of integers of a unit, as `_divide` gave it
    share: int  # panels of a unit
    rows: int  # M
    groups: int  # of inputs: one, or as many as a row of the weight has scales
    group: int  # inputs of a group
    words: int  # the same / 4, rounded up
    group_steps: int  # the same, rounded up to whole turns of the inner loop
    quarter: int  # N / 4
    tiles: int  # of rows: M * parts / rows of a tile, rounded up
    input: int  # (M, groups, group) float32 or bfloat16
    codes: int  # (tiles, groups * group_steps / run, rows of a tile, run, 4) int8; zero beyond a group
    steps: int  # (M, groups) float32
    sums: int  # (M, groups) int32, of the integers
    packed: int  # (quarter, groups * words) uint32
    scale: int  # (4, quarter, groups) float32
    bias: int  # (4, quarter) float32
    output: int  # (M, 4, quarter), as `input`
    scratch: int  # (threads, own) uint32
    own: int


JOB = Job(*range(len(Job._fields)))
f32, i32, u32 = numba.float32, numba.int32, numba.uint32


def cut_of(shape: Shape) -> Any:
    """Return the `cut` that masks the bits of a quarter: codes (4 / vectors, steps, vectors, lanes, 4), `apart`."""
    lanes, vectors = shape.lanes, shape.vectors
    line = 4 * lanes

    @intrinsic
    def cut(typing_context, words, steps, codes, apart):
        def codegen(context, builder, signature, args):
            words, steps, codes, apart = args
            i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), lanes)
            ones = ir.Constant(ir.VectorType(ir.IntType(8), line), [1] * line)

            def constant(value):
                return ir.Constant(vector, [value] * lanes)

            with for_range(builder, steps) as loop:
                source = builder.add(words, builder.mul(loop.index, i64(line)))
                word = builder.load(at(builder, source, 0, vector), align=1)
                target = builder.add(codes, builder.mul(loop.index, i64(vectors * line)))
                for quarter in range(4):
                    code = builder.and_(builder.lshr(word, constant(6 - 2 * quarter)), constant(0x03030303))
                    if shape.signed:
                        code = builder.sub(builder.bitcast(code, ones.type), ones)
                    builder.store(code, at(builder, target, quarter % vectors * line, code.type), align=1)
                    if quarter % vectors == vectors - 1:
                        target = builder.add(target, apart)
            return context.get_dummy_value()

        return types.void(types.uintp, types.intp, types.uintp, types.intp), codegen

    return cut


def _tile_of(instruction: str, shape: Shape) -> Any:
    """Return the `tile` that keeps its sums in vector registers, those of `shape.vectors` at a time."""
    rows, lanes, vectors, turn = shape.rows, shape.lanes, shape.vectors, shape.turn
    line = 4 * lanes

    @intrinsic
    def tile(typing_context, tables, x, codes, apart, steps, sums, first):
        def codegen(context, builder, signature, args):
            _, x, codes, apart, steps, sums, first = args
            i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
            ints = ir.VectorType(i32, lanes)
            module = builder.module

            def function(llvm_name, result, *parameters):
                declared = module.declare_intrinsic(llvm_name, (), ir.FunctionType(result, parameters))
                return lambda *values: builder.call(declared, values)

            if instruction == "vpmaddubsw":
                total, operand = ir.VectorType(i16, 2 * lanes), ir.VectorType(i8, 4 * lanes)
                multiply = function("llvm.x86.avx2.pmadd.ub.sw", total, operand, operand)
                widen = function("llvm.x86.avx2.pmadd.wd", ints, total, total)
                ones = ir.Constant(total, [1] * 2 * lanes)
            else:
                total = operand = ints
                products_of_four = dot(module, lanes)

            def load(address, offset, type_):
                return builder.load(at(builder, address, offset, type_), align=1)

            grid = [(row, vector) for row in range(rows) for vector in range(vectors)]
            is_first = builder.icmp_signed("!=", first, first.type(0))
            for begin in range(0, 4, vectors):
                start, loop, end = builder.block, builder.append_basic_block(), builder.append_basic_block()
                builder.branch(loop)
                builder.position_at_end(loop)
                step = builder.phi(i64)
                step.add_incoming(i64(0), start)
                before = {cell: builder.phi(total) for cell in grid}
                after = dict(before)
                inputs = builder.add(x, builder.mul(step, i64(4 * rows)))
                base = builder.add(codes, builder.mul(step, i64(line * vectors)))
                for number in range(turn):
                    weights = [load(base, line * (number * vectors + vector), operand) for vector in range(vectors)]
                    for row in range(rows):
                        four = everywhere(builder, load(inputs, 4 * (number * rows + row), i32), ints)
                        for vector in range(vectors):
                            cell = row, vector
                            if instruction == "vpmaddubsw":
                                products = multiply(weights[vector], builder.bitcast(four, operand))
                                after[cell] = builder.add(after[cell], products)
                            else:
                                after[cell] = builder.call(products_of_four, [after[cell], weights[vector], four])
                next_step = builder.add(step, i64(turn))
                step.add_incoming(next_step, loop)
                for cell in grid:
                    before[cell].add_incoming(ir.Constant(total, [0] * total.count), start)
                    before[cell].add_incoming(after[cell], loop)
                builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, end)
                builder.position_at_end(end)
                if instruction == "vpmaddubsw":
                    after = {cell: widen(value, ones) for cell, value in after.items()}
                add_or_store(builder, is_first, sums, {line * (4 * row + begin + v): after[row, v] for row, v in grid})
                codes = builder.add(codes, apart)
            return context.get_dummy_value()

        address, size = types.uintp, types.intp
        return types.void(address, address, address, size, size, address, size), codegen

    return tile


def add_or_store(builder: ir.IRBuilder, is_first: ir.Value, address: ir.Value, values: dict[int, ir.Value]) -> None:
    """Write vectors, by offset from an address; add what is there unless `is_first`."""
    with builder.if_else(is_first) as (then, otherwise):
        with then:
            for offset, value in values.items():
                builder.store(value, at(builder, address, offset, value.type), align=1)
        with otherwise:
            for offset, value in values.items():
                place = at(builder, address, offset, value.type)
                builder.store(builder.add(builder.load(place, align=1), value), place, align=1)


def _compile_quantize(shape: Shape, parts: int, half: bool, cached: bool) -> Any:
    rows, run = shape.rows, shape.run
    largest_code, none = reference.LARGEST_CODE[8 * parts], 1e-12
    nan, infinity, magnitude = 0x7FC00000, 0x7F800000, 0x7FFFFFFF
    field, fields = JOB, len(JOB)
    number, shift = ("uint16", 16) if half else ("uint32", 0)

    @c_function(cached, shape, parts, half)
    def quantize(address):
        """A unit is the rows of a tile."""
        job = numba.carray(pointer(address, "int64"), fields)
        groups, group, group_steps = job[field.groups], job[field.group], job[field.group_steps]
        runs = groups * group_steps // run
        input = numba.carray(pointer(job[field.input], number), (job[field.rows], groups, group))
        codes = numba.carray(pointer(job[field.codes], "uint32"), (job[field.tiles], runs, rows, run))
        steps = numba.carray(pointer(job[field.steps], "float32"), (job[field.rows], groups))
        sums = numba.carray(pointer(job[field.sums], "int32"), (job[field.rows], groups))
        own = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        own_codes = numba.carray(pointer(own, "int8"), (parts, groups, 4 * group_steps))
        own_words = numba.carray(pointer(own, "uint32"), (parts, runs, run))
        own_codes[:] = 0
        while True:
            tile = take(address + 8 * field.unit)
            if tile >= job[field.units]:
                return
            for m in range(tile * rows // parts, min((tile + 1) * rows // parts, job[field.rows])):
                for g in range(groups):
                    row, high_codes, low_codes, total = input[m, g], own_codes[0, g], own_codes[parts - 1, g], i32(0)
                    largest = u32(0)  # magnitude, as bits: they are ordered as the numbers are
                    for k in range(group):
                        largest = max(largest, u32(u32(u32(row[k]) << shift) & u32(magnitude)))
                    finite = largest < u32(infinity)
                    step = max(as_float(largest), f32(none)) / f32(largest_code)
                    reciprocal = f32(1) / step
                    steps[m, g] = step if finite else as_float(u32(nan))
                    for k in range(group):
                        code = rounded_ratio(as_float(u32(u32(row[k]) << shift)), step, reciprocal)
                        code = code if finite else i32(0)
                        total = i32(total + code)  # numba would go on in 64 bits
                        if parts == 2:
                            high = i32(i32(code + i32(128)) >> i32(8))
                            high_codes[k] = high
                            code = i32(code - (high << i32(8)))
                        low_codes[k] = code
                    sums[m, g] = total
                for part in range(parts):
                    place = m * parts + part - tile * rows
                    for k in range(runs):
                        for r in range(run):
                            codes[tile, k, place, r] = own_words[part, k, r]

    return quantize


def _compile_multiply(kernel: Kernel, parts: int, half: bool, cached: bool) -> Any:
    rows, lanes, vectors, block, _, _, turn, _, near, signed = shape = kernel.shape
    cut, tile, begin, end, prepare, table_words = kernel.hooks
    line, tokens = 4 * lanes, rows // parts  # outputs of a panel
    field, fields = JOB, len(JOB)
    number, size, to_half = ("uint16", 2, 1) if half else ("uint32", 4, 0)

    @c_function(cached, kernel.name, shape, parts, half)
    def multiply(address):
        """A unit is `strip` rows of integers and `share` panels."""
        job = numba.carray(pointer(address, "int64"), fields)
        groups, group_words, group_steps = job[field.groups], job[field.words], job[field.group_steps]
        quarter_rows, strip, share = job[field.quarter], job[field.strip], job[field.share]
        count, code_steps = groups * group_words, groups * group_steps
        packed = numba.carray(pointer(job[field.packed], "uint32"), (quarter_rows, count))
        scale = numba.carray(pointer(job[field.scale], "float32"), (4, quarter_rows, groups))
        bias = numba.carray(pointer(job[field.bias], "float32"), (4, quarter_rows))
        output = numba.carray(pointer(job[field.output], number), (job[field.rows], 4, quarter_rows))

        own = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        words = numba.carray(pointer(own, "uint32"), (block, lanes))
        tables = own + 4 * lanes * block
        codes = tables + 4 * table_words * (block // turn)
        rest = codes + 16 * lanes * block * near
        values = numba.carray(pointer(rest, number), (tokens, 4, lanes))
        rest += 4 * tokens * line
        shifts = numba.carray(pointer(rest, "float32"), (share, 4, lanes))
        scales = numba.carray(pointer(rest + 4 * line * share, "float32"), (share, groups, 4, lanes))
        sums = rest + 4 * line * share * (1 + groups)
        totals = sums + 4 * line * share * strip
        pieces = -(-group_steps // block)  # of a group, a block each
        together = max(1, block // group_steps)  # groups of a block
        all_panels = -(-quarter_rows // lanes)
        across = -(-all_panels // share)
        begin()
        while True:
            unit = take(address + 8 * field.unit)
            if unit >= job[field.units]:
                break
            left, top = unit % across * share, unit // across * strip
            bottom, panels = min(top + strip, job[field.tiles] * rows), min(share, all_panels - left)
            for p in range(panels):
                first = (left + p) * lanes
                for quarter in range(4):
                    for r in range(min(lanes, quarter_rows - first)):
                        shifts[p, quarter, r] = bias[quarter, first + r]
                        for g in range(groups):
                            scales[p, g, quarter, r] = scale[quarter, first + r, g]
            for part in range(-(-groups // together) * pieces):
                group, start = part // pieces * together, part % pieces * block
                some, steps = min(together, groups - group), min(block, group_steps - start)
                whole = (some - 1) * group_words + min(steps, group_words - start)
                source = group * group_words + start
                apart = line * vectors * some * steps
                is_first, is_last = start == 0, start + steps == group_steps
                for nearest in range(0, panels, near):
                    farthest = min(nearest + near, panels)
                    for p in range(nearest, farthest):
                        first = (left + p) * lanes
                        if first + lanes <= quarter_rows and whole >= lanes:
                            for j in range(0, whole, lanes):
                                to = min(j, whole - lanes)
                                address_ = job[field.packed] + 4 * (first * count + source + to)
                                transpose(lanes, address_, 4 * count, own + 4 * lanes * to, 4 * lanes)
                        else:
                            for r in range(min(lanes, quarter_rows - first)):
                                for j in range(whole):
                                    words[j, r] = packed[first + r, source + j]
                        words[whole : (some - 1) * group_words + steps] = 0  # what is there may be no code
                        for g in range(some):
                            target = codes + 4 * line * block * (p - nearest) + line * vectors * steps * g
                            cut(own + 4 * lanes * group_words * g, steps, target, apart)
                    for m in range(top, bottom, rows):
                        x = job[field.codes] + 4 * rows * (m // rows * code_steps + group * group_steps + start)
                        for g in range(some):
                            prepare(x + 4 * rows * steps * g, steps, tables + 4 * table_words * (steps // turn) * g)
                        i = m // parts
                        for p in range(nearest, farthest):
                            first = (left + p) * lanes
                            width = min(lanes, quarter_rows - first)
                            total = sums + (4 * line * (p * strip + m - top) if pieces > 1 else 0)
                            waiting = totals + 4 * line * (p * strip + m - top)
                            target, down, over = job[field.output], size * 4 * quarter_rows, size * quarter_rows
                            target += down * i + size * first
                            if width < lanes:
                                target, down, over = rest - 4 * tokens * line, size * line, size * lanes
                            for g in range(some):
                                weights = codes + 4 * line * block * (p - nearest) + line * vectors * steps * g
                                table = tables + 4 * table_words * (steps // turn) * g
                                tile(table, x + 4 * rows * steps * g, weights, apart, steps, total, is_first)
                                this = group + g
                                if is_last:
                                    finish(
                                        lanes,
                                        parts,
                                        to_half,
                                        signed,
                                        total,
                                        min(tokens, job[field.rows] - i),
                                        job[field.sums] + 4 * (i * groups + this),
                                        4 * groups,
                                        scales.ctypes.data + 4 * line * (p * groups + this),
                                        waiting,
                                        this == 0,
                                        this == groups - 1,
                                        job[field.steps] + 4 * (i * groups + this),
                                        shifts.ctypes.data + 4 * line * p,
                                        target,
                                        down,
                                        over,
                                    )
                            if width < lanes and is_last and group + some == groups:
                                for token in range(min(tokens, job[field.rows] - i)):
                                    for quarter in range(4):
                                        for r in range(width):
                                            output[i + token, quarter, first + r] = values[token, quarter, r]
        end()

    return multiply


def _divide(shape: Shape, quarter_rows: int, tiles: int, threads: int) -> tuple[int, int, int]:
    """Return rows of integers and panels of a unit, and the number of units: enough for all threads."""
    panels, wanted = -(-quarter_rows // shape.lanes), 2 * threads if threads > 1 else 1
    strips = max(-(-tiles * shape.rows // shape.strip), min(-(-wanted // panels), tiles), 1)
    strip = max(1, -(-tiles // strips))
    strips = -(-tiles // strip)
    share = -(-panels // max(-(-panels // shape.panels), min(panels, -(-wanted // max(1, strips)))))
    return strip * shape.rows, share, strips * -(-panels // share)


def _own_words(kernel: Kernel, parts: int, groups: int, group_steps: int, strip: int, share: int) -> int:
    """Words of 32 bits of a thread: those of `multiply`, or a row's integers, before that."""
    shape = kernel.shape
    block, panel, tables = shape.steps * shape.lanes, 4 * shape.lanes, kernel.hooks.table_words
    waiting = strip if groups > 1 else 0
    shared = block + tables * (shape.steps // shape.turn) + 4 * block * shape.near + shape.rows * panel
    needed = shared + share * panel * (1 + groups + strip + waiting)
    return max(needed, -(-parts * groups * group_steps // 16) * 16)  # whole cache lines


AVX512_VNNI = {"+avx512vnni", "+avx512vl"}
WIDE = Shape(rows=8, lanes=16, vectors=2, steps=256, strip=256, panels=2)
NARROW = Shape(rows=6, lanes=8, vectors=2, steps=64, strip=126, panels=2)


def _in_vectors(name: str, instruction: str, shape: Shape, features: set[str]) -> Kernel:
    return Kernel(name, frozenset(features), shape, Hooks(cut_of(shape), _tile_of(instruction, shape)))


KERNELS = (  # best first
    _in_vectors("avx512_vnni", "vpdpbusd", WIDE, AVX512_VNNI),
    _in_vectors("avx_vnni", "vpdpbusd", NARROW._replace(steps=256), {"+avxvnni"}),
    _in_vectors("avx2", "vpmaddubsw", NARROW, {"+avx2", "+fma"}),
    _in_vectors("neon_sdot", "sdot", NARROW._replace(lanes=4, steps=256), {"+dotprod"}),
)


def compile_functions(kernel: Kernel, parts: int, half: bool, cached: bool) -> Functions:
    """Compile a kernel for bfloat16 (`half`) or float32, with activations of as many bytes as `parts`."""
    return Functions(
        _compile_quantize(kernel.shape, parts, half, cached), _compile_multiply(kernel, parts, half, cached)
    )


@cache
def compiled(kernel: Kernel, parts: int, half: bool) -> Functions:
    """Return the compiled functions, from numba's cache on disk where it has them."""
    try:
        return compile_functions(kernel, parts, half, cached=True)
    except Exception:  # no folder for the cache, a full disk: an error of ours comes again below
        return compile_functions(kernel, parts, half, cached=False)


def linears(
    kernel: Kernel, input: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]], bits: int
) -> list[Tensor]:
    """Compute `reference.integer_linear` of one input, which is rounded once, and each of several weights.

    Args:
        kernel ([`Kernel`]): That this processor runs.
        input (`torch.Tensor`): (..., K), float.
        weights (`list` of `tuple`): `weight_packed` (N/4, K) uint8, `weight_scale` and `bias` (N,) or `None`, each.
        bits (`int`): 8 or 16.

    Returns:
        List of `torch.Tensor`: (..., N) each, `input`'s dtype.
    """
    shape, parts = kernel.shape, bits // 8
    in_features, half = input.shape[-1], input.dtype == torch.bfloat16
    flat = input.reshape(-1, in_features)
    flat = (flat if half else flat.float()).contiguous()
    rows, tiles = len(flat), -(-len(flat) * parts // shape.rows)
    quantize, multiply = compiled(kernel, parts, half)
    outputs: list[Tensor] = []
    laid_out = 0  # the groups that the integers are in
    for weight_packed, weight_scale, bias in weights:
        quarter = len(weight_packed)
        groups = weight_scale.shape[1] if reference.is_grouped(weight_scale) else 1
        group = in_features // groups
        words, group_steps = -(-group // 4), -(-group // (4 * shape.turn)) * shape.turn
        threads = threads_for(rows * weight_packed.numel())
        packed = weight_packed.contiguous()
        if group % 4:
            packed = torch.nn.functional.pad(packed.view(quarter, groups, group), (0, 4 * words - group))
        elif packed.data_ptr() % 4:
            packed = packed.clone()
        scale = weight_scale.float().reshape(-1, groups).expand(4 * quarter, groups).contiguous()
        shift = torch.zeros(4 * quarter, dtype=torch.float32) if bias is None else bias.float().contiguous()
        output = flat.new_empty(rows, 4 * quarter)
        strip, share, units = _divide(shape, quarter, tiles, threads)
        own = _own_words(kernel, parts, groups, group_steps, strip, share)
        buffers = scratch.take("panels", threads * own, torch.int32)
        if groups != laid_out:
            codes = scratch.take("integers", tiles * groups * group_steps * shape.rows * 4, torch.int8)
            sums = torch.empty(rows * groups, dtype=torch.int32)
            # not the default dtype, which a load in another thread may change
            steps = torch.empty(rows * groups, dtype=torch.float32)
        sizes = (strip, share, rows, groups, group, words, group_steps, quarter, tiles)
        arrays = (flat, codes, steps, sums, packed, scale, shift, output, buffers)
        job = new_job(*sizes, *[array.data_ptr() for array in arrays], own)
        if groups != laid_out:
            run(quantize, job, tiles, threads)
            laid_out = groups
        run(multiply, job, units, threads)
        outputs.append(output.to(input.dtype).reshape(*input.shape[:-1], 4 * quarter))
    return outputs


def linear(
    kernel: Kernel, input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Compute `reference.integer_linear`."""
    return linears(kernel, input, [(weight_packed, weight_scale, bias)], bits)[0]

"""Integer matmuls on packed weights for x86 processors, compiled by numba at first use (and cached on disk after).

`linear` is `reference.integer_linear` to the last bit: activations become integers per row (8 bits, or 16 as two
signed bytes, x = step * (256 high + low)), the products with the codes 0, 1, 2 are summed exactly in int32, and what
the codes' offset of one added, the sum of the row's integers, is subtracted. It reads the packed weight as it is
stored, so there is no second copy: 4 bytes (four inputs) of `PANEL` rows at a time are transposed into a scratch, the
two bits of a quarter are cut out of a block of it, and all rows of the input pass by while it is in the cache. The
rows' integers lie in the order in which they are read: the four inputs of each step, of all rows of a tile.

One inner loop, `tile`, in the instructions the processor has:

    "avx512_vnni"  vpdpbusd on 16 outputs
    "avx_vnni"     vpdpbusd on 8 outputs (also avx512_vnni with 256-bit registers)
    "avx2"         vpmaddubsw, summed in 16 bits for 64 steps: 64 * 2 * 2 * 128 = 2^15 is the most that fits
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


SHAPES = {
    "avx512_vnni": Shape(rows=8, vectors=3, lanes=16, steps=256, strip=256),
    "avx_vnni": Shape(rows=6, vectors=2, lanes=8, steps=256, strip=126),
    "avx2": Shape(rows=6, vectors=2, lanes=8, steps=256, strip=126),
}
AVX2_STEPS = 64
UNROLL = 2  # steps per turn of the inner loop


@cache
def instruction_sets() -> tuple[str, ...]:
    """Those of `SHAPES` that numba compiles for on this machine, best first."""
    features = set(cpu_target.target_context.codegen().magic_tuple()[-1].split(","))
    has = {
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


@intrinsic(prefer_literal=True)
def _tile(typing_context, name, x, codes, steps, sums):
    """`sums` (rows, PANEL) int32 += `codes` (steps, PANEL, 4) uint8 . `x` (steps, rows, 4) int8; addresses.

    The steps are rounded up to a multiple of `UNROLL`: there `x` is zero.
    """
    isa = name.literal_value
    rows, vectors, lanes = SHAPES[isa][:3]

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
            return builder.load(builder.inttoptr(builder.add(address, i64(offset)), type_.as_pointer()), align=1)

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
        for turn in range(UNROLL):
            weights = [load(base, 4 * lanes * (turn * vectors + vector), operand) for vector in range(vectors)]
            for row in range(rows):
                undefined = ir.Constant(ints, ir.Undefined)
                four = builder.insert_element(undefined, load(inputs, 4 * (turn * rows + row), i32), i32(0))
                four = builder.shuffle_vector(four, undefined, ir.Constant(ints, [0] * lanes))  # in every lane
                for vector in range(vectors):
                    cell = row, vector
                    if isa == "avx2":
                        products = multiply(weights[vector], builder.bitcast(four, operand))
                        after[cell] = builder.add(after[cell], products)
                    else:
                        after[cell] = builder.call(dot, [after[cell], weights[vector], four])
        next_step = builder.add(step, i64(UNROLL))
        step.add_incoming(next_step, loop)
        for cell in grid:
            before[cell].add_incoming(ir.Constant(total, [0] * total.count), start)
            before[cell].add_incoming(after[cell], loop)
        builder.cbranch(builder.icmp_signed("<", next_step, steps), loop, end)
        builder.position_at_end(end)
        for row, vector in grid:
            offset = 4 * lanes * (row * vectors + vector)
            result = widen(after[row, vector], ones) if isa == "avx2" else after[row, vector]
            address = builder.inttoptr(builder.add(sums, i64(offset)), ints.as_pointer())
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
        undefined = ir.Constant(vector, ir.Undefined)
        shift = builder.insert_element(undefined, builder.trunc(bits, ir.IntType(32)), ir.IntType(32)(0))
        shift = builder.shuffle_vector(shift, undefined, ir.Constant(vector, [0] * size))
        with for_range(builder, count) as loop:
            offset = builder.mul(loop.index, i64(4 * size))
            source = builder.inttoptr(builder.add(words, offset), vector.as_pointer())
            codes = builder.lshr(builder.load(source, align=1), shift)
            codes = builder.and_(codes, ir.Constant(vector, [0x03030303] * size))
            builder.store(codes, builder.inttoptr(builder.add(target, offset), vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(lanes, types.uintp, types.intp, types.uintp, types.intp), codegen


@intrinsic(prefer_literal=True)
def _finish(typing_context, name, parts, half, high, low, high_offset, low_offset, step, scales, shifts, output):
    """A row of a panel: output = sum * scale * step + shift, sum = 256 (high - its offset) + low - its offset.

    All but offsets and step are addresses. With one part `high` is all there is; with `half` 1 the output is bfloat16,
    rounded half to even, else float32.
    """
    shape, two, to_half = SHAPES[name.literal_value], parts.literal_value == 2, half.literal_value
    lanes = shape.lanes

    def codegen(context, builder, signature, args):
        high, low, high_offset, low_offset, step, scales, shifts, output = args[3:]
        i32, i64 = ir.IntType(32), ir.IntType(64)
        ints, floats, shorts = (ir.VectorType(type_, lanes) for type_ in (i32, ir.FloatType(), ir.IntType(16)))

        def everywhere(value, type_):
            undefined = ir.Constant(type_, ir.Undefined)
            filled = builder.insert_element(undefined, value, i32(0))
            return builder.shuffle_vector(filled, undefined, ir.Constant(ints, [0] * lanes))

        def constant(value):
            return ir.Constant(ints, [value] * lanes)

        def place(address, offset, type_):
            return builder.inttoptr(builder.add(address, i64(offset)), type_.as_pointer())

        high_offset, low_offset = everywhere(high_offset, ints), everywhere(low_offset, ints)
        step = everywhere(step, floats)
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
                builder.store(word, place(output, offset // 2, shorts), align=1)
            else:
                builder.store(value, place(output, offset, floats), align=1)
        return context.get_dummy_value()

    address, integer = types.uintp, types.int32
    numbers = address, address, integer, integer, types.float32, address, address, address
    return types.void(name, parts, half, *numbers), codegen


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
    quarters: int  # of a group of packed rows, per unit: 4 or 1
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
    own: int  # `scratch_words(isa, words)`


JOB = Job(*range(len(Job._fields)))


def scratch_words(isa: str, words: int) -> int:
    """Words of 32 bits that each thread needs.

    A transposed panel, a block of codes, its sums, a row of results, scales and shifts; or, earlier, a row's integers.
    """
    shape = SHAPES[isa]
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
    rows, vectors, lanes, block, strip = SHAPES[isa]
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
            quarters = job[field.quarters]
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
                    factors = scales.ctypes.data, shifts.ctypes.data
                    _finish(isa, parts, to_half, high, low, ends[0], ends[1], ends[2], factors[0], factors[1], target)
                    if width < panel:
                        for r in range(width):
                            output[m, column + r] = values[r]

    return Kernels(quantize, multiply)


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
    tiles, code_steps = -(-rows * parts // shape.rows), -(-words // UNROLL) * UNROLL
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
    buffers = cpu.scratch("panels", threads * scratch_words(isa, words), torch.int32)
    sizes = (rows, in_features, words, code_steps, len(weight_packed), tiles)
    arrays = (flat, codes, steps, sums, packed, scale, shift, output, buffers)
    groups = -(-len(weight_packed) // (shape.vectors * shape.lanes))
    quarters = 4 if groups >= 4 * threads else 1  # enough units for all threads
    own = scratch_words(isa, words)
    job = torch.tensor([0, 0, 0, quarters, *sizes, *[array.data_ptr() for array in arrays], own])

    quantize, multiply = kernels(isa, parts, half)
    _run(quantize, job, tiles, threads)
    _run(multiply, job, groups * 4 // quarters, threads)
    return output.to(input.dtype).reshape(*input.shape[:-1], out_features)

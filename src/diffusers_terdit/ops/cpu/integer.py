"""Integer matmuls on packed weights for x86 processors, compiled by numba at first use (and cached on disk after).

`linear` is `reference.integer_linear` to the last bit: activations become integers per row (8 bits, or 16 as two
signed bytes, x = step * (256 high + low)), the products with the codes 0, 1, 2 are summed exactly in int32, and what
the codes' offset of one added, the sum of the row's integers, is subtracted. It reads the packed weight as it is
stored, so there is no second copy. The rows' integers lie in the order in which they are read: the four inputs of each
step, of all rows of a tile.

A `Kernel` says how the product is divided into units of work and what computes a unit. `KERNELS` transpose 4 bytes
(four inputs) of a panel of rows at a time into a scratch, cut the two bits of a quarter out of a block of it, and let
all rows of the input pass by while it is in the cache. They share one inner loop, `_tile`:

    "avx512_vnni"         vpdpbusd on 16 outputs
    "avx_vnni"            vpdpbusd on 8 outputs (also avx512_vnni with 256-bit registers)
    "avx2"                vpmaddubsw, summed in 16 bits for 64 steps: 64 * 2 * 2 * 128 = 2^15 is the most that fits
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
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
from .instructions import Processor, as_float, at, c_function, dot, everywhere, finish, pointer, take, transpose


class Shape(NamedTuple):
    """Sizes of the inner loop: rows x vectors of outputs stay in registers; a block is `steps` of 4 inputs."""

    rows: int
    vectors: int
    lanes: int  # outputs per vector
    steps: int  # whose codes are cut out at a time
    strip: int  # rows of integers that pass by a block of the weight: they stay in the second cache
    turn: int = 2  # steps of the inner loop's turn: there are whole turns


class Kernel(NamedTuple):
    """An integer matmul for the processors that have its instructions."""

    name: str
    features: tuple[frozenset[str], ...]  # the processor has one of these sets
    shape: Shape
    divide: Callable[[Shape, int, int, int], tuple[int, int]]  # (shape, N / 4, tiles, threads) -> share, units
    scratch_words: Callable[[Shape, int, int], int]  # (shape, words, share) -> words of 32 bits that a thread needs
    compile: Callable[[Shape, int, bool, bool], Any]  # (shape, parts, half, cached) -> `multiply` of `Functions`
    processor: str = ""  # the only one that it is for

    def runs_on(self, processor: Processor) -> bool:
        """Whether a processor has the instructions."""
        return self.processor in ("", processor.name) and any(some <= processor.features for some in self.features)


class Functions(NamedTuple):
    """Two C functions of one argument, the address of a `Job`. Any number of threads run one at a time."""

    quantize: Any
    multiply: Any


class Job(NamedTuple):
    """What a function works on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int  # counts the threads that came
    units: int
    share: int  # of a unit, as `Kernel.divide` gave it
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
    own: int  # as `Kernel.scratch_words` gave it


JOB = Job(*range(len(Job._fields)))
AVX2_STEPS = 64
f32, i32, u32 = numba.float32, numba.int32, numba.uint32


@intrinsic(prefer_literal=True)
def _tile(typing_context, instruction, rows, vectors, lanes, turn, x, codes, steps, sums):
    """`sums` (rows, PANEL) int32 += `codes` (steps, PANEL, 4) uint8 . `x` (steps, rows, 4) int8; addresses.

    The steps are rounded up to whole turns: there `x` is zero.
    """
    literals = instruction, rows, vectors, lanes, turn
    name, rows, vectors, lanes, turn = (literal.literal_value for literal in literals)

    def codegen(context, builder, signature, args):
        x, codes, steps, sums = args[len(literals) :]
        i8, i16, i32, i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
        ints = ir.VectorType(i32, lanes)
        module = builder.module

        def function(llvm_name, result, *parameters):
            declared = module.declare_intrinsic(llvm_name, (), ir.FunctionType(result, parameters))
            return lambda *values: builder.call(declared, values)

        if name == "vpmaddubsw":
            total, operand = ir.VectorType(i16, 2 * lanes), ir.VectorType(i8, 4 * lanes)
            multiply = function("llvm.x86.avx2.pmadd.ub.sw", total, operand, operand)
            widen = function("llvm.x86.avx2.pmadd.wd", ints, total, total)
            ones = ir.Constant(total, [1] * 2 * lanes)
        else:
            total = operand = ints
            products_of_four = dot(module, lanes)

        def load(address, offset, type_):
            return builder.load(at(builder, address, offset, type_), align=1)

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
        for number in range(turn):
            weights = [load(base, 4 * lanes * (number * vectors + vector), operand) for vector in range(vectors)]
            for row in range(rows):
                four = everywhere(builder, load(inputs, 4 * (number * rows + row), i32), ints)
                for vector in range(vectors):
                    cell = row, vector
                    if name == "vpmaddubsw":
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
        for row, vector in grid:
            offset = 4 * lanes * (row * vectors + vector)
            result = widen(after[row, vector], ones) if name == "vpmaddubsw" else after[row, vector]
            address = at(builder, sums, offset, ints)
            builder.store(builder.add(builder.load(address, align=1), result), address, align=1)
        return context.get_dummy_value()

    return types.void(*literals, types.uintp, types.uintp, types.intp, types.uintp), codegen


@intrinsic(prefer_literal=True)
def _cut(typing_context, lanes, words, bits, target, count):
    """`count` vectors: target = words >> bits & 0x03030303; addresses."""
    size = lanes.literal_value

    def codegen(context, builder, signature, args):
        _, words, bits, target, count = args
        i64, vector = ir.IntType(64), ir.VectorType(ir.IntType(32), size)
        shift = everywhere(builder, builder.trunc(bits, ir.IntType(32)), vector)
        with for_range(builder, count) as loop:
            offset = builder.mul(loop.index, i64(4 * size))
            source = builder.inttoptr(builder.add(words, offset), vector.as_pointer())
            codes = builder.lshr(builder.load(source, align=1), shift)
            codes = builder.and_(codes, ir.Constant(vector, [0x03030303] * size))
            builder.store(codes, builder.inttoptr(builder.add(target, offset), vector.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(lanes, types.uintp, types.intp, types.uintp, types.intp), codegen


def _compile_quantize(shape: Shape, parts: int, half: bool, cached: bool) -> Any:
    rows = shape.rows
    rounding, largest_code, none = reference.ROUNDING, reference.LARGEST_CODE[8 * parts], 1e-12
    nan, infinity, magnitude = 0x7FC00000, 0x7F800000, 0x7FFFFFFF
    field, fields = JOB, len(JOB)
    number, shift = ("uint16", 16) if half else ("uint32", 0)

    @c_function(cached, shape, parts, half)
    def quantize(address):
        """A unit is the rows of a tile."""
        job = numba.carray(pointer(address, "int64"), fields)
        inputs, words, code_steps = job[field.inputs], job[field.words], job[field.code_steps]
        input = numba.carray(pointer(job[field.input], number), (job[field.rows], inputs))
        codes = numba.carray(pointer(job[field.codes], "uint32"), (job[field.tiles], code_steps, rows))
        steps = numba.carray(pointer(job[field.steps], "float32"), job[field.rows])
        sums = numba.carray(pointer(job[field.sums], "int32"), (job[field.rows], parts))
        own = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        own_codes = numba.carray(pointer(own, "int8"), (parts, 4 * words))
        own_words = numba.carray(pointer(own, "uint32"), (parts, words))
        high_codes, low_codes = own_codes[0], own_codes[parts - 1]
        high_codes[inputs:] = 0
        low_codes[inputs:] = 0
        while True:
            tile = take(address + 8 * field.unit)
            if tile >= job[field.units]:
                return
            for m in range(tile * rows // parts, min((tile + 1) * rows // parts, job[field.rows])):
                row = input[m]
                largest = u32(0)  # magnitude, as bits: they are ordered as the numbers are
                for k in range(inputs):
                    largest = max(largest, u32(u32(u32(row[k]) << shift) & u32(magnitude)))
                finite = largest < u32(infinity)
                step = max(as_float(largest), f32(none)) / f32(largest_code)
                steps[m] = step if finite else as_float(u32(nan))
                high_sum, low_sum = i32(0), i32(0)
                for k in range(inputs):
                    code = i32((as_float(u32(u32(row[k]) << shift)) / step + f32(rounding)) - f32(rounding))
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

    return quantize


def _compile_tiles(instruction: str, shape: Shape, parts: int, half: bool, cached: bool) -> Any:
    rows, vectors, lanes, block, strip, turn = shape
    panel = vectors * lanes
    tile_steps = AVX2_STEPS if instruction == "vpmaddubsw" else block
    field, fields = JOB, len(JOB)
    number, size, to_half = ("uint16", 2, 1) if half else ("uint32", 4, 0)

    @c_function(cached, instruction, shape, parts, half)
    def multiply(address):
        """A unit is `panel` rows of the packed weight, or one quarter of them: `panel` outputs each."""
        job = numba.carray(pointer(address, "int64"), fields)
        count, code_steps, quarter_rows = job[field.words], job[field.code_steps], job[field.quarter]
        steps = numba.carray(pointer(job[field.steps], "float32"), job[field.rows])
        offsets = numba.carray(pointer(job[field.sums], "int32"), (job[field.rows], parts))
        packed = numba.carray(pointer(job[field.packed], "uint32"), (quarter_rows, count))
        scale = numba.carray(pointer(job[field.scale], "float32"), 4 * quarter_rows)
        bias = numba.carray(pointer(job[field.bias], "float32"), 4 * quarter_rows)
        output = numba.carray(pointer(job[field.output], number), (job[field.rows], 4 * quarter_rows))

        own = job[field.scratch] + 4 * job[field.own] * take(address + 8 * field.thread)
        words = numba.carray(pointer(own, "uint32"), (count, panel))
        block_codes = own + 4 * panel * count
        sums = numba.carray(pointer(block_codes + 4 * panel * block, "int32"), (strip, panel))
        rest = block_codes + 4 * panel * (block + strip)
        values = numba.carray(pointer(rest, number), panel)
        scales = numba.carray(pointer(rest + 4 * panel, "float32"), panel)
        shifts = numba.carray(pointer(rest + 8 * panel, "float32"), panel)
        loaded = -1
        while True:
            unit = take(address + 8 * field.unit)
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
                        transpose(lanes, source, 4 * count, words.ctypes.data + 4 * (k * panel + r), 4 * panel)
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
                            _tile(
                                instruction, rows, vectors, lanes, turn, x, weights, min(tile_steps, last - j), total
                            )
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
                    finish(
                        vectors, lanes, parts, to_half, high, low, ends[0], ends[1], ends[2], one, other, target, apart
                    )
                    if width < panel:
                        for r in range(width):
                            output[m, column + r] = values[r]

    return multiply


def _divide_tiles(shape: Shape, quarter_rows: int, tiles: int, threads: int) -> tuple[int, int]:
    """A unit is a group of packed rows, a panel of them: its share is all 4 quarters, or 1."""
    groups = -(-quarter_rows // (shape.vectors * shape.lanes))
    share = 4 if groups >= 4 * threads else 1  # enough units for all threads
    return share, groups * 4 // share


def _scratch_words_of_tiles(shape: Shape, words: int, share: int) -> int:
    """Hold a panel transposed, a block of codes, its sums, a row of results, scales, shifts; or a row's integers."""
    return (words + shape.steps + shape.strip + 3) * shape.vectors * shape.lanes


def _tiles(name: str, instruction: str, shape: Shape, *features: set[str]) -> Kernel:
    compile_ = partial(_compile_tiles, instruction)
    return Kernel(name, tuple(map(frozenset, features)), shape, _divide_tiles, _scratch_words_of_tiles, compile_)


AVX512_VNNI = {"+avx512vnni", "+avx512vl"}
NARROW = Shape(rows=6, vectors=2, lanes=8, steps=256, strip=126)
KERNELS = (  # best first
    _tiles("avx512_vnni", "vpdpbusd", Shape(rows=8, vectors=3, lanes=16, steps=256, strip=256), AVX512_VNNI),
    _tiles("avx_vnni", "vpdpbusd", NARROW, {"+avxvnni"}, AVX512_VNNI),
    _tiles("avx2", "vpmaddubsw", NARROW, {"+avx2"}),
)


def compile_functions(kernel: Kernel, parts: int, half: bool, cached: bool) -> Functions:
    """Compile a kernel for bfloat16 (`half`) or float32, with activations of as many bytes as `parts`."""
    quantize = _compile_quantize(kernel.shape, parts, half, cached)
    return Functions(quantize, kernel.compile(kernel.shape, parts, half, cached))


@cache
def compiled(kernel: Kernel, parts: int, half: bool) -> Functions:
    """Return the compiled functions, from numba's cache on disk where it has them."""
    try:
        return compile_functions(kernel, parts, half, cached=True)
    except Exception:  # no folder for the cache, a full disk: an error of ours comes again below
        return compile_functions(kernel, parts, half, cached=False)


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


def _run(function: Any, job: Tensor, units: int, threads: int) -> None:
    job[JOB.unit] = job[JOB.thread] = 0
    job[JOB.units] = units
    address, threads = job.data_ptr(), min(threads, units)
    parallel = _openmp() if os.getpid() == scratch.PROCESS else None  # OpenMP's threads are lost in a fork
    if threads > 1 and parallel is not None:
        parallel(function.address, address, threads, 0)
        return
    helpers = [_pool(os.getpid(), threads - 1).submit(function.ctypes, address) for _ in range(threads - 1)]
    try:
        function.ctypes(address)
    finally:  # an interrupt must not free what they still read
        wait([helper for helper in helpers if not helper.cancel()])  # one that has not started has nothing left to do


def linear_many(
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
    rows, words = len(flat), -(-in_features // 4)
    tiles, code_steps = -(-rows * parts // shape.rows), -(-words // shape.turn) * shape.turn
    codes = scratch.take("integers", tiles * code_steps * shape.rows * 4, torch.int8)
    steps = torch.empty(rows, dtype=torch.float32)  # not the default dtype, which a load in another thread may change
    sums = torch.empty(rows * parts, dtype=torch.int32)
    quantize, multiply = compiled(kernel, parts, half)
    outputs: list[Tensor] = []
    for weight_packed, weight_scale, bias in weights:
        out_features = 4 * len(weight_packed)
        threads = torch.get_num_threads() if rows * weight_packed.numel() > 2**16 else 1
        packed = weight_packed.contiguous()
        if in_features % 4:
            packed = torch.nn.functional.pad(packed, (0, 4 * words - in_features))
        elif packed.data_ptr() % 4:
            packed = packed.clone()
        scale = weight_scale.float().reshape(-1).expand(out_features).contiguous()
        shift = torch.zeros(out_features, dtype=torch.float32) if bias is None else bias.float().contiguous()
        output = flat.new_empty(rows, out_features)
        share, units = kernel.divide(shape, len(weight_packed), tiles, threads)
        own = kernel.scratch_words(shape, words, share)
        buffers = scratch.take("panels", threads * own, torch.int32)
        sizes = (rows, in_features, words, code_steps, len(weight_packed), tiles)
        arrays = (flat, codes, steps, sums, packed, scale, shift, output, buffers)
        job = torch.tensor([0, 0, 0, share, *sizes, *[array.data_ptr() for array in arrays], own])
        if not outputs:
            _run(quantize, job, tiles, threads)
        _run(multiply, job, units, threads)
        outputs.append(output.to(input.dtype).reshape(*input.shape[:-1], out_features))
    return outputs


def linear(
    kernel: Kernel, input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Compute `reference.integer_linear`."""
    return linear_many(kernel, input, [(weight_packed, weight_scale, bias)], bits)[0]

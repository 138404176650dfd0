"""What the integer kernels share: the processor's features, instructions in LLVM's IR, and compilation to C functions.

Imported only where numba is installed. An intrinsic takes addresses as integers; strides are in bytes.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.cgutils import for_range
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .. import reference


class Processor(NamedTuple):
    """The processor that numba compiles for: this machine's, or the one that NUMBA_CPU_NAME and _FEATURES name."""

    name: str  # as LLVM spells it: "znver4"
    features: frozenset[str]  # "+avx2", ...


AMX = frozenset({"+amx-int8", "+amx-tile"})


@cache
def processor() -> Processor:
    """Return the processor that numba compiles for, with AMX where the system lets this process use it."""
    _, name, listed = cpu_target.target_context.codegen().magic_tuple()
    features = frozenset(listed.split(","))
    try:
        allowed = features >= AMX and torch.cpu._init_amx()
    except AttributeError:  # an older torch
        allowed = False
    if not allowed:
        features -= AMX | {"+amx-bf16"}
    return Processor(name, features)


@cache
def _digest_of_sources() -> str:
    """Digest of all files of this folder, of which a kernel is put together."""
    digest = hashlib.sha256()
    for file in sorted(files(__package__).iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def c_function(cached: bool, *variant: Any) -> Callable[[Callable], Any]:
    """Compile a function of an address to a C function, from numba's cache on disk if wanted and there.

    A damaged file there, which numba stops at, is written again.

    Args:
        cached (`bool`): Whether to use the cache.
        variant: Everything that the function's code depends on besides the sources, as plain values.
    """

    def compiled(function: Callable) -> Any:
        # The name of the cache's files. Every variant has its own files, since numba numbers the variants of one
        # function without a lock: two processes that compile two of them at once would exchange their code for good.
        # And numba itself looks for changes in the file of the function alone, not in those of what it calls.
        made_from = (numba.__version__, processor().name, sorted(processor().features), _digest_of_sources(), variant)
        function.__qualname__ += f"-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}"
        decorate = numba.cfunc(types.void(types.intp), nogil=True, cache=cached)
        try:
            return decorate(function)
        except Exception:
            if not cached:
                raise
            FunctionCache(function).flush()
            return decorate(function)

    return compiled


def from_cache(compile_: Callable[..., Any], *variant: Any) -> Any:
    """`compile_(*variant, cached=True)`, or without the cache where that fails: no folder for it, a full disk."""
    try:
        return compile_(*variant, cached=True)
    except Exception:  # an error of ours comes again below
        return compile_(*variant, cached=False)


# ---- for code generators ----


def dot(module: ir.Module, lanes: int) -> ir.Function:
    """`vpdpbusd`, with 4 lanes ARM's `sdot`: (sums, codes, signed bytes) -> sums, four products in each lane."""
    ints = ir.VectorType(ir.IntType(32), lanes)
    if lanes > 4:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return module.declare_intrinsic(name, (), ir.FunctionType(ints, [ints, ints, ints]))
    if "sdot" in module.globals:
        return module.globals["sdot"]
    bytes_ = ir.VectorType(ir.IntType(8), 4 * lanes)
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    instruction = module.declare_intrinsic(name, (), ir.FunctionType(ints, [ints, bytes_, bytes_]))
    function = ir.Function(module, ir.FunctionType(ints, [ints, ints, ints]), "sdot")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    sums, *operands = function.args
    builder.ret(builder.call(instruction, [sums, *(builder.bitcast(operand, bytes_) for operand in operands)]))
    return function


def permute(module: ir.Module) -> ir.Function:
    """`vpermw`: (table, indices) -> the table's words at the indices, of which the low five bits count."""
    shorts = ir.VectorType(ir.IntType(16), 32)
    return module.declare_intrinsic("llvm.x86.avx512.permvar.hi.512", (), ir.FunctionType(shorts, [shorts, shorts]))


def at(builder: ir.IRBuilder, address: ir.Value, offset: int, type_: ir.Type) -> ir.Value:
    """Return the pointer to a value `offset` bytes after an address."""
    return builder.inttoptr(builder.add(address, ir.IntType(64)(offset)), type_.as_pointer())


def to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the 16 bits of the bfloat16 nearest to each float32 of a vector, half to even; NaN stays one."""
    count = value.type.count
    ints = ir.VectorType(ir.IntType(32), count)

    def constant(number):
        return ir.Constant(ints, [number] * count)

    word = builder.bitcast(value, ints)
    odd = builder.and_(builder.lshr(word, constant(16)), constant(1))
    rounded = builder.add(word, builder.add(odd, constant(0x7FFF)))
    word = builder.select(builder.fcmp_ordered("==", value, value), rounded, word)
    return builder.trunc(builder.lshr(word, constant(16)), ir.VectorType(ir.IntType(16), count))


def everywhere(builder: ir.IRBuilder, value: ir.Value, type_: ir.VectorType) -> ir.Value:
    """Return the vector with a value in every lane."""
    undefined, i32 = ir.Constant(type_, ir.Undefined), ir.IntType(32)
    filled = builder.insert_element(undefined, value, i32(0))
    return builder.shuffle_vector(filled, undefined, ir.Constant(ir.VectorType(i32, type_.count), [0] * type_.count))


def add_lanes(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the sum of a vector's lanes, each added to the one half a vector away, until one is left."""
    while value.type.count > 1:
        half, undefined = value.type.count // 2, ir.Constant(value.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(ir.IntType(32), half), list(lanes)))
            for lanes in (range(half), range(half, 2 * half))
        )
        value = builder.fadd(low, high)
    return builder.extract_element(value, ir.IntType(32)(0))


# ---- for compiled functions ----


@intrinsic
def as_float(typing_context, bits):
    """The float32 of these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def rounded_ratio(typing_context, value, step, reciprocal):
    """The int32 nearest to float32 `value / step`, half to even; `reciprocal` is float32 `1 / step`, normal.

    The quotient is float32's to the last bit, without a division: after the first remainder it is off by at most one
    bit, which the second one, exact, corrects. A quotient below a quarter, whose remainders may vanish, rounds to 0.
    Source: Markstein 1990 (https://doi.org/10.1147/rd.341.0111).
    """

    def codegen(context, builder, signature, args):
        value, step, reciprocal = args
        f32, i32 = ir.FloatType(), ir.IntType(32)
        fma = builder.module.declare_intrinsic("llvm.fma.f32", (), ir.FunctionType(f32, [f32] * 3))
        quotient = builder.fmul(value, reciprocal)
        for _ in range(2):
            remainder = builder.call(fma, [builder.fneg(quotient), step, value])
            quotient = builder.call(fma, [remainder, reciprocal, quotient])
        rounding = ir.Constant(f32, reference.ROUNDING)
        return builder.sub(builder.bitcast(builder.fadd(quotient, rounding), i32), builder.bitcast(rounding, i32))

    return types.int32(types.float32, types.float32, types.float32), codegen


@intrinsic(prefer_literal=True)
def pointer(typing_context, address, element):
    """The pointer that `numba.carray` makes an array of; `element` is the name of a type."""
    result = types.CPointer(getattr(types, element.literal_value))

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return result(address, element), codegen


@intrinsic
def take(typing_context, address):
    """The int64 at an address, then one more there: every thread gets another number."""

    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(args[0], i64.as_pointer()), i64(1), "seq_cst")

    return types.int64(address), codegen


@intrinsic(prefer_literal=True)
def transpose(typing_context, lanes, source, source_stride, target, target_stride):
    """`lanes` x `lanes` words of 32 bits: target[j, i] = source[i, j]."""
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
def finish(
    typing_context,
    lanes,
    parts,
    half,
    signed,
    sums,
    count,
    offsets,
    stride,
    scales,
    totals,
    first,
    last,
    steps,
    shifts,
    output,
    down,
    across,
):
    """`count` rows of a panel: total = [total +] (sum - offset) * scale * step, at the end output = total + shift.

    `sums` (count, parts, 4, lanes) int32: with two parts a sum is 256 * one + the other. `offsets` int32, none of
    which are subtracted with `signed` 1, and `steps` float32 are `stride` bytes apart. `totals` (count, 4, lanes)
    float32 wait from the `first` of a row's groups to the `last`. With `half` 1 the output is bfloat16, rounded half
    to even, else float32; `down` and `across` are bytes from row to row and from vector to vector.
    """
    size, to_half, two = lanes.literal_value, half.literal_value, parts.literal_value == 2
    line = 4 * size

    def codegen(context, builder, signature, args):
        sums, count, offsets, stride, scales, totals, first, last, steps, shifts, output, down, across = args[4:]
        i32, i64, f32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
        ints, floats = (ir.VectorType(type_, size) for type_ in (i32, f32))

        def constant(value):
            return ir.Constant(ints, [value] * size)

        def load(address, offset, type_):
            return builder.load(at(builder, address, offset, type_), align=1)

        def store(value, address, offset=0):
            builder.store(value, at(builder, address, offset, value.type), align=1)

        def rows(is_first, is_last):
            scale = [load(scales, line * vector, floats) for vector in range(4)]
            shift = [load(shifts, line * vector, floats) for vector in range(4)]
            with for_range(builder, count) as loop:
                row = loop.index
                source = builder.add(sums, builder.mul(row, i64(4 * line * (2 if two else 1))))
                total = builder.add(totals, builder.mul(row, i64(4 * line)))
                target = builder.add(output, builder.mul(row, down))
                offset = everywhere(builder, load(builder.add(offsets, builder.mul(row, stride)), 0, i32), ints)
                step = everywhere(builder, load(builder.add(steps, builder.mul(row, stride)), 0, f32), floats)
                for vector in range(4):
                    value = load(source, line * vector, ints)
                    if two:
                        low = load(source, line * (4 + vector), ints)
                        value = builder.add(builder.shl(value, constant(8)), low)
                    value = value if signed.literal_value else builder.sub(value, offset)
                    value = builder.fmul(builder.fmul(builder.sitofp(value, floats), scale[vector]), step)
                    if not is_first:
                        value = builder.fadd(load(total, line * vector, floats), value)
                    if not is_last:
                        store(value, total, line * vector)
                        continue
                    value = builder.fadd(value, shift[vector])
                    if to_half:
                        value = to_bfloat16(builder, value)
                    store(value, target)
                    target = builder.add(target, across)

        with builder.if_else(builder.icmp_signed("!=", first, first.type(0))) as (then, otherwise):
            for branch, is_first in ((then, True), (otherwise, False)):
                with branch, builder.if_else(builder.icmp_signed("!=", last, last.type(0))) as (final, before):
                    with final:
                        rows(is_first, True)
                    with before:
                        rows(is_first, False)
        return context.get_dummy_value()

    address, size_ = types.uintp, types.intp
    numbers = address, size_, address, size_, address, address, size_, size_
    return types.void(lanes, parts, half, signed, *numbers, address, address, address, size_, size_), codegen

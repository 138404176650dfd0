"""Codes of a float weight, ternarized and packed in two passes, for kernels that read packed weights."""

from functools import cache
from typing import Any, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic
from torch import Tensor

from .. import reference
from .instructions import add_lanes, at, c_function, from_cache, pointer, take
from .threads import new_job, run, threads_for


f32, f64, u8 = numba.float32, numba.float64, numba.uint8
ROWS = 4  # of the weight, or of bytes, in a unit
LANES = 16


class Job(NamedTuple):
    """What the functions work on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int
    units: int
    rows: int  # N
    width: int  # K
    quarter: int  # N / 4, rounded up
    limit_rows: int  # 1 or N
    groups: int  # of inputs
    weight: int  # (N, K) float32
    sums: int  # (N, groups) float64
    limits: int  # (limit_rows, groups) float32
    packed: int  # (quarter, K) uint8


JOB = Job(*range(len(Job._fields)))


@intrinsic
def _absolute_sum(typing_context, address, count):
    """The sum in float64 of the absolute values of `count` float32 at an address; `count` is a multiple of `LANES`."""

    def codegen(context, builder, signature, args):
        address, count = args
        ints, floats, doubles = (ir.VectorType(t, LANES) for t in (ir.IntType(32), ir.FloatType(), ir.DoubleType()))
        without_sign = ir.Constant(ints, [0x7FFFFFFF] * LANES)
        total = alloca_once_value(builder, ir.Constant(doubles, [0.0] * LANES))
        with for_range(builder, builder.udiv(count, count.type(LANES))) as loop:
            place = builder.add(address, builder.mul(loop.index, ir.IntType(64)(4 * LANES)))
            word = builder.load(at(builder, place, 0, ints), align=4)
            value = builder.bitcast(builder.and_(word, without_sign), floats)
            builder.store(builder.fadd(builder.load(total), builder.fpext(value, doubles)), total)
        return add_lanes(builder, builder.load(total))

    return types.float64(types.uintp, types.intp), codegen


def _compile_sums(cached: bool) -> Any:
    field, fields = JOB, len(JOB)

    @c_function(cached, "absolute sums")
    def sums(address):
        """A unit is `ROWS` rows of the weight."""
        job = numba.carray(pointer(address, "int64"), fields)
        rows, width, groups = job[field.rows], job[field.width], job[field.groups]
        weight = numba.carray(pointer(job[field.weight], "float32"), (rows, width))
        sums = numba.carray(pointer(job[field.sums], "float64"), (rows, groups))
        size = width // groups
        whole = size - size % LANES
        while True:
            unit = take(address)
            if unit >= job[field.units]:
                return
            for row in range(unit * ROWS, min(unit * ROWS + ROWS, rows)):
                for group in range(groups):
                    values = weight[row, group * size : (group + 1) * size]
                    total = _absolute_sum(values.ctypes.data, whole)
                    for k in range(whole, size):
                        total += abs(f64(values[k]))
                    sums[row, group] = total

    return sums


def _compile_pack(cached: bool) -> Any:
    field, fields = JOB, len(JOB)

    @c_function(cached, "pack")
    def pack(address):
        """A unit is `ROWS` rows of bytes."""
        job = numba.carray(pointer(address, "int64"), fields)
        rows, width, quarter = job[field.rows], job[field.width], job[field.quarter]
        groups, limit_rows = job[field.groups], job[field.limit_rows]
        weight = numba.carray(pointer(job[field.weight], "float32"), (rows, width))
        limits = numba.carray(pointer(job[field.limits], "float32"), (limit_rows, groups))
        packed = numba.carray(pointer(job[field.packed], "uint8"), (quarter, width))
        size = width // groups
        while True:
            unit = take(address)
            if unit >= job[field.units]:
                return
            for row in range(unit * ROWS, min(unit * ROWS + ROWS, quarter)):
                bytes_ = packed[row]
                bytes_[:] = 0
                for part in range(4):
                    source = row + part * quarter
                    if source >= rows:
                        for k in range(width):
                            bytes_[k] = u8(bytes_[k] << 2) | u8(1)
                        continue
                    for group in range(groups):
                        limit = limits[source if limit_rows > 1 else 0, group]
                        values = weight[source, group * size : (group + 1) * size]
                        own = bytes_[group * size : (group + 1) * size]
                        for k in range(size):
                            ratio = values[k] / limit  # rounds half to even: beyond one half it is 1
                            code = u8(1) + u8(ratio > f32(0.5)) - u8(ratio < f32(-0.5))
                            own[k] = u8(own[k] << 2) | u8(code)

    return pack


@cache
def _compiled() -> tuple[Any, Any]:
    return from_cache(_compile_sums), from_cache(_compile_pack)


def pack(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.pack_float`; zero rows fill N up to a multiple of 4."""
    out_features, in_features = weight.shape
    wide = weight.detach().float().contiguous()
    quarter = -(-out_features // reference.CODES_PER_BYTE)
    shape = reference.scale_shape(out_features, in_features, reference.granularity_of(weight_scale, in_features))
    limit_rows, groups = (1, 1) if len(shape) == 1 else shape
    sums = torch.empty(out_features, groups, dtype=torch.float64)
    limits = torch.empty(shape, dtype=torch.float32)
    packed = torch.empty(quarter, in_features, dtype=torch.uint8)
    sizes = (out_features, in_features, quarter, limit_rows, groups)
    job = new_job(*sizes, *[array.data_ptr() for array in (wide, sums, limits, packed)])
    add, pack_rows = _compiled()
    threads = threads_for(weight.numel())
    run(add, job, -(-out_features // ROWS), threads)
    mean = reference.mean_of_sums(sums, weight, shape)
    limits.copy_(mean + reference.EPS)
    run(pack_rows, job, -(-quarter // ROWS), threads)
    return packed, mean

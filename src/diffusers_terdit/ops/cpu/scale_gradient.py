"""Gradients of a scale and of the ternary matrix, from that of the weight, in one pass over it."""

from functools import cache
from typing import Any, NamedTuple

import numba
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import alloca_once_value, for_range
from numba.extending import intrinsic
from torch import Tensor

from .instructions import add_lanes, at, c_function, everywhere, from_cache, pointer, take
from .threads import new_job, run, threads_for


f32 = numba.float32
ROWS = 4  # of bytes in a unit
LANES = 16


class Job(NamedTuple):
    """What the function works on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int
    units: int
    rows: int  # N
    width: int  # K
    quarter: int  # rows of bytes
    scales: int  # 1 or N
    gradient: int  # (N, K) float32
    packed: int  # (quarter, K) uint8
    scale: int  # (scales,) float32
    totals: int  # (N,) float32


JOB = Job(*range(len(Job._fields)))


@intrinsic
def _row(typing_context, gradient, codes, shift, scale, count):
    """The sum of `count` float32 `gradient` times T; then `gradient` is multiplied by `scale`.

    `count` is a multiple of `LANES`. The codes of T are `shift` bits up in their bytes. `gradient` and `codes` are
    addresses.
    """

    def codegen(context, builder, signature, args):
        gradient, codes, shift, scale, count = args
        i8, i32, i64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
        floats, ints = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(i32, LANES)

        def constant(value):
            return ir.Constant(ints, [value] * LANES)

        shifts = everywhere(builder, builder.trunc(shift, i32), ints)
        scales = everywhere(builder, scale, floats)
        total = alloca_once_value(builder, ir.Constant(floats, [0.0] * LANES))
        with for_range(builder, builder.udiv(count, count.type(LANES))) as loop:
            place = builder.mul(loop.index, i64(LANES))
            bytes_ = builder.load(at(builder, builder.add(codes, place), 0, ir.VectorType(i8, LANES)), align=1)
            code = builder.and_(builder.lshr(builder.zext(bytes_, ints), shifts), constant(3))
            ternary = builder.sitofp(builder.sub(code, constant(1)), floats)
            cell = at(builder, builder.add(gradient, builder.mul(place, i64(4))), 0, floats)
            value = builder.load(cell, align=4)
            builder.store(builder.fadd(builder.load(total), builder.fmul(value, ternary)), total)
            builder.store(builder.fmul(value, scales), cell, align=4)
        return add_lanes(builder, builder.load(total))

    address, size = types.uintp, types.intp
    return types.float32(address, address, size, types.float32, size), codegen


def _compile(cached: bool) -> Any:
    field, fields = JOB, len(JOB)

    @c_function(cached, "scale gradient")
    def scale_gradient(address):
        """A unit is `ROWS` rows of bytes."""
        job = numba.carray(pointer(address, "int64"), fields)
        rows, width, quarter, scales = job[field.rows], job[field.width], job[field.quarter], job[field.scales]
        gradient = numba.carray(pointer(job[field.gradient], "float32"), (rows, width))
        packed = numba.carray(pointer(job[field.packed], "uint8"), (quarter, width))
        scale = numba.carray(pointer(job[field.scale], "float32"), scales)
        totals = numba.carray(pointer(job[field.totals], "float32"), rows)
        whole = width - width % LANES
        while True:
            unit = take(address)
            if unit >= job[field.units]:
                return
            for byte in range(unit * ROWS, min(unit * ROWS + ROWS, quarter)):
                for part in range(4):
                    row, shift = part * quarter + byte, 6 - 2 * part
                    if row >= rows:
                        continue
                    own, codes = gradient[row], packed[byte]
                    factor = scale[row if scales > 1 else 0]
                    total = _row(own.ctypes.data, codes.ctypes.data, shift, factor, whole)
                    for k in range(whole, width):
                        total += own[k] * f32(numba.int64(codes[k] >> shift & 3) - 1)
                        own[k] *= factor
                    totals[row] = total

    return scale_gradient


@cache
def _compiled() -> Any:
    return from_cache(_compile)


def scale_gradient(weight_grad: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """Return the gradient of a scale, (1,) or (N, 1), and turn that of the weight, (N, K), into that of T in place.

    The weight is `weight_scale * T`. The result is the sum of `weight_grad * T`, over all or each row; `weight_grad`,
    contiguous float32, is multiplied by the scale.
    """
    rows, width = weight_grad.shape
    packed, scale = weight_packed.contiguous(), weight_scale.float().contiguous()
    totals = torch.empty(rows, dtype=torch.float32)
    arrays = (weight_grad, packed, scale, totals)
    job = new_job(rows, width, len(packed), scale.numel(), *[array.data_ptr() for array in arrays])
    run(_compiled(), job, -(-len(packed) // ROWS), threads_for(weight_grad.numel()))
    return totals.unsqueeze(1) if weight_scale.dim() == 2 else totals.double().sum().float().reshape(1)

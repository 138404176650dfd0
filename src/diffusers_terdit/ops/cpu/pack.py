"""Codes of a float weight, ternarized and packed in one pass, for kernels that read packed weights."""

from functools import cache
from typing import Any, NamedTuple

import numba
import torch
from torch import Tensor

from .. import reference
from .instructions import c_function, from_cache, pointer, take
from .threads import new_job, run, threads_for


f32, u8 = numba.float32, numba.uint8
ROWS = 4  # of bytes in a unit


class Job(NamedTuple):
    """What the function works on, int64 each: sizes, counters and the addresses of arrays."""

    unit: int  # counts the units of work that were taken
    thread: int
    units: int
    rows: int  # N
    width: int  # K
    quarter: int  # N / 4, rounded up
    limit_rows: int  # 1 or N
    groups: int  # of inputs
    weight: int  # (N, K) float32
    limits: int  # (limit_rows, groups) float32
    packed: int  # (quarter, K) uint8


JOB = Job(*range(len(Job._fields)))


def _compile(cached: bool) -> Any:
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
def _compiled() -> Any:
    return from_cache(_compile)


def pack(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.pack_float`; zero rows fill N up to a multiple of 4."""
    out_features, in_features = weight.shape
    mean = reference.absmean(weight, reference.granularity_of(weight_scale, in_features))
    limits = (mean + reference.EPS).contiguous()
    wide = weight.detach().float().contiguous()
    quarter = -(-out_features // reference.CODES_PER_BYTE)
    packed = torch.empty(quarter, in_features, dtype=torch.uint8)
    limit_rows, groups = (1, 1) if limits.dim() == 1 else limits.shape
    threads = threads_for(weight.numel())
    sizes = (out_features, in_features, quarter, limit_rows, groups)
    job = new_job(*sizes, *[array.data_ptr() for array in (wide, limits, packed)])
    run(_compiled(), job, -(-quarter // ROWS), threads)
    return packed, mean

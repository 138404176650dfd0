"""Threads for compiled kernels: torch's own where its OpenMP library can be called, else a pool of ours."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import scratch


@cache
def openmp() -> Callable | None:
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


def run(function: Any, job: Tensor, units: int, threads: int) -> None:
    """Run a C function of the address of a job in that many threads.

    The job's first three fields are int64s: the units taken and the threads come so far, which the function counts up,
    and the units that there are.
    """
    job[0] = job[1] = 0
    job[2] = units
    address, threads = job.data_ptr(), min(threads, units)
    parallel = openmp() if os.getpid() == scratch.PROCESS else None  # OpenMP's threads are lost in a fork
    if threads > 1 and parallel is not None:
        parallel(function.address, address, threads, 0)
        return
    helpers = [_pool(os.getpid(), threads - 1).submit(function.ctypes, address) for _ in range(threads - 1)]
    try:
        function.ctypes(address)
    finally:  # an interrupt must not free what they still read
        wait([helper for helper in helpers if not helper.cancel()])  # one that has not started has nothing left to do

"""Threads for compiled kernels: torch's own where its OpenMP library can be called, else a pool of ours."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

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


def threads_for(work: int) -> int:
    """Return how many threads are worth their start for that many weights times rows."""
    return torch.get_num_threads() if work > 2**16 else 1


def new_job(*fields: int) -> ctypes.Array:
    """What a C function is given the address of: `fields` as int64, after three that `run` fills in.

    They are the units taken and the threads come so far, which the function counts up, and the units that there are.
    """
    return (ctypes.c_int64 * (3 + len(fields)))(0, 0, 0, *fields)


@cache
def _callable(function: Any) -> Callable[[int], None]:
    return function.ctypes


def run(function: Any, job: ctypes.Array, units: int, threads: int) -> None:
    """Run a C function of the address of a job in that many threads."""
    job[0], job[1], job[2] = 0, 0, units
    address, call, threads = ctypes.addressof(job), _callable(function), min(threads, units)
    if threads <= 1:
        call(address)
        return
    parallel = openmp() if os.getpid() == scratch.PROCESS else None  # OpenMP's threads are lost in a fork
    if parallel is not None:
        parallel(function.address, address, threads, 0)
        return
    helpers = [_pool(os.getpid(), threads - 1).submit(call, address) for _ in range(threads - 1)]
    try:
        call(address)
    finally:  # an interrupt must not free what they still read
        wait([helper for helper in helpers if not helper.cancel()])  # one that has not started has nothing left to do

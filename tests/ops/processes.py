"""Code in a process of its own, and memory that ends a process that reads too far."""

import ctypes
import faulthandler
import mmap
import os
import signal
import subprocess
import sys

import pytest
import torch


# The ops alone: the package's own `__init__` imports diffusers, which takes longer than most of these processes.
OPS_ALONE = """
import sys, torch, types
from importlib.util import find_spec

package = types.ModuleType("diffusers_terdit")
package.__path__ = list(find_spec("diffusers_terdit").submodule_search_locations)
sys.modules["diffusers_terdit"] = package
"""


def run(code, **environment):
    """The last line that a new process prints."""
    command = [sys.executable, "-c", OPS_ALONE + code]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().split("\n")[-1]


def in_a_fork(function):
    """The exit status of a forked process that calls a function, 0 for true; negative for a signal that ended it."""
    child = os.fork()
    if not child:
        faulthandler.disable()
        signal.alarm(60)  # it must not wait for the threads that it lost
        torch.use_deterministic_algorithms(False)  # this fills memory with all threads of OpenMP
        os._exit(0 if function() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
multi_threaded = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
needs_a_wall = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="no mprotect")


def before_a_wall(tensor):
    """A copy that ends where a page begins that may not be read: a signal ends a process that does."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    wall = -(-size // page) * page
    memory = mmap.mmap(-1, wall + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + wall), page, 0) == 0
    behind = torch.frombuffer(memory, dtype=tensor.dtype, offset=wall - size, count=tensor.numel())
    return behind.view_as(tensor).copy_(tensor)

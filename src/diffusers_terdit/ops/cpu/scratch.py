"""Memory for CPU kernels: one buffer per name and thread, kept from call to call.

A fresh (N, K) tensor for every call costs more than decoding does: 100 MB of page faults for TerDiT-4.2B's widest
layer. Each thread has its own buffers because two threads sharing one would read each other's weights.
"""

import os
import threading

import torch
from torch import Tensor


buffers = threading.local()
PROCESS = os.getpid()  # that imported this: in a fork of it the threads of torch's OpenMP are lost


def take(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Return the first `numel` elements of this thread's buffer `name`; grow it when too small or of another dtype."""
    buffer = getattr(buffers, name, None)
    if buffer is None or buffer.dtype != dtype or buffer.numel() < numel:
        setattr(buffers, name, None)  # free the old one before the new one is allocated
        with torch.inference_mode(False):  # a tensor born in inference mode could not be written to outside it
            buffer = torch.empty(numel, dtype=dtype)
        setattr(buffers, name, buffer)
    return buffer[:numel]

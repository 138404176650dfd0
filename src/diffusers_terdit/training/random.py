"""Random numbers and sample order as functions of (seed, position), so that a run repeats anywhere."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache
def _key(stream: str) -> int:
    return int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")


def _philox(seed: int, stream: str, position: int) -> np.random.Philox:
    # Counter-based: the state is (seed, stream, position); word 0 counts within it.
    return np.random.Philox(key=[seed, _key(stream)], counter=[0, position, 0, 0])


def draw(seed: int, stream: str, position: int) -> float:
    """Return the number of `uniform` for one position, which takes half as long."""
    return np.random.Generator(_philox(seed, stream, position)).random()


def uniform(seed: int, stream: str, positions: Sequence[int]) -> Tensor:
    """Return one uniform number per position: a function of (seed, stream, position) and nothing else.

    Args:
        seed (`int`): 0 to 2**64 - 1.
        stream (`str`): What the number is for, such as `"timestep"`; other names give independent numbers.
        positions (`Sequence[int]`): B positions in the run.

    Returns:
        `torch.Tensor`: (B,), float64 in [0, 1), on the CPU.
    """
    return torch.tensor([draw(seed, stream, position) for position in positions], dtype=torch.float64)


def normal(seed: int, stream: str, positions: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return standard normal noise per position; the arguments are those of `uniform`.

    Returns:
        `torch.Tensor`: (B, *shape), float32, on the CPU.
    """
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    for row, position in zip(noise, positions, strict=True):
        np.random.Generator(_philox(seed, stream, position)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(noise)


def permutation(size: int, seed: int, stream: str, position: int) -> np.ndarray:
    """Return a permutation of `range(size)`; the other arguments are those of `uniform`.

    Returns:
        `np.ndarray`: (size,), int64.
    """
    return _philox(seed, stream, position).random_raw(size).argsort(kind="stable")


def sample_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of an epoch: position p of the run is sample `sample_order(n, seed, p // n)[p % n]`.

    Returns:
        `np.ndarray`: (num_samples,), int64.
    """
    return permutation(num_samples, seed, "order", epoch)


def microbatch_positions(
    step: int, batch_size: int, accumulation_steps: int = 1, process_index: int = 0, num_processes: int = 1
) -> list[range]:
    """Return the positions that one process takes in one optimizer step, one range per accumulated micro-batch.

    Args:
        step (`int`): Optimizer step, from 0.
        batch_size (`int`): Samples per micro-batch and process.
        accumulation_steps (`int`): Micro-batches per optimizer step.
        process_index (`int`): 0 to `num_processes - 1`.
        num_processes (`int`): Processes in the run.
    """
    start = step * accumulation_steps * num_processes * batch_size
    starts = (start + (i * num_processes + process_index) * batch_size for i in range(accumulation_steps))
    return [range(first, first + batch_size) for first in starts]


def run_positions(
    first_step: int,
    max_steps: int,
    batch_size: int,
    accumulation_steps: int = 1,
    process_index: int = 0,
    num_processes: int = 1,
) -> Iterator[range]:
    """Yield the `microbatch_positions` of each step from `first_step` on: the `batch_sampler` of a data loader."""
    for step in range(first_step, max_steps):
        yield from microbatch_positions(step, batch_size, accumulation_steps, process_index, num_processes)

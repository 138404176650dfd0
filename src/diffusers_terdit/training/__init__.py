"""What trainers of ternary models share, one module per question.

A run is a function of its seed. Training consumes samples at positions 0, 1, 2, ...: step s with B samples per step
takes positions s*B to s*B + B - 1. Which sample is at a position, its noise, timestep, label dropout and flip are
functions of (seed, position) alone, whatever the number of processes, loader workers or restarts.
"""

from . import (
    checkpointing,
    data,
    export,
    idx,
    initialize,
    log,
    memory,
    muon,
    random,
    recipes,
    sharding,
    statistics,
    stopping,
)


__all__ = [
    "checkpointing",
    "data",
    "export",
    "idx",
    "initialize",
    "log",
    "memory",
    "muon",
    "random",
    "recipes",
    "sharding",
    "statistics",
    "stopping",
]

"""How much memory training takes, and how much is free."""

import math
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from ..models.transformer_terdit import TerDiTTransformer2DModel


_CGROUPS = (  # folder, limit and use of a container, version 2 and 1 of Linux' control groups
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def training_bytes(
    model: TerDiTTransformer2DModel,
    batch_size: int,
    bfloat16: bool = False,
    checkpointing: bool = False,
    shards: int = 1,
    moment_bytes: int = 8,
) -> int:
    """Estimate the memory that one process needs to train a model, beyond what it has when it starts.

    Weights, gradients and average take 12 bytes a weight, and AdamW's two moments 8. Of a block, autograd
    keeps for each token 16.4 floats per channel and 4 per channel of the feed-forward layers; that was counted on this
    network. Under bfloat16 autocast it is 0.6 times as many bytes. The backward pass was measured to take two blocks
    more, and four where it computes blocks again. The libraries take 100 MB.

    Args:
        model ([`TerDiTTransformer2DModel`]): Float format; it may be on the meta device.
        batch_size (`int`): Samples in one forward pass.
        bfloat16 (`bool`): Whether activations are computed under bfloat16 autocast.
        checkpointing (`bool`): Whether blocks keep their input alone.
        shards (`int`): Number of processes over which weights and optimizer are sharded.
        moment_bytes (`int`): What the optimizer keeps of a weight: AdamW 8, with 8 bits 2, Muon 4.

    Returns:
        `int`: Bytes; within 30 % of the peak that was measured on a CPU.
    """
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    ffn_width = model.get_parameter("transformer_blocks.0.ff.gate_proj.weight").shape[0]
    tokens = batch_size * (config.sample_size // config.patch_size) ** 2
    block = 4 * tokens * (16.4 * width + 4 * ffn_width)
    kept = 4 * tokens * width if checkpointing else block * (0.6 if bfloat16 else 1)
    weights = (12 + moment_bytes) * sum(parameter.numel() for parameter in model.parameters()) / shards
    passing = (4 if checkpointing else 2) * block
    return int(1e8 + weights + config.num_layers * kept + passing)


def encoder_bytes(vae: AutoencoderKL, batch_size: int, resolution: int) -> int:
    """Estimate the memory in which a VAE encodes images: five feature maps of its first, largest size."""
    return 5 * 4 * batch_size * resolution**2 * vae.config["block_out_channels"][0]


def free_bytes(device: torch.device) -> int | None:
    """Return the memory that is free for this process, also where a container limits it; `None` where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [_of_containers()]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free.append(int(rows["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # what there is, free or not
        free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return int(least) if math.isfinite(least := min(free)) else None


def _of_containers() -> float:
    for folder, limit, used in _CGROUPS:
        paths = [Path(folder, name) for name in (limit, used, "memory.stat")]
        if all(path.exists() for path in paths) and (text := paths[0].read_text().strip()).isdecimal():
            counts = dict(line.split() for line in paths[2].read_text().splitlines())
            # pages of files count as used, and are given back when memory is asked for
            cached = sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))
            return int(text) - int(paths[1].read_text()) + cached
    return math.inf

"""What trainers of ternary models share: random numbers, schedules, parameter groups, statistics, checkpoints, export.

A run is a function of its seed. Training consumes samples at positions 0, 1, 2, ...: step s with B samples per step
takes positions s*B to s*B + B - 1. Which sample stands at a position, its noise, timestep, label dropout and flip are
functions of (seed, position) alone, whatever the number of processes, loader workers or restarts.
"""

from ..pipelines.schedulers import training_scheduler
from ..storage.saving import new_file, new_folder, output_folder, writing
from .checkpointing import (
    STATE_NAME,
    checkpoints,
    cut_log,
    load_checkpoint,
    rotate_checkpoints,
    save_checkpoint,
)
from .data import (
    LATENTS_NAME,
    Digits,
    Examples,
    ImageSamples,
    LatentCodec,
    LatentSamples,
    ShardedStream,
    check_columns,
    open_dataset,
    prepare_image,
    stream_samples,
)
from .ema import ema_decay, update_ema
from .export import (
    image_grid,
    model_card,
    packed_model,
    push_pipeline,
    save_card,
    save_pipeline,
    to_pipeline,
)
from .initialize import gradual_ternarization, least_squares_scale, load_transformer, transfer_weights
from .random import microbatch_positions, normal, run_positions, sample_order, uniform
from .recipes import PRESETS, clip_grad_norm, learning_rate_factor, parameter_groups
from .sharding import shard_model
from .statistics import gate_sizes, packed_codes, ternary_statistics, weights_digest


__all__ = [
    "LATENTS_NAME",
    "PRESETS",
    "STATE_NAME",
    "Digits",
    "Examples",
    "ImageSamples",
    "LatentCodec",
    "LatentSamples",
    "ShardedStream",
    "check_columns",
    "checkpoints",
    "clip_grad_norm",
    "cut_log",
    "ema_decay",
    "gate_sizes",
    "gradual_ternarization",
    "image_grid",
    "learning_rate_factor",
    "least_squares_scale",
    "load_checkpoint",
    "load_transformer",
    "microbatch_positions",
    "model_card",
    "new_file",
    "new_folder",
    "normal",
    "open_dataset",
    "output_folder",
    "packed_codes",
    "packed_model",
    "parameter_groups",
    "prepare_image",
    "push_pipeline",
    "rotate_checkpoints",
    "run_positions",
    "sample_order",
    "save_card",
    "save_checkpoint",
    "save_pipeline",
    "shard_model",
    "stream_samples",
    "ternary_statistics",
    "to_pipeline",
    "training_scheduler",
    "transfer_weights",
    "uniform",
    "update_ema",
    "weights_digest",
    "writing",
]

"""Recipes: presets, learning rates, parameter groups, gradient clipping and the average of the weights."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..models.transformer_terdit import SIZES
from .sharding import full_tensor, local_tensor


def _size(name: str) -> dict[str, Any]:
    # The images decide about the sample size, through --resolution.
    return {key: value for key, value in SIZES[name].items() if key != "sample_size"}


# What a laptop trains in minutes. Short runs need a short memory of squared gradients, and positions. Warm-up, average
# and decay follow from the length of the run.
_TINY: dict[str, Any] = {
    "resolution": 32,
    "patch_size": 4,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "ffn_dim": 384,
    "pos_embed_type": "rope+sincos2d",
    "initialization": "small_gain",
    "flow_matching": True,
    "train_batch_size": 32,
    "max_train_steps": 1500,
    "optimizer": "muon",
    "learning_rate": 3e-3,
    "lr_scheduler": "wsd",
    "scale_lr_factor": 0.1,
    "adam_beta2": 0.95,
    "checkpointing_steps": 250,
    "validation_steps": 250,
    "num_inference_steps": 25,
}
_SMALL: dict[str, Any] = {
    **_TINY,
    "resolution": 64,
    "patch_size": 8,
    "num_attention_heads": 8,
    "ffn_dim": None,
    "learning_rate": 2e-3,
}

# What the runs of the paper have in common with the demo.
_LONG: dict[str, Any] = {
    "patch_size": 2,
    "flow_matching": False,
    "optimizer": "adamw",
    "lr_scheduler": "wsd",
    "lr_warmup_steps": 0,
    "scale_lr_factor": 1.0,
    "adam_beta2": 0.999,
    "num_inference_steps": 50,
}
_TERDIT_600M: dict[str, Any] = {
    **_LONG,
    **_size("terdit-600m-256"),
    "resolution": 256,
    "ffn_dim": None,
    "pos_embed_type": "rope",
    "initialization": "reference",
    "train_batch_size": 32,
    "learning_rate": 5e-4,
    "lr_scheduler": "piecewise_constant",
    "lr_step_rules": "1:1550000,0.2",
    "total_batch_size": 256,
    "max_train_steps": 1_750_000,
    "ema_decay": 0.9999,
    "checkpointing_steps": 5000,
    "validation_steps": 10_000,
}


# Sizes and recipe by name, as flags of examples/train_terdit.py: for a laptop, the built-in demo, and the sizes and
# schedules of the paper.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    "small": _SMALL,
    "medium": {**_SMALL, "resolution": 256, "patch_size": 4, "num_layers": 8},  # of latents, an eighth of the pixels
    "demo": {
        **_LONG,
        "resolution": 8,
        "in_channels": 1,
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "ffn_dim": 192,
        "pos_embed_type": "rope+sincos2d",
        "initialization": "small_gain",
        "train_batch_size": 64,
        "max_train_steps": 6000,
        "learning_rate": 4e-3,
        "lr_warmup_steps": 100,
        "lr_decay_steps": 1500,
        "ema_decay": 0.995,
        "checkpointing_steps": 1000,
        "validation_steps": 1000,
    },
    "terdit-600m": _TERDIT_600M,
    "terdit-4.2b": {
        **_TERDIT_600M,
        **_size("terdit-4.2b-256"),
        "lr_step_rules": "1:550000,0.2",
        "total_batch_size": 512,
        "max_train_steps": 1_180_000,
    },
    # The paper's size and length with what trains small models best (docs/results/recipe.md); nobody ran it.
    "terdit-600m-tuned": {
        **_TERDIT_600M,
        **{key: _TINY[key] for key in ("pos_embed_type", "flow_matching", "lr_scheduler", "scale_lr_factor")},
        **{key: _TINY[key] for key in ("optimizer", "adam_beta2")},
        "initialization": "small_gain",
        "lr_step_rules": None,
        "num_inference_steps": _TINY["num_inference_steps"],
    },
    # Figures 7 and 8: one learning rate, and a Frechet distance every 100,000 steps.
    "ablation": {
        **_TERDIT_600M,
        "lr_scheduler": "constant",
        "max_train_steps": 400_000,
        "frechet_steps": 100_000,
        "checkpointing_steps": 100_000,
    },
}


def learning_rate_factor(
    step: int,
    schedule: str,
    max_steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    step_rules: str | None = None,
) -> float:
    """Return the factor of the learning rate at a step.

    Args:
        step (`int`): Optimizer step, from 0.
        schedule (`str`): `"constant"`; `"cosine"`: to 0 at `max_steps`; `"wsd"` (warm-up, stable, decay): constant,
            then linear to 0 over the last `decay_steps`; `"piecewise_constant"`: by `step_rules`.
        max_steps (`int`): Length of the run.
        warmup_steps (`int`): Linear from 0 at the start of any schedule.
        decay_steps (`int`): For `"wsd"`.
        step_rules (`str`, *optional*): diffusers' notation: `"1:1550000,0.2"` is 1 up to step 1,550,000, then 0.2.

    Raises:
        ValueError: Unknown schedule, or rules that do not parse.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        progress = min((step - warmup_steps) / max(max_steps - warmup_steps, 1), 1)
        return 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "wsd":
        return min(max(max_steps - step, 0) / max(decay_steps, 1), 1.0)
    if schedule == "piecewise_constant":
        *rules, last = (step_rules or "").split(",")
        try:
            steps = [(float(value), int(until)) for value, until in (rule.split(":") for rule in rules)]
            return next((value for value, until in steps if step < until), float(last))
        except ValueError as error:
            raise ValueError(f'`step_rules` must look like "1:1550000,0.2", got {step_rules!r}.') from error
    raise ValueError(f'`schedule` must be "constant", "cosine", "wsd" or "piecewise_constant", got {schedule!r}.')


def parameter_groups(
    model: nn.Module, weight_decay: float = 0.0, scale_lr_factor: float = 1.0, muon: bool = False
) -> list[dict[str, Any]]:
    """Return parameter groups: matrices; norms, biases and embeddings, without decay; ternary scales.

    Args:
        model (`torch.nn.Module`): Its parameters that take a gradient are grouped.
        weight_decay (`float`): Decay of the matrices; that of the other groups is 0.
        scale_lr_factor (`float`): `lr_factor` of the scales; that of the other groups is 1.
        muon (`bool`): Whether the matrices of `model.transformer_blocks` are a separate group, for
            [`~training.muon.Muon`]; it says `"muon": True`.

    Returns:
        `list[dict]`: Groups with `name`, `params`, `weight_decay` and `lr_factor`; the trainer sets each group's `lr`
        to the learning rate times `lr_factor`.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    blocks = {id(p) for p in model.get_submodule("transformer_blocks").parameters()} if muon else set()
    groups: dict[str, list[Tensor]] = {"block matrices": [], "matrices": [], "vectors": [], "scales": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.split(".")[-1] == "weight_scale":
            groups["scales"].append(parameter)
        elif parameter.ndim < 2 or id(parameter) in embeddings:
            groups["vectors"].append(parameter)
        else:
            groups["block matrices" if id(parameter) in blocks else "matrices"].append(parameter)
    return [
        {
            "name": name,
            "params": params,
            "weight_decay": weight_decay if "matrices" in name else 0.0,
            "lr_factor": scale_lr_factor if name == "scales" else 1.0,
            "muon": name == "block matrices",
        }
        for name, params in groups.items()
        if params
    ]


def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale the gradients, sharded or not, to a norm of at most `max_norm`; return the norm before, () float32."""
    return full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))


def decay_for(max_steps: int) -> float:
    """Return the decay of an average that remembers a fifteenth of a run: 1 - 15 / steps, from 0 to 0.9999."""
    return min(max(0.0, 1 - 15 / max_steps), 0.9999)


def average_decay(step: int, decay: float) -> float:
    """Return min(decay, (1 + step) / (10 + step)), a decay that warms up to forget the first weights.

    Args:
        step (`int`): Updates so far.
        decay (`float`): Its limit, in [0, 1).
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set `average = decay * average + (1 - decay) * model`, in place, for all parameters, sharded or not.

    The average is a separate float32 model, so it can be sampled from, saved and packed while the other one trains.
    """
    averages = [local_tensor(parameter) for parameter in average.parameters()]
    torch._foreach_lerp_(averages, [local_tensor(parameter) for parameter in model.parameters()], 1 - decay)

"""The exponential moving average of a model's weights."""

import torch
from torch import nn

from .sharding import local_tensor


def decay_at(step: int, decay: float) -> float:
    """Return min(decay, (1 + step) / (10 + step)), a decay that warms up to forget the first weights.

    Args:
        step (`int`): Updates so far.
        decay (`float`): Its limit, in [0, 1).
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update(ema_model: nn.Module, model: nn.Module, decay: float) -> None:
    """Set `ema = decay * ema + (1 - decay) * model`, in place, for all parameters.

    The average is a separate float32 model, so it can be sampled from, saved and packed while the other one trains;
    nothing is swapped and restored.
    """
    averages = [local_tensor(parameter) for parameter in ema_model.parameters()]
    torch._foreach_lerp_(averages, [local_tensor(parameter) for parameter in model.parameters()], 1 - decay)

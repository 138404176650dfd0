"""Muon: a matrix's step is its momentum with all singular values made about equal."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .sharding import full_tensor, shard_like


BATCH = 2**24  # values that are orthogonalized at once


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups that say `"muon": True`, and AdamW for the others.

    The learning rate is that of AdamW for both: a Muon step has the root mean square of AdamW's, about .2. Unlike
    `torch.optim.Muon`, it takes matrices of one shape together, in float32 on a CPU, where bfloat16 can be several
    times as slow, and shards: each process then computes the whole step, and applies its part.

    Args:
        params (`Iterable[dict]`): Parameter groups, such as `recipes.parameter_groups(model, muon=True)`. What Muon
            takes are matrices, (N, K); their `weight_decay` is AdamW's.
        momentum (`float`): Decay of the average of the gradients.
        kwargs: Arguments of `torch.optim.AdamW`.

    Source: Keller Jordan, https://kellerjordan.github.io/posts/muon; the size of a step is that of
    https://arxiv.org/abs/2502.16982.
    """

    def __init__(self, params: Any, momentum: float = 0.95, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.defaults["momentum"] = momentum
        for group in self.param_groups:
            group.setdefault("momentum", momentum)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step, as every torch optimizer does."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        momentum, of_shape = group["momentum"], defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                of_shape[parameter.shape].append(parameter)
        for shape, parameters in of_shape.items():
            count, rate = max(1, BATCH // shape.numel()), group["lr"] * 0.2 * math.sqrt(max(shape))
            for start in range(0, len(parameters), count):
                some = parameters[start : start + count]
                # Nesterov's: the average as it will be if the next gradient is the same
                ahead = [full_tensor(self.state[p]["momentum_buffer"].lerp(p.grad, 1 - momentum)) for p in some]
                for parameter, step in zip(some, orthogonalize(torch.stack(ahead)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(shard_like(rate * step, parameter))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices with the singular vectors of the given ones, and singular values between about .7 and 1.2.

    Five rounds of an odd polynomial (Newton-Schulz), in bfloat16 on a GPU, in float32 elsewhere.

    Args:
        matrices (`Tensor` of shape (B, N, K)): A matrix of zeros stays one.

    Returns:
        `Tensor` of shape (B, N, K), in the dtype of `matrices`.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide.bfloat16() if wide.device.type == "cuda" else wide.float()
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return (x if wide is matrices else x.mT).to(matrices.dtype)

"""Find the step and the layer at which sampling stops being finite."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from .._diffusers import reset_step_caches


class FiniteCheck:
    """Raise a `ValueError` for a step whose output holds NaN or infinity.

    On a GPU a step is judged after the next one was queued, so that the host never waits for the device.

    Args:
        transformer ([`~diffusers.ModelMixin`]): Computes the steps.
        num_timesteps (`int`): How many there are, for the message.
        device (`torch.device`): Where they are computed.
    """

    def __init__(self, transformer: ModelMixin, num_timesteps: int, device: torch.device):
        self.transformer, self.num_timesteps = transformer, num_timesteps
        self._one_step_late = device.type == "cuda"
        self._pending: Callable[[], None] = lambda: None

    def __call__(self, output: Tensor, step: int, timestep: Tensor, model_input: Tensor, labels: Tensor) -> None:
        """Judge `output` (B, C', h, w) of step `step`, which had the other arguments as inputs."""
        finite = output.isfinite().all()
        if not self._one_step_late:
            self._raise_unless(finite, step, timestep, model_input, labels)
            return
        on_host, copied = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        on_host.copy_(finite, non_blocking=True)
        copied.record(torch.cuda.current_stream(finite.device))

        def judge() -> None:
            copied.synchronize()
            self._raise_unless(on_host, step, timestep, model_input, labels)

        before, self._pending = self._pending, judge
        before()

    def last(self) -> None:
        """Judge the last step, if it was not yet."""
        self._pending()

    def _raise_unless(self, finite: Tensor, *inputs: Any) -> None:
        if not finite:
            raise ValueError(self._explain(*inputs))

    def _explain(self, step: int, timestep: Tensor, model_input: Tensor, labels: Tensor) -> str:
        """Compute the step once more, and name the first layer that gives NaN or infinity."""
        place = f"Step {step + 1} of {self.num_timesteps} (timestep {float(timestep):g})"
        if not model_input.isfinite().all():
            return (
                f"{place} starts from latents with NaN or infinity: those passed in, a callback's or the scheduler's."
            )
        names = {module: name for name, module in self.transformer.named_modules() if name}
        found: list[str] = []

        def look(module, inputs, output) -> None:
            outputs = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(o, Tensor) and o.is_floating_point() and not o.isfinite().all() for o in outputs):
                found.append(names[module])

        hooks = [module.register_forward_hook(look) for module in names]
        reset_step_caches(self.transformer)
        try:
            with torch.compiler.set_stance("force_eager"):
                rows = model_input.to(self.transformer.dtype), timestep.expand(len(labels)), labels
                self.transformer(*rows, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        layer = f"layer {found[0]}" if found else "the transformer"
        dtype = str(self.transformer.dtype).removeprefix("torch.")
        advice = {
            "float32": "Its weights are damaged, or were never trained.",
            "bfloat16": "Try float32; if it does the same there, its weights are damaged or were never trained.",
        }.get(dtype, "Try bfloat16 or float32, which hold larger numbers.")
        return f"{place}: {layer} gives NaN or infinity in {dtype}. {advice}"

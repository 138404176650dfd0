"""Schedulers: the default, by name, and which of diffusers' can sample which model."""

import difflib
import inspect
from typing import Any

import diffusers
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin


def default_scheduler() -> DDPMScheduler:
    """The sampler TerDiT is trained for: 1000 linear steps, learned variance, no clipping, spaced from 999 to 0."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        variance_type="learned_range",
        clip_sample=False,
        timestep_spacing="linspace",
    )


def training_scheduler(
    learn_sigma: bool = True, flow_matching: bool = False
) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """What a model is trained on and sampled with: the 1000-step linear DDPM, or rectified flow.

    Args:
        learn_sigma (`bool`): Whether the model predicts the variance; without it DDPM uses its own small one.
        flow_matching (`bool`): Rectified flow instead of DDPM.
    """
    if flow_matching:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler = default_scheduler()
    return scheduler if learn_sigma else DDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")


def scheduler_by_name(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler that samples what `current` samples, from its configuration.

    Args:
        name (`str`): Name of the class.
        current ([`~diffusers.SchedulerMixin`]): The pipeline's.

    Raises:
        ValueError: No such scheduler (near matches are shown), or it cannot sample what the model predicts.
    """
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not issubclass(found, diffusers.SchedulerMixin):
        names = [other for other in dir(diffusers) if other.endswith("Scheduler")]
        inside = sorted((other for other in names if name.lower() in other.lower()), key=len)
        near = difflib.get_close_matches(name, names, n=3) or inside[:3]
        raise ValueError(
            f"diffusers has no scheduler {name!r}. {'Close matches' if near else 'There are'}: "
            f"{', '.join(near or ['DDPMScheduler', 'DDIMScheduler', 'DPMSolverMultistepScheduler', '...'])}."
        )
    cls: Any = found
    settings: dict[str, Any] = {}
    flow, asked_flow = (n.startswith("FlowMatch") for n in (type(current).__name__, name))
    if flow and not asked_flow and "use_flow_sigmas" in inspect.signature(cls).parameters:
        shift = current.config.shift
        settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    elif flow != asked_flow:
        trained, others = (
            (
                "rectified flow",
                "FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler",
            )
            if flow
            else ("noise prediction", "DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler")
        )
        raise ValueError(
            f"{name} cannot sample this model, which was trained for {trained} ({type(current).__name__}). Try"
            f" {others}."
        )
    return cls.from_config(current.config, **settings)

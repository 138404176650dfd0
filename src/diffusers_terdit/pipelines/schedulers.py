"""The default scheduler, schedulers by name, and which of diffusers' schedulers can sample which model."""

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import (
    ConfigMixin,
    DDPMParallelScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LTXEulerAncestralRFScheduler,
    SchedulerMixin,
)


LEARNED = ("learned", "learned_range")  # DDPM's `variance_type` for a variance that the model predicts


def default_scheduler() -> DDPMScheduler:
    """Return the scheduler TerDiT is trained with: 1000 linear steps, learned variance, no clipping, from 999 to 0."""
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
    """Return the scheduler that a model is trained on and sampled with: 1000-step linear DDPM, or rectified flow.

    Args:
        learn_sigma (`bool`): Whether the model predicts the variance; without it DDPM uses its own small one.
        flow_matching (`bool`): Rectified flow instead of DDPM.
    """
    if flow_matching:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    scheduler = default_scheduler()
    return scheduler if learn_sigma else DDPMScheduler.from_config(scheduler.config, variance_type="fixed_small")


def scheduler_by_name(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """Return a diffusers scheduler that samples what `current` samples, from its configuration.

    Args:
        name (`str`): Name of the class.
        current ([`~diffusers.SchedulerMixin`]): The pipeline's.

    Raises:
        ValueError: No such scheduler (near matches are shown), or it cannot sample what the model predicts.
    """
    found = getattr(diffusers, name, None)
    if not isinstance(found, type) or not (issubclass(found, SchedulerMixin) and issubclass(found, ConfigMixin)):
        names = [other for other in dir(diffusers) if other.endswith("Scheduler")]
        inside = sorted((other for other in names if name.lower() in other.lower()), key=len)
        near = difflib.get_close_matches(name, names, n=3) or inside[:3]
        raise ValueError(
            f"diffusers has no scheduler {name!r}. {'Close matches' if near else 'There are'}: "
            f"{', '.join(near or ['DDPMScheduler', 'DDIMScheduler', 'DPMSolverMultistepScheduler', '...'])}."
        )
    cls: Any = found
    settings: dict[str, Any] = {}
    flow, asked_flow = is_flow(type(current)), is_flow(cls)
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


def is_flow(cls: type) -> bool:
    """Whether a class of schedulers follows rectified flow, rather than DDPM's noise."""
    return cls.__name__.startswith("FlowMatch")


def uses_learned_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler reads the variance that a model predicts: DDPM with a learned `variance_type`."""
    ddpm = isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler))
    return ddpm and scheduler.config.get("variance_type") in LEARNED


def check_scheduler(scheduler: SchedulerMixin, learn_sigma: bool) -> None:
    """Raise a `ValueError` where a scheduler cannot sample a model.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): The pipeline's.
        learn_sigma (`bool`): Whether the model predicts noise and variance of DDPM's steps.
    """
    name = type(scheduler).__name__
    if learn_sigma and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"This model predicts the noise of DDPM's steps (it was trained with learn_sigma=True); {name} has other"
            " steps and would draw something else. Take one of DDPM's family, such as"
            " `DPMSolverMultistepScheduler.from_config(...)`; docs/schedulers.md lists them."
        )
    if uses_learned_variance(scheduler) and not learn_sigma:
        raise ValueError(
            f"This {name} expects a learned variance, but this model predicts none (learn_sigma=False). Use"
            ' `DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_small")`.'
        )


def timesteps_device(scheduler: SchedulerMixin, device: torch.device) -> torch.device:
    """Return where a scheduler's timesteps belong: on the CPU beside its tables, so that no look-up waits for a GPU.

    LTX's scheduler multiplies latents by tables that it keeps with its timesteps, so they go on the latents' device.
    """
    return device if isinstance(scheduler, LTXEulerAncestralRFScheduler) else torch.device("cpu")


@contextmanager
def unused_variance_lifted(scheduler: SchedulerMixin) -> Iterator[None]:
    """Take a learned `variance_type`, inherited from DDPM's config, from a scheduler that cannot use it; then restore.

    DPM-Solver would cut the noise to its first 3 channels.
    """
    variance_type = scheduler.config.get("variance_type")
    if variance_type not in LEARNED or uses_learned_variance(scheduler):
        yield
        return
    scheduler.register_to_config(variance_type=None)
    try:
        yield
    finally:
        scheduler.register_to_config(variance_type=variance_type)

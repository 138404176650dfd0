"""The default scheduler, schedulers by name, and which of diffusers' schedulers can sample which model."""

import difflib
import inspect
from collections.abc import Iterator, Sequence
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


def scheduler_for(config: Any) -> SchedulerMixin:
    """Return the `training_scheduler` of a model, set to what its config says that it predicts.

    Args:
        config: The config of a [`TerDiTTransformer2DModel`].

    Raises:
        ValueError: It does not say, or predicts what no such scheduler samples.
    """
    prediction = config.prediction_type or ("epsilon" if config.learn_sigma else None)
    if prediction is None:
        raise ValueError(
            "This model does not say what it predicts: prediction_type=None, learn_sigma=False. Build it with a"
            " `prediction_type`, or pass a `scheduler`: `training_scheduler(flow_matching=True)` if it was trained for"
            " rectified flow, `training_scheduler(learn_sigma=False)` for DDPM."
        )
    return fitting_scheduler(training_scheduler(config.learn_sigma, prediction == "flow_prediction"), prediction)


def scheduler_by_name(name: str, current: SchedulerMixin, prediction: str | None) -> SchedulerMixin:
    """Return a diffusers scheduler that samples what a model predicts, from the configuration of another one.

    Args:
        name (`str`): Name of the class, in any case, with or without "Scheduler"; or "dpm", "unipc", "euler", "heun".
        current ([`~diffusers.SchedulerMixin`]): The pipeline's.
        prediction (`str`, *optional*): What the model predicts, see `fitting_scheduler`.

    Raises:
        ValueError: No such scheduler (near matches are shown), or it cannot sample what the model predicts.
    """
    names = {_short(other): other for other in dir(diffusers) if other.endswith("Scheduler")}
    key = _short(name)
    family = "flowmatch" if str(prediction).startswith("flow") else ""
    key = {
        "dpm": "dpmsolvermultistep",
        "unipc": "unipcmultistep",
        "euler": f"{family}eulerdiscrete",
        "heun": f"{family}heundiscrete",
    }.get(key, key)
    found = getattr(diffusers, names.get(key, ""), None)
    if not isinstance(found, type) or not (issubclass(found, SchedulerMixin) and issubclass(found, ConfigMixin)):
        inside = sorted((other for short, other in names.items() if key in short), key=len)
        near = [names[short] for short in difflib.get_close_matches(key, names, n=3)] or inside[:3]
        raise ValueError(
            f"diffusers has no scheduler {name!r}. {'Close matches' if near else 'There are'}: "
            f"{', '.join(near or ['dpm', 'unipc', 'euler', 'heun', 'DDPMScheduler', 'DDIMScheduler'])}."
        )
    parameters = inspect.signature(found).parameters  # diffusers warns of each setting that is none of them
    config = {key: value for key, value in current.config.items() if key in parameters or key.startswith("_")}
    if "flow_shift" in parameters and "shift" in current.config:
        config["flow_shift"] = current.config["shift"]
    if "shift" in parameters and current.config.get("use_flow_sigmas") and "flow_shift" in current.config:
        config["shift"] = current.config["flow_shift"]
    return fitting_scheduler(found.from_config(config), prediction)  # type: ignore[attr-defined]


def _short(name: str) -> str:
    return name.lower().removesuffix("scheduler")


def is_flow(cls: type) -> bool:
    """Return whether a class of schedulers follows rectified flow, rather than DDPM's noise."""
    return cls.__name__.startswith(("Flow", "LTX", "Helios"))


def prediction_of(scheduler: Any) -> str | None:
    """Return what a scheduler expects of its model: diffusers' `prediction_type`, `None` where it does not say."""
    config = getattr(scheduler, "config", {})
    if is_flow(type(scheduler)) or config.get("use_flow_sigmas"):
        return "flow_prediction"
    return config.get("prediction_type")


def fitting_scheduler(scheduler: Any, prediction: str | None) -> Any:
    """Return a scheduler that samples what a model predicts: the one given, or the same with other settings.

    Swapped in by `from_config`, diffusers' schedulers take up neither the flow nor the prediction of a scheduler of
    another family.

    Args:
        scheduler ([`~diffusers.SchedulerMixin`]): The pipeline's.
        prediction (`str`, *optional*): `"epsilon"`, `"v_prediction"`, `"sample"`, `"flow_prediction"`; `None` where it
            is not known.

    Raises:
        ValueError: It cannot sample that.
    """
    flow = str(prediction).startswith("flow")
    has_steps = hasattr(scheduler, "alphas_cumprod")
    cls, config = type(scheduler), getattr(scheduler, "config", {})
    parameters = inspect.signature(cls).parameters
    takes_flow = "use_flow_sigmas" in parameters and not is_flow(cls)
    takes_noise = "prediction_type" in parameters and has_steps
    if flow:
        configured = takes_flow and config.get("use_flow_sigmas") and config.get("prediction_type") == prediction
        fits = configured or (is_flow(cls) and prediction == "flow_prediction")
    else:
        fits = has_steps and prediction_of(scheduler) == prediction
    if prediction is None or fits:
        return scheduler
    if not (takes_flow if flow else takes_noise):
        trained, others = (
            (
                "rectified flow",
                "FlowMatchHeunDiscreteScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler",
            )
            if flow
            else ("noise prediction", "DDIMScheduler, DPMSolverMultistepScheduler or UniPCMultistepScheduler")
        )
        raise ValueError(
            f"{cls.__name__} cannot sample this model, which was trained for {trained} ({prediction}). Try {others}."
        )
    settings: dict[str, Any] = {"prediction_type": prediction}
    if takes_flow:
        shift = "flow_shift" if config.get("use_flow_sigmas") else "shift"
        settings |= {"use_flow_sigmas": flow, "flow_shift": config.get(shift, config.get("flow_shift", 1.0))}
    return cls.from_config(scheduler.config, **settings)


def uses_learned_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler reads the variance that a model predicts: DDPM with a learned `variance_type`."""
    ddpm = isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler))
    return ddpm and scheduler.config.get("variance_type") in LEARNED


def check_variance(scheduler: SchedulerMixin, learn_sigma: bool) -> None:
    """Raise a `ValueError` where a scheduler expects a variance that a model does not predict."""
    if uses_learned_variance(scheduler) and not learn_sigma:
        raise ValueError(
            f"This {type(scheduler).__name__} expects a learned variance, but this model predicts none"
            " (learn_sigma=False). Use"
            ' `DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_small")`.'
        )


def timesteps_device(scheduler: SchedulerMixin, device: torch.device) -> torch.device:
    """Return where a scheduler's timesteps belong: on the CPU with its tables, so that no look-up waits for a GPU.

    LTX's scheduler multiplies latents by tables that it keeps with its timesteps, so they go on the latents' device.
    """
    return device if isinstance(scheduler, LTXEulerAncestralRFScheduler) else torch.device("cpu")


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> torch.Tensor:
    """Set the steps of a scheduler, by number or one by one, and return the timesteps.

    Raises:
        ValueError: Both or an empty list are given, or the scheduler does not take them.
    """
    own = {name: list(steps) for name, steps in (("timesteps", timesteps), ("sigmas", sigmas)) if steps is not None}
    if not own:
        scheduler.set_timesteps(num_inference_steps, device=device)  # type: ignore[attr-defined]
        return scheduler.timesteps  # type: ignore[attr-defined]
    accepted = inspect.signature(scheduler.set_timesteps).parameters  # type: ignore[attr-defined]
    name = type(scheduler).__name__
    if len(own) == 2 or not all(own.values()) or not own.keys() <= accepted.keys():
        taken = [f"`{key}`" for key in ("timesteps", "sigmas") if key in accepted]
        raise ValueError(
            f"Got {' and '.join(f'{key}={value!r:.80}' for key, value in own.items())}; {name} takes"
            f" {' or '.join(taken) or 'neither `timesteps` nor `sigmas`'}, one list that is not empty."
        )
    scheduler.set_timesteps(device=device, **own)  # type: ignore[attr-defined]
    return scheduler.timesteps  # type: ignore[attr-defined]


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

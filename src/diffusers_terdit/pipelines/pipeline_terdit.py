"""Sampling from a class-conditional ternary diffusion transformer."""

import difflib
import inspect
import math
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .._diffusers import is_offloaded, reset_step_caches
from ..lora import PipelineAdapterMixin
from ..modeling import StrictPipelineMixin
from ..models.transformer_terdit import TerDiTTransformer2DModel
from .finite import FiniteCheck
from .schedulers import (
    check_variance,
    fitting_scheduler,
    prediction_of,
    scheduler_for,
    set_timesteps,
    timesteps_device,
    unused_variance_lifted,
    uses_learned_variance,
)


logger = logging.get_logger(__name__)

SAMPLING_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 4.0}  # of models that recommend none
ClassLabels = int | str | Sequence[Any] | Tensor | np.ndarray


def _check_settings(num_inference_steps: Any, guidance_scale: Any, **counts: Any) -> None:
    """Raise a `ValueError` unless the guidance scale is a number, and the others are positive ints."""
    if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, (int, float, np.number)):
        raise ValueError(f"`guidance_scale` must be a number, got {guidance_scale!r}.")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"`guidance_scale` must be finite, got {guidance_scale}.")
    for name, value in {"num_inference_steps": num_inference_steps, **counts}.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"`{name}` must be a positive int, got {value!r}.")


class TerDiTPipeline(StrictPipelineMixin, PipelineAdapterMixin, DiffusionPipeline):
    r"""Images from class labels with a [`TerDiTTransformer2DModel`].

    Args:
        transformer ([`TerDiTTransformer2DModel`]): Predicts noise (and variance) of the latents.
        scheduler ([`~diffusers.SchedulerMixin`] or `None`): DDPM uses the learned variance; the others get the noise
            alone. `None`: DDPM or rectified flow, by what the model says that it predicts.
        vae ([`~diffusers.AutoencoderKL`], *optional*): Decodes latents. Without it the model works on
            pixels in [-1, 1]: with 1 or 3 channels they are the image, with other counts only `output_type="latent"`
            works.
        id2label (`dict[str, str]`, *optional*): Label names by class id; several names of a class are separated by
            commas.
        guidance_channels (`int`, *optional*): How many noise channels guidance acts on; `None` for all. The
            checkpoints of the TerDiT authors are sampled with 3 of 4.
        sampling_defaults (`dict`, *optional*): The `num_inference_steps` and `guidance_scale` that suit the model,
            for calls that pass none; 50 and 4.0 where it does not say.

    Source: TerDiT (https://arxiv.org/abs/2405.14854); classifier-free guidance (https://arxiv.org/abs/2207.12598).
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    scheduler: Any
    _call: object  # the running call; there only while one runs

    def __init__(
        self,
        transformer: TerDiTTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers
        | None,  # no default: the host would take no other one for a saved pipeline
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
        guidance_channels: int | None = None,
        sampling_defaults: dict | None = None,  # bare: the host warns of numbers of two types
    ):
        super().__init__()
        if not isinstance(transformer, torch.nn.Module):
            raise ValueError(
                f"`transformer` must be a TerDiTTransformer2DModel, got {type(transformer).__name__}. To load a folder"
                " or Hub repository, call `TerDiTPipeline.from_pretrained`."
            )
        if scheduler is None:
            scheduler = scheduler_for(transformer.config)
        if not hasattr(scheduler, "set_timesteps"):
            raise ValueError(
                f"`scheduler` must be a scheduler of diffusers, such as DDPMScheduler, got {type(scheduler).__name__}."
            )
        if vae is not None and not hasattr(vae, "decode"):
            raise ValueError(f"`vae` must be an AutoencoderKL or None, got {type(vae).__name__}.")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        # Models that were saved before they recorded it are sampled with the scheduler that they were trained for.
        recorded = transformer.config.get("prediction_type") or ("epsilon" if transformer.config.learn_sigma else None)
        self._prediction_type = recorded or prediction_of(scheduler)
        channels = transformer.config.in_channels
        whole = isinstance(guidance_channels, int) and not isinstance(guidance_channels, bool)
        if guidance_channels is not None and not (whole and 1 <= guidance_channels <= channels):
            raise ValueError(
                f"`guidance_channels` must be None (all) or an int from 1 to {channels}, got {guidance_channels!r}."
            )
        if id2label is not None:
            if not isinstance(id2label, dict):
                raise ValueError(f"`id2label` must be a dict of names by class id, got {type(id2label).__name__}.")
            id2label = {str(key): str(value) for key, value in id2label.items()}
            wrong = [key for key in id2label if not key.isdecimal()]
            if wrong:
                raise ValueError(f'The keys of `id2label` must be class ids, such as 0 or "0", got {wrong[:5]}.')
        if sampling_defaults is not None:
            if not isinstance(sampling_defaults, dict) or not sampling_defaults.keys() <= SAMPLING_DEFAULTS.keys():
                raise ValueError(
                    f"`sampling_defaults` must be a dict of {' and '.join(SAMPLING_DEFAULTS)}, got"
                    f" {sampling_defaults!r:.80}."
                )
            _check_settings(**{**SAMPLING_DEFAULTS, **sampling_defaults})
        self.register_to_config(
            id2label=id2label, guidance_channels=guidance_channels, sampling_defaults=sampling_defaults
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def prediction_type(self) -> str | None:
        """What the model predicts, by which schedulers are configured; `None` where nothing says."""
        return self._prediction_type

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The `num_inference_steps` and `guidance_scale` of calls that pass none."""
        return {**SAMPLING_DEFAULTS, **(self.config.sampling_defaults or {})}

    @property
    def labels(self) -> dict[str, int]:
        """Class id by name, sorted. A name that several classes share is there once per class, as "crane (134)"."""
        ids = self._ids_by_name()
        unique = {(n if len(found) == 1 else f"{n} ({i})"): i for n, found in ids.items() for i in found}
        return dict(sorted(unique.items()))

    def _ids_by_name(self) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        for key, names in (self.config.id2label or {}).items():  # several names of a class are separated by commas
            for name in dict.fromkeys(part.strip() for part in names.split(",")):
                ids.setdefault(name, []).append(int(key))
        return ids

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Class ids of label names.

        Args:
            label (`str` or `list[str]`): Names as in `labels`. Case matters only between names that differ in nothing
                else.

        Raises:
            ValueError: A name is unknown (near matches are shown) or several classes share it.
        """
        names = self._ids_by_name()
        any_case: dict[str, list[int]] = {}
        for name, ids in names.items():
            any_case.setdefault(name.casefold(), []).extend(ids)
        class_ids: list[int] = []
        for name in label if isinstance(label, (list, tuple)) else [label]:
            if not isinstance(name, str):
                raise ValueError(
                    f"A label name is a string, got {reprlib.repr(name)}. A class id needs no look-up: pass it as it"
                    " is."
                )
            ids = names.get(name.strip()) or any_case.get(name.strip().casefold(), [])
            ids = ids or [
                class_id for label, class_id in self.labels.items() if label == name.strip()
            ]  # "crane (134)"
            if len(ids) == 1:
                class_ids += ids
            elif ids:
                raise ValueError(f"{len(ids)} classes are named {name!r}: pass one of their ids, {sorted(ids)}.")
            elif not names:
                raise ValueError(f"This model has no label names, so {name!r} cannot be looked up. Pass class ids.")
            else:
                near = difflib.get_close_matches(name.strip().casefold(), any_case, n=3)
                hint = f" Close matches: {', '.join(map(repr, near))}." if near else ""
                raise ValueError(f"{name!r} is not a label of this model.{hint} All labels: `pipe.labels`.")
        return class_ids

    def _class_ids(self, class_labels: ClassLabels, depth: int = 0) -> list[int]:
        """Ids, names, lists, tensors and arrays of them, nested too -> a flat list of valid ids."""
        if depth > 8:  # such as in a list that holds itself
            raise ValueError(f"Labels are lists in {depth} lists, expected at most 8. Pass a flat list.")
        if isinstance(class_labels, (Tensor, np.ndarray, np.generic)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids(class_labels)
        if isinstance(class_labels, Sequence) and not isinstance(class_labels, bytes):
            return [class_id for item in class_labels for class_id in self._class_ids(item, depth + 1)]
        if not isinstance(class_labels, int) or isinstance(class_labels, bool):
            raise ValueError(
                f"A class label is an int or a name, got {reprlib.repr(class_labels)} ({type(class_labels).__name__})."
            )
        num_classes = self.transformer.config.num_classes
        if not 0 <= class_labels < num_classes:
            raise ValueError(
                f"Class label {class_labels} is out of range: this model has classes 0 to {num_classes - 1}."
            )
        return [class_labels]

    def check_inputs(
        self,
        class_ids: list[int],
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a `ValueError` that says what was given and what is possible."""
        config = self.transformer.config
        if not class_ids:
            raise ValueError("`class_labels` is empty; pass at least one class id or name.")
        _check_settings(num_inference_steps, guidance_scale, num_images_per_prompt=num_images_per_prompt)
        multiple = self.vae_scale_factor * config.patch_size
        sides = [side for side in (height, width) if isinstance(side, (int, np.integer))]
        if len(sides) < 2 or min(sides) < 1 or any(side % multiple for side in sides):
            raise ValueError(
                f"`height` and `width` must be positive multiples of {multiple} pixels, got {height} x {width}."
            )
        batch_size = len(class_ids) * num_images_per_prompt
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(item, torch.Generator) for item in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, got {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"Got {len(generator)} generators for {batch_size} images. Pass one per image, or a single generator."
            )
        factor = self.vae_scale_factor
        shape = (batch_size, config.in_channels, height // factor, width // factor)
        if latents is not None and (not isinstance(latents, Tensor) or tuple(latents.shape) != shape):
            given = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"`latents` must be a tensor of shape {shape}, got {given}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f'`output_type` must be "pil", "np", "pt" or "latent", got {output_type!r}.')
        if self.vae is None and output_type != "latent" and config.in_channels not in (1, 3):
            raise ValueError(
                f"This pipeline has no VAE and its model has {config.in_channels} channels, which are not an image."
                ' Pass `vae=` when loading, or `output_type="latent"`.'
            )
        if self.vae is not None and self.vae.config.latent_channels != config.in_channels:
            raise ValueError(
                f"The VAE has {self.vae.config.latent_channels} latent channels, the transformer {config.in_channels}."
                " Pass the VAE that the transformer was trained with."
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` may hold {self._callback_tensor_inputs}, got {unknown}."
            )
        check_variance(self.scheduler, config.learn_sigma)

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Start noise at the scheduler's scale, (B, C, h, w); `height` and `width` in pixels."""
        if latents is None:
            shape = (
                batch_size,
                num_channels_latents,
                height // self.vae_scale_factor,
                width // self.vae_scale_factor,
            )
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def prepare_extra_step_kwargs(self, generator: Any) -> dict[str, Any]:
        """`generator` for the schedulers whose step takes one."""
        accepts = "generator" in inspect.signature(self.scheduler.step).parameters
        return {"generator": generator} if accepts else {}

    def guide(self, model_output: Tensor) -> Tensor:
        """Classifier-free guidance on the first `guidance_channels` of the noise.

        Args:
            model_output (`torch.Tensor`): (2B, C', h, w): with the labels, then with the null label.

        Returns:
            `torch.Tensor`: (B, C', h, w). Channels that are not guided are those predicted with the labels.
        """
        cond, uncond = model_output.chunk(2)
        guided = self.config.guidance_channels or self.transformer.config.in_channels
        noise = uncond[:, :guided] + self.guidance_scale * (cond[:, :guided] - uncond[:, :guided])
        return torch.cat([noise, cond[:, guided:]], dim=1)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current or last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the guidance scale is above 1."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the current or last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Timestep of the current step, which diffusers' step caches ask for; `None` between calls."""
        return getattr(self, "_current_timestep", None)

    @property
    def interrupt(self) -> bool:
        """Whether to skip the remaining steps. Set `pipe._interrupt = True` in a callback."""
        return self._interrupt

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Refuse a second call while this one changes the pipeline's settings and its scheduler."""
        call = object()
        if self.__dict__.setdefault("_call", call) is not call:  # atomic
            raise RuntimeError(
                "This pipeline is in use by another call that is still running; both would draw wrong pictures. Sample"
                " with a pipeline and a scheduler of its own, which share the weights: `other = copy.copy(pipe);"
                " other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)`."
            )
        try:
            yield
        finally:
            self._current_timestep = None
            del self._call

    def __getstate__(self) -> dict[str, Any]:
        """Leave a running call out of copies and pickles."""
        return {key: value for key, value in vars(self).items() if key != "_call"}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabels | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict], dict]
        | PipelineCallback
        | MultiPipelineCallbacks
        | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> ImagePipelineOutput | tuple:
        r"""Sample images.

        Args:
            class_labels (`int`, `str`, `list`, `torch.Tensor` or `np.ndarray`): Class ids or label names, mixed at
                will. A model of one class needs none.
            height (`int`, *optional*): In pixels; default the transformer's `sample_size` times the VAE's factor.
            width (`int`, *optional*): In pixels; as `height`.
            num_inference_steps (`int`, *optional*): Denoising steps; default the model's `sampling_defaults`, else 50.
                The paper samples with 250.
            timesteps (`list`, *optional*): Those of the steps instead, where the scheduler takes them.
            sigmas (`list`, *optional*): Noise levels of the steps instead, where the scheduler takes them.
            guidance_scale (`float`, *optional*): Above 1, pulls images towards their label; at 1 or below the
                unconditional half of the batch is not computed. Default the model's `sampling_defaults`, else 4.0.
            num_images_per_prompt (`int`, defaults to 1): Images per label; those of one label follow each other.
            generator (`torch.Generator` or `list`, *optional*): One for all images, or one per image.
            latents (`torch.Tensor`, *optional*): (B, C, h, w) standard normal noise to start from.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W) in [0, 1], or
                `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return an [`~diffusers.ImagePipelineOutput`] instead
                of a tuple.
            callback_on_step_end (`Callable`, *optional*): Called as `callback(pipe, step, timestep, kwargs)` after
                each step; tensors in the dict it returns replace those of the pipeline.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*): Names of the tensors in `kwargs`;
                `"latents"`.

        Returns:
            [`~diffusers.ImagePipelineOutput`] or `tuple`: The images.

        Raises:
            ValueError: An unknown label or a setting that does not fit, with what was given and what is possible.
            RuntimeError: Another call of this pipeline is still running.

        Examples:
        ```py
        >>> import torch
        >>> from diffusers_terdit import TerDiTPipeline

        >>> pipe = TerDiTPipeline.from_pretrained("org/terdit-4.2b", dtype=torch.bfloat16).to("cuda")
        >>> image = pipe(["golden retriever", 207], generator=torch.Generator().manual_seed(0)).images[0]
        ```
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        callback_inputs = (
            ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        )
        default_size = self.transformer.config.sample_size * self.vae_scale_factor
        height = default_size if height is None else height
        width = default_size if width is None else width
        defaults = self.sampling_defaults
        num_inference_steps = defaults["num_inference_steps"] if num_inference_steps is None else num_inference_steps
        guidance_scale = defaults["guidance_scale"] if guidance_scale is None else guidance_scale

        # 1. Check
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(
                f"`callback_on_step_end` must be a function (pipe, step, timestep, kwargs) -> dict, got"
                f" {callback_on_step_end!r:.80}."
            )
        if class_labels is None:
            num_classes = self.transformer.config.num_classes
            if num_classes > 1:
                raise ValueError(
                    f"`class_labels` is missing, and this model has {num_classes} classes. Pass ids from 0 to"
                    f" {num_classes - 1}, or names: `pipe.labels`."
                )
            class_labels = 0
        class_ids = self._class_ids(class_labels)
        self.scheduler = fitting_scheduler(self.scheduler, self._prediction_type)
        self.check_inputs(
            class_ids, height, width, num_inference_steps, guidance_scale, num_images_per_prompt, generator, latents,
            output_type, callback_inputs,
        )  # fmt: skip
        if (height, width) != (default_size, default_size):
            logger.warning(
                f"This model was trained on images of {default_size} x {default_size} pixels. At {width} x {height}"
                " they may be distorted."
            )
        if guidance_scale > 1 and not self.transformer.config.class_dropout_prob:
            logger.warning(
                f"This model was trained without label dropout: guidance_scale={guidance_scale:g} compares with a"
                " label that it has not learned. Pass 1."
            )
        with self._running(), unused_variance_lifted(self.scheduler):
            self._guidance_scale = float(guidance_scale)
            self._interrupt = False
            reset_step_caches(self.transformer)  # an interrupted call leaves them full
            device = self._execution_device
            dtype = self.transformer.dtype  # looked up once: the property scans all modules
            channels = self.transformer.config.in_channels

            # 2. Labels, (B,), and the null label of the unconditional half
            labels = torch.tensor(class_ids, device=device).repeat_interleave(num_images_per_prompt)
            null_labels = torch.full_like(labels, self.transformer.null_label)

            # 3. Timesteps and start noise, in float32
            where = timesteps_device(self.scheduler, device)
            steps = set_timesteps(self.scheduler, num_inference_steps, where, timesteps, sigmas)
            timesteps_on_device = steps.to(device)
            self._num_timesteps = len(steps)
            latents = self.prepare_latents(
                len(labels), channels, height, width, torch.float32, device, generator, latents
            )
            extra_step_kwargs = self.prepare_extra_step_kwargs(generator)

            # 4. Compute adaLN for many steps at once, since it depends only on timestep and label; not where a
            # callback may change the model between steps, or where offloading moves its weights
            ahead = None
            if callback_on_step_end is None and not is_offloaded(self.transformer):
                null = [self.transformer.null_label] if self.do_classifier_free_guidance else []
                ahead = self.transformer.adaln_ahead(timesteps_on_device, [*class_ids, *null])

            # 5. Denoise, in float32 but for the model's own arithmetic
            predicted = 2 * channels if uses_learned_variance(self.scheduler) else channels
            check_finite = FiniteCheck(self.transformer, self._num_timesteps, device)
            with self.progress_bar(total=self._num_timesteps) as progress_bar:
                for i, t in enumerate(steps):
                    if self.interrupt:
                        continue

                    self._current_timestep = t
                    guided = self.do_classifier_free_guidance  # a callback may change it
                    model_input = torch.cat([latents] * 2) if guided else latents
                    model_labels = torch.cat([labels, null_labels]) if guided else labels
                    if hasattr(self.scheduler, "scale_model_input"):
                        model_input = self.scheduler.scale_model_input(model_input, t)
                    with self.transformer.cache_context("cond_uncond"):
                        model_output = self.transformer(
                            model_input.to(dtype),
                            timesteps_on_device[i].expand(len(model_labels)),
                            model_labels,
                            modulation=None if ahead is None else ahead(i, model_labels),
                            return_dict=False,
                        )[0].float()
                    check_finite(model_output, i, timesteps_on_device[i], model_input, model_labels)
                    if guided:
                        model_output = self.guide(model_output)
                    latents = self.scheduler.step(
                        model_output[:, :predicted], t, latents, **extra_step_kwargs
                    ).prev_sample

                    if callback_on_step_end is not None:
                        callback_kwargs = {}
                        for name in callback_inputs:
                            callback_kwargs[name] = locals()[name]
                        callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                        if not isinstance(callback_outputs, dict):
                            raise ValueError(
                                "`callback_on_step_end` must return a dict, such as the one it is called with, got"
                                f" {callback_outputs!r:.80}."
                            )
                        latents = callback_outputs.pop("latents", latents)
                    progress_bar.update()
            check_finite.last()
            del ahead  # megabytes, before the VAE needs memory

            # 6. Latents to pixels
            if output_type == "latent":
                images = latents
            else:
                if self.vae is not None:
                    latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
                    latents = self.vae.decode(latents, return_dict=False)[0].float()
                if not latents.isfinite().all():
                    part = (
                        f"VAE in {str(self.vae.dtype).removeprefix('torch.')}" if self.vae is not None else "scheduler"
                    )
                    raise ValueError(
                        f"The {part} gives NaN or infinity. Try `pipe.vae.to(torch.float32)`, or another scheduler."
                    )
                images = self.image_processor.postprocess(latents, output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

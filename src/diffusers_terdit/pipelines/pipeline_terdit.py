"""Sampling from a class-conditional ternary diffusion transformer."""

import difflib
import functools
import inspect
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMParallelScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    LTXEulerAncestralRFScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..files import refuse_interrupted, replacing
from ..host import (
    HubMixin,
    PortableConfigMixin,
    has_hooks,
    hub_errors,
    is_offloaded,
    refuse_adapters,
    reset_step_caches,
    scrub_paths,
)
from ..models.transformer_terdit import TerDiTTransformer2DModel


MODULATION_BYTES = 32 * 2**20  # of adaLN outputs that are computed ahead

ClassLabels = int | str | Sequence[Any] | Tensor | np.ndarray

# What running calls change, by id, and the threads they run in. Not in the objects: copies and pickles are free.
_in_use: dict[int, threading.Thread] = {}
_in_use_lock = threading.Lock()


@contextmanager
def _using(parts: list[tuple[Any, str, str]]) -> Iterator[None]:
    """Refuse where a call that is running changes one of `parts`, too: the object, its name, what to do instead."""
    me, mine = threading.current_thread(), []
    try:
        with _in_use_lock:
            for part, name, instead in parts:
                owner = _in_use.get(id(part))
                if owner is not None and owner.is_alive():  # a fork does not take the other threads along
                    where = "in this thread" if owner is me else f"in thread {owner.name!r}"
                    raise RuntimeError(
                        f"{name} is in use by another call that is still running, {where}. Both would draw wrong"
                        f" pictures. {instead}"
                    )
            mine = [id(part) for part, _, _ in parts]
            _in_use.update(dict.fromkeys(mine, me))
        yield
    finally:
        with _in_use_lock:
            for key in mine:
                _in_use.pop(key, None)


def _one_at_a_time(call: Callable) -> Callable:
    """For `__call__`: the pipeline's settings, its scheduler, and hooks of its models serve one call at a time."""

    @functools.wraps(call)
    def guarded(self, *args: Any, **kwargs: Any) -> Any:
        own = (
            "Sample with a pipeline and a scheduler of its own, which share the weights: `other = copy.copy(pipe);"
            " other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)`."
        )
        parts = [(self, "This pipeline", own), (self.scheduler, "The scheduler of this pipeline", own)]
        for name in ("transformer", "vae"):
            model = getattr(self, name)
            if model is not None and has_hooks(model):
                again = f"Offloading and step caches tie a model to one call: load the {name} once more, or wait."
                parts.append((model, f"The {name} of this pipeline", again))
        with _using(parts):
            return call(self, *args, **kwargs)

    return guarded


class _Finite:
    """Raise when a step's output is not finite; with CUDA one step late, so that the next step is queued by then."""

    def __init__(self, device: torch.device):
        self._late = device.type == "cuda"
        self._pending: tuple[Tensor, Callable[[], str], torch.cuda.Event] | None = None

    def look(self, flag: Tensor, message: Callable[[], str]) -> None:
        """Check a 0-dim bool, True where all is finite; with CUDA, keep it and check that of the step before."""
        if not self._late:
            self._check(flag, message)
            return
        on_host, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        on_host.copy_(flag, non_blocking=True)
        event.record(torch.cuda.current_stream(flag.device))
        self.settle()
        self._pending = on_host, message, event

    def settle(self) -> None:
        """Check what is pending: after the last step, that of it."""
        if self._pending is not None:
            flag, message, event = self._pending
            event.synchronize()
            self._check(flag, message)

    @staticmethod
    def _check(flag: Tensor, message: Callable[[], str]) -> None:
        if not flag:
            raise ValueError(message())


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


class TerDiTPipeline(HubMixin, PortableConfigMixin, DiffusionPipeline):
    r"""Images from class labels with a [`TerDiTTransformer2DModel`].

    Args:
        transformer ([`TerDiTTransformer2DModel`]): Predicts noise (and variance) of the latents.
        scheduler ([`~diffusers.SchedulerMixin`]): DDPM uses the learned variance; the others get the noise alone.
        vae ([`~diffusers.AutoencoderKL`], *optional*): Decodes latents. Without it the model works on
            pixels in [-1, 1]: with 1 or 3 channels they are the image, with other counts only `output_type="latent"`
            works.
        id2label (`dict[str, str]`, *optional*): Label names by class id; several names of a class are separated by
            commas.
        guidance_channels (`int`, *optional*): How many noise channels guidance acts on; `None` for all. The
            checkpoints of the TerDiT authors are sampled with 3 of 4.

    Source: TerDiT (https://arxiv.org/abs/2405.14854); classifier-free guidance (https://arxiv.org/abs/2207.12598).
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: TerDiTTransformer2DModel,
        scheduler: KarrasDiffusionSchedulers,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | None = None,
        guidance_channels: int | None = None,
    ):
        super().__init__()
        if not isinstance(transformer, torch.nn.Module):
            raise ValueError(
                f"`transformer` must be a TerDiTTransformer2DModel, got {type(transformer).__name__}. To load a folder"
                " or Hub repository, call `TerDiTPipeline.from_pretrained`."
            )
        if not hasattr(scheduler, "set_timesteps"):
            raise ValueError(
                f"`scheduler` must be a scheduler of diffusers, such as DDPMScheduler, got {type(scheduler).__name__}."
            )
        if vae is not None and not hasattr(vae, "decode"):
            raise ValueError(f"`vae` must be an AutoencoderKL or None, got {type(vae).__name__}.")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
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
        self.register_to_config(id2label=id2label, guidance_channels=guidance_channels)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "TerDiTPipeline":
        """See [`~diffusers.DiffusionPipeline.from_pretrained`].

        Raises:
            OSError: The folder does not exist, or the repository cannot be read.
            ValueError: The files are not what they should be.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(path) and (os.path.isabs(path) or path.count("/") > 1 or path.startswith((".", "~"))):
            raise FileNotFoundError(f"{path} is not a folder. Pass that of a saved pipeline, or a Hub id.")
        refuse_interrupted(Path(path, "transformer"))
        with hub_errors(path, kwargs.get("revision")):
            return super().from_pretrained(path, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save every component into a folder of its own, and `model_index.json`.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            safe_serialization (`bool`): Write safetensors instead of pickles.
            variant (`str`, *optional*): Written into the weights' file names.
            max_shard_size (`int` or `str`, *optional*): Of a weights file: bytes, or a string such as `"5GB"`.
            push_to_hub (`bool`): Upload the folder afterwards, to `repo_id` among `kwargs` (default its name).
            kwargs: The other arguments of `push_to_hub`.

        Raises:
            ValueError: `save_directory` is a file, or the transformer carries adapters.
            OSError: It cannot be written; what was there before is still there. Only where the last step, moving the
                files, breaks off, the folder holds neither pipeline, and says so when it is loaded.
        """
        flashpack = kwargs.pop("use_flashpack", False)
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, {save_directory} is a file.")
        refuse_adapters(self.transformer, "saving the pipeline")
        folder = Path(save_directory)
        # The marker is in the folder of the transformer, which every way to load the pipeline loads.
        with replacing(folder, folder / "transformer" / "pipeline.saving") as partial:
            super().save_pretrained(
                partial, safe_serialization, variant, max_shard_size, push_to_hub=False, use_flashpack=flashpack
            )
            scrub_paths(partial)
        if push_to_hub:
            self._push_folder(Path(save_directory), variant=variant, **kwargs)

    @property
    def labels(self) -> dict[str, int]:
        """Class id by name, sorted. A name that several classes share stands once per class, as "crane (134)"."""
        ids = self._ids_by_name()
        unique = {(n if len(found) == 1 else f"{n} ({i})"): i for n, found in ids.items() for i in found}
        return dict(sorted(unique.items()))

    def _ids_by_name(self) -> dict[str, list[int]]:
        ids: dict[str, list[int]] = {}
        for key, names in (self.config.id2label or {}).items():
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
                    f"A label name is a string, got {name!r}. A class id needs no look-up: pass it as it is."
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

    def _class_ids(self, class_labels: ClassLabels) -> list[int]:
        """Ids, names, lists, tensors and arrays of them, nested too -> a flat list of valid ids."""
        if isinstance(class_labels, (Tensor, np.ndarray, np.generic)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str):
            class_labels = self.get_label_ids(class_labels)
        if isinstance(class_labels, Sequence) and not isinstance(class_labels, bytes):
            return [class_id for item in class_labels for class_id in self._class_ids(item)]
        if not isinstance(class_labels, int) or isinstance(class_labels, bool):
            raise ValueError(
                f"A class label is an int or a name, got {class_labels!r} ({type(class_labels).__name__})."
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
        if isinstance(guidance_scale, bool) or not isinstance(guidance_scale, (int, float, np.number)):
            raise ValueError(f"`guidance_scale` must be a number, got {guidance_scale!r}.")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be finite, got {guidance_scale}.")
        for name, value in (
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"`{name}` must be a positive int, got {value!r}.")
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
        shape = self._latents_shape(batch_size, height, width)
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
        if config.learn_sigma and not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(
                f"This model predicts the noise of DDPM's steps (it was trained with learn_sigma=True);"
                f" {type(self.scheduler).__name__} has other steps and would draw something else. Take one of DDPM's"
                " family, such as `DPMSolverMultistepScheduler.from_config(...)`; docs/schedulers.md lists them."
            )
        if self._uses_learned_variance() and not config.learn_sigma:
            raise ValueError(
                f"This {type(self.scheduler).__name__} expects a learned variance, but this model predicts none"
                " (learn_sigma=False). Use"
                ' `DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_small")`.'
            )

    def _latents_shape(self, batch_size: int, height: int, width: int) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return (batch_size, self.transformer.config.in_channels, height // factor, width // factor)

    def prepare_latents(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Start noise at the scheduler's scale, (B, C, h, w) float32."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _uses_learned_variance(self) -> bool:
        variance_type = self.scheduler.config.get("variance_type")
        ddpm = isinstance(self.scheduler, (DDPMScheduler, DDPMParallelScheduler))
        return ddpm and variance_type in ("learned", "learned_range")

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
        """Of the call that is running, or ran last."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the guidance scale is above 1."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Of the call that is running, or ran last."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Of the step that is running; the step caches of diffusers ask for it. `None` between calls."""
        return getattr(self, "_current_timestep", None)

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop denoising; the rest of the steps is skipped."""
        return self._interrupt

    @torch.no_grad()
    @_one_at_a_time
    def __call__(
        self,
        class_labels: ClassLabels,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
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
                will.
            height (`int`, *optional*): In pixels; default the transformer's `sample_size` times the VAE's factor.
            width (`int`, *optional*): In pixels; as `height`.
            num_inference_steps (`int`, defaults to 50): Denoising steps; the paper samples with 250.
            guidance_scale (`float`, defaults to 4.0): Above 1, pulls images towards their label; at 1 or below the
                unconditional half of the batch is not computed.
            num_images_per_prompt (`int`, defaults to 1): Images per label; those of one label stand together.
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
            RuntimeError: The pipeline, its scheduler, or a model with hooks is in use by a call that is still running.

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

        # 1. Check
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(
                f"`callback_on_step_end` must be a function (pipe, step, timestep, kwargs) -> dict, got"
                f" {callback_on_step_end!r:.80}."
            )
        class_ids = self._class_ids(class_labels)
        self.check_inputs(
            class_ids, height, width, num_inference_steps, guidance_scale, num_images_per_prompt, generator, latents,
            output_type, callback_inputs,
        )  # fmt: skip
        self._guidance_scale = float(guidance_scale)
        self._interrupt = False
        reset_step_caches(self.transformer)  # a call that was interrupted leaves them full
        device = self._execution_device

        # 2. Labels, (B,), and the null label of the unconditional half
        labels = torch.tensor(class_ids, device=device).repeat_interleave(num_images_per_prompt)
        null_labels = torch.full_like(labels, self.transformer.config.num_classes)

        # 3. Timesteps and start noise
        # On the CPU, where schedulers keep their tables: to look up timesteps on a GPU, DDPM waits 13 times per step.
        # LTX's scheduler multiplies latents by tables that it keeps with its timesteps.
        beside = isinstance(self.scheduler, LTXEulerAncestralRFScheduler)
        self.scheduler.set_timesteps(num_inference_steps, device=device if beside else "cpu")
        timesteps = self.scheduler.timesteps
        on_device = timesteps.to(device)
        self._num_timesteps = len(timesteps)
        batch_size = len(class_ids) * num_images_per_prompt
        latents = self.prepare_latents(self._latents_shape(batch_size, height, width), device, generator, latents)
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator)

        # 4. Denoise, in float32 but for the model's own arithmetic
        channels = self.transformer.config.in_channels * (2 if self._uses_learned_variance() else 1)
        modulations = self._modulations(on_device, class_ids, changes=callback_on_step_end is not None)
        dtype = self.transformer.dtype  # read once: diffusers walks all modules to find it
        finite = _Finite(device)
        with self._sampling(), self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(timesteps):
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
                        on_device[i].expand(len(model_labels)),
                        model_labels,
                        return_dict=False,
                        **modulations(i, model_labels),
                    )[0].float()
                message = functools.partial(self._where_not_finite, i, on_device[i], model_input, model_labels)
                finite.look(model_output.isfinite().all(), message)
                if guided:
                    model_output = self.guide(model_output)
                latents = self.scheduler.step(model_output[:, :channels], t, latents, **extra_step_kwargs).prev_sample

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

        finite.settle()

        # 5. Latents to pixels
        if output_type == "latent":
            images = latents
        else:
            if self.vae is not None:
                latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
                latents = self.vae.decode(latents, return_dict=False)[0].float()
            if not latents.isfinite().all():
                part = f"VAE in {str(self.vae.dtype).removeprefix('torch.')}" if self.vae is not None else "scheduler"
                raise ValueError(
                    f"The {part} gives NaN or infinity. Try `pipe.vae.to(torch.float32)`, or another scheduler."
                )
            images = self.image_processor.postprocess(latents, output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def _modulations(
        self, timesteps: Tensor, class_ids: list[int], changes: bool
    ) -> Callable[[int, Tensor], dict[str, Tensor]]:
        """`modulation` of the transformer at step i for labels (B,), computed once per label for many steps at once.

        Nothing where a callback may change the model between steps, or where only `forward` finds its weights.
        """
        config = self.transformer.config
        if changes or is_offloaded(self.transformer):
            return lambda step, labels: {}
        null = {config.num_classes} if self.do_classifier_free_guidance else set()
        unique = torch.tensor(sorted({*class_ids, *null}), device=timesteps.device)
        values = config.num_layers * 6 * config.num_attention_heads * config.attention_head_dim
        ahead = max(1, MODULATION_BYTES // (values * len(unique) * self.transformer.dtype.itemsize))
        computed: dict[int, Tensor] = {}

        def modulations(step: int, labels: Tensor) -> dict[str, Tensor]:
            first = step - step % ahead
            if first not in computed:
                computed.clear()  # the last steps' before the next ones'
                part = timesteps[first : first + ahead]
                rows = part.repeat_interleave(len(unique)), unique.repeat(len(part))
                computed[first] = self.transformer.modulations(*rows).unflatten(1, (len(part), len(unique)))
            return {"modulation": computed[first][:, step - first, torch.searchsorted(unique, labels)]}

        return modulations

    def _where_not_finite(self, step: int, timestep: Tensor, model_input: Tensor, model_labels: Tensor) -> str:
        """Words for the first layer of the transformer that gives NaN or infinity; the step is computed once more."""
        place = f"Step {step + 1} of {self._num_timesteps} (timestep {float(timestep):g})"
        dtype = str(self.transformer.dtype).removeprefix("torch.")
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
                rows = model_input.to(self.transformer.dtype), timestep.expand(len(model_labels)), model_labels
                self.transformer(*rows, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        layer = f"layer {found[0]}" if found else "the transformer"
        advice = {
            "float32": "Its weights are damaged, or were never trained.",
            "bfloat16": "Try float32; if it does the same there, its weights are damaged or were never trained.",
        }.get(dtype, "Try bfloat16 or float32, which hold larger numbers.")
        return f"{place}: {layer} gives NaN or infinity in {dtype}. {advice}"

    @contextmanager
    def _sampling(self):
        """While it samples, lift a `variance_type` that a scheduler keeps from DDPM's config and cannot use.

        DPM-Solver would cut the noise to its first 3 channels.
        """
        variance_type = self.scheduler.config.get("variance_type")
        lift = variance_type in ("learned", "learned_range") and not self._uses_learned_variance()
        if lift:
            self.scheduler.register_to_config(variance_type=None)
        try:
            yield
        finally:
            self._current_timestep = None
            if lift:
                self.scheduler.register_to_config(variance_type=variance_type)

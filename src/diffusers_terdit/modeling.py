"""diffusers' `ModelMixin`, `ConfigMixin` and pipeline loading made strict.

What diffusers accepts with a warning or in silence is an error here, by the checks of `storage/weights.py`; what is
saved carries metadata and digests.
"""

import inspect
import json
import os
import re
from contextlib import suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate.utils import convert_file_size_to_int
from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, logging
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import httpx

from .checkpoints import BUNDLED
from .hub.errors import hub_errors
from .hub.push import HubMixin
from .lora import refuse_adapters
from .storage.configs import check_config, fits
from .storage.saving import replacing, scrub_paths, undisturbed
from .storage.weights import (
    PACKED_SUFFIX,
    PACKING,
    SCALE_SUFFIX,
    TOGETHER,
    VERSION,
    canonical_json,
    check_weights,
    read_index,
    read_json,
    refuse_pickles,
    require_safetensors,
    state_dict_digest,
    with_variant,
    write_weights,
)


logger = logging.get_logger(__name__)

_loading: ContextVar[bool] = ContextVar("loading", default=False)


# What the constructors of diffusers' classes raise for numbers that they cannot use and for choices that they do not
# have: NotImplementedError is a RuntimeError, UnboundLocalError comes from an `if` without an `else`.
REFUSALS = (ArithmeticError, LookupError, RuntimeError, UnboundLocalError, ValueError)
_DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def _is_pair(value: Any) -> bool:
    """Whether a value names a library, or a module, and a class in it."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(name, str) and name for name in value)


def check_pipeline_config(where: str | os.PathLike, config: Any) -> None:
    """Raise a `ValueError` where a model_index.json, or the config of a part in a folder next to it, cannot be.

    Args:
        where (`str` or `os.PathLike`): The file.
        config: What it holds.
    """
    check_config(where, config)
    parts = {key: value for key, value in config.items() if isinstance(value, list) and key != "_class_name"}
    for key, value in parts.items():
        if not _is_pair(value) and not (key == "vae" and value == [None, None]):
            raise ValueError(f"{where}: `{key}` is {value!r:.80}, expected the names of a library and a class.")
    classes: dict[str, Any] = {
        key: getattr(diffusers, name, None) for key, (library, name) in parts.items() if library == "diffusers"
    }
    classes = {key: cls for key, cls in classes.items() if isinstance(cls, type) and issubclass(cls, ConfigMixin)}
    # By library and class, before anything is imported: diffusers would build any class of transformers, and that may
    # run code that a repository brings along.
    vae = classes.get("vae", object)
    is_autoencoder = issubclass(vae, ModelMixin) and vae.__module__.startswith("diffusers.models.autoencoders.")
    name, labels = config.get("_class_name"), config.get("id2label") or {}
    for key, right, expected in (
        ("_class_name", isinstance(name, str) or _is_pair(name), "the name of a class"),
        ("transformer", parts.get("transformer", "  ")[1] == "TerDiTTransformer2DModel", "a TerDiTTransformer2DModel"),
        ("scheduler", issubclass(classes.get("scheduler", object), SchedulerMixin), "a scheduler of diffusers"),
        (
            "vae",
            "vae" not in config or parts.get("vae") == [None, None] or is_autoencoder,
            "an autoencoder of diffusers",
        ),
        ("guidance_channels", fits(config.get("guidance_channels"), int | None, 1), "a positive int or null"),
        (
            "sampling_defaults",
            fits(config.get("sampling_defaults"), dict[str, float] | None, 1),
            "numbers: num_inference_steps, guidance_scale",
        ),
        (
            "id2label",
            fits(labels, dict[str, str], 1) and all(re.fullmatch(r"[0-9]{1,9}", key) for key in labels),
            "names by class id",
        ),
    ):
        if not right:
            raise ValueError(f"{where}: `{key}` is {config.get(key)!r:.80}, expected {expected}.")
    for key, cls in classes.items():
        path = Path(where).parent / key / cls.config_name
        if path.is_file():
            settings = read_json(path)
            if isinstance(size := settings.get("sample_size"), list) and size:
                settings["sample_size"] = size[0]  # as diffusers' VAE takes height and width
            check_config(path, settings, cls)
            if issubclass(cls, SchedulerMixin):
                known = {key: settings[key] for key in inspect.signature(cls).parameters if key in settings}
                try:
                    betas = getattr(built := cls(**known), "betas", None)
                    if betas is not None and len(betas) != (steps := built.config.num_train_timesteps):
                        raise ValueError(f"{len(betas)} betas for {steps} timesteps")
                except REFUSALS as error:
                    raise ValueError(
                        f"{path}: these settings make no {cls.__name__} ({error}). Save it again, or update diffusers."
                    ) from error


@cache
def warn_half_precision_codes(dtype: torch.dtype | None) -> None:
    """Warn, once, when float-format ternary weights are about to be read in half precision."""
    if dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            f"Float-format ternary weights in {dtype} ternarize differently (up to 0.13 % of the codes). Call `pack()`"
            " on the float32 model first; packed weights do not change when the model is cast."
        )


def size_in_bytes(budget: int | str | None) -> int:
    """Return a budget of memory in bytes: of an int, a string such as "4GB", or `None` for 0."""
    try:
        size = convert_file_size_to_int(0 if budget is None else budget)
    except (TypeError, ValueError):
        size = -1
    if size < 0 or isinstance(budget, bool):
        raise ValueError(f'`budget` must be a number of bytes, a string such as "4GB" or None, got {budget!r}.')
    return size


class PortableConfigMixin(ConfigMixin):
    """`ConfigMixin` that saves no local paths and no trace of remote code."""

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """Read a config, from a folder or a download, and check it."""
        config = read_json(json_file)
        if issubclass(cls, ModelMixin):
            check_config(json_file, config, cls)
        else:
            check_pipeline_config(json_file, config)
        return config

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # `auto_map` belongs to the repository that the code comes with; the host would warn, and save it again.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        """Return the config as JSON, without `_name_or_path`."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        for key, value in config.items():
            if isinstance(value, list) and len(value) == 2 and str(value[0]).startswith("diffusers_modules."):
                config[key] = ["diffusers_terdit", value[1]]  # a component that was loaded with its own code
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _check_index(name: str | os.PathLike, variant: str | None, subfolder: str | None, **options: Any) -> None:
    """Check the index of a sharded model, if it has one; download it first where the model is on the Hub."""
    filename = with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if os.path.isdir(name):
        index = Path(name, subfolder or "", filename)
        if index.is_file():
            read_index(index)
        return
    with suppress(EntryNotFoundError, HFValidationError):  # the latter: neither a folder nor a Hub id
        read_index(hf_hub_download(str(name), filename, subfolder=subfolder, **options), present=False)


class TernaryModelMixin(HubMixin, ModelMixin, PortableConfigMixin):
    """`ModelMixin` with strict loading, digests in what it saves, and float32 scales: base of layer and model."""

    # ModelMixin answers attribute look-ups from the config too, which hides parameters and submodules that share a
    # name with an init argument (`bias`) and slows every access of hundreds of nested layers.
    __getattr__ = torch.nn.Module.__getattr__  # type: ignore[assignment]

    # With `low_cpu_mem_usage=False` the host would assign the file's tensors as they are when the first one's dtype
    # fits, and so forget `dtype=`: the first one is uint8 in a packed layer.
    _supports_param_buffer_assignment = False

    _weights_checked = False  # set by the loading hook, and taken away again

    def to(self, *args, **kwargs):
        """Cast and move as `torch.nn.Module.to`; offloaded models stay where they are.

        A cast passes the host by, which warns at each of a list of modules that is empty.
        """
        dtypes = [value for value in (*args, kwargs.pop("dtype", None)) if isinstance(value, torch.dtype)]
        if dtypes:
            torch.nn.Module.to(self, dtype=dtypes[0])
        if args and isinstance(args[0], torch.dtype):  # (dtype, non_blocking)
            args = ()
        return super().to(*(None if isinstance(value, torch.dtype) else value for value in args), **kwargs)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the weights as diffusers does; a packed byte holds four."""
        packed = () if only_trainable else self.named_parameters()
        more = sum(3 * parameter.numel() for name, parameter in packed if name.endswith(PACKED_SUFFIX))
        return super().num_parameters(only_trainable, exclude_embeddings) + more

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # The host leaves out what was not passed by keyword; but `pack()` changes the config after construction.
        config = {key: value for key, value in config_dict.items() if key != "_use_default_values"}
        return super().extract_init_dict(config, **kwargs)

    @classmethod
    def from_config(cls, config=None, **kwargs):
        if not _loading.get():
            return super().from_config(config, **kwargs)
        try:
            with torch.device("meta"):  # what the config asks for is allocated once the files are found to hold it
                return super().from_config(config, **kwargs)
        except RuntimeError as error:
            raise ValueError(
                f"the config asks for tensors that cannot be: {str(error).splitlines()[0]} {TOGETHER}"
            ) from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        default_dtype = torch.get_default_dtype()
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        loading = _loading.set(True)
        try:
            with undisturbed(folder), hub_errors(pretrained_model_name_or_path, kwargs.get("revision")):
                refuse_pickles(folder)
                options = {key: kwargs[key] for key in _DOWNLOAD_OPTIONS if key in kwargs}
                _check_index(pretrained_model_name_or_path, kwargs.get("variant"), kwargs.get("subfolder"), **options)
                # whatever formats a pipeline is asked to read its VAE from
                kwargs |= {"use_safetensors": True, "use_flashpack": False}
                output = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
            _loading.reset(loading)
            torch.set_default_dtype(default_dtype)  # the host forgets to when a config is refused
        model = output[0] if isinstance(output, tuple) else output
        if not model.__dict__.pop("_weights_checked", False):
            raise RuntimeError(
                f"diffusers {diffusers.__version__} no longer calls the loading hook that this package relies on, so"
                " the weights were not checked. Update diffusers-terdit or install diffusers 0.42.1."
            )
        return output

    @classmethod
    def _load_pretrained_model(
        cls, model, state_dict, resolved_model_file, name_or_path, loaded_keys, *args, **kwargs
    ):
        files = list(resolved_model_file)
        check_weights(model, files, kwargs.get("ignore_mismatched_sizes", False))
        kwargs["keep_in_fp32_modules"] = [*(kwargs.get("keep_in_fp32_modules") or []), SCALE_SUFFIX]
        differing = sorted(set(loaded_keys) ^ set(model.state_dict()))
        if differing:  # the files were found complete, so it is the index that is wrong
            raise ValueError(
                f"{name_or_path}: the index and the files differ in {differing[:5]}. Save the model again."
            )
        if not kwargs.get("low_cpu_mem_usage", True):
            model.to_empty(device="cpu")
        output = super()._load_pretrained_model(
            model, state_dict, resolved_model_file, name_or_path, loaded_keys, *args, **kwargs
        )
        output[0]._weights_checked = True
        names = output[0].state_dict()
        if any(n.endswith(SCALE_SUFFIX) for n in names) and not any(n.endswith(PACKED_SUFFIX) for n in names):
            warn_half_precision_codes(kwargs.get("dtype"))
        return output

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function=None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save config and weights, with metadata and a digest in each weights file.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            is_main_process (`bool`): Whether this process writes the config and clears old weights.
            save_function: Unused; diffusers has it for other formats.
            safe_serialization (`bool`): Only `True`: safetensors.
            variant (`str`, *optional*): Written into the file's name, as in
                `diffusion_pytorch_model.<variant>.safetensors`.
            max_shard_size (`int` or `str`): Bytes, or a string such as `"5GB"`.
            push_to_hub (`bool`): Upload afterwards, to `repo_id` among `kwargs`.
            kwargs: The other arguments of `push_to_hub`.

        Raises:
            ValueError: `save_directory` is a file, another format is asked for, or the model carries adapters or is
                offloaded by accelerate.
            OSError: It cannot be written; what was there before is still there. Only where the last step, moving the
                files, breaks off, the folder holds neither model, and says so when it is loaded.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, {save_directory} is a file.")
        require_safetensors(safe_serialization, kwargs.pop("use_flashpack", False))
        refuse_adapters(self, "saving the model")
        folder, limit = Path(save_directory), convert_file_size_to_int(max_shard_size)
        state_dict = self.state_dict()
        if away := [name for name, tensor in state_dict.items() if tensor.is_meta]:
            raise ValueError(
                f"{len(away)} weights, such as `{away[0]}`, are on the meta device, as those of a model that"
                " accelerate offloads: there is nothing to save. Save it before, or bring them back with"
                " `accelerate.hooks.remove_hook_from_module(model, recurse=True)`."
            )
        metadata = {"format": "pt", "terdit.version": VERSION, "terdit.config": canonical_json(self.config)}
        if self.config.get("weight_format") == "packed":
            metadata["terdit.packing"] = PACKING
        if sum(tensor.nbytes for tensor in state_dict.values()) > limit:
            metadata["terdit.model"] = state_dict_digest(state_dict)
        marker = folder / with_variant("diffusion_pytorch_model.saving", variant)
        with replacing(folder, marker, clear=is_main_process) as partial:
            write_weights(partial, state_dict.items(), metadata, limit, variant)
            if is_main_process:
                self.to_json_file(partial / self.config_name)
        if push_to_hub:
            self._push_saved(folder, variant=variant, **kwargs)


def _holds_originals(path: str, revision: str | None) -> bool:
    """Whether a folder or repository holds the arguments of a model as TerDiT's authors save them."""
    names = [file.name for pattern in ("*.pth", "*/*.pth") for file in Path(path).glob(pattern)]
    if not os.path.isdir(path):
        with suppress(OSError, ValueError, httpx.TransportError):  # the first error tells more
            names = [name.rpartition("/")[2] for name in HfApi().list_repo_files(path, revision=revision)]
    return "model_args.pth" in names


class StrictPipelineMixin(HubMixin, PortableConfigMixin):
    """`DiffusionPipeline` with strict loading, and saving that is whole or absent."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """See [`~diffusers.DiffusionPipeline.from_pretrained`].

        Raises:
            OSError: The folder does not exist, or the repository cannot be read.
            ValueError: The files are not what they should be.
        """
        path = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(path) and (os.path.isabs(path) or path.count("/") > 1 or path.startswith((".", "~"))):
            raise FileNotFoundError(f"{path} is not a folder. Pass that of a saved pipeline, or a Hub id.")
        if not os.path.isdir(path) and path in BUNDLED:
            raise FileNotFoundError(
                f"{path} is not a folder, but the name of a checkpoint that comes with this package. Pass its folder:"
                f" `diffusers_terdit.checkpoints.bundled({path!r})`."
            )
        folders = [Path(path, part) for part in ("", "transformer", "scheduler", "vae")]
        try:
            with undisturbed(*folders), hub_errors(path, kwargs.get("revision")):
                return super().from_pretrained(path, **kwargs)  # type: ignore[misc]
        except OSError as error:
            if not _holds_originals(path, kwargs.get("revision")):
                raise
            raise OSError(
                f"{path} holds checkpoints of TerDiT's authors, and no pipeline of diffusers. Convert one of them:"
                f" `terdit convert {path} FOLDER`."
            ) from error

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save every component into a separate folder, and `model_index.json`.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            safe_serialization (`bool`): Must be `True`: ternary weights are saved as safetensors only.
            variant (`str`, *optional*): Written into the weights' file names.
            max_shard_size (`int` or `str`, *optional*): Of a weights file: bytes, or a string such as `"5GB"`.
            push_to_hub (`bool`): Upload the folder afterwards, to `repo_id` among `kwargs` (default its name).
            kwargs: The other arguments of `push_to_hub`.

        Raises:
            ValueError: `save_directory` is a file, or the transformer carries adapters.
            OSError: It cannot be written; what was there before is still there. Only where the last step, moving the
                files, breaks off, the folder holds neither pipeline, and says so when it is loaded.
        """
        require_safetensors(safe_serialization, kwargs.pop("use_flashpack", False))
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, {save_directory} is a file.")
        refuse_adapters(self.transformer, "saving the pipeline")  # type: ignore[attr-defined]
        folder = Path(save_directory)
        # The marker is in the folder of the transformer, which every way to load the pipeline loads.
        with replacing(folder, folder / "transformer" / "pipeline.saving") as partial:
            super().save_pretrained(partial, safe_serialization, variant, max_shard_size)  # type: ignore[misc]
            scrub_paths(partial)
        if push_to_hub:
            self._push_saved(folder, variant=variant, **kwargs)

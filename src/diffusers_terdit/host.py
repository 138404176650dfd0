"""Where this package touches its host: every private name of diffusers and PEFT that it uses stands here alone.

`TernaryModelMixin` is diffusers' `ModelMixin` made strict: what the host accepts with a warning or in silence is an
error, by the checks of `files.py`, and what it saves carries metadata and digests.
"""

import hashlib
import json
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders import peft as peft_loader
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, is_peft_available, logging
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from safetensors import SafetensorError
from safetensors.torch import save_file

from .files import (
    BROKEN,
    PACKED_SUFFIX,
    PACKING,
    SCALE_SUFFIX,
    TOGETHER,
    VERSION,
    UnwritableError,
    check_config,
    check_pipeline_config,
    check_weights,
    read_index,
    refuse_interrupted,
    replacing,
    state_dict_digest,
)


if is_peft_available():  # diffusers has imported it by now
    from peft.tuners.lora.layer import Linear as LoraLinear
else:
    LoraLinear = torch.nn.Module

logger = logging.get_logger(__name__)

INSTALL_NUMBA = "pip install 'diffusers-terdit[cpu]'"
_ITS_MODEL = "Load it into the model that it was trained on."

_loading: ContextVar[bool] = ContextVar("loading", default=False)


def register(package: str, classes: Iterable[type], blocks: Iterable[type]) -> None:
    """Make diffusers find `package`'s classes by name, as it does its own.

    Three tables: `LOADABLE_CLASSES` lets a `model_index.json`, on the Hub too, say `["diffusers_terdit", "..."]`;
    attributes on `diffusers` let `DiffusionPipeline` and `AutoModel` resolve a class name; the block registry serves
    the step caches.
    """
    LOADABLE_CLASSES.setdefault(package, {"ModelMixin": ["save_pretrained", "from_pretrained"]})
    for cls in classes:
        if not hasattr(diffusers, cls.__name__):
            setattr(diffusers, cls.__name__, cls)
    for block in blocks:
        TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0))


def register_quantizer(
    method: Enum, config: type[QuantizationConfigMixin], quantizer: type[DiffusersQuantizer]
) -> None:
    """Make diffusers find a quantization method by its name, as it does its own."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[method.value] = config
    AUTO_QUANTIZER_MAPPING[method.value] = quantizer


@cache
def warn_half_precision_codes(dtype: torch.dtype | None) -> None:
    """Warn, once, when float-format ternary weights are about to be read in half precision."""
    if dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            f"Float-format ternary weights in {dtype} ternarize differently (0.05-0.2 % of the codes). Call `pack()`"
            " on the float32 model first; packed weights do not change when the model is cast."
        )


@cache
def warn_no_integer_kernel(device_type: str) -> None:
    """Say, once, why integer activations that were asked for, or would be used, are not."""
    if device_type != "cpu":
        logger.warning(f"There are no integer kernels for this {device_type} device; ternary layers compute exactly.")
    elif find_spec("numba") is None:
        logger.warning(f"bfloat16 on this CPU would be faster and more accurate with numba: {INSTALL_NUMBA}")
    else:
        logger.warning("This processor has no AVX2, which the integer kernels need; ternary layers compute exactly.")


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or of diffusers' group offloading move the weights of the model or a part of it."""
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return any(hasattr(module, "_hf_hook") for module in model.modules()) or any(
        registry.get_hook(_GROUP_OFFLOADING) is not None for registry in registries if registry is not None
    )


def has_hooks(model: torch.nn.Module) -> bool:
    """Whether offloading, step caches or layerwise casting keep the state of a run in the model or a part of it."""
    return is_offloaded(model) or any(
        registry.hooks
        for module in model.modules()
        if (registry := getattr(module, "_diffusers_hook", None)) is not None
    )


def reset_step_caches(model: ModelMixin) -> None:
    """Forget what diffusers' step caches keep between the steps of one run of a sampler."""
    model._reset_stateful_cache()


@contextmanager
def hub_errors(name: str | os.PathLike, revision: str | None = None, writing: bool = False) -> Iterator[None]:
    """Turn what goes wrong with a Hub repository into an `OSError` that names it and says what to do.

    What a file's contents bring about while reading is a `ValueError` with the name, for a local folder too.

    Args:
        name (`str` or `os.PathLike`): Repository or folder.
        revision (`str`, *optional*): Branch, tag or commit.
        writing (`bool`): Whether the token needs to write.
    """
    try:
        yield
    except UnwritableError:
        raise
    except (ValueError, *BROKEN) as error:
        if writing or isinstance(error, OSError) or (isinstance(error, ValueError) and str(name) in str(error)):
            raise
        reason = (
            str(error)
            if isinstance(error, ValueError)
            else f"a file is not what it should be ({error!r:.300}). Save it again."
        )
        raise ValueError(f"{name}: {reason}") from error
    except (OSError, HfHubHTTPError, httpx.TransportError, RuntimeError) as error:  # the last from LFS uploads
        message = None if os.path.isdir(name) else _hub_message(str(name), revision, writing, error)
        nameless = isinstance(error, OSError) and str(name) not in str(error)
        if isinstance(error, NotImplementedError) and _passes(error, "configuration_utils.py", "from_config"):
            raise ValueError(
                f"{name}: a config asks for what diffusers has not ({error}). Save it again, or update diffusers."
            ) from error
        if message is None and not writing and (nameless or _passes(error, "torch/serialization.py")):
            message = f"{name}: a file cannot be read ({error}). Download or save it again."
        if message is None:
            raise
        raise OSError(message) from error


def _passes(error: BaseException, file: str, function: str = "") -> bool:
    """Whether an error came through a function, or any function of a file."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frame.filename).as_posix().endswith(file) and function in (frame.name, "") for frame in frames)


def _hub_message(name: str, revision: str | None, writing: bool, error: BaseException) -> str | None:
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    verb = "write to" if writing else "read"
    access = f"log in with `hf auth login`, or pass the `token=` of an account that may {verb} it"

    def found(*kinds: type[BaseException]) -> BaseException | None:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    if found(GatedRepoError):
        return f"{name} is gated: accept its terms on https://huggingface.co/{name}, then {access}."
    http = found(HfHubHTTPError)
    status = getattr(getattr(http, "response", None), "status_code", 0)
    reason = (str(http).strip().splitlines() or [""])[-1]
    if status in (401, 403) and (writing or not found(RepositoryNotFoundError)):
        return f"The Hub does not let you {verb} {name} ({status}: {reason}): {access}."
    if found(RevisionNotFoundError):
        return f"{name} has no branch, tag or commit {revision!r}; see https://huggingface.co/{name}/branches."
    if found(RepositoryNotFoundError):
        return f"There is no repository {name} on the Hub, or it is private: check the name, or {access}."
    if found(OfflineModeIsEnabled) and writing:
        return f"HF_HUB_OFFLINE is set, so nothing can be uploaded to {name}."
    if found(OfflineModeIsEnabled):
        return f"{name} is not in the cache as a whole, and HF_HUB_OFFLINE forbids to download. Load it once online."
    if status == 429 or status >= 500 or (writing and status):
        return f"The Hub answered {status} for {name} ({reason}). Try again later."
    broken = found(httpx.TransportError)
    if broken:
        return (
            f"The connection to the Hub broke off at {name} ({type(broken).__name__}: {broken}). Try again: files that"
            " had arrived whole are not sent twice."
        )
    if found(LocalEntryNotFoundError):
        return f"{name} is not in the cache as a whole. Load it once without `local_files_only`."
    return None


class PortableConfigMixin(ConfigMixin):
    """`ConfigMixin` that saves no path of this machine, and that remote code leaves no trace in."""

    @classmethod
    def load_config(cls, pretrained_model_name_or_path=None, **kwargs):
        name = str(pretrained_model_name_or_path)
        where = os.path.join(name, kwargs.get("subfolder") or "", cls.config_name)
        try:
            output = super().load_config(pretrained_model_name_or_path, **kwargs)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} cannot be read: {error} Download or save it again.") from error
        config = output[0] if isinstance(output, tuple) else output
        check_config(where, config, cls if issubclass(cls, ModelMixin) else None)
        if not issubclass(cls, ModelMixin):
            check_pipeline_config(where, config)
        return output

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        # `auto_map` belongs to the repository that the code comes with; the host would warn, and save it again.
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, without `_name_or_path`."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        for key, value in config.items():
            if isinstance(value, list) and len(value) == 2 and str(value[0]).startswith("diffusers_modules."):
                config[key] = ["diffusers_terdit", value[1]]  # a component that was loaded with its own code
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def scrub_paths(folder: str | os.PathLike) -> None:
    """Take `_name_or_path`, a path of this machine, out of the configs in a saved model or pipeline."""
    for path in [*Path(folder).glob("*config.json"), *Path(folder).glob("*/*config.json")]:
        config = json.loads(path.read_text("utf-8"))
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class HubMixin:
    """Uploads with a model card, for layer, model and pipeline."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
        images: Any = None,
    ) -> Any:
        """Save, and upload with a model card.

        A README.md that the repository has keeps its author's text and metadata; the generated part is renewed.

        Args:
            repo_id (`str`): Repository, made if it does not exist.
            commit_message (`str`, *optional*): Default "Upload" and the name of the class.
            private (`bool`, *optional*): Of a repository that is made.
            token (`str`, *optional*): Default the one of `hf auth login`.
            create_pr (`bool`): Open a pull request instead.
            safe_serialization (`bool`): See `save_pretrained`.
            variant (`str`, *optional*): See `save_pretrained`.
            subfolder (`str`, *optional*): Folder of the repository; then no card is written.
            revision (`str`, *optional*): Branch, made from `main` if it does not exist.
            license (`str`, *optional*): For the card, an identifier as on the Hub. None is guessed.
            base_model (`str`, *optional*): For the card: Hub id of what this was made from; default the one it was
                converted or loaded from, where that is known.
            images (`list` or `dict` of `PIL.Image.Image`, *optional*): Pictures for the card, with captions as keys;
                such as `pipe(...).images`.

        Returns:
            [`~huggingface_hub.CommitInfo`]: The commit.

        Raises:
            OSError: The Hub does not allow it, or cannot be reached.
            ValueError: `images` hold something else, or the metadata of the repository's README.md is not YAML.
        """
        from . import card

        repo_id = card.create_repository(repo_id, private, token, revision)  # what is not allowed, before the work
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)  # type: ignore[attr-defined]
            return self._push_folder(
                Path(folder),
                repo_id=repo_id,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
                variant=variant,
                subfolder=subfolder,
                revision=revision,
                license=license,
                base_model=base_model,
                images=images,
            )

    def _push_folder(
        self,
        folder: Path,
        repo_id: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        token: str | None = None,
        create_pr: bool = False,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        license: str | None = None,
        base_model: str | None = None,
        images: Any = None,
    ) -> Any:
        from . import card

        scrub_paths(folder)
        repo_id = card.create_repository(repo_id or folder.resolve().name, private, token, revision)
        shown, pictures = card.encode_pictures(images)
        arguments = {"revision": revision, "variant": variant}
        text = None if subfolder else card.model_card(self, repo_id, None, shown, license, base_model, arguments)
        given = {"license": license, "base_model": base_model}
        return card.push_folder(
            folder,
            repo_id,
            text,
            [key for key, value in given.items() if value],
            pictures,
            commit_message or f"Upload {type(self).__name__}",
            token,
            create_pr,
            subfolder,
            revision,
        )


class TernaryModelMixin(HubMixin, ModelMixin, PortableConfigMixin):
    """`ModelMixin` with strict loading, digests in what it saves, and float32 scales: base of layer and model."""

    # ModelMixin answers attribute look-ups from the config too, which hides parameters and submodules that share a
    # name with an init argument (`bias`) and slows every access of hundreds of nested layers.
    __getattr__ = torch.nn.Module.__getattr__  # type: ignore[assignment]

    # With `low_cpu_mem_usage=False` the host would assign the file's tensors as they are when the first one's dtype
    # fits, and so forget `dtype=`: the first one is uint8 in a packed layer.
    _supports_param_buffer_assignment = False

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
        refuse_interrupted(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""))
        loading = _loading.set(True)
        try:
            with hub_errors(pretrained_model_name_or_path, kwargs.get("revision")):
                stem, suffix = SAFE_WEIGHTS_INDEX_NAME.rsplit(".", 1)
                variant = f".{kwargs['variant']}" if kwargs.get("variant") else ""
                folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
                index = folder / f"{stem}{variant}.{suffix}"
                if index.is_file() and kwargs.get("use_safetensors") is not False:
                    read_index(index)
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
        refuse_interrupted(Path(files[0]).parent)
        single = state_dict if len(files) == 1 and not str(files[0]).endswith(".safetensors") else None
        check_weights(model, files, single, kwargs.get("ignore_mismatched_sizes", False))
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
        """Save config and weights, with metadata and a digest in each safetensors file.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            is_main_process (`bool`): Whether this process writes the config and clears old weights.
            save_function: Passed to diffusers; unused with safetensors.
            safe_serialization (`bool`): Write safetensors; `False` writes a `.bin` pickle, without metadata or digest.
            variant (`str`, *optional*): Written into the file's name, as in
                `diffusion_pytorch_model.<variant>.safetensors`.
            max_shard_size (`int` or `str`): Bytes, or a string such as `"5GB"`.
            push_to_hub (`bool`): Upload afterwards, to `repo_id` among `kwargs`.
            kwargs: The other arguments of `push_to_hub`.

        Raises:
            ValueError: `save_directory` is a file, or the model carries adapters.
            OSError: It cannot be written; what was there before is still there. Only where the last step, moving the
                files, breaks off, the folder holds neither model, and says so when it is loaded.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, {save_directory} is a file.")
        refuse_adapters(self, "saving the model")
        folder = Path(save_directory)
        flashpack = kwargs.pop("use_flashpack", False)
        stem = ".".join(filter(None, (SAFETENSORS_WEIGHTS_NAME.split(".")[0], variant)))
        with replacing(folder, folder / f"{stem}.saving", clear=is_main_process) as partial:
            if not safe_serialization or flashpack:
                super().save_pretrained(
                    partial,
                    is_main_process=is_main_process,
                    save_function=save_function,
                    safe_serialization=safe_serialization,
                    variant=variant,
                    max_shard_size=max_shard_size,
                    use_flashpack=flashpack,
                )
            else:
                self._save_safetensors(partial, variant, max_shard_size, is_main_process)
        if push_to_hub:
            self._push_folder(folder, variant=variant, **kwargs)

    def _save_safetensors(
        self, folder: Path, variant: str | None, max_shard_size: int | str, is_main_process: bool
    ) -> None:
        def named(name: str) -> str:  # "a.safetensors" -> "a.<variant>.safetensors", as diffusers does
            stem, suffix = name.rsplit(".", 1)
            return f"{stem}.{variant}.{suffix}" if variant else name

        state_dict = self.state_dict()
        pattern = named(SAFETENSORS_WEIGHTS_NAME).replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(state_dict, filename_pattern=pattern, max_shard_size=max_shard_size)
        metadata = {"format": "pt", "terdit.version": VERSION}
        if self.config.get("weight_format") == "packed":
            metadata["terdit.packing"] = PACKING
        shards = split.filename_to_tensors
        digests = {name: state_dict_digest({n: state_dict[n] for n in names}) for name, names in shards.items()}
        if split.is_sharded:
            metadata["terdit.model"] = hashlib.sha256("".join(digests.values()).encode()).hexdigest()
        for filename, names in shards.items():
            path = folder / filename
            path.touch()
            mode = path.stat().st_mode  # safetensors would leave the file to its owner alone
            shard = {name: state_dict[name].detach().contiguous() for name in names}
            save_file(shard, path, metadata={**metadata, "terdit.sha256": digests[filename]})
            path.chmod(mode)
        if split.is_sharded:
            index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / named(SAFE_WEIGHTS_INDEX_NAME)).write_text(text, encoding="utf-8")
        if is_main_process:
            self.to_json_file(folder / self.config_name)


class TernaryLoraLinear(LoraLinear):
    """PEFT's LoRA around a ternary layer: the base stays as it is, in either format, and is never written to."""

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]  # PEFT would warn

    def _get_base_layer_device_and_dtype(self, base_layer: torch.nn.Module):
        return base_layer.weight_scale.device, None  # the dtype of the codes is not that of the adapter

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(FUSE_MESSAGE)


FUSE_MESSAGE = (
    "A ternary weight cannot take in an adapter: the sum is no longer ternary. Keep the adapter beside it, or fuse it"
    " into a dense copy: `dense = model.dequantize()` of the model without the adapter, then"
    " `dense.load_lora_adapter(...)` and `dense.fuse_lora()`."
)

# What PEFT starts without reading the dense weight.
_LORA_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def refuse_adapters(model: torch.nn.Module, action: str) -> None:
    """Raise if a model carries adapters: its state dict has their tensors, and other names for the layers."""
    if names := list(getattr(model, "peft_config", None) or {}):
        raise ValueError(
            f"The model carries adapters, {names}. `save_lora_adapter` saves them; call `unload_lora()` before"
            f" {action}."
        )


@contextmanager
def _peft() -> Iterator[None]:
    """PEFT, or an error that says what to install; without its warning that a second adapter is a second adapter."""
    if not is_peft_available():
        raise ImportError("LoRA needs PEFT: pip install 'diffusers-terdit[lora]'")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        yield


class TernaryAdapterMixin(PeftAdapterMixin):
    """`PeftAdapterMixin` that knows ternary layers; PEFT itself takes `nn.Linear` and its own list of others."""

    _adapter_layer_class: type[torch.nn.Module]

    def _ternary_adapter_config(self, adapter_config: Any) -> Any:
        """Teach a PEFT config the ternary layer, and refuse what would need its dense weight."""
        rows = getattr(adapter_config, "trainable_token_indices", None)
        null = getattr(self.config, "num_classes", None)  # type: ignore[attr-defined]
        if isinstance(rows, dict) and null is not None and max(rows.get("class_embed") or [-1]) >= null:
            raise ValueError(
                f"The adapter trains rows {rows['class_embed']} of the label table; here row {null} is the null label."
                " For new classes call `model.add_classes(...)` first, as when the adapter was trained."
            )
        beside = {name: getattr(adapter_config, name, None) for name in ("modules_to_save", "bias")}
        if kept := [f"{name}={value!r}" for name, value in beside.items() if value not in (None, "none", [])]:
            raise ValueError(
                f"{', '.join(kept)}: trains weights of the model itself, which diffusers cannot switch off or take out"
                " again. Name the layers in `target_modules`; for rows of the label table, `trainable_token_indices`."
            )
        if not any(isinstance(module, self._adapter_layer_class) for module in self.modules()):  # type: ignore[attr-defined]
            return adapter_config
        if not hasattr(adapter_config, "_register_custom_module"):
            raise ValueError(
                f"Ternary layers take LoRA adapters, got {type(adapter_config).__name__}. Pass a `peft.LoraConfig`, or"
                " adapt the full-precision model that `model.dequantize()` gives."
            )
        wrong = [name for name in ("use_dora", "kasa_config") if getattr(adapter_config, name, None)]
        if adapter_config.init_lora_weights not in _LORA_STARTS:
            wrong.append(f"init_lora_weights={adapter_config.init_lora_weights!r}")
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: reads a dense weight, which a ternary layer has not. Use plain LoRA, or adapt"
                " the full-precision model that `model.dequantize()` gives."
            )
        adapter_config._register_custom_module({self._adapter_layer_class: TernaryLoraLinear})
        return adapter_config

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add a fresh LoRA adapter and make it the active one; only its weights take gradients afterwards.

        Args:
            adapter_config (`peft.LoraConfig`): `target_modules` by name, such as `["to_q", "to_v", "to_out.0"]`.
            adapter_name (`str`, defaults to `"default"`): To tell several apart.

        Raises:
            ValueError: No plain LoRA (DoRA, another method, a start from the dense weight), or the name is taken.
        """
        with _peft():
            super().add_adapter(self._ternary_adapter_config(adapter_config), adapter_name)

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict, prefix: str | None = None, hotswap: bool = False, **kwargs: Any
    ) -> None:
        """Load what `save_lora_adapter` wrote; see [`~loaders.PeftAdapterMixin.load_lora_adapter`].

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): Folder, Hub repository or tensors.
            prefix (`str`, *optional*): Of the names in the file; `save_lora_adapter` writes none.
            hotswap (`bool`): Put the weights in the place of the adapter of that name, for compiled models.
            kwargs: `adapter_name`, `weight_name`, `revision`, `token`, ...

        Raises:
            ValueError: No plain LoRA, or it is of another model: a layer is missing or has another size.
            OSError: The file is missing or cannot be read.
        """
        given, plain, configs = pretrained_model_name_or_path_or_dict, peft_loader._create_lora_config, []

        def create(state_dict: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            self._check_adapter(state_dict)
            configs.append(self._ternary_adapter_config(plain(state_dict, *args, **kwargs)))
            return configs[-1]

        if kwargs.get("weight_name") is None:
            kwargs.setdefault("use_safetensors", True)  # otherwise the host looks for a pickle
        peft_loader._create_lora_config = create
        try:
            with _peft():
                super().load_lora_adapter(given, prefix=prefix, hotswap=hotswap, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"{given} holds no readable safetensors file ({error}). Download or save it again."
            ) from error
        finally:
            peft_loader._create_lora_config = plain
        if not configs:  # the host warns
            where = "" if isinstance(given, dict) else f" in {given}"
            raise ValueError(f"There is no LoRA{where} whose names start with {prefix!r}. Try `prefix=None`.")

    def _check_adapter(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Raise unless every LoRA matrix has its partner and a layer of this model that it fits; the host warns."""
        modules = dict(self.named_modules())  # type: ignore[attr-defined]
        for key, tensor in state_dict.items():
            name, _, part = key.partition(".lora_")
            sizes = {"A.weight": ("in_features", -1), "B.weight": ("out_features", 0)}
            if part and name not in modules:
                raise ValueError(
                    f"The adapter's tensor `{key}` is for a layer that {type(self).__name__} does not have."
                    f" {_ITS_MODEL}"
                )
            if part in sizes:
                other = f"{name}.lora_{'B' if part[0] == 'A' else 'A'}.weight"
                if other not in state_dict:
                    raise ValueError(f"The adapter has `{key}`, but no `{other}`. Save it again.")
                attribute, dim = sizes[part]
                size = getattr(modules[name], attribute, tensor.shape[dim])
                if tensor.shape[dim] != size:
                    raise ValueError(
                        f"The adapter's tensor `{key}` has shape {list(tensor.shape)}, the layer's `{attribute}` is"
                        f" {size}. {_ITS_MODEL}"
                    )

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Not on a ternary model; on a full-precision one as in diffusers.

        Raises:
            ValueError: A ternary layer has an adapter.
        """
        if any(isinstance(module, TernaryLoraLinear) for module in self.modules()):  # type: ignore[attr-defined]
            raise ValueError(FUSE_MESSAGE)  # before a dense layer is fused
        super().fuse_lora(*args, **kwargs)

    def unload_lora(self) -> None:
        """Take all adapters out; the model computes what it did before the first. Its own weights stay frozen."""
        for name, module in list(self.named_modules()):  # type: ignore[attr-defined]
            if adapter := getattr(module, "token_adapter", None):  # the host would leave half of its wrapper
                parent, _, child = name.rpartition(".")
                setattr(self.get_submodule(parent), child, adapter.base_layer)  # type: ignore[attr-defined]
        super().unload_lora()


class _AnyModelAdapterMixin(TernaryAdapterMixin):
    """The same for a model of diffusers whose pipelines name their tensors "transformer...."."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        super().load_lora_adapter(pretrained_model_name_or_path_or_dict, prefix, hotswap, **kwargs)


@cache
def _taking_adapters(cls: Any, layer_class: Any) -> type[ModelMixin]:
    names = {"__module__": cls.__module__, "__doc__": cls.__doc__, "_adapter_layer_class": layer_class}
    return type(cls.__name__, (_AnyModelAdapterMixin, cls), names)


def take_adapters(model: ModelMixin, layer_class: type[torch.nn.Module] | None) -> None:
    """Let a model of any class of diffusers carry LoRA on ternary layers; `None`: let it be as it was.

    The model becomes one of a subclass of the same name, whose `add_adapter` and `load_lora_adapter` know the layer.
    """
    cls = type(model)
    plain = cls.__bases__[1] if cls.__bases__[0] is _AnyModelAdapterMixin else cls
    if layer_class is None or not issubclass(plain, PeftAdapterMixin):
        model.__class__ = plain
    else:
        model.__class__ = _taking_adapters(plain, layer_class)  # type: ignore[arg-type]

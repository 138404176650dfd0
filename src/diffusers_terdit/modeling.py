"""diffusers' `ModelMixin`, `ConfigMixin` and pipeline loading made strict.

What diffusers accepts with a warning or in silence is an error here, by the checks of `storage/weights.py`; what is
saved carries metadata and digests.
"""

import json
import math
import os
import re
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import diffusers
import torch
from accelerate.utils import convert_file_size_to_int
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, logging

from .hub.errors import hub_errors
from .hub.push import HubMixin
from .lora import refuse_adapters
from .storage.saving import refuse_interrupted, replacing, scrub_paths
from .storage.weights import (
    PACKED_SUFFIX,
    PACKING,
    SCALE_SUFFIX,
    TOGETHER,
    VERSION,
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


MAX_BLOCKS = 1000  # of a config: modules are built before the weights are read, at a millisecond each
_MAX_INT = 2**31 - 1
_MAX_FLOAT = torch.finfo(torch.float32).max
_MAX_TIMESTEPS = 10**6  # a scheduler allocates several numbers for each


def check_config(where: str | os.PathLike, config: Any, cls: type | None = None) -> None:
    """Raise a `ValueError` where a config asks for what cannot be, before anything is built from it.

    Args:
        where: The file or folder, for the error.
        config: As read from JSON.
        cls (`type`, *optional*): Class to build, whose annotations the values must fit; integers are sizes.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where}: the config is {type(config).__name__}, expected an object.")
    for key, value in config.items():
        if isinstance(value, float) and _MAX_FLOAT < abs(value) < math.inf:
            raise ValueError(f"{where}: the config has {key}={value}, more than a float32 holds.")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        limit = MAX_BLOCKS if re.search(r"layers|blocks|depth", key) else _MAX_INT
        if abs(value) > limit:
            shown = value if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
            raise ValueError(f"{where}: the config asks for {key}={shown}, more than {limit}; nothing was allocated.")
    hints = {} if cls is None else get_type_hints(cls.__init__)  # type: ignore[misc]
    for key, hint in hints.items():
        if key in config and not any(_fits(config[key], kind) for kind in get_args(hint) or [hint]):
            names = " or ".join(
                "a positive int" if kind is int else kind.__name__ for kind in get_args(hint) or [hint]
            )
            raise ValueError(f"{where}: the config has {key}={config[key]!r:.80}, expected {names}.")


def _fits(value: Any, kind: type) -> bool:
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind)


def check_pipeline_config(where: str, config: dict[str, Any]) -> None:
    """The same for a model_index.json of `TerDiTPipeline`, and for the sizes in the scheduler's config."""
    for key, value in config.items():
        if isinstance(value, list) and key != "_class_name":
            named = len(value) == 2 and all(isinstance(part, str) and part for part in value)
            if not named and not (key == "vae" and value == [None, None]):
                raise ValueError(f"{where}: `{key}` is {value!r:.80}, expected the names of a library and a class.")
    name = config.get("_class_name", "")
    if not isinstance(name, str) and not (isinstance(name, list) and all(isinstance(part, str) for part in name)):
        raise ValueError(f"{where}: `_class_name` is {name!r:.80}, expected the name of a class.")
    for key, expected in (("transformer", "TerDiTTransformer2DModel"), ("scheduler", "")):
        component = config.get(key)
        known = isinstance(component, list) and (component[1] == expected if expected else component[0] == "diffusers")
        if not known:
            kind = f"a {expected}" if expected else "a scheduler of diffusers"
            raise ValueError(f"{where}: `{key}` is {component!r:.80}, expected {kind}.")
    vae = config.get("vae")
    if vae is not None and not isinstance(vae, list):
        raise ValueError(f"{where}: `vae` is {vae!r:.80}, expected the names of a library and a class.")
    labels = config.get("id2label")
    if labels is not None and not (isinstance(labels, dict) and all(isinstance(v, str) for v in labels.values())):
        raise ValueError(f"{where}: `id2label` is {labels!r:.80}, expected names by class id.")
    scheduler = Path(where).parent / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        settings = read_json(scheduler)
        check_config(scheduler, settings)
        steps = settings.get("num_train_timesteps", 1000)
        if not _fits(steps, int) or steps > _MAX_TIMESTEPS:
            raise ValueError(f"{scheduler}: num_train_timesteps={steps!r:.80}, expected 1 to {_MAX_TIMESTEPS}.")


@cache
def warn_half_precision_codes(dtype: torch.dtype | None) -> None:
    """Warn, once, when float-format ternary weights are about to be read in half precision."""
    if dtype in (torch.float16, torch.bfloat16):
        logger.warning(
            f"Float-format ternary weights in {dtype} ternarize differently (0.05-0.2 % of the codes). Call `pack()`"
            " on the float32 model first; packed weights do not change when the model is cast."
        )


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


class TernaryModelMixin(HubMixin, ModelMixin, PortableConfigMixin):
    """`ModelMixin` with strict loading, digests in what it saves, and float32 scales: base of layer and model."""

    # ModelMixin answers attribute look-ups from the config too, which hides parameters and submodules that share a
    # name with an init argument (`bias`) and slows every access of hundreds of nested layers.
    __getattr__ = torch.nn.Module.__getattr__  # type: ignore[assignment]

    # With `low_cpu_mem_usage=False` the host would assign the file's tensors as they are when the first one's dtype
    # fits, and so forget `dtype=`: the first one is uint8 in a packed layer.
    _supports_param_buffer_assignment = False

    _weights_checked = False  # set by the loading hook, and taken away again

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
        refuse_interrupted(folder)
        refuse_pickles(folder)
        loading = _loading.set(True)
        try:
            with hub_errors(pretrained_model_name_or_path, kwargs.get("revision")):
                index = folder / with_variant(SAFE_WEIGHTS_INDEX_NAME, kwargs.get("variant"))
                if index.is_file():
                    read_index(index)
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
        refuse_interrupted(Path(files[0]).parent)
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
            ValueError: `save_directory` is a file, another format is asked for, or the model carries adapters.
            OSError: It cannot be written; what was there before is still there. Only where the last step, moving the
                files, breaks off, the folder holds neither model, and says so when it is loaded.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, {save_directory} is a file.")
        require_safetensors(safe_serialization, kwargs.pop("use_flashpack", False))
        refuse_adapters(self, "saving the model")
        folder, limit = Path(save_directory), convert_file_size_to_int(max_shard_size)
        state_dict = self.state_dict()
        metadata = {"format": "pt", "terdit.version": VERSION}
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
            self._push_folder(folder, variant=variant, **kwargs)


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
        refuse_interrupted(Path(path, "transformer"))
        with hub_errors(path, kwargs.get("revision")):
            return super().from_pretrained(path, **kwargs)  # type: ignore[misc]

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
            self._push_folder(folder, variant=variant, **kwargs)

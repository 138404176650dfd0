"""Where this package touches its host: every private name of diffusers that it uses stands here, and nowhere else.

`TernaryModelMixin` is diffusers' `ModelMixin` made strict. What the host accepts with a warning or in silence (a
missing key, a packed tensor stored as floats, a code that is not ternary, an index that names an absent tensor, a
flipped bit) is one `ValueError` here that names the file and the tensor; a file that cannot be read is an `OSError`.

Weights are written with this safetensors metadata, and checked against it where it is present:

    format          "pt"
    terdit.version  "1"
    terdit.packing  "row-chunk-2bit", when the file belongs to a packed model (the bytes: ops/reference.py)
    terdit.sha256   digest of the file's tensors, see `digest`
"""

import hashlib
import json
import os
import pickle
import struct
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, logging
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .ops import reference


logger = logging.get_logger(__name__)

PACKING = "row-chunk-2bit"
VERSION = "1"
INSTALL_NUMBA = "pip install 'diffusers-terdit[cpu]'"
PACKED_SUFFIX = "weight_packed"
SCALE_SUFFIX = "weight_scale"

# The safetensors format's names of dtypes; https://github.com/huggingface/safetensors#format
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_FLOAT_NAMES = {name for dtype, name in _DTYPE_NAMES.items() if dtype.is_floating_point}


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


def digest(tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes | memoryview]]]) -> str:
    """sha256 over tensors in the order of their names: name, dtype, shape and bytes.

    Args:
        tensors: (name, safetensors dtype name, shape, chunks of little-endian bytes), sorted by name.
    """
    sha = hashlib.sha256()
    for name, dtype, shape, chunks in tensors:
        sha.update(json.dumps([name, dtype, list(shape)]).encode())
        for chunk in chunks:
            sha.update(chunk)
    return sha.hexdigest()


def _state_dict_digest(state_dict: dict[str, torch.Tensor]) -> str:
    def entry(name: str):
        tensor = state_dict[name].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        return name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), [data.data]

    return digest(entry(name) for name in sorted(state_dict))


class _WeightsFile:
    """Names, dtypes and shapes of one weights file, and its bytes in chunks: nothing stays in memory.

    Reads instead of mapping, because a second mapping of the file would count twice in the process's resident memory.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            with safe_open(path, framework="pt") as file:  # the library validates the header
                self.metadata: dict[str, str] = file.metadata() or {}
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError, struct.error) as error:
            raise OSError(
                f"{path} is not a readable safetensors file ({error}). Download or save it again."
            ) from error
        header.pop("__metadata__", None)
        self.tensors: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()
        }
        self._offsets = {name: entry["data_offsets"] for name, entry in header.items()}
        self._start = 8 + length

    def chunks(self, name: str, size: int = 1 << 20) -> Iterator[bytes]:
        begin, end = self._offsets[name]
        with open(self.path, "rb") as file:
            file.seek(self._start + begin)
            for position in range(begin, end, size):
                yield file.read(min(size, end - position))

    def checked_chunks(self, name: str) -> Iterator[bytes]:
        """The chunks of a tensor; raises when it is packed and holds a code that is not ternary."""
        packed = name.split(".")[-1] == PACKED_SUFFIX
        for chunk in self.chunks(name):
            if packed:
                codes = np.frombuffer(chunk, np.uint8)
                if (codes & codes >> 1 & reference.ZERO_BYTE).any():
                    raise ValueError(f"{self.path}: tensor `{name}` holds code 3, which is not a ternary value.")
            yield chunk

    def check_contents(self) -> None:
        """Compare with the digest in the metadata, and look for codes that are not ternary, in one pass."""
        found = digest((n, *self.tensors[n], self.checked_chunks(n)) for n in sorted(self.tensors))
        expected = self.metadata.get("terdit.sha256")
        if expected is None:
            logger.info(f"{self.path} carries no digest, so its contents were not checked for damage.")
        elif found != expected:
            raise ValueError(
                f"{self.path}: the tensors do not match the digest in the file (sha256 {found[:12]}..., expected"
                f" {expected[:12]}...). The file is damaged or was changed; download or save it again."
            )


def load_pickle(path: str | os.PathLike, *allowed: type) -> Any:
    """Read a PyTorch file of tensors and plain values, memory-mapped where it can be, without running code from it.

    Args:
        path (`str` or `os.PathLike`): A `.pth` or `.bin` file.
        allowed: Classes that it may build besides.

    Raises:
        ValueError: The file wants to build anything else; nothing of it was run.
        OSError: The file is missing or damaged.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors and plain values, so it was not read and nothing in it was run. Weights"
            f" need no such thing; do not trust this file. ({reason})"
        ) from error
    except FileNotFoundError:
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise OSError(f"{path} is not a readable PyTorch file: truncated or damaged? ({error})") from error


class _PickleFile:
    """The same, for a `.bin` file, whose tensors diffusers has read with `weights_only=True`."""

    def __init__(self, path: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        if state_dict is None:  # a shard, which diffusers has not read yet
            try:
                state_dict = load_pickle(path)
            except ValueError as error:  # as diffusers does with a single file
                raise OSError(str(error)) from error
        if not isinstance(state_dict, dict) or not all(isinstance(t, torch.Tensor) for t in state_dict.values()):
            raise OSError(f"{path} does not hold a dict of tensors.")
        self._state_dict = state_dict
        self.tensors = {n: (_DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in state_dict.items()}

    def check_contents(self) -> None:
        for name, tensor in self._state_dict.items():
            if name.split(".")[-1] == PACKED_SUFFIX and reference.has_invalid_code(tensor):
                raise ValueError(f"{self.path}: tensor `{name}` holds code 3, which is not a ternary value.")


def check_weights(
    model: ModelMixin,
    paths: Iterable[str | os.PathLike],
    state_dict: dict[str, torch.Tensor] | None = None,
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Raise unless `paths` hold exactly the tensors of `model`, in its format, undamaged.

    Args:
        model ([`ModelMixin`]): May be on the meta device.
        paths: The weights file, or all shards of it.
        state_dict (`dict`, *optional*): The tensors of a single `.bin` file that was read already.
        ignore_mismatched_sizes (`bool`): Leave shapes to the host.

    Raises:
        ValueError: A tensor is missing, unexpected, stored twice, of the wrong shape or dtype, or holds a code that is
            not ternary; the metadata contradicts the config; or the digest does not match.
        OSError: A file cannot be read.
    """
    packed_model = model.config.get("weight_format") == "packed"
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    files = [
        _WeightsFile(path) if str(path).endswith(".safetensors") else _PickleFile(path, state_dict) for path in paths
    ]
    seen: dict[str, Path] = {}
    for file in files:
        _check_metadata(file.path, file.metadata, packed_model)
        for name, (dtype, shape) in file.tensors.items():
            if name in seen:
                raise ValueError(f"Tensor `{name}` stands in both {seen[name]} and {file.path}.")
            seen[name] = file.path
            if name not in expected:
                _raise_format_mismatch(file.path, name, packed_model)
                raise ValueError(
                    f"{file.path}: unexpected tensor `{name}`; {type(model).__name__} has no such weight."
                )
            expected_dtype, expected_shape = expected[name]
            if shape != expected_shape and not ignore_mismatched_sizes:
                raise ValueError(
                    f"{file.path}: tensor `{name}` has shape {list(shape)}, the config asks for"
                    f" {list(expected_shape)}."
                )
            fits = dtype in _FLOAT_NAMES if expected_dtype.is_floating_point else dtype == _DTYPE_NAMES[expected_dtype]
            if not fits:
                kind = "floating point" if expected_dtype.is_floating_point else _DTYPE_NAMES[expected_dtype]
                raise ValueError(f"{file.path}: tensor `{name}` is stored as {dtype}, expected {kind}.")
    missing = sorted(set(expected) - set(seen))
    if missing:
        where = ", ".join(str(file.path) for file in files)
        shown = ", ".join(f"`{name}`" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{where}: {len(missing)} missing tensor(s) of {type(model).__name__}: {shown}.")
    for file in files:
        file.check_contents()


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
        logger.warning(f"There are no integer kernels for {device_type}; ternary layers compute exactly there.")
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


def reset_step_caches(model: ModelMixin) -> None:
    """Forget what diffusers' step caches keep between the steps of one run of a sampler."""
    model._reset_stateful_cache()


def _check_metadata(path: Path, metadata: dict[str, str], packed_model: bool) -> None:
    packing, version = metadata.get("terdit.packing"), metadata.get("terdit.version")
    if version not in (None, VERSION):
        raise ValueError(
            f"{path} is of format version {version!r}; this release reads version {VERSION}. Update diffusers-terdit."
        )
    if packing not in (None, PACKING):
        raise ValueError(f"{path} is packed as {packing!r}; this release reads {PACKING!r}.")
    if version is not None and packed_model != (packing is not None):
        inside, asked = ("packed", "float") if packing else ("float", "packed")
        raise ValueError(
            f"{path} holds {inside} weights, but the config says weight_format={asked!r}. Load it as"
            f' weight_format="{inside}" and call `.{"unpack" if packing else "pack"}()`.'
        )


def _raise_format_mismatch(path: Path, name: str, packed_model: bool) -> None:
    if name.split(".")[-1] == PACKED_SUFFIX and not packed_model:
        raise ValueError(
            f'{path}: tensor `{name}` is packed, but the config says weight_format="float". Load it as'
            ' weight_format="packed" and call `.unpack()`.'
        )


class PortableConfigMixin(ConfigMixin):
    """`ConfigMixin` that saves no path of this machine."""

    def to_json_string(self) -> str:
        """The config as JSON, without `_name_or_path`."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


class TernaryModelMixin(ModelMixin, PortableConfigMixin):
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
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        default_dtype = torch.get_default_dtype()
        try:
            output = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        finally:
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
        single = state_dict if len(files) == 1 and not str(files[0]).endswith(".safetensors") else None
        check_weights(model, files, single, kwargs.get("ignore_mismatched_sizes", False))
        kwargs["keep_in_fp32_modules"] = [*(kwargs.get("keep_in_fp32_modules") or []), SCALE_SUFFIX]
        differing = sorted(set(loaded_keys) ^ set(model.state_dict()))
        if differing:  # the files were found complete, so it is the index that is wrong
            raise ValueError(
                f"{name_or_path}: the index and the files differ in {differing[:5]}. Save the model again."
            )
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
            kwargs: `repo_id`, `token`, `private`, `create_pr`, `commit_message` of the upload.

        Raises:
            ValueError: `save_directory` is a file.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, {save_directory} is a file.")
        if not safe_serialization or kwargs.get("use_flashpack"):
            return super().save_pretrained(
                save_directory,
                is_main_process=is_main_process,
                save_function=save_function,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                push_to_hub=push_to_hub,
                **kwargs,
            )
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._save_safetensors(folder, variant, max_shard_size, clear=is_main_process)
        if is_main_process:  # last: weights that could not be written leave the old config beside the old weights
            self.save_config(folder)
        if push_to_hub:
            self._push_folder(folder, **kwargs)

    def _save_safetensors(self, folder: Path, variant: str | None, max_shard_size: int | str, clear: bool) -> None:
        def named(name: str) -> str:  # "a.safetensors" -> "a.<variant>.safetensors", as diffusers does
            stem, suffix = name.rsplit(".", 1)
            return f"{stem}.{variant}.{suffix}" if variant else name

        state_dict = self.state_dict()
        pattern = named(SAFETENSORS_WEIGHTS_NAME).replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(state_dict, filename_pattern=pattern, max_shard_size=max_shard_size)
        metadata = {"format": "pt", "terdit.version": VERSION}
        if self.config.get("weight_format") == "packed":
            metadata["terdit.packing"] = PACKING
        for filename, names in split.filename_to_tensors.items():
            shard = {name: state_dict[name].detach().contiguous() for name in names}
            partial = folder / f"{filename}.partial"
            try:
                partial.touch()
                mode = partial.stat().st_mode  # safetensors would leave the file to its owner alone
                save_file(shard, partial, metadata={**metadata, "terdit.sha256": _state_dict_digest(shard)})
                partial.chmod(mode)
                os.replace(partial, folder / filename)
            finally:
                partial.unlink(missing_ok=True)
        index_path = folder / named(SAFE_WEIGHTS_INDEX_NAME)
        if split.is_sharded:
            index = {"metadata": {**split.metadata, **metadata}, "weight_map": split.tensor_to_filename}
            index_path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if clear:
            stem = pattern.replace("{suffix}.safetensors", "")
            stale = {*folder.glob(f"{stem}-?????-of-?????.safetensors"), folder / f"{stem}.safetensors"}
            stale |= set() if split.is_sharded else {index_path}  # an index would win over the single file
            for path in stale - {folder / filename for filename in split.filename_to_tensors}:
                path.unlink(missing_ok=True)

    def _push_folder(self, folder: Path, **kwargs: Any) -> None:
        upload = {key: kwargs.get(key) for key in ("token", "commit_message")}
        repo_id = kwargs.get("repo_id") or folder.name
        repo_id = create_repo(repo_id, exist_ok=True, private=kwargs.get("private"), token=kwargs.get("token")).repo_id
        card = populate_model_card(load_or_create_model_card(repo_id, token=kwargs.get("token")))
        card.save(folder / "README.md")
        self._upload_folder(folder, repo_id, create_pr=kwargs.get("create_pr", False), **upload)

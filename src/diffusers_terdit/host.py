"""Where this package touches its host: every private name of diffusers that it uses stands here, and nowhere else.

`TernaryModelMixin` is diffusers' `ModelMixin` made strict. What the host accepts with a warning or in silence (a
missing key, a packed tensor stored as floats, a code that is not ternary, an index that names an absent tensor, a
flipped bit) is one `ValueError` here that names the file and the tensor; a file that cannot be read is an `OSError`.

Weights are written with this safetensors metadata, and checked against it where it is present:

    format          "pt"
    terdit.version  "1"
    terdit.packing  "row-chunk-2bit", when the file belongs to a packed model (the bytes: ops/reference.py)
    terdit.sha256   digest of the file's tensors, see `digest`
    terdit.model    of a shard: sha256 of all shards' digests, so that shards of two models do not mix
"""

import errno
import hashlib
import json
import math
import os
import pickle
import re
import secrets
import shutil
import struct
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import diffusers
import numpy as np
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .ops import reference


# Not an import statement: diffusers refuses remote code where one of its imports, wherever it stands, is missing.
fcntl: Any = None if os.name == "nt" else import_module("fcntl")

if is_peft_available():  # diffusers has imported it by now
    from peft.tuners.lora.layer import Linear as LoraLinear
else:
    LoraLinear = torch.nn.Module

logger = logging.get_logger(__name__)

PACKING = "row-chunk-2bit"
VERSION = "1"
INSTALL_NUMBA = "pip install 'diffusers-terdit[cpu]'"
ORIGINAL = "_converted_from"  # in the config: the files a model was converted from; the host passes `_...` along
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
# As an unsigned integer without its sign, a float is NaN or infinite from this value on; E4M3 has no infinity.
_NOT_FINITE = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x7C),
}
_TOGETHER = "Download or save config.json and weights again, together."
_DAMAGED = "which is not a ternary value. Download or save it again."
_ITS_MODEL = "Load it into the model that it was trained on."
MAX_BLOCKS = 1000  # of a config: modules are built before the weights are read, at a millisecond each
_MAX_INT = 2**31 - 1
_MAX_TIMESTEPS = 10**6  # a scheduler allocates several numbers for each
# What loading code raises on files that are not what they should be, beside ValueError and OSError.
_BROKEN = (LookupError, TypeError, AttributeError, NameError, ArithmeticError, RecursionError, SafetensorError)

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


def is_running(process: str) -> bool:
    """Whether a process of this machine, by number, still runs."""
    if os.name == "nt":
        return process.isdigit()  # not known: there `os.kill(n, 0)` would interrupt the process
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError, ValueError):
        return False
    except OSError:  # of another user
        return True
    return True


# What a disk answers to writing, beside being full: what to do about it.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room there, or choose another folder"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Allow writing there, or choose another folder"),
    errno.EIO: "Look at the disk, or choose another folder",
}


class UnwritableError(OSError):
    """A disk is full, read-only or broken; the message names the path and says what to do."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.errno = code


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Turn what a full, read-only or broken disk answers into an `UnwritableError` of `path`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        code = getattr(error, "errno", None)
        if code is None and isinstance(error, (SafetensorError, shutil.Error)):
            found = re.search(r"(?:os error|Errno) (\d+)", str(error))
            code = found and int(found[1])
        pickled = isinstance(error, RuntimeError) and re.search("inline_container|StreamWriter|iostream", str(error))
        if pickled:  # torch does not say why
            code = errno.ENOSPC
        if code not in _ADVICE or not (pickled or isinstance(error, (OSError, SafetensorError))):
            raise
        reason = "the disk is full, or does not take the file" if pickled else os.strerror(code)
        raise UnwritableError(f"{path} cannot be written: {reason}. {_ADVICE[code]}, and try again.", code) from error


_partials: set[str] = set()  # of this process


@contextmanager
def partial_path(path: Path) -> Iterator[Path]:
    """A path beside `path` that no other process or thread writes to; what is left there at the end is removed."""
    name = f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    _partials.add(name)
    try:
        yield path.with_name(name)
    finally:
        remove(path.with_name(name))
        _partials.discard(name)


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_partials(folder: Path, name: str = "*") -> None:
    """Remove what processes that were killed have left half-written in a folder."""
    for left in folder.glob(f"{name}.*.partial"):
        found = re.search(r"\.(\d+)-[0-9a-f]{8}\.partial$", left.name)
        if found and left.name not in _partials and (found[1] == str(os.getpid()) or not is_running(found[1])):
            remove(left)


_WEIGHTS = re.compile(
    r"(?P<name>\w+?)(\.(?P<variant>[^.]+?))?(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index(\.(?P<listed>[^.]+))?\.json)?"
)


def _weights_of(file: Path) -> tuple[Path, str, str] | None:
    """Folder, name and variant that weights files of one model share, in one file or in shards."""
    found = _WEIGHTS.fullmatch(file.name)
    return found and (file.parent, found["name"], found["variant"] or found["listed"] or "")


@contextmanager
def replacing(folder: Path, marker: Path, clear: bool = True) -> Iterator[Path]:
    """Write files of a folder so that it holds the old ones, the new ones, or a marker that says it holds neither.

    Gives an empty folder to write them into. Then, within moments, a marker is set, the files are moved to where they
    belong, weights files that they replace are removed (`clear`), and the marker goes. A process that is killed before
    leaves the old files; one that is killed in those moments leaves the marker, which `refuse_interrupted` looks for.
    An error, such as a full disk, leaves the old files.
    """
    with writing(folder):
        remove_partials(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with partial_path(folder / "new") as partial:
            partial.mkdir()
            yield partial
            files = sorted(path.relative_to(partial) for path in partial.rglob("*") if path.is_file())
            for parent in {folder / file.parent for file in files} | {marker.parent}:
                parent.mkdir(exist_ok=True)
            with marked(marker):
                for file in files:
                    os.replace(partial / file, folder / file)
                models = {_weights_of(folder / file) for file in files if clear} - {None}
                for parent in {model[0] for model in models if model}:
                    for path in parent.iterdir():
                        if _weights_of(path) in models and path.relative_to(folder) not in files:
                            path.unlink(missing_ok=True)


def locked(descriptor: int) -> bool:
    """Take the lock of an open file or folder, which ends with the process; False where another one has it."""
    if fcntl is None:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has no locks
        return True
    return True


def _take(marker: Path, seconds: float = 10.0) -> int:
    """Make a marker, open and locked; wait for a process that has it, take over from one that was killed."""
    end = time.monotonic() + seconds
    while True:
        descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o666)
        owner = os.read(descriptor, 100).decode("ascii", "replace")
        free = locked(descriptor) if fcntl is not None else not is_running(owner)
        # Whoever had it may have removed it since it was opened.
        if free and marker.exists() and os.path.samestat(os.fstat(descriptor), marker.stat()):
            with suppress(OSError):  # the number is for people; a full disk does not take it
                os.truncate(marker, 0)
                os.lseek(descriptor, 0, os.SEEK_SET)
                os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)
        if time.monotonic() > end:
            raise OSError(
                f"Process {owner or 'unknown'} is saving into {marker.parent}. Save elsewhere, or try again;"
                f" if it is gone, delete {marker.name} there."
            )
        time.sleep(0.05)


@contextmanager
def marked(marker: Path) -> Iterator[None]:
    """Set a marker in a folder while files around it are replaced; it stays when that fails or is killed."""
    descriptor = _take(marker)
    try:
        yield
        if os.name != "nt":
            marker.unlink(missing_ok=True)  # before it is let go: then nobody removes another's
    except BaseException:
        with suppress(OSError):
            os.truncate(descriptor, 0)  # no process's number: where there are no locks, the next save takes over
        raise
    finally:
        os.close(descriptor)
    if os.name == "nt":
        marker.unlink(missing_ok=True)


def refuse_interrupted(folder: Path) -> None:
    """Raise an `OSError` if a save into a folder was killed half-way, or is under way."""
    for marker in folder.glob("*.saving"):
        raise OSError(
            f"A save into {folder} was interrupted, or is under way: it may hold files of two models. Save the"
            f" {marker.stem.split('_')[-1]} there again, or take another copy. ({marker.name})"
        )


def _state_dict_digest(state_dict: dict[str, torch.Tensor]) -> str:
    def entry(name: str):
        tensor = state_dict[name].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        return name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), [data.data]

    return digest(entry(name) for name in sorted(state_dict))


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON object from a file; a `ValueError` that names the file where it holds anything else."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}. Download or save it again.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}. Download or save it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected an object. Download or save it again.")
    return found


def read_index(path: str | os.PathLike) -> list[Path]:
    """The weights files that an index names, which lie beside it.

    Raises:
        ValueError: It is no index, or leads outside its folder.
        OSError: A file is missing.
    """
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{path} has no `weight_map` from tensors to files. Download or save it again.")
    if not isinstance(index.get("metadata"), dict):
        raise ValueError(f"{path} has no `metadata`. Download or save it again.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"{path} names {name!r}; a shard is a plain file name, in the folder of the index.")
        if not (Path(path).parent / name).is_file():
            raise OSError(f"{path} names {name}, which is not there. Download or save the model again.")
    return [Path(path).parent / name for name in names]


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


def _check_pipeline_config(where: str, config: dict[str, Any]) -> None:
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
        except (SafetensorError, OSError, ValueError, RecursionError, struct.error) as error:
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
        """The chunks of a tensor; raises at a code that is not ternary, and at NaN and infinity."""
        packed = name.split(".")[-1] == PACKED_SUFFIX
        unsigned, limit = _NOT_FINITE.get(self.tensors[name][0], (None, 0))
        for chunk in self.chunks(name):
            if packed:
                codes = np.frombuffer(chunk, np.uint8)
                if (codes & codes >> 1 & reference.ZERO_BYTE).any():
                    raise ValueError(f"{self.path}: tensor `{name}` holds code 3, {_DAMAGED}")
            elif unsigned is not None:
                numbers = np.frombuffer(chunk, unsigned)
                if ((numbers & (1 << 8 * numbers.itemsize - 1) - 1) >= limit).any():
                    raise ValueError(not_finite(self.path, name))
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
            _check_archive(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{path} holds more than tensors and plain values, so it was not read and nothing in it was run. Weights"
            f" need no such thing; do not trust this file. ({reason})"
        ) from error
    except FileNotFoundError:
        raise
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        AssertionError,
        BadZipFile,
        MemoryError,
        struct.error,
        *_BROKEN,
    ) as error:
        raise OSError(
            f"{path} is not a readable PyTorch file: truncated or damaged? ({error}) Download it again."
        ) from error


def _check_archive(path: str | os.PathLike) -> None:
    """Raise unless every record of a PyTorch file has its checksum, which torch does not look at, and is as it is.

    Compressed records would let a small file fill the memory; torch writes none.
    """
    if not is_zipfile(path):
        return
    with ZipFile(path) as archive:
        if any(record.compress_type != ZIP_STORED for record in archive.infolist()):
            raise OSError("a record is compressed")
        if damaged := archive.testzip():
            raise OSError(f"the record {damaged} does not have its checksum")


def check_tensors(path: str | os.PathLike, state_dict: Any) -> None:
    """Raise a `ValueError` unless a pickle held a dict of ordinary tensors, by name, each with the memory it says."""
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state_dict.items()
    ):
        raise ValueError(f"{path} does not hold a dict of tensors, by name. Download or save it again.")
    for name, tensor in state_dict.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in _DTYPE_NAMES
        if not plain:
            raise ValueError(
                f"{path}: tensor `{name}` is {tensor.layout}, {tensor.dtype}, on {tensor.device.type}, expected a"
                " dense one on the CPU. Save it again."
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: tensor `{name}` has shape {list(tensor.shape)}, and memory for fewer numbers in the file."
                " Download or save it again."
            )


def not_finite(path: str | os.PathLike, name: str) -> str:
    """What is said of a tensor with NaN or infinity, from which every picture would be black."""
    return (
        f"{path}: tensor `{name}` holds NaN or infinity. The file is damaged, or its training had diverged: download"
        " it again, or take an earlier one."
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; a few rows at a time in memory."""
    if not tensor.is_floating_point():
        return True
    blocks = tensor.reshape(-1).split(2**20)
    return all(bool((block.float() if block.element_size() == 1 else block).isfinite().all()) for block in blocks)


class _PickleFile:
    """The same, for a `.bin` file, whose tensors diffusers has read with `weights_only=True`."""

    def __init__(self, path: str | os.PathLike, state_dict: dict[str, torch.Tensor] | None):
        self.path = Path(path)
        self.metadata: dict[str, str] = {}
        try:
            if state_dict is None:  # a shard, which diffusers has not read yet
                state_dict = load_pickle(path)
            else:
                _check_archive(path)
            check_tensors(path, state_dict)
        except (ValueError, BadZipFile, NotImplementedError) as error:  # as diffusers does with a single file
            raise OSError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
        except OSError as error:
            raise OSError(f"{path} is damaged: {error}. Download or save it again.") from error
        self._state_dict = state_dict
        self.tensors = {n: (_DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in state_dict.items()}

    def check_contents(self) -> None:
        for name, tensor in self._state_dict.items():
            if name.split(".")[-1] == PACKED_SUFFIX and reference.has_invalid_code(tensor):
                raise ValueError(f"{self.path}: tensor `{name}` holds code 3, {_DAMAGED}")
            if not is_finite(tensor):
                raise ValueError(not_finite(self.path, name))


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
                raise ValueError(f"Tensor `{name}` stands in both {seen[name]} and {file.path}. Save the model again.")
            seen[name] = file.path
            if name not in expected:
                _raise_format_mismatch(file.path, name, packed_model)
                raise ValueError(
                    f"{file.path}: unexpected tensor `{name}`; {type(model).__name__} has no such weight. {_TOGETHER}"
                )
            expected_dtype, expected_shape = expected[name]
            if shape != expected_shape and not ignore_mismatched_sizes:
                raise ValueError(
                    f"{file.path}: tensor `{name}` has shape {list(shape)}, the config asks for"
                    f" {list(expected_shape)}. {_TOGETHER}"
                )
            fits = dtype in _FLOAT_NAMES if expected_dtype.is_floating_point else dtype == _DTYPE_NAMES[expected_dtype]
            if not fits:
                kind = "floating point" if expected_dtype.is_floating_point else _DTYPE_NAMES[expected_dtype]
                raise ValueError(f"{file.path}: tensor `{name}` is stored as {dtype}, expected {kind}. {_TOGETHER}")
    missing = sorted(set(expected) - set(seen))
    if missing:
        where = ", ".join(str(file.path) for file in files)
        shown = ", ".join(f"`{name}`" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{where}: {len(missing)} missing tensor(s) of {type(model).__name__}: {shown}. {_TOGETHER}")
    for file in files:
        file.check_contents()
    if len({file.metadata.get("terdit.model") for file in files} - {None}) > 1:
        raise ValueError(
            f"{files[0].path.parent} holds shards of several models. Download all of them again, or save the model"
            " again."
        )


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


def _check_metadata(path: Path, metadata: dict[str, str], packed_model: bool) -> None:
    packing, version = metadata.get("terdit.packing"), metadata.get("terdit.version")
    if version not in (None, VERSION):
        raise ValueError(
            f"{path} is of format version {version!r}; this release reads version {VERSION}. Update diffusers-terdit."
        )
    if packing not in (None, PACKING):
        raise ValueError(f"{path} is packed as {packing!r}; this release reads {PACKING!r}. Update diffusers-terdit.")
    if version is not None and packed_model != (packing is not None):
        inside, asked = ("packed", "float") if packing else ("float", "packed")
        raise ValueError(
            f"{path} holds {inside} weights, but the config says weight_format={asked!r}. Load it as"
            f' weight_format="{inside}" and call `.{"unpack" if packing else "pack"}()`.'
        )


def check_file(path: str | os.PathLike, packed: bool) -> None:
    """Check one safetensors file by itself.

    Raises:
        ValueError: It says that it has another format, holds NaN, infinity or code 3, or does not match its digest.
        OSError: It cannot be read.
    """
    file = _WeightsFile(path)
    _check_metadata(file.path, file.metadata, packed)
    file.check_contents()


def _raise_format_mismatch(path: Path, name: str, packed_model: bool) -> None:
    if name.split(".")[-1] == PACKED_SUFFIX and not packed_model:
        raise ValueError(
            f'{path}: tensor `{name}` is packed, but the config says weight_format="float". Load it as'
            ' weight_format="packed" and call `.unpack()`.'
        )


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
    except (ValueError, *_BROKEN) as error:
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
            _check_pipeline_config(where, config)
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
                f"the config asks for tensors that cannot be: {str(error).splitlines()[0]} {_TOGETHER}"
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
        digests = {name: _state_dict_digest({n: state_dict[n] for n in names}) for name, names in shards.items()}
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

"""What this package reads from a disk and writes to it: checked, whole, and by one process at a time.

A missing key, a packed tensor stored as floats, a code that is not ternary, an index that names an absent tensor, a
flipped bit: each is one `ValueError` that names the file and the tensor; a file that cannot be read is an `OSError`.

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
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open

from .ops import reference


# Not an import statement: diffusers refuses remote code where one of its imports, wherever it stands, is missing.
fcntl: Any = None if os.name == "nt" else import_module("fcntl")

logger = logging.get_logger(__name__)

PACKING = "row-chunk-2bit"
VERSION = "1"
ORIGINAL = "_converted_from"  # in the config: the files a model was converted from; the host passes `_...` along
PACKED_SUFFIX = "weight_packed"
SCALE_SUFFIX = "weight_scale"

# The safetensors format's names of dtypes; https://github.com/huggingface/safetensors#format
DTYPE_NAMES = {
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
_FLOAT_NAMES = {name for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
# As an unsigned integer without its sign, a float is NaN or infinite from this value on; E4M3 has no infinity.
_NOT_FINITE = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E4M3": ("u1", 0x7F),
    "F8_E5M2": ("u1", 0x7C),
}
TOGETHER = "Download or save config.json and weights again, together."
_DAMAGED = "which is not a ternary value. Download or save it again."
MAX_BLOCKS = 1000  # of a config: modules are built before the weights are read, at a millisecond each
_MAX_INT = 2**31 - 1
_MAX_FLOAT = torch.finfo(torch.float32).max
_MAX_TIMESTEPS = 10**6  # a scheduler allocates several numbers for each
# What loading code raises on files that are not what they should be, beside ValueError and OSError.
BROKEN = (LookupError, TypeError, AttributeError, NameError, ArithmeticError, RecursionError, SafetensorError)


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


def state_dict_digest(state_dict: dict[str, torch.Tensor]) -> str:
    def entry(name: str):
        tensor = state_dict[name].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        return name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), [data.data]

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


class WeightsFile:
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
        *BROKEN,
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
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPE_NAMES
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
        self.tensors = {n: (DTYPE_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape)) for n, t in state_dict.items()}

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
        WeightsFile(path) if str(path).endswith(".safetensors") else _PickleFile(path, state_dict) for path in paths
    ]
    seen: dict[str, Path] = {}
    for file in files:
        check_metadata(file.path, file.metadata, packed_model)
        for name, (dtype, shape) in file.tensors.items():
            if name in seen:
                raise ValueError(f"Tensor `{name}` stands in both {seen[name]} and {file.path}. Save the model again.")
            seen[name] = file.path
            if name not in expected:
                _raise_format_mismatch(file.path, name, packed_model)
                raise ValueError(
                    f"{file.path}: unexpected tensor `{name}`; {type(model).__name__} has no such weight. {TOGETHER}"
                )
            expected_dtype, expected_shape = expected[name]
            if shape != expected_shape and not ignore_mismatched_sizes:
                raise ValueError(
                    f"{file.path}: tensor `{name}` has shape {list(shape)}, the config asks for"
                    f" {list(expected_shape)}. {TOGETHER}"
                )
            fits = dtype in _FLOAT_NAMES if expected_dtype.is_floating_point else dtype == DTYPE_NAMES[expected_dtype]
            if not fits:
                kind = "floating point" if expected_dtype.is_floating_point else DTYPE_NAMES[expected_dtype]
                raise ValueError(f"{file.path}: tensor `{name}` is stored as {dtype}, expected {kind}. {TOGETHER}")
    missing = sorted(set(expected) - set(seen))
    if missing:
        where = ", ".join(str(file.path) for file in files)
        shown = ", ".join(f"`{name}`" for name in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{where}: {len(missing)} missing tensor(s) of {type(model).__name__}: {shown}. {TOGETHER}")
    for file in files:
        file.check_contents()
    if len({file.metadata.get("terdit.model") for file in files} - {None}) > 1:
        raise ValueError(
            f"{files[0].path.parent} holds shards of several models. Download all of them again, or save the model"
            " again."
        )


def check_metadata(path: Path, metadata: dict[str, str], packed_model: bool) -> None:
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
    file = WeightsFile(path)
    check_metadata(file.path, file.metadata, packed)
    file.check_contents()


def _raise_format_mismatch(path: Path, name: str, packed_model: bool) -> None:
    if name.split(".")[-1] == PACKED_SUFFIX and not packed_model:
        raise ValueError(
            f'{path}: tensor `{name}` is packed, but the config says weight_format="float". Load it as'
            ' weight_format="packed" and call `.unpack()`.'
        )

"""The weights format: metadata, digests, and strict checks of what is read.

A missing key, a packed tensor stored as floats, a code that is not ternary, an index that names an absent tensor, a
flipped bit: each is one `ValueError` that names the file and the tensor. A file that cannot be read is an `OSError`.

Weights are written with this safetensors metadata, and checked against it where it is present:

    format          "pt"
    terdit.version  "1"
    terdit.packing  "row-chunk-2bit", when the file belongs to a packed model (the bytes: ops/reference.py)
    terdit.sha256   digest of the file's tensors, see `digest`
    terdit.config   config of the model, or settings of the adapter, as canonical JSON
    terdit.model    digest of the whole model's tensors: in shards, so that those of two models do not mix, and where
                    diffusers writes the files, with the same metadata in all of them
"""

import hashlib
import json
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..ops import reference
from .saving import new_file, write_json


logger = logging.get_logger(__name__)


PACKING = "row-chunk-2bit"
VERSION = "1"
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
    torch.uint32: "U32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FLOAT_NAMES = {name for dtype, name in DTYPE_NAMES.items() if dtype.is_floating_point}
TOGETHER = "Download or save config.json and weights again, together."


def digest(tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes | bytearray | memoryview]]]) -> str:
    """Return the sha256 of tensors in the order of their names: name, dtype, shape and bytes.

    Args:
        tensors: (name, safetensors dtype name, shape, chunks of little-endian bytes), sorted by name.
    """
    sha = hashlib.sha256()
    for name, dtype, shape, chunks in tensors:
        sha.update(json.dumps([name, dtype, list(shape)]).encode())
        for chunk in chunks:
            sha.update(chunk)
    return sha.hexdigest()


def state_dict_digest(state_dict: Mapping[str, torch.Tensor]) -> str:
    """Return the `digest` of the tensors of a state dict."""

    def entry(name: str):
        tensor = state_dict[name].detach().cpu().contiguous()
        data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        return name, DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), [data.data]

    return digest(entry(name) for name in sorted(state_dict))


def canonical_json(config: Mapping[str, Any]) -> str:
    """Return a config as JSON text that depends on its values alone; private keys, such as a path, are left out."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)


def differing_keys(saved: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys that a config has with another value than `saved`, which may lack those of later releases."""
    return sorted(key for key, value in saved.items() if not key.startswith("_") and other.get(key) != value)


def require_safetensors(safe_serialization: bool, use_flashpack: bool = False) -> None:
    """Raise a `ValueError` if a save asks for another format."""
    if not safe_serialization or use_flashpack:
        asked = "use_flashpack=True" if use_flashpack else f"safe_serialization={safe_serialization}"
        raise ValueError(f"Ternary weights are saved as safetensors only, got {asked}. Leave it out.")


def refuse_pickles(folder: Path) -> None:
    """Raise an `OSError` if the only weights in a folder are pickles, which are not read."""
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder} has its weights in a pickle, {pickles[0]}; ternary weights are read from safetensors only. Save"
            " the model again, or take a copy with a .safetensors file."
        )


def with_variant(name: str, variant: str | None) -> str:
    """Put a variant before the last suffix of a file's name, as diffusers does: "a.fp16.b" for "a.b"."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: dict[str, str],
    max_shard_size: int,
    variant: str | None = None,
) -> None:
    """Write tensors into one safetensors file, or into shards with an index; every file with its digest.

    Args:
        folder (`Path`): Exists.
        tensors (`Iterable[tuple[str, torch.Tensor]]`): Names and tensors. Taken one at a time; those of one shard are
            held until it is written.
        metadata (`dict[str, str]`): Of every file and of the index.
        max_shard_size (`int`): Bytes of tensors per file; a larger tensor has a separate file.
        variant (`str`, *optional*): Written into the files' names.

    Raises:
        OSError: The disk is full or not writable.
    """
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_size):
        with new_file(folder / f"shard-{len(shards)}") as path:
            save_file(shard, path, {**metadata, "terdit.sha256": state_dict_digest(shard)})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    stem, suffix = with_variant(SAFETENSORS_WEIGHTS_NAME, variant).rsplit(".", 1)
    parts = [f"-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))] if len(shards) > 1 else [""]
    files = [f"{stem}{part}.{suffix}" for part in parts]
    for i, file in enumerate(files):
        (folder / f"shard-{i}").rename(folder / file)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
        write_json(folder / with_variant(SAFE_WEIGHTS_INDEX_NAME, variant), index)


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield state dicts of at most `limit` bytes, split as huggingface_hub does; the next one empties the last."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        contiguous = tensor.detach().contiguous()
        if tensor.nbytes > limit:
            yield {name: contiguous}
            continue
        if size + tensor.nbytes > limit:
            yield shard
            shard.clear()
            size = 0
        shard[name] = contiguous
        size += tensor.nbytes
    if shard:
        yield shard


def refuse_special(path: str | os.PathLike) -> None:
    """Raise an `OSError` at a folder, a pipe or a device, which may be read for ever."""
    if Path(path).exists() and not Path(path).is_file():
        raise OSError("it is no regular file")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ValueError: The file holds anything else.
        OSError: The file cannot be read.
    """
    try:
        refuse_special(path)
        found = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}. Download or save it again.") from error
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}. Download or save it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected an object. Download or save it again.")
    return found


def is_plain_name(name: str) -> bool:
    """Return whether this names a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def read_index(path: str | os.PathLike, present: bool = True) -> list[Path]:
    """Return the weights files that an index names, all of them in its folder.

    Args:
        path (`str` or `os.PathLike`): The index.
        present (`bool`): Whether the files must be there already.

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
        if not is_plain_name(name):
            raise ValueError(f"{path} names {name!r}; a shard is a plain file name, in the folder of the index.")
        if present and not (Path(path).parent / name).is_file():
            raise OSError(f"{path} names {name}, which is not there. Download or save the model again.")
    return [Path(path).parent / name for name in names]


class WeightsFile:
    """Header of a weights file, and its bytes in chunks, so that no tensor stays in memory.

    Attributes:
        path (`Path`): The file.
        metadata (`dict[str, str]`): Its metadata.
        tensors (`dict[str, tuple[str, tuple[int, ...]]]`): Dtype, as in `DTYPE_NAMES`, and shape by name.
        offsets (`dict[str, tuple[int, int]]`): Where the bytes of a tensor begin and end in the file.
    """

    # The header is parsed twice: `safe_open` validates it but gives no offsets, and it maps the whole file to read a
    # tensor. Checking a packed model of 285 MB that way takes 285 MB of memory; in chunks it takes 5 MB.

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            refuse_special(path)
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
        self.tensors = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        start = 8 + length
        offsets = {name: entry["data_offsets"] for name, entry in header.items()}
        self.offsets = {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}

    def chunks(self, name: str, size: int = 1 << 20) -> Iterator[bytearray]:
        """Yield the bytes of a tensor, at most `size` at a time."""
        begin, end = self.offsets[name]
        with open(self.path, "rb") as file:
            file.seek(begin)
            for position in range(begin, end, size):
                yield bytearray(file.read(min(size, end - position)))

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor; its bytes are read into memory, not mapped. Raise a `ValueError` at a dtype not known."""
        dtype, shape = self.tensors[name]
        if dtype not in _DTYPES:
            raise ValueError(f"{self.path}: tensor `{name}` is {dtype}, which is not read. Save it as float16.")
        tensor = torch.empty(shape, dtype=_DTYPES[dtype])
        if tensor.numel():
            with open(self.path, "rb") as file:
                file.seek(self.offsets[name][0])
                file.readinto(tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def _checked_chunks(self, name: str) -> Iterator[bytearray]:
        """Yield the chunks of a tensor; raise a `ValueError` at code 3, NaN and infinity."""
        packed = name.split(".")[-1] == PACKED_SUFFIX
        dtype = torch.uint8 if packed else _DTYPES.get(self.tensors[name][0], torch.uint8)
        for chunk in self.chunks(name):
            values = torch.frombuffer(chunk, dtype=dtype)
            if packed and reference.has_invalid_code(values):
                raise ValueError(
                    f"{self.path}: tensor `{name}` holds code 3, which is not a ternary value. Download or save it"
                    " again."
                )
            if not is_finite(values):
                _refuse_not_finite(self.path, name)
            yield chunk


def check_files(files: Sequence[WeightsFile]) -> bool:
    """Raise a `ValueError` if the files of a model hold code 3, NaN or infinity, or do not match their digests.

    Returns:
        `bool`: Whether there are digests of all tensors.
    """
    models = {file.metadata.get("terdit.model") for file in files}
    if len(models - {None}) > 1:
        raise ValueError(
            f"{files[0].path.parent} holds shards of several models. Download all of them again, or save the model"
            " again."
        )
    parts = [([file], file.metadata.get("terdit.sha256")) for file in files]
    if None in {expected for _, expected in parts}:  # diffusers gives all files of a model the same metadata
        parts = [(list(files), models.pop())] if None not in models else parts
    for part, expected in parts:
        holder = {name: file for file in part for name in file.tensors}
        found = digest((n, *holder[n].tensors[n], holder[n]._checked_chunks(n)) for n in sorted(holder))
        _compare_digest(part[0].path, expected, found)
    return all(expected for _, expected in parts)


def _refuse_not_finite(path: str | os.PathLike, name: str) -> None:
    raise ValueError(
        f"{path}: tensor `{name}` holds NaN or infinity. The file is damaged, or its training had diverged: download"
        " it again, or take an earlier one."
    )


def _compare_digest(path: str | os.PathLike, expected: str | None, found: str) -> None:
    """Raise a `ValueError` if tensors have another digest than the metadata of their file say."""
    if expected is None:
        logger.info(f"{path} carries no digest, so its contents were not checked for damage.")
    elif found != expected:
        raise ValueError(
            f"{path}: the tensors do not match the digest in the file (sha256 {found[:12]}..., expected"
            f" {expected[:12]}...). The file is damaged or was changed; download or save it again."
        )


def check_contents(
    path: str | os.PathLike, state_dict: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Raise a `ValueError` if tensors that diffusers has read hold NaN or infinity, or do not match their digest."""
    for name, tensor in state_dict.items():
        if not is_finite(tensor):
            _refuse_not_finite(path, name)
    _compare_digest(path, metadata.get("terdit.sha256"), state_dict_digest(state_dict))


def load_pickle(path: str | os.PathLike, *allowed: type) -> Any:
    """Read a PyTorch file of tensors and plain values, memory-mapped where it can be, without running code from it.

    Args:
        path (`str` or `os.PathLike`): A `.pth` file.
        allowed: Classes that it may build besides.

    Raises:
        ValueError: The file wants to build anything else; nothing of it was run.
        OSError: The file is missing or damaged.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's protocol
            sizes = _check_archive(path)
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            if (
                sizes is not None
                and isinstance(loaded, dict)  # weights; what else may be in their place, callers refuse
                and all(isinstance(t, torch.Tensor) and t.layout is torch.strided for t in loaded.values())
                and not any(t.is_nested for t in loaded.values())
            ):
                storages = [tensor.untyped_storage() for tensor in loaded.values() if tensor.is_cpu]
                lengths = {storage.data_ptr(): storage.nbytes() for storage in storages}
                found = [lengths[place] for place in sorted(lengths) if lengths[place]]
                if found != sizes:  # a tensor would go on into the next record
                    raise OSError("its records are not as long as its tensors")
            return loaded
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))  # the rest of torch's message says how to run it after all
        raise ValueError(
            f"{path} holds more than tensors and plain values{f', such as {name[1]}' if name else ''}, so it was not"
            " read and nothing in it was run. Weights need no such thing; do not trust this file."
        ) from None
    except FileNotFoundError:
        raise
    except (  # what an unpickler comes upon in damaged bytes: names, indices, opcodes and sizes that cannot be
        ArithmeticError, AssertionError, AttributeError, BadZipFile, EOFError, LookupError, MemoryError, NameError,
        OSError, RuntimeError, TypeError, ValueError, struct.error,
    ) as error:  # fmt: skip
        raise OSError(
            f"{path} is not a readable PyTorch file: truncated or damaged? ({error}) Download it again."
        ) from error


def _check_archive(path: str | os.PathLike) -> list[int] | None:
    """Return the lengths of the tensors' records in a PyTorch file but empty ones, in its order; `None` for no zip.

    Raises an `OSError` unless every record has its checksum, which torch does not look at, and a place and a name that
    no other has. Compressed records would let a small file fill the memory, and of a record that is marked as a folder
    torch reads nothing, or its bytes, depending on whether the file is mapped. torch writes neither.
    """
    if not is_zipfile(path):
        return None
    with ZipFile(path) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        if any(record.compress_type != ZIP_STORED or record.external_attr & 0x10 for record in records):
            raise OSError("a record is compressed, or marked as a folder")
        overlap = any(one.header_offset + one.file_size >= next.header_offset for one, next in pairwise(records))
        if overlap or len(set(archive.namelist())) < len(records):  # each would be read, again and again
            raise OSError("two records have one place or one name")
        if damaged := archive.testzip():
            raise OSError(f"the record {damaged} does not have its checksum")
    tensors = [record for record in records if record.filename.split("/")[-2:-1] == ["data"]]
    return [record.file_size for record in tensors if record.file_size]


def check_tensors(path: str | os.PathLike, state_dict: Any) -> None:
    """Raise a `ValueError` unless a pickle held a dict of dense tensors on the CPU, each with memory for its shape."""
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


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity. Takes memory for a million numbers at a time."""
    if not tensor.is_floating_point():
        return True
    blocks = tensor.reshape(-1).split(2**20)
    return all(bool((block.float() if block.element_size() == 1 else block).isfinite().all()) for block in blocks)


def check_weights(
    model: ModelMixin,
    paths: Iterable[str | os.PathLike],
    ignore_mismatched_sizes: bool = False,
    packed: bool | None = None,
    ignore_unexpected: bool = False,
) -> None:
    """Raise unless `paths` hold exactly the tensors of `model`, in its format, undamaged.

    Args:
        model ([`ModelMixin`]): May be on the meta device.
        paths: The weights file, or all shards of it.
        ignore_mismatched_sizes (`bool`): Leave shapes to the host.
        packed (`bool`, *optional*): Whether the model is packed; default as its config says.
        ignore_unexpected (`bool`): Leave tensors that the model does not have to the host.

    Raises:
        ValueError: A tensor is missing, unexpected, stored twice, of the wrong shape or dtype, or holds a code that is
            not ternary; the metadata contradicts the config; or the digest does not match.
        OSError: A file cannot be read.
    """
    packed_model = model.config.get("weight_format") == "packed" if packed is None else packed
    expected = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    files = [WeightsFile(path) for path in paths]
    seen: dict[str, Path] = {}
    for file in files:
        check_metadata(file.path, file.metadata, packed_model)
        for name, (dtype, shape) in file.tensors.items():
            if name in seen:
                raise ValueError(f"Tensor `{name}` is in both {seen[name]} and {file.path}. Save the model again.")
            seen[name] = file.path
            if name not in expected:
                _raise_format_mismatch(file.path, name, packed_model)
                if ignore_unexpected:
                    continue
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
    check_files(files)
    _compare_config(files[0], model)


def _compare_config(file: WeightsFile, model: ModelMixin) -> None:
    """Warn if a model is built with another config than its weights were saved with."""
    text = file.metadata.get("terdit.config")
    if text is None:
        return
    try:
        saved = json.loads(text)
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise ValueError(f"{file.path}: `terdit.config` is {text!r:.80}, expected a JSON object. Download it again.")
    built = json.loads(canonical_json(model.config))
    if keys := differing_keys(saved, built):
        shown = ", ".join(f"{key}={saved[key]!r:.80}, not {built.get(key)!r:.80}" for key in keys[:5])
        logger.warning(f"{file.path} was saved with {shown}. config.json may be of another model, or was changed.")


def check_tensors_of(
    path: str | os.PathLike,
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    advice: str,
    some: bool = False,
) -> WeightsFile:
    """Check one file of tensors that is no model: adapter, training checkpoint, cached latents, parts of results.

    Args:
        path (`str` or `os.PathLike`): The file.
        expected (`dict[str, tuple[torch.dtype, tuple[int, ...]]]`): Dtypes and shapes by name.
        advice (`str`): What to do about a file that holds something else.
        some (`bool`): Whether the file may lack some of them.

    Returns:
        [`WeightsFile`]: The file, found to hold these tensors, finite, and to match its digest where it has one.

    Raises:
        ValueError: It holds something else.
        OSError: It cannot be read.
    """
    file = WeightsFile(path)
    missing = [] if some else sorted(set(expected) - set(file.tensors))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensor(s), such as `{missing[0]}`. {advice}")
    for name, (dtype, shape) in file.tensors.items():
        if name not in expected:
            raise ValueError(f"{path} holds an unexpected tensor, `{name}`. {advice}")
        if (dtype, shape) != (DTYPE_NAMES[expected[name][0]], expected[name][1]):
            raise ValueError(
                f"{path}: `{name}` is {dtype} {list(shape)}, expected {DTYPE_NAMES[expected[name][0]]}"
                f" {list(expected[name][1])}. {advice}"
            )
    check_files([file])
    return file


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
    check_files([file])


def _raise_format_mismatch(path: Path, name: str, packed_model: bool) -> None:
    if name.split(".")[-1] == PACKED_SUFFIX and not packed_model:
        raise ValueError(
            f'{path}: tensor `{name}` is packed, but the config says weight_format="float". Load it as'
            ' weight_format="packed" and call `.unpack()`.'
        )

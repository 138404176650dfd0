"""Load hostile and damaged files in masses: `python examples/reliability/files.py --inputs 100000`.

Case i of a seed is one model folder with one fault, made from `random.Random(f"{seed}:{i}")` alone. A worker process
with an address-space limit loads it; the supervisor restarts a worker that dies or takes too long. A case passes when

    it loads, finite, and every bit is what this program's own reader finds in the files; where a file carries a
    digest, the digest of what was loaded matches it; or
    it raises ValueError or OSError with the name of a file or folder in the message;

and no payload ran, which would have made the canary file. `page.py` writes the figures: docs/results/reliability.md.
"""

import argparse
import hashlib
import io
import json
import os
import pickle
import platform
import random
import resource
import shutil
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import diffusers
import safetensors
import torch
import transformers
from diffusers import DiTTransformer2DModel

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear, convert_original_checkpoint
from diffusers_terdit.conversion import convert_ternary_checkpoint
from diffusers_terdit.conversion.terdit import ARGS_NAME, convert_name
from diffusers_terdit.storage.inspection import inspect_weights
from diffusers_terdit.storage.weights import DTYPE_NAMES
from harness import PTH, make_bases, memory, parse, supervise, versions, write_report


WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MEMORY = 1 << 30  # bytes of address space that loading a model of some kilobytes may take
# A class of diffusers: where its config has lost the sizes, diffusers builds its default model, 1.4 GiB and unfilled.
MEMORY_OF_OTHERS = 2 << 30

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip

Entry = tuple[str, list[int], bytes]  # dtype, shape and bytes of a tensor
Tensors = dict[str, Entry]
Files = dict[str, "bytes | Link"]


class Link:
    """A symbolic link (to `target`, relative to the file), a folder or a named pipe instead of a file."""

    def __init__(self, kind: str, target: str = ""):
        self.kind, self.target = kind, target


# The safetensors format, read and written without the library


def build(header: dict, body: bytes, dump: Callable[[dict], str] = json.dumps) -> bytes:
    text = dump(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def tensors_of(data: bytes) -> tuple[Tensors, dict[str, str]]:
    header, body = parse(data)
    metadata = header.pop("__metadata__", None) or {}
    return {n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items()}, metadata


def write(tensors: Tensors, metadata: dict[str, str]) -> bytes:
    header: dict = {"__metadata__": metadata} if metadata else {}
    position, body = 0, b""
    for name, (dtype, shape, data) in sorted(tensors.items(), key=lambda item: -DTYPES[item[1][0]]):
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position, body = position + len(data), body + data
    return build(header, body)


def digest(tensors: Tensors) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, data = tensors[name]
        sha.update(json.dumps([name, dtype, list(shape)]).encode() + data)
    return sha.hexdigest()


def data_start(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def to_entry(tensor: torch.Tensor) -> Entry:
    tensor = tensor.detach().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return DTYPE_NAMES[tensor.dtype], list(tensor.shape), data


def to_tensor(dtype: str, shape: list[int], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(TORCH_DTYPES[dtype]).reshape(shape)


def dump_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_pickle(data: bytes) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(io.BytesIO(data), weights_only=True)


def edit_tensors(rng: random.Random, files: Files, edit: Callable[[Tensors], None]) -> None:
    """Change the tensors of one weights file; its digest is kept, updated, or taken out."""
    path = rng.choice(weights_in(files))
    if path.endswith(".safetensors"):
        tensors, metadata = tensors_of(files[path])
        edit(tensors)
        choice = rng.randrange(3)
        if choice == 0 and "terdit.sha256" in metadata:
            metadata["terdit.sha256"] = digest(tensors)
        elif choice == 1:
            metadata.pop("terdit.sha256", None)
        files[path] = write(tensors, metadata)
    else:
        tensors = {name: to_entry(tensor) for name, tensor in load_pickle(files[path]).items()}
        edit(tensors)
        files[path] = dump_pickle({n: to_tensor(*entry) for n, entry in tensors.items() if entry[0] in TORCH_DTYPES})


def on_tensors(edit: Callable[[random.Random, Tensors], None]):
    """Make a fault of a function that changes the tensors of one file."""
    return wraps(edit)(lambda rng, files, root: edit_tensors(rng, files, lambda tensors: edit(rng, tensors)))


def weights_in(files: Files) -> list[str]:
    names = [n for n in files if n.endswith((".safetensors", PTH))]
    return [n for n in names if "vae" not in n and isinstance(files[n], bytes)]


# The faults. Each changes `files` in place. The page shows the first lines of their docstrings.


def flip_header(rng, files, root):
    """1 to 4 flipped bits in the length or the JSON of a safetensors header, or in the directory of a zip."""
    path = rng.choice(weights_in(files))
    data = bytearray(files[path])
    if path.endswith(".safetensors"):
        span = (0, 8) if rng.random() < 0.2 else (8, data_start(data))
    else:
        span = (0, 400) if rng.random() < 0.5 else (max(0, len(data) - 3000), len(data))
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data[rng.randrange(*span)] ^= 1 << rng.randrange(8)
    files[path] = bytes(data)


def flip_data(rng, files, root):
    """1 to 8 flipped bits in the bytes of the tensors."""
    path = rng.choice(weights_in(files))
    data = bytearray(files[path])
    start = data_start(data) if path.endswith(".safetensors") else 64
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
    files[path] = bytes(data)


def truncate(rng, files, root):
    """A file of any kind cut at a boundary of its format, one byte off it, or anywhere; or made longer."""
    path = rng.choice(sorted(n for n in files if isinstance(files[n], bytes)))
    data = files[path]
    cuts = [0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data) + 1)]
    if path.endswith(".safetensors"):
        header, _ = parse(data)
        start = data_start(data)
        ends = [start + e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"]
        cuts += [start, start - 1, start + 1, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends)]
    elif path.endswith(".pth"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            cuts += [info.header_offset + rng.choice([-1, 0, 1]) for info in archive.infolist()]
    cut = max(0, rng.choice(cuts))
    grow = rng.random() < 0.1
    files[path] = data + rng.randbytes(rng.choice([1, 8, 4096])) if grow else data[:cut]


@on_tensors
def wrong_dtype(rng, tensors):
    """A tensor under another dtype: of the same width, or converted in number of bytes."""
    name = rng.choice(sorted(tensors))
    dtype, shape, data = tensors[name]
    other = rng.choice([d for d in DTYPES if d != dtype])
    size = len(data) // DTYPES[dtype] * DTYPES[other]
    tensors[name] = (other, shape, (data * 8)[:size])


@on_tensors
def wrong_shape(rng, tensors):
    """A tensor transposed, flattened, cut, extended, with an extra or missing dimension, or empty."""
    name = rng.choice(sorted(tensors))
    dtype, shape, data = tensors[name]
    width, count = DTYPES[dtype], len(data) // DTYPES[dtype]
    row = width * (count // shape[0]) if shape else width
    way = rng.randrange(6)
    if way == 0:
        shape = shape[::-1] if len(shape) > 1 else [1, *shape]
    elif way == 1:
        shape = [count] if len(shape) > 1 else [count, 1]
    elif way == 2:
        shape = [*shape, 1]
    elif way == 3:
        shape, data = [shape[0] - 1, *shape[1:]] if shape else [0], data[: len(data) - row]
    elif way == 4:
        shape, data = [shape[0] + 1, *shape[1:]] if shape else [2], data + data[:row]
    else:
        shape, data = rng.choice([([0], b""), ([0, *shape], b""), ([], data[:width])])
    tensors[name] = (dtype, shape, data)


@on_tensors
def swap(rng, tensors):
    """Two tensors in each other's place, or one under a name that does not exist."""
    names = sorted(tensors)
    a = rng.choice(names)
    same = [n for n in names if n != a and tensors[n][:2] == tensors[a][:2]]
    if same and rng.random() < 0.7:
        b = rng.choice(same)
    elif rng.random() < 0.5 and len(names) > 1:
        b = rng.choice([n for n in names if n != a])
    else:
        tensors[a + rng.choice(["s", ".weight", "\u202e", " ", "\x00"])] = tensors.pop(a)
        return
    tensors[a], tensors[b] = tensors[b], tensors[a]


def duplicate(rng, files, root):
    """A tensor twice: in two files, twice in one header, under two names, or with bytes shared by two."""
    paths = [p for p in weights_in(files) if p.endswith(".safetensors")]
    path = rng.choice(paths)
    way = rng.randrange(4)
    if way == 0 and len(paths) > 1:
        other = rng.choice([p for p in paths if p != path])
        source, _ = tensors_of(files[path])
        taken = rng.choice(sorted(source))
        tensors, metadata = tensors_of(files[other])
        tensors[taken] = source[taken]
        if "terdit.sha256" in metadata:
            metadata["terdit.sha256"] = digest(tensors)
        files[other] = write(tensors, metadata)
        return
    header, body = parse(files[path])
    names = sorted(n for n in header if n != "__metadata__")
    a = rng.choice(names)
    if way <= 1:  # the JSON says a key twice, with other bytes the second time
        second = header[rng.choice(names)] if rng.random() < 0.5 else header[a]
        text = json.dumps(header)[:-1] + f", {json.dumps(a)}: {json.dumps(second)}}}"
        files[path] = build({}, body, lambda _: text)
    elif way == 2:
        header[f"{a}{rng.choice(['_copy', '.weight', '2'])}"] = header[a]
        files[path] = build(header, body)
    else:
        b = rng.choice(names)
        header[b] = {**header[b], "data_offsets": header[a]["data_offsets"]}
        files[path] = build(header, body)


def remove(rng, files, root):
    """Missing or extra tensors or whole files."""

    def edit(tensors):
        if rng.random() < 0.7:
            for name in rng.sample(sorted(tensors), rng.choice([1, 1, 2, len(tensors)]) if len(tensors) > 1 else 1):
                del tensors[name]
        else:
            name = rng.choice(["extra", "transformer_blocks.7.norm1.weight", "", "a" * 10_000, "é.weight_packed"])
            tensors[name] = ("F32", [2], b"\0" * 8)

    if rng.random() < 0.2:
        del files[rng.choice(sorted(files))]
    else:
        edit_tensors(rng, files, edit)


@on_tensors
def code_three(rng, tensors):
    """The fourth code, which is no ternary value, in 1 to 3 places."""
    packed = sorted(n for n in tensors if tensors[n][0] == "U8")
    if not packed:
        return
    name = rng.choice(packed)
    dtype, shape, data = tensors[name]
    codes = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        codes[rng.randrange(len(codes))] |= 3 << 2 * rng.randrange(4)
    tensors[name] = (dtype, shape, bytes(codes))


NOT_FINITE = {
    "F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    "F16": [0x7C00, 0xFC00, 0x7E00, 0x7C01],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0x7F81],
}


@on_tensors
def not_finite(rng, tensors):
    """NaN or infinity in a scale, norm, bias or any other float tensor."""
    floats = sorted(n for n in tensors if tensors[n][0] in NOT_FINITE and tensors[n][2])
    chosen = [n for n in floats if "scale" in n or "norm" in n or "alphas" in n]
    name = rng.choice(chosen if chosen and rng.random() < 0.7 else floats)
    dtype, shape, data = tensors[name]
    width = DTYPES[dtype]
    place = rng.randrange(len(data) // width) * width
    value = rng.choice(NOT_FINITE[dtype]).to_bytes(width, "little")
    tensors[name] = (dtype, shape, data[:place] + value + data[place + width :])


HUGE = [2**31 - 1, 2**31, 2**40, 2**50, 2**62, 2**63, 2**64, 10**18, 10**30, 10**400]
ODD = [
    None, True, False, "", "a", "8", -1, 0, 1, 2, 3, 5, 7, 0.5, 1e308, [], [1, 2], {}, {"a": 1}, "../../etc/passwd",
    "\x00", "\ud800", float("nan"), float("inf"), -0.0, "é" * 1000, [[[[]]]], "os.system",
]  # fmt: skip


def broken_text(rng, data: bytes) -> bytes:
    """Make a text that is not JSON, or unusual JSON."""
    way = rng.randrange(8)
    if way == 0:
        return b"[" * rng.choice([500, 100_000])
    if way == 1:
        return b'{"a":' * rng.choice([500, 100_000]) + b"1" + b"}" * 100_000
    if way == 2:
        return rng.choice([b"null", b"[]", b"1", b'"x"', b"true", b"{}", b"", b"NaN", b"[1, 2]", b"\xff\xfe{}"])
    if way == 3:
        return b"\xef\xbb\xbf" + data
    if way == 4:
        place = rng.randrange(len(data))
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if way == 5:
        place = rng.randrange(len(data))
        return data[:place] + rng.randbytes(rng.randrange(1, 20)) + data[place:]
    if way == 6:
        return b'{"num_layers": 1' + b"0" * rng.choice([20, 400, 10_000]) + b"}"
    a, b = sorted(rng.randrange(len(data)) for _ in range(2))
    return data[:a] + data[b:]


def pick_config(rng, files):
    """Choose a config of this package, or one of diffusers' that has a quantization_config."""
    path = rng.choice(sorted(n for n in files if n.endswith("config.json") and "vae" not in n))
    return path, json.loads(files[path])


def change(rng, values: dict, key: str, choices: list) -> None:
    """Take a key out of a config, or give it another value."""
    if rng.random() < 0.2:
        values.pop(key, None)
    else:
        values[key] = rng.choice(choices)


def absurd_config(rng, files, root):
    """Sizes of petabytes, and millions of blocks."""
    if ARGS_NAME in files:
        return absurd_original(rng, files)
    path, config = pick_config(rng, files)
    sizes = sorted(k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)) or ["num_layers"]
    for key in rng.sample(sizes, min(len(sizes), rng.choice([1, 1, 1, 2, 3]))):
        config[key] = rng.choice([*HUGE, 10**4, 10**6, 10**9])
    files[path] = json.dumps(config).encode()


def odd_config(rng, files, root):
    """Values of other types, missing and unknown keys, and text that is not JSON."""
    if ARGS_NAME in files:
        return odd_original(rng, files)
    path, config = pick_config(rng, files)
    if rng.random() < 0.3:
        files[path] = broken_text(rng, files[path])
        return
    others = ["unknown", "_class_name", "quantization_config", "auto_map", "_name_or_path"]
    for _ in range(rng.choice([1, 1, 2])):
        change(rng, config, rng.choice([*sorted(config), *others]), ODD)
    files[path] = json.dumps(config).encode()


def odd_quantization(rng, files, root):
    """A `quantization_config` with other values."""
    path, config = pick_config(rng, files)
    inner = config["quantization_config"]
    key = rng.choice([*sorted(set(inner) - {"quant_method"}), "unknown"])  # diffusers reads the method's name
    words = ["tensor", "row", 4, 8, "float", "*", ["*"], ["nothing*"], "[", "bitsandbytes"]
    change(rng, inner, key, [*ODD, *HUGE, *words])
    files[path] = json.dumps(config).encode()


def absurd_original(rng, files: Files) -> None:
    """`absurd_config` for the authors' files."""
    values = vars(load_pickle(files[ARGS_NAME]))
    if rng.random() < 0.5:
        key = rng.choice(["image_size", "model"])
        huge = rng.choice(HUGE)
        values[key] = huge if key == "image_size" or huge > 10**100 else f"DiT_Llama_patch{huge}"
        files[ARGS_NAME] = dump_pickle(argparse.Namespace(**values))
        return
    state_dict = load_pickle(files[PTH])
    way = rng.randrange(3)
    name = rng.choice(sorted(state_dict))
    if way == 0:  # a block far away
        state_dict[f"layers.{rng.choice(HUGE[:9])}.attention.wq.alphas"] = torch.ones(1)
    elif way == 1:  # one number in memory, a petabyte by its shape
        shape = [rng.choice([2**20, 2**40, 2**50]), *state_dict[name].shape[1:]]
        state_dict[name] = torch.zeros((), dtype=rng.choice([torch.float16, torch.float32, torch.uint8])).expand(shape)
    else:
        state_dict[name] = torch.empty(rng.choice([2**20, 2**40, 2**50]), device="meta")
    files[PTH] = dump_pickle(state_dict)


def odd_original(rng, files: Files) -> None:
    """`odd_config` for the authors' files."""
    values = vars(load_pickle(files[ARGS_NAME]))
    if rng.random() < 0.6:
        if rng.random() < 0.2:
            files[ARGS_NAME] = dump_pickle(
                rng.choice([None, [], 1, "a", torch.ones(2), {}, {"image_size": [1]}, {1: 2}])
            )
            return
        for _ in range(rng.choice([1, 2])):
            key = rng.choice([*sorted(values), "rope_scaling_factor", "ntk_factor", "unknown"])
            values[key] = rng.choice([*[v for v in ODD if v != "\ud800"], torch.ones(3), "patch0", "patch3", 1, 1.0])
        files[ARGS_NAME] = dump_pickle(argparse.Namespace(**values))
        return
    state_dict = load_pickle(files[PTH])
    name = rng.choice(sorted(state_dict))
    value = state_dict[name]
    ways = [
        lambda: {name: rng.choice([None, 1, "a", [value], {"a": value}])},
        lambda: {rng.choice([1, None, (1, 2), "layers.x.attention.wq.weight", "layers"]): value},
        lambda: {name: value.to_sparse() if value.is_floating_point() else value.int()},
        lambda: {name: value.to(torch.complex64)},
        lambda: {name: torch.nn.Parameter(value, requires_grad=False)},
        lambda: {name: value.to(torch.bool)},
        lambda: {name: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.quint8)},
    ]
    state_dict.update(rng.choice(ways)())
    whole = rng.choice([state_dict] * 8 + [list(state_dict.values()), None, {"model": state_dict}, {}])
    files[PTH] = dump_pickle(whole)


def absurd_header(rng, files, root):
    """A safetensors header with impossible sizes, offsets and values."""
    path = rng.choice([p for p in weights_in(files) if p.endswith(".safetensors")])
    header, body = parse(files[path])
    name = rng.choice(sorted(n for n in header if n != "__metadata__"))
    entry = header[name]
    way = rng.randrange(8)
    if way == 0:
        files[path] = struct.pack("<Q", rng.choice([0, 1, 2**26, 2**31, 2**40, 2**63, 2**64 - 1])) + files[path][8:]
        return
    if way == 1:
        entry["shape"] = [rng.choice([*HUGE, -1, 0.5, None, "a"]) for _ in range(rng.choice([1, 2, 2, 50]))]
    elif way == 2:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            [[end, begin], [0, 2**62], [-8, end], [begin, end + 8], [begin + 1, end], [2**63, 2**63 + 1], [], [0], "a"]
        )
    elif way == 3:
        entry["dtype"] = rng.choice(["F4", "F128", "", None, 3, "C64", "F8_E8M0", "f32"])
    elif way == 4:
        header["__metadata__"] = rng.choice(
            [None, [], "a", {"format": 1}, {"a": {}}, {"format": "tf"}, {"x": "y" * 10**6}]
        )
    elif way == 5:
        key = rng.choice(["terdit.version", "terdit.packing", "terdit.sha256", "format"])
        value = rng.choice(["", "2", "float", "0" * 64, "../..", "\x00", "column-2bit", "é"])
        header.setdefault("__metadata__", {})[key] = value
    elif way == 6:
        entry[rng.choice(["extra", "device"])] = "x"
    else:
        entry.pop(rng.choice(sorted(entry)))
    files[path] = build(header, body)


def bad_index(rng, files, root):
    """An index with paths that lead outside, names that do not exist, other types, or text that is not JSON."""
    path = next(n for n in files if n.endswith(INDEX))
    if rng.random() < 0.2:
        files[path] = broken_text(rng, files[path])
        return
    index = json.loads(files[path])
    weight_map = index["weight_map"]
    names, shards = sorted(weight_map), sorted(set(weight_map.values()))
    name = rng.choice(names)
    outside = [
        f"../outside/{shards[0]}", f"{root}/outside/{shards[0]}", "../../../etc/passwd", "/etc/passwd", "/dev/zero",
        f"..\\outside\\{shards[0]}", f"./{shards[0]}", f"sub/../{shards[0]}", "..", ".", "", "~/x", "\x00",
        "/proc/self/mem",
        f"{shards[0]}/", f"{shards[0]}\x00", f"file://{root}/outside/{shards[0]}", "con", "a" * 5000,
    ]  # fmt: skip
    way = rng.randrange(7)
    if way <= 1:
        target = rng.choice(outside)
        for key in [name] if rng.random() < 0.5 else [k for k in names if weight_map[k] == shards[0]]:
            weight_map[key] = target
    elif way == 2:
        weight_map[name] = rng.choice([*ODD, 3, *shards])
    elif way == 3:
        weight_map.pop(name)
    elif way == 4:
        weight_map[rng.choice(["extra", "", name + "2"])] = rng.choice(shards)
    elif way == 5:
        key = rng.choice(["metadata", "weight_map"])
        if rng.random() < 0.5:
            index.pop(key)
        else:
            index[key] = rng.choice(ODD)
    else:
        index["metadata"] = {"total_size": rng.choice([*HUGE, "a", None, -1])}
    files[path] = json.dumps(index).encode()


CODE = "import pathlib\npathlib.Path({canary!r}).write_text('ran')\nfrom diffusers_terdit import *\n"
LIBRARIES = [
    "os", "subprocess", "builtins", "diffusers", "diffusers_terdit", "transformers", "evil", "..", "", "a/b", None, 3,
]  # fmt: skip
CLASSES = [
    "system", "Popen", "eval", "AutoencoderKL", "UNet2DModel", "DDPMScheduler", "TernaryLinear", "TerDiTPipeline",
    "TerDiTTransformer2DModel", "", None, 3, "__class__", "DiTTransformer2DModel",
]  # fmt: skip


def bad_model_index(rng, files, root):
    """A model_index.json with other classes, other libraries, its own code, or text that is not JSON."""
    path = "model_index.json"
    if rng.random() < 0.2:
        files[path] = broken_text(rng, files[path])
        return
    index = json.loads(files[path])
    key = rng.choice(sorted(index))
    way = rng.randrange(6)
    if way <= 1:
        part = rng.choice(["transformer", "scheduler", "vae"])
        index[part] = [rng.choice(LIBRARIES), rng.choice(CLASSES)]
    elif way == 2:
        index[key] = rng.choice(ODD)
    elif way == 3:
        index.pop(key)
    elif way == 4:  # code next to the weights, which nobody asked to run
        code = CODE.format(canary=str(root / "canary")).encode()
        module = rng.choice(["evil", "pipeline_terdit", "transformer_terdit"])
        for place in ("", "transformer/", "scheduler/"):
            files[f"{place}{module}.py"] = code
        if rng.random() < 0.7:
            index["_class_name"] = [module, "TerDiTPipeline"]
        if rng.random() < 0.7:
            index["transformer"] = [module, "TerDiTTransformer2DModel"]
        if rng.random() < 0.3:
            index["auto_map"] = {"AutoModel": f"{module}.TerDiTTransformer2DModel"}
    else:
        index[rng.choice(["id2label", "guidance_channels", "vae", "unknown"])] = rng.choice(
            [*ODD, *HUGE, {"0": 3}, {"x": "y"}, {"-1": "a"}, {"0": None}]
        )
    files[path] = json.dumps(index).encode()


def links(rng, files, root):
    """A file replaced by a symbolic link, a folder or a named pipe."""
    path = rng.choice(sorted(files))
    data = files[path]
    way = rng.randrange(9)
    if way <= 1 and isinstance(data, bytes):  # to the very bytes, as in the Hub's cache: loads
        files[f"{path}.blob"] = data
        files[path] = Link("link", f"{Path(path).name}.blob")
    elif way == 2:
        files[path] = Link("link", Path(path).name)  # itself
    elif way == 3:
        files[path] = Link("folder")
    elif way == 4:
        files[path] = Link("fifo")
    else:
        targets = ["/dev/zero", "/dev/full", "/dev/null", "/etc/passwd", "/proc/self/mem", "/nowhere", "..", "/"]
        files[path] = Link("link", rng.choice([*targets, "../" * path.count("/") + ".."]))


class Payload:
    """Runs a function where a careless unpickler rebuilds it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def payloads(root: Path) -> list[Payload]:
    """Values whose unpickling makes the canary file."""
    canary = str(root / "canary")
    code = f"open({canary!r}, 'w').write('ran')"
    return [
        Payload(os.system, f"touch {canary}"),
        Payload(eval, code),
        Payload(exec, code),
        Payload(open, canary, "w"),
        Payload(subprocess.check_call, ["touch", canary]),
        Payload(os.mkdir, canary),
        Payload(os.open, canary, os.O_CREAT | os.O_WRONLY),
        Payload(getattr(Path, "touch"), Path(canary)),  # noqa: B009 - as a payload names it
    ]


def pickled(rng, files, root):
    """A pickle that calls a function when it is read: as the file, inside it, or under the name of a safe format."""
    payload = rng.choice(payloads(root))
    ordinary = {"weight": torch.ones(2)}
    value = rng.choice(
        [payload, {"weight": payload}, {**ordinary, "x": [payload]}, argparse.Namespace(image_size=payload)]
    )
    way = rng.randrange(4)
    if way == 0:
        data = pickle.dumps(value, protocol=rng.choice([0, 1, 2, 3, 4, 5]))
    elif way == 1:
        buffer = io.BytesIO()
        torch.save(value, buffer, _use_new_zipfile_serialization=False)
        data = buffer.getvalue()
    else:
        data = dump_pickle(value)
    path = rng.choice(sorted(n for n in files if n.endswith((".safetensors", ".pth"))))
    if path.endswith(".safetensors") and rng.random() < 0.6:  # the pickle that diffusers would fall back to
        del files[path]
        path = path.replace("safetensors", "bin")
        for name in [n for n in files if n.endswith(INDEX)]:
            files[name.replace("safetensors", "bin")] = files.pop(name).replace(b".safetensors", b".bin")
    if path.endswith(".pth") and way == 3:  # the payload inside a healthy archive, next to the tensors' own bytes
        with zipfile.ZipFile(io.BytesIO(files[path])) as old:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as new:
                for info in old.infolist():
                    inner = pickle.dumps(value, protocol=2) if info.filename.endswith("data.pkl") else old.read(info)
                    new.writestr(info.filename, inner)
        data = buffer.getvalue()
    files[path] = data


def noise(rng, files, root):
    """Any file with bytes overwritten, cut out, moved or repeated, or with another file's content."""
    names = sorted(n for n in files if isinstance(files[n], bytes))
    path = rng.choice(names)
    data = files[path]
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + rng.choice([1, 8, 64, 10**6]))
    files[path] = rng.choice(
        [
            data[:a] + rng.randbytes(b - a) + data[b:],
            data[:a] + data[b:],
            data[b:] + data[:b],
            data[:a] + data[a:b] * rng.choice([2, 100 if b - a < 1000 else 2]) + data[b:],
            data[:a] + b"\0" * (b - a) + data[b:],
            rng.randbytes(rng.choice([0, 1, 8, 100, 10_000])),
            files[rng.choice(names)],
        ]
    )


OURS = ["layer", "model", "sharded", "pipeline"]
SAFETENSORS = [*OURS, "quantized", "dense"]
ALL = [*SAFETENSORS, "original"]
FAULTS = {
    "bit flips in headers": (flip_header, ALL),
    "bit flips in data": (flip_data, ALL),
    "truncated or lengthened": (truncate, ALL),
    "wrong dtype": (wrong_dtype, ALL),
    "wrong shape": (wrong_shape, ALL),
    "swapped or renamed tensors": (swap, ALL),
    "duplicate tensors": (duplicate, SAFETENSORS),
    "missing or extra tensors and files": (remove, ALL),
    "code 3": (code_three, ["layer", "model", "pipeline", "quantized", "original"]),
    "NaN and infinity": (not_finite, ALL),
    "absurd sizes in configs and arguments": (absurd_config, [*OURS, "dense", "original"]),
    "odd values in configs and arguments": (odd_config, [*OURS, "dense", "original"]),
    "quantization_config": (odd_quantization, ["quantized"]),
    "absurd safetensors headers": (absurd_header, SAFETENSORS),
    "index files and paths": (bad_index, ["sharded"]),
    "model_index.json and code": (bad_model_index, ["pipeline"]),
    "symbolic links, folders, pipes": (links, ALL),
    "pickles with payloads": (pickled, ALL),
    "noise": (noise, ALL),
}
GOOD = ("loaded", "ValueError", "OSError", "left to diffusers")
BAD = ("other", "unnamed", "different", "ran code", "memory", "crashed", "hung")


def fault_of(number: int) -> str:
    return list(FAULTS)[number % len(FAULTS)]


# One case


def make_case(seed: int, number: int, bases: dict[str, dict[str, bytes]], root: Path) -> tuple[str, bool, Files]:
    """Make the files of a case; return the kind of folder, whether to load in the plain memory mode, and the files."""
    rng = random.Random(f"{seed}:{number}")
    mutate, kinds = FAULTS[fault_of(number)]
    kind = "layer" if "layer" in kinds and rng.random() < 0.8 else rng.choice(kinds)  # the fastest to load
    files: Files = dict(bases[kind])
    mutate(rng, files, root)
    return kind, rng.random() < 0.25, files


def load(kind: str, folder: Path, plain: bool = False):
    """Load a folder as a user would; return the model, pipeline or folder."""
    memory = {"low_cpu_mem_usage": False} if plain else {}
    if kind == "layer":
        return TernaryLinear.from_pretrained(folder, **memory)
    if kind in ("model", "sharded"):
        return TerDiTTransformer2DModel.from_pretrained(folder, **memory)
    if kind == "pipeline":
        return TerDiTPipeline.from_pretrained(folder)
    if kind == "quantized":
        return DiTTransformer2DModel.from_pretrained(folder)
    if kind == "dense":
        return convert_ternary_checkpoint(folder, folder.parent / "converted")
    return convert_original_checkpoint(folder, num_attention_heads=2)


def as_values(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Tensors of bytes; floats become float32, which holds every value of the smaller types."""
    unknown = {entry[0] for entry in tensors.values()} - TORCH_DTYPES.keys()
    assert not unknown, f"a tensor of {unknown} loaded"
    found = {name: to_tensor(*entry) for name, entry in tensors.items()}
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def expected_tensors(kind: str, files: Files) -> Tensors:
    """Read every tensor of the weights files of a case."""

    def read(path: str) -> bytes:
        data = files[path]
        return read(str(Path(path).parent / data.target)) if isinstance(data, Link) else data

    if kind == "original":
        found = {name: to_entry(tensor) for name, tensor in load_pickle(read(PTH)).items()}
        return {convert_name(n) + ("_packed" if entry[0] == "U8" else ""): entry for n, entry in found.items()}
    prefix = "transformer/" if kind == "pipeline" else ""
    indexed = prefix + INDEX in files
    names = sorted(set(json.loads(read(prefix + INDEX))["weight_map"].values())) if indexed else [WEIGHTS]
    found = {}
    for name in names:
        tensors, metadata = tensors_of(read(prefix + name))
        if "terdit.sha256" in metadata and metadata["terdit.sha256"] != digest(tensors):
            raise AssertionError(f"{prefix + name} does not match its digest, and loaded")
        found |= tensors
    return found


def judge(kind: str, files: Files, loaded) -> str:
    """Raise an `AssertionError` unless what was loaded is what the files say."""
    expected = as_values(expected_tensors(kind, files))
    if kind == "dense":  # the folder that was written, its codes times its scales
        assert not (loaded / INDEX).exists(), "a tiny model was sharded"
        found = as_values(tensors_of((loaded / WEIGHTS).read_bytes())[0])
        for name in [n for n in found if n.endswith(".weight_packed")]:
            packed, layer = found.pop(name), name.removesuffix(".weight_packed")
            codes = torch.cat([(packed >> shift) & 3 for shift in (6, 4, 2, 0)]).float() - 1
            found[f"{layer}.weight"] = codes * found.pop(f"{layer}.weight_scale")
    else:
        model = loaded.transformer if kind in ("pipeline", "original") else loaded
        found = {n: t.float() if t.is_floating_point() else t for n, t in model.state_dict().items()}
    if kind == "quantized" and getattr(loaded, "hf_quantizer", None) is None:
        # The config no longer says that the model is ternary, so diffusers loads it alone: it warns of what is missing
        # and leaves it on the meta device, where nothing can be computed.
        missing = found.keys() - expected.keys()
        assert missing, "the config says nothing of ternary layers, and the files are complete"
        assert all(found[name].is_meta for name in missing)
        assert all(torch.equal(found[name], expected[name]) for name in found.keys() & expected.keys())
        return "left to diffusers"
    if kind == "quantized":  # diffusers warns of tensors that the model does not have, and leaves them
        expected = {name: tensor for name, tensor in expected.items() if name in found}
    assert found.keys() == expected.keys(), f"tensors differ: {sorted(found.keys() ^ expected.keys())[:3]}"
    for name, tensor in found.items():
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
        assert tensor.shape == expected[name].shape, f"{name} has another shape than its file"
        assert torch.equal(tensor, expected[name]), f"{name} is not what its file says"
        if tensor.is_floating_point():
            assert tensor.isfinite().all(), f"{name} holds NaN or infinity"
        elif name.endswith("weight_packed"):
            assert not (tensor & tensor >> 1 & 0b01010101).any(), f"{name} holds code 3"
    return "loaded"


def place(folder: Path, files: Files, present: dict) -> None:
    """Make the folder hold exactly `files`; `present` says what it holds."""
    for name in [n for n in present if present[n] is not files.get(n)]:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        del present[name]
    for name in files.keys() - present.keys():
        path, data = folder / name, files[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(data, bytes):
            path.write_bytes(data)
        elif data.kind == "link":
            path.symlink_to(data.target)
        elif data.kind == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
        present[name] = data


def run_case(seed: int, number: int, bases, root: Path, present: dict[str, dict]) -> dict:
    """Load one case; return its outcome, time and memory."""
    random.seed(0)
    kind, plain, files = make_case(seed, number, bases, root)
    folder = root / kind
    place(folder, files, present[kind])
    shutil.rmtree(root / "converted", ignore_errors=True)
    result = {"number": number, "fault": fault_of(number), "kind": kind, "detail": ""}
    limit, most = resource.getrlimit(resource.RLIMIT_AS)
    if kind == "quantized":
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    start, before = time.perf_counter(), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    names = {str(folder), "`quantization_config` in config.json"} | {Path(n).name for n in [*files, *bases[kind]]}

    def attempt(work: Callable[[], str]) -> str:
        """Outcome of work that may end in an error which names a file; the first failure is kept in the result."""
        try:
            return work()
        except (ValueError, OSError) as error:
            # classes of diffusers say it in diffusers' words
            theirs = kind == "quantized" and "/diffusers/" in traceback.extract_tb(error.__traceback__)[-1].filename
            named = theirs or any(name in str(error) for name in names)
            outcome = ("ValueError" if isinstance(error, ValueError) else "OSError") if named else "unnamed"
            detail = str(error)
        except MemoryError as error:
            outcome, detail = "memory", repr(error)
        except AssertionError as error:
            outcome, detail = "different", str(error)
        except Exception as error:
            outcome, detail = "other", f"{type(error).__name__}: {error}"
        result.update(detail=detail[:300], trace=traceback.format_exc()[-3000:] if outcome in BAD else "")
        return outcome

    outcome = attempt(lambda: judge(kind, files, load(kind, folder, plain)))
    if kind in ("layer", "model", "sharded") and outcome in GOOD:
        inspected = attempt(lambda: inspect_weights(folder) and "")
        outcome = inspected if inspected in BAD else outcome
    if (root / "canary").exists():
        outcome = "ran code"
    result |= {"outcome": outcome, "seconds": time.perf_counter() - start, "bytes": max(0, memory("VmHWM") - before)}
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))
    return result


# Worker and supervisor


def worker(seed: int, folder: Path) -> None:
    """Read case numbers from standard input, write a line with each result."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for library in (diffusers.utils.logging, transformers.logging):
        library.set_verbosity(60)
        library.disable_progress_bar()
    bases = {
        kind.name: {str(p.relative_to(kind)): p.read_bytes() for p in sorted(kind.rglob("*")) if p.is_file()}
        for kind in sorted((folder / "bases").iterdir())
    }
    root = folder / "run"
    shutil.rmtree(root, ignore_errors=True)
    place(root / "outside", bases["sharded"], {})
    present: dict[str, dict] = {kind: {} for kind in bases}
    for kind, files in bases.items():
        place(root / kind, files, present[kind])
        assert judge(kind, files, load(kind, root / kind)) == "loaded"
    start = memory("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (start + MEMORY, start + MEMORY_OF_OTHERS))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(run_case(seed, int(line), bases, root, present)), file=out, flush=True)
        (root / "canary").is_dir() and (root / "canary").rmdir()
        (root / "canary").unlink(missing_ok=True)


def run(inputs: int, seed: int, progress: Path | None = None) -> dict:
    """Try cases 0 to `inputs` and count their outcomes, see `supervise`."""
    return supervise(__file__, [], inputs, seed, lambda folder: make_bases(folder / "bases"), fault_of, BAD, progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/results"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.seed, args.worker)
        return
    args.output_dir.mkdir(parents=True, exist_ok=True)
    progress = args.output_dir / "reliability_files.progress.json"
    report = run(args.inputs, args.seed, progress)
    report["machine"] = f"{platform.machine()} CPU"
    report["versions"] = versions(torch, diffusers, safetensors)
    write_report(args.output_dir / "reliability_files.json", report)
    for failure in report["failures"][:20]:
        print(failure["number"], failure["fault"], failure["kind"], failure["outcome"], failure["detail"])
    if report["failures"]:
        sys.exit(1)
    progress.unlink()


if __name__ == "__main__":
    main()

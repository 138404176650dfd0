"""What weights files hold, read from the files: no model is built, and one tensor at a time is in memory."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from ..ops import reference
from .saving import weights_name
from .weights import (
    PACKED_SUFFIX,
    SCALE_SUFFIX,
    WeightsFile,
    check_files,
    check_metadata,
    read_index,
    read_json,
    with_variant,
)


HEADERS = "file headers"
# By the first part of a tensor's name, inside a block or outside; Source: models/transformer_terdit.py.
_PARTS = {
    "attn": "attention",
    "ff": "feed-forward",
    "adaln": "adaLN",
    "norm1": "norms",
    "norm2": "norms",
    "proj_in": "patch embedding",
    "time_embed": "timestep embedding",
    "class_embed": "class embedding",
    "norm_out": "final layer",
    "proj_out": "final layer",
}
_ORDER = ["attention", "feed-forward", "adaLN", "adaLN bias and norm", *list(_PARTS.values())[3:], HEADERS]


@dataclass
class Group:
    """Tensors of one role: how many, the weights and bytes they hold, their dtypes, and how many weights are zero."""

    tensors: int = 0
    weights: int = 0
    bytes: int = 0
    dtypes: set[str] = field(default_factory=set)
    zeros: int | None = None


@dataclass
class WeightsReport:
    """Result of `inspect_weights`.

    Attributes:
        config (`dict`): The `config.json` next to the files; empty for a file on its own.
        files (`list[Path]`): The weights file, or all shards.
        groups (`dict[str, Group]`): By role, such as `"ternary codes, attention"`; `HEADERS` holds the rest of the
            bytes, so that they sum to the files' sizes.
        layers (`int`): Number of ternary layers.
        dead_layers (`list[str]`): Names of the ternary layers whose weights are all zero.
        scales (`torch.Tensor`): All ternary scales, float32, one dimension.
        granularities (`set`): What one scale covers: `"tensor"`, `"row"`, or inputs per group.
        shapes (`Counter`): Ternary layers by outputs, inputs and what one scale covers.
        packing (`str` or `None`): As in the files' metadata; `None` where the ternary weights are floats.
        version (`str` or `None`): Of the format, as in the metadata; `None` in files of others.
        has_digest (`bool`): Whether all tensors have digests, which matched.
    """

    config: dict
    files: list[Path]
    groups: dict[str, Group]
    layers: int
    dead_layers: list[str]
    scales: torch.Tensor
    granularities: set[str | int]
    shapes: Counter[tuple[int, int, str | int]]
    packing: str | None
    version: str | None
    has_digest: bool

    def total(self, prefix: str = "") -> Group:
        """Sum of the groups whose name starts with `prefix`; no zeros where nothing was counted."""
        groups = [group for name, group in self.groups.items() if name.startswith(prefix)]
        counted = [group.zeros for group in groups if group.zeros is not None]
        return Group(
            sum(group.tensors for group in groups),
            sum(group.weights for group in groups),
            sum(group.bytes for group in groups),
            set().union(*(group.dtypes for group in groups)),
            sum(counted) if counted else None,
        )


def inspect_weights(path: str | Path) -> WeightsReport:
    """Sizes and statistics of a model or layer.

    Args:
        path (`str` or `Path`): Folder of a model of diffusers or a [`TernaryLinear`], packed or float, ternary or not;
            or one safetensors file.

    Raises:
        OSError: No safetensors weights are there, or they cannot be read.
        ValueError: A tensor holds code 3, NaN or infinity, or a file does not match its digest or has another version
            or packing.
    """
    path = Path(path)
    paths = [path] if path.is_file() else _weights_files(path)
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    files = [WeightsFile(p) for p in paths]
    shapes = {name: shape for file in files for name, (_, shape) in file.tensors.items()}
    groups: dict[str, Group] = {}
    dead: list[str] = []
    scales: list[torch.Tensor] = []
    granularities: set[str | int] = set()
    layer_shapes: Counter[tuple[int, int, str | int]] = Counter()
    packed = any(name.split(".")[-1] == PACKED_SUFFIX for name in shapes)
    for file in files:
        check_metadata(file.path, file.metadata, packed)
    has_digest = check_files(files)
    by_name = {name: file for file in files for name in file.tensors}
    for file in files:
        tensor_bytes = 0
        for name, (dtype, shape) in file.tensors.items():
            begin, end = file.offsets[name]
            tensor_bytes += end - begin
            leaf = name.split(".")[-1]
            scale_name = name.removesuffix(leaf) + SCALE_SUFFIX
            ternary = leaf in (PACKED_SUFFIX, "weight") and scale_name in shapes
            group = groups.setdefault(_role(name, leaf, ternary), Group())
            group.tensors += 1
            group.weights += int(np.prod(shape)) * (reference.CODES_PER_BYTE if leaf == PACKED_SUFFIX else 1)
            group.bytes += end - begin
            group.dtypes.add("2-bit" if leaf == PACKED_SUFFIX else dtype)
            if leaf == SCALE_SUFFIX:
                scales.append(_tensor(file, name).float().flatten())
            if ternary:
                scale = _tensor(by_name[scale_name], scale_name)
                if len(shape) != 2 or not (scale.dim() == 1 or (scale.dim() == 2 and 1 <= scale.shape[1] <= shape[1])):
                    raise ValueError(
                        f"{file.path}: `{name}` has shape {list(shape)} and its scale {list(scale.shape)}, which is no"
                        " ternary layer. Save it again."
                    )
                granularity = reference.granularity_of(scale, shape[1])
                granularities.add(granularity)
                outputs = shape[0] * (reference.CODES_PER_BYTE if leaf == PACKED_SUFFIX else 1)
                layer_shapes[outputs, shape[1], granularity] += 1
                zeros, numel = _count_zeros(file, name, leaf, granularity)
                group.zeros = (group.zeros or 0) + zeros
                if zeros == numel:
                    dead.append(name.removesuffix(f".{leaf}"))
        headers = groups.setdefault(HEADERS, Group())
        headers.bytes += file.path.stat().st_size - tensor_bytes
    metadata = files[0].metadata
    return WeightsReport(
        config=config,
        files=paths,
        groups=dict(sorted(groups.items(), key=lambda item: _order(item[0]))),
        layers=sum(name.endswith(SCALE_SUFFIX) for name in shapes),
        dead_layers=sorted(dead),
        scales=torch.cat(scales) if scales else torch.empty(0),
        granularities=granularities,
        shapes=layer_shapes,
        packing=metadata.get("terdit.packing"),
        version=metadata.get("terdit.version"),
        has_digest=has_digest,
    )


def _weights_files(folder: Path) -> list[Path]:
    """The shards that the index names, or the one file: what `from_pretrained` would read, or the only variant."""
    variants = {name[1] for path in folder.iterdir() if (name := weights_name(path.name))}
    variant = None if "" in variants or len(variants) != 1 else variants.pop()
    index = folder / with_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if index.is_file():
        return read_index(index)
    file = folder / with_variant(SAFETENSORS_WEIGHTS_NAME, variant)
    if file.is_file():
        return [file]
    found = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth", ".pt"))
    hint = f"It holds {', '.join(found[:4])}." if found else "It holds no weights."
    raise OSError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}. {hint} Pass the folder of a pipeline, model or layer.")


def _role(name: str, leaf: str, ternary: bool) -> str:
    parts = name.split(".")
    inner = parts[2:] if parts[0] == "transformer_blocks" and len(parts) > 2 else parts
    part = _PARTS.get(inner[0])
    if leaf == SCALE_SUFFIX:
        return "ternary scales"
    if ternary:
        kind = "ternary codes" if leaf == PACKED_SUFFIX else "ternary weights as floats"
        return f"{kind}, {part}" if part else kind
    if part == "adaLN" and inner[1:] != ["linear", "weight"]:
        return "adaLN bias and norm"
    return "norms" if inner[1:2] in (["norm_q"], ["norm_k"]) else part or leaf


def _order(role: str) -> tuple[int, int]:
    """Ternary weights, their scales, then the rest from the input to the output."""
    part = role.split(", ")[-1]
    return (
        1 if role == "ternary scales" else 0 if role.startswith("ternary") else 2,
        _ORDER.index(part) if part in _ORDER else 0,
    )


def _tensor(file: WeightsFile, name: str) -> torch.Tensor:
    with safe_open(file.path, framework="pt") as opened:
        return opened.get_tensor(name)


def _count_zeros(file: WeightsFile, name: str, leaf: str, granularity: str | int) -> tuple[int, int]:
    """Return how many weights of a ternary matrix are zero, and how many there are."""
    if leaf != PACKED_SUFFIX:
        weight = _tensor(file, name)
        return int((reference.round_to_ternary(weight, granularity) == 0).sum()), weight.numel()
    histogram = np.zeros(256, np.int64)
    for chunk in file.chunks(name):
        histogram += np.bincount(np.frombuffer(chunk, np.uint8), minlength=256)
    values = np.arange(256)
    zeros_in_byte = sum(((values >> shift) & 3) == 1 for shift in (0, 2, 4, 6))
    return int(histogram @ zeros_in_byte), int(histogram.sum()) * reference.CODES_PER_BYTE

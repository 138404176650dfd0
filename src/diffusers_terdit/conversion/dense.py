"""Pack ternary models of any diffusers class that were published as dense tensors, such as Bonsai."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import HfApi, snapshot_download
from safetensors import safe_open
from torch import Tensor

from ..hub.errors import hub_errors
from ..hub.known_files import known_files, open_inside
from ..modeling import REFUSALS
from ..ops import reference
from ..quantization import TernaryConfig, saved_scale, select_layers, ternary_tensors
from ..storage.configs import check_config
from ..storage.saving import partial_path, remove_partials, write_json, writing
from ..storage.weights import (
    PACKED_SUFFIX,
    PACKING,
    SCALE_SUFFIX,
    VERSION,
    check_file,
    read_index,
    read_json,
    write_weights,
)


def is_diffusers_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a folder or Hub repository holds a diffusers pipeline or model: a model_index.json or config.json."""
    names = ("model_index.json", "config.json")
    if Path(path).is_dir():
        return any((Path(path) / name).is_file() for name in names)
    if Path(path).exists() or str(path).count("/") != 1:
        return False
    with hub_errors(path):
        return any(HfApi().file_exists(str(path), name) for name in names)


def convert_dense_checkpoint(
    path: str | os.PathLike,
    output: str | os.PathLike,
    scale_granularity: str | int | None = None,
    component: str = "transformer",
    max_shard_size: int = 2 * 10**9,
    revision: str | None = None,
    **choice: Any,
) -> Path:
    """Pack a ternary model of any diffusers class whose weights were published as dense tensors, without any loss.

    One tensor is in memory at a time, and the packed ones of a shard. Other components of a pipeline are copied, and
    its card, license and index; nothing is copied through a link but from the Hub's cache.

    Args:
        path (`str` or `os.PathLike`): Pipeline folder with a model_index.json, model folder, or Hub id.
        output (`str` or `os.PathLike`): Folder to write; it must not exist, or be empty.
        scale_granularity (`str` or `int`, *optional*): What one scale covers, see [`TernaryConfig`]; default the
            coarsest that fits the first layer.
        component (`str`, defaults to `"transformer"`): The ternary model of a pipeline.
        max_shard_size (`int`, defaults to 2 GB): Bytes per file; a shard is in memory until it is written.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        choice: `include` and `modules_to_not_convert` of [`TernaryConfig`].

    Returns:
        `pathlib.Path`: `output`; it loads with the class it was made for, after `import diffusers_terdit`.

    Raises:
        ValueError: A weight is not ternary (layer and group are named), the folder holds another layout, or there is
            nothing to pack.
        OSError: A file or repository cannot be read, a file to copy is a link, or `output` is not empty.
    """
    output = Path(output)
    remove_partials(output.parent, output.name)
    _check_free(output)
    source = Path(path)
    if not source.is_dir() and (source.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path))):
        raise FileNotFoundError(f"{path} is not a folder. Pass that of a diffusers pipeline or model, or a Hub id.")
    if not source.is_dir():
        with hub_errors(path, revision):
            source = Path(snapshot_download(str(path), revision=revision))
    is_pipeline = (source / "model_index.json").is_file()
    folder = source / component if is_pipeline else source
    if not (folder / "config.json").is_file():
        raise OSError(f"{folder} has no config.json; `path` must be a diffusers pipeline or model, in folders.")
    with writing(output), partial_path(output) as partial:
        if is_pipeline:
            for name in known_files(source, whole=True):
                if name.split("/")[0] != component:
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    with open_inside(source, name) as file, (partial / name).open("wb") as copy:
                        shutil.copyfileobj(file, copy)
        with hub_errors(folder), writing(output):
            target = partial / component if is_pipeline else partial
            _pack_model(folder, target, scale_granularity, max_shard_size, choice)
        try:
            if output.exists():
                output.rmdir()
            partial.rename(output)
        except OSError:
            _check_free(output)  # another process may have written there meanwhile
            raise
    return output


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another, or remove it.")


def _pack_model(
    source: Path, output: Path, scale_granularity: str | int | None, max_shard_size: int, choice: dict[str, Any]
) -> None:
    """`convert_dense_checkpoint` for one model's folder."""
    raw = read_json(source / "config.json")
    cls: Any = getattr(diffusers, str(raw.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(
            f"{source}/config.json names the class {raw.get('_class_name')!r}, which diffusers has not. Pass a model"
            " of diffusers, or update it."
        )
    check_config(source / "config.json", raw, cls)
    if settings := raw.get("quantization_config"):
        method = settings["quant_method"]
        raise ValueError(f"{source} is quantized already ({method!s:.80}); convert the repository of dense weights.")
    try:
        with init_empty_weights(), torch.device("meta"):  # also what a class computes for itself
            model = cls.from_config(raw)  # type: ignore[attr-defined]
    except REFUSALS as error:
        raise ValueError(
            f"{source}/config.json does not build: {str(error).splitlines()[0]} Download it again."
        ) from error
    tensors = dict(_dense_tensors(source))
    _refuse_other_layouts(source, tensors)
    linears = select_layers(model, TernaryConfig(**choice))
    missing = [name for name in linears if f"{name}.weight" not in tensors]
    if missing:
        raise ValueError(
            f"{source} has no {missing[0]}.weight ({len(missing)} dense weights are missing). Download it again."
        )

    expected = dict(model.named_parameters())
    if absent := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{source} has no {absent[0]} ({len(absent)} weights are missing). Download it again.")

    def read(name: str) -> Tensor:
        with safe_open(tensors[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        if name in expected and (tensor.shape != expected[name].shape or not tensor.is_floating_point()):
            raise ValueError(
                f"{tensors[name]}: tensor `{name}` is {list(tensor.shape)}, {tensor.dtype}; the config asks for floats"
                f" of shape {list(expected[name].shape)}. Download both again."
            )
        return tensor

    if scale_granularity is None:
        scale_granularity = reference.find_granularity(read(f"{next(iter(linears))}.weight"), next(iter(linears)))
    config = TernaryConfig(scale_granularity, lossless=True, **choice)
    select_layers(model, config)  # whether every layer takes it

    def packed() -> Iterator[tuple[str, Tensor]]:
        for name in tensors:
            layer = name.removesuffix(".weight")
            if layer != name and layer in linears:
                for key, tensor in ternary_tensors(read(name), config, layer).items():
                    yield f"{layer}.{key}", saved_scale(tensor) if key == SCALE_SUFFIX else tensor
            else:
                yield name, read(name)

    output.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "terdit.version": VERSION, "terdit.packing": PACKING}
    write_weights(output, packed(), metadata, max_shard_size)
    raw.pop("_name_or_path", None)
    raw["quantization_config"] = config.to_dict()
    write_json(output / "config.json", raw)


def _dense_tensors(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of every tensor in a model's folder, in the order of the files."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    files = [folder / SAFETENSORS_WEIGHTS_NAME]
    if index.is_file():
        files = read_index(index)
    for file in files:
        if not file.is_file():
            raise OSError(f"{file} does not exist; only safetensors files are converted. Save the model as such.")
        check_file(file, packed=False)
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        yield from ((name, file) for name in names)


def _refuse_other_layouts(folder: Path, names: Iterable[str]) -> None:
    leaves = {name.rpartition(".")[2] for name in names}
    if {"scales", "biases"} <= leaves:
        raise ValueError(
            f"{folder} is quantized for Apple's MLX (tensors `scales`, `biases`): `scale * code + bias` in MLX's own"
            " order of bits. Convert the repository of dense weights, often called `-unpacked`."
        )
    if PACKED_SUFFIX in leaves:
        raise ValueError(f"{folder} holds ternary layers already (tensors `{PACKED_SUFFIX}`); it needs no conversion.")
    if "W_q" in leaves:
        raise ValueError(
            f"{folder} is packed for gemlite (tensors `W_q`), in an order of bits that is gemlite's own and not"
            " documented. Convert the repository of dense weights, often called `-unpacked`."
        )

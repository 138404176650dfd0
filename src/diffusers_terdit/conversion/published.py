"""Pack ternary models of any diffusers class that were published as dense tensors, for MLX or for gemlite."""

import inspect
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor

from .._diffusers import unexpected_tensors
from ..hub.errors import hub_errors
from ..hub.known_files import known_files, open_inside
from ..modeling import REFUSALS
from ..ops import pack_ternary, reference
from ..quantization import TernaryConfig, saved_scale, select_layers
from ..storage.configs import check_config
from ..storage.saving import partial_path, remove_partials, write_json, writing
from ..storage.weights import (
    PACKED_SUFFIX,
    PACKING,
    SCALE_SUFFIX,
    VERSION,
    WeightsFile,
    check_file,
    check_tensors,
    is_finite,
    load_pickle,
    read_index,
    read_json,
    write_weights,
)
from . import dense, gemlite, mlx


PICKLE = "state_dict.pt"  # of gemlite's models
# Settings of the program that Bonsai was trained with, in its config.json; its layers are diffusers' own.
IGNORED_KEYS = ("enable_time_sign_embed", "musubi_block_swap_device", "musubi_blocks_to_swap")
_INDEX, _CONFIG = "model_index.json", "config.json"
# What quantization_config.json says besides the codes; anything else may change what they mean.
_QUANTIZATION_KEYS = {
    "bits", "group_size", "format", "solver", "mode", "input_dtype", "output_dtype", "scales_dtype", "zeros_dtype",
    "packing_bitwidth", "quantized_count", "skipped_count", "quantized_fqns", "skipped_fqns", "skip_patterns",
    "modules_to_not_convert", "pack_seconds", "quant_method", "compute_dtype",
}  # fmt: skip


def is_published_model(path: str | os.PathLike, component: str = "transformer") -> bool:
    """Whether a folder or Hub repository holds a model of diffusers, alone or in a pipeline, in any published form."""
    if not Path(path).is_dir() and (Path(path).exists() or str(path).count("/") != 1):
        return False
    with hub_errors(path):
        names = _names(path)
    return _INDEX in names or _model_folder(names, component, path) is not None


def _names(path: str | os.PathLike, revision: str | None = None) -> set[str]:
    """Names of the configs in a folder, at most one folder down, or of all files in a Hub repository."""
    if not Path(path).is_dir():
        return set(HfApi().list_repo_files(str(path), revision=revision))
    found = [*Path(path).glob("*.json"), *Path(path).glob(f"*/{_CONFIG}")]
    return {file.relative_to(path).as_posix() for file in found}


def _model_folder(names: Collection[str], component: str, where: str | os.PathLike) -> str | None:
    """Return the folder of the ternary model, "" for a model alone; `None` where there is none.

    Published are `transformer`, and packed forms in folders such as `transformer-gemlite-int2`.
    """
    homes = sorted(name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == _CONFIG)
    found = [home for home in homes if home == component or re.fullmatch(rf"{re.escape(component)}-[^/]+", home)]
    if component in found or (_INDEX in names and not found):
        return component
    if len(found) > 1:
        raise ValueError(f"{where} holds several models: {', '.join(found)}. Pass one of them as `component`.")
    return found[0] if found else "" if "" in homes else None


def convert_ternary_checkpoint(
    path: str | os.PathLike,
    output: str | os.PathLike,
    scale_granularity: str | int | None = None,
    component: str = "transformer",
    max_shard_size: int = 4 * 10**8,
    revision: str | None = None,
    pipeline: str | os.PathLike | None = None,
    **choice: Any,
) -> Path:
    """Pack a published ternary model of any diffusers class, without any loss.

    Read are dense tensors whose values are ternary, and the two-bit forms of MLX and gemlite. One tensor is in memory
    at a time, and the packed ones of a shard. Other components of a pipeline are copied, and its card, license and
    index; nothing is copied through a link but from the Hub's cache. The two-bit repositories hold text encoders in
    their own forms, which are not read: pass `pipeline` to have a pipeline.

    Args:
        path (`str` or `os.PathLike`): Pipeline folder with a model_index.json, model folder, or Hub id. Of a packed
            model on the Hub its folder alone is downloaded.
        output (`str` or `os.PathLike`): Folder to write; it must not exist, or be empty.
        scale_granularity (`str` or `int`, *optional*): What one scale of dense weights covers, see [`TernaryConfig`];
            default the coarsest that fits the first layer.
        component (`str`, defaults to `"transformer"`): The ternary model of a pipeline.
        max_shard_size (`int`, defaults to 400 MB): Bytes per file; a shard is in memory until it is written.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        pipeline (`str` or `os.PathLike`, *optional*): Folder or Hub id of a pipeline from which the other components
            are copied (downloaded), such as the text encoder; default those of `path`, where it is a pipeline.
        choice: `include` and `modules_to_not_convert` of [`TernaryConfig`], for dense weights.

    Returns:
        `pathlib.Path`: `output`; it loads with the class it was made for, after `import diffusers_terdit`.

    Raises:
        ValueError: A weight is not ternary (layer and group are named), the folder holds another layout, a setting
            that this package does not know, or nothing to pack.
        OSError: A file or repository cannot be read, a file to copy is a link, or `output` is not empty.
    """
    output = Path(output)
    remove_partials(output.parent, output.name)
    _check_free(output)
    if not Path(path).is_dir() and (Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(path))):
        raise FileNotFoundError(f"{path} is not a folder. Pass that of a diffusers pipeline or model, or a Hub id.")
    with hub_errors(path, revision):
        names = _names(path, revision)
    home = _model_folder(names, component, path)
    own_parts = home == component and _INDEX in names and pipeline is None
    patterns = [f"{home}/*", "LICENSE*", "NOTICE*"] if home and not own_parts else None
    with hub_errors(path, revision):
        source = _folder(path, revision=revision, allow_patterns=patterns)
    folder = source / (home or "")
    if not (folder / _CONFIG).is_file():
        raise OSError(f"{folder} has no {_CONFIG}; `path` must be a diffusers pipeline or model, in folders.")
    parts = source if own_parts else None
    if pipeline is not None:
        with hub_errors(pipeline):
            parts = _folder(pipeline, ignore_patterns=[f"{component}/*"])
        _check_same_class(parts, component, folder)
    with writing(output), partial_path(output) as partial:
        licenses = [file.name for kind in ("LICENSE*", "NOTICE*") for file in source.glob(kind)]
        copied = dict.fromkeys(known_files(parts, whole=True), parts) if parts else {}
        copied |= dict.fromkeys(licenses, source)
        for name, place in copied.items():
            if name.split("/")[0] != component:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                with open_inside(place, name) as file, (partial / name).open("wb") as copy:
                    shutil.copyfileobj(file, copy)
        with hub_errors(folder), writing(output):
            target = partial / component if parts else partial
            _pack_model(folder, target, scale_granularity, max_shard_size, choice)
        try:
            if output.exists():
                output.rmdir()
            partial.rename(output)
        except OSError:
            _check_free(output)  # another process may have written there meanwhile
            raise
    return output


convert_dense_checkpoint = convert_ternary_checkpoint  # its first name


def _folder(path: str | os.PathLike, **hub: Any) -> Path:
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(str(path), **hub))


def _check_same_class(parts: Path, component: str, folder: Path) -> None:
    if not (parts / _INDEX).is_file():
        raise FileNotFoundError(f"{parts} has no {_INDEX}. Pass the folder or Hub id of a pipeline as `pipeline`.")
    expected = read_json(parts / _INDEX).get(component)
    found = read_json(folder / _CONFIG).get("_class_name")
    if not isinstance(expected, list) or expected[-1] != found:
        raise ValueError(
            f"{parts} has {expected!r:.80} as its {component}, and {folder} is {found!r:.80}. Pass the pipeline that"
            " this model was made for."
        )


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder; choose another, or remove it.")


def _pack_model(
    source: Path, output: Path, scale_granularity: str | int | None, max_shard_size: int, choice: dict[str, Any]
) -> None:
    """`convert_ternary_checkpoint` for one model's folder."""
    raw = {key: value for key, value in read_json(source / _CONFIG).items() if key not in IGNORED_KEYS}
    check_config(source / _CONFIG, raw)
    settings = raw.pop("quantization_config", None) or {}
    if settings and settings["quant_method"] != gemlite.NAME:
        method = settings["quant_method"]
        raise ValueError(f"{source} is quantized already ({method!s:.80}); convert the repository of dense weights.")
    tensors = _open(source)
    leaves = {name.rpartition(".")[2] for name in tensors}
    if PACKED_SUFFIX in leaves:
        raise ValueError(f"{source} holds ternary layers already (tensors `{PACKED_SUFFIX}`); it needs no conversion.")
    form: Any = next((form for form in (mlx, gemlite) if form.MARK in leaves), dense)
    model = _build(source / _CONFIG, raw)
    if form is dense:
        layers = list(select_layers(model, TernaryConfig(lossless=True, **choice)))
    else:
        layers = [name.removesuffix(f".{form.MARK}") for name in tensors if name.endswith(f".{form.MARK}")]
        if choice or scale_granularity is not None:
            raise ValueError(
                f"{source} is packed for {form.NAME}, which says what is ternary and what a scale covers. Leave out"
                " `scale_granularity`, `include` and `modules_to_not_convert`."
            )
        _check_settings(source, settings)
    names = {layer: {key: f"{layer}.{key}" for key in form.TENSORS if f"{layer}.{key}" in tensors} for layer in layers}
    used = {name for keys in names.values() for name in keys.values()}
    expected = model.state_dict()
    _check_names(source, model, {*(tensors.keys() - used), *(f"{layer}.weight" for layer in layers if names[layer])})

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        if name in expected and (tensor.shape != expected[name].shape or not tensor.is_floating_point()):
            raise ValueError(
                f"{source}: tensor `{name}` is {list(tensor.shape)}, {tensor.dtype}; the config asks for floats of"
                f" shape {list(expected[name].shape)}. Download both again."
            )
        return tensor

    def decode(layer: str, granularity: str | int | None) -> tuple[Tensor, Tensor]:
        found = {key: read(name) if form is dense else tensors[name] for key, name in names[layer].items()}
        ternary, scale = form.decode(found, layer, granularity)
        shape = expected[f"{layer}.weight"].shape
        wanted = reference.scale_shape(shape[0], shape[1], granularity) if granularity else tuple(scale.shape)
        if ternary.shape != shape or scale.shape != wanted:
            raise ValueError(
                f"{source}: {layer} has {list(ternary.shape)} weights and {list(scale.shape)} scales; the config and"
                f" the other layers ask for {list(shape)} and {list(wanted)}. Download both again."
            )
        return ternary, scale

    for layer in layers:
        if isinstance(scale_granularity, int) or (scale_granularity and form is dense):
            break
        ternary, scale = decode(layer, None)
        scale_granularity = reference.granularity_of(scale, ternary.shape[1])  # "row" in a layer of one group, too
    assert scale_granularity is not None  # there is a layer
    config = TernaryConfig(scale_granularity, lossless=True, **choice)
    if form is not dense and _selected(model, config) != set(layers):
        config.include = sorted(layers)
    select_layers(model, config)  # whether every layer takes it

    def packed() -> Iterator[tuple[str, Tensor]]:
        marks = {keys[form.MARK]: layer for layer, keys in names.items()}
        for name in tensors:
            if layer := marks.get(name):
                ternary, scale = decode(layer, config.scale_granularity)
                yield f"{layer}.{PACKED_SUFFIX}", pack_ternary(ternary)
                yield f"{layer}.{SCALE_SUFFIX}", saved_scale(scale)
            elif name not in used:
                yield name, read(name)

    output.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", "terdit.version": VERSION, "terdit.packing": PACKING}
    write_weights(output, packed(), metadata, max_shard_size)
    raw.pop("_name_or_path", None)
    raw["quantization_config"] = config.to_dict()
    write_json(output / _CONFIG, raw)


def _build(where: Path, raw: dict[str, Any]) -> ModelMixin:
    """Build the model of a config on the meta device."""
    cls: Any = getattr(diffusers, str(raw.get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise ValueError(
            f"{where} names the class {raw.get('_class_name')!r}, which diffusers has not. Pass a model of diffusers,"
            " or update it."
        )
    check_config(where, raw, cls)
    parameters = inspect.signature(cls).parameters
    if unknown := sorted(key for key in raw if not key.startswith("_") and key not in parameters):
        raise ValueError(
            f"{where} has {unknown[0]}={raw[unknown[0]]!r:.80}, which {cls.__name__} does not know, so it may"
            " compute something else. Update diffusers, or remove the line if it says nothing about the weights."
        )
    try:
        with init_empty_weights(), torch.device("meta"):  # also what a class computes for itself
            return cls.from_config(raw)  # type: ignore[attr-defined]
    except REFUSALS as error:
        raise ValueError(f"{where} does not build: {str(error).splitlines()[0]} Download it again.") from error


def _selected(model: ModelMixin, config: TernaryConfig) -> set[str]:
    try:
        return set(select_layers(model, config))
    except ValueError:  # it selects a layer that cannot be ternary, and is not in the file
        return set()


def _check_settings(source: Path, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` where the settings of a packed model say more than its codes and scales do."""
    if (source / "quantization_config.json").is_file():
        settings = {**read_json(source / "quantization_config.json"), **settings}
    if unknown := sorted(key for key, value in settings.items() if key not in _QUANTIZATION_KEYS and value):
        raise ValueError(
            f"{source} was quantized with {unknown[0]}={settings[unknown[0]]!r:.80}, which this package does not know:"
            " weights in another basis would load as noise. Convert the repository of dense weights."
        )
    if (bits := settings.get("bits", 2)) != 2:
        raise ValueError(
            f"{source} has {bits!r:.80} bits per weight; two-bit ternary models are read. Take the ternary repository."
        )


def _check_names(source: Path, model: ModelMixin, given: set[str]) -> None:
    """Raise a `ValueError` unless the tensors are those of the model."""
    if absent := sorted(dict(model.named_parameters()).keys() - given):
        raise ValueError(f"{source} has no {absent[0]} ({len(absent)} weights are missing). Download it again.")
    if more := sorted(unexpected_tensors(model, given)):
        raise ValueError(
            f"{source} has {len(more)} tensor(s) that {type(model).__name__} does not have, such as {more[0]}."
            " Download config and weights again, together."
        )


class _Files(Mapping[str, Tensor]):
    """The tensors of safetensors files, each read when it is asked for, without mapping the file."""

    def __init__(self, paths: list[Path]):
        self._places = {name: file for file in map(WeightsFile, paths) for name in file.tensors}

    def __getitem__(self, name: str) -> Tensor:
        return self._places[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _open(folder: Path) -> Mapping[str, Tensor]:
    """The tensors of a model's folder by name, checked, in the order of the files."""
    index, file, archive = (folder / name for name in (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME, PICKLE))
    if archive.is_file() and not index.is_file() and not file.is_file():
        found = load_pickle(archive)
        check_tensors(archive, found)
        if damaged := [name for name, tensor in found.items() if not is_finite(tensor)]:
            raise ValueError(f"{archive}: tensor `{damaged[0]}` holds NaN or infinity. Download it again.")
        return found
    files = read_index(index) if index.is_file() else [file]
    for path in files:
        if not path.is_file():
            raise OSError(f"{path} does not exist; only safetensors files are converted. Save the model as such.")
        check_file(path, packed=False)
    return _Files(files)

"""LoRA adapters on ternary layers, and every private name of PEFT that this package uses."""

import dataclasses
import inspect
import json
import os
import re
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE, LoraBaseMixin
from diffusers.utils import convert_unet_state_dict_to_peft, is_peft_available, logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ._diffusers import fetch_adapter, is_offloaded, load_adapter
from .hub.errors import hub_errors
from .storage.configs import fits
from .storage.saving import new_file
from .storage.weights import (
    canonical_json,
    check_contents,
    require_safetensors,
    state_dict_digest,
)


if is_peft_available():  # diffusers has imported it by now
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.utils.other import get_pattern_key
else:
    LoraConfig, LoraLinear = object, torch.nn.Module

logger = logging.get_logger(__name__)

_ITS_MODEL = "Load it into the model that it was trained on."


class TernaryLoraLinear(LoraLinear):
    """PEFT's LoRA around a ternary layer: the base stays as it is, in either format, and is never written to."""

    def _get_in_out_features(self, module: torch.nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]  # PEFT would warn

    def _get_base_layer_device_and_dtype(self, base_layer: torch.nn.Module):
        return base_layer.weight_scale.device, None  # the dtype of the codes is not that of the adapter

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(FUSE_MESSAGE)


FUSE_MESSAGE = (
    "A ternary weight cannot take in an adapter: the sum is no longer ternary. Keep the adapter as it is, or fuse it"
    " into a dense copy: `dense = model.dequantize()` of the model without the adapter, then"
    " `dense.load_lora_adapter(...)` and `dense.fuse_lora()`."
)


# What PEFT starts without reading the dense weight.
_LORA_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# How the names of a LoRA's tensors end after ".lora_"; AdaLoRA and others have more.
_LORA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DELTA = ".token_adapter.trainable_tokens_delta"  # rows of a table
_LORA_PARTS = {"A.weight", "B.weight", "B.bias", "embedding_A", "embedding_B", "magnitude_vector"}


def refuse_adapters(model: torch.nn.Module, action: str) -> None:
    """Raise if a model carries adapters: its state dict has their tensors, and other names for the layers."""
    if names := list(getattr(model, "peft_config", None) or {}):
        raise ValueError(
            f"The model carries adapters, {names}. `save_lora_adapter` saves them; call `unload_lora()` before"
            f" {action}."
        )


@contextmanager
def _peft() -> Iterator[None]:
    """Raise if PEFT is not installed; hide its warning about adding a second adapter."""
    if not is_peft_available():
        raise ImportError("LoRA needs PEFT: pip install peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        yield


def _teach(model: Any, adapter_config: Any) -> None:
    """Let a config put `TernaryLoraLinear` around ternary layers, which PEFT itself does not know."""
    adapter_config._register_custom_module({model._adapter_layer_class: TernaryLoraLinear})


def _refuse_other_kinds(model: Any, given: str) -> None:
    raise ValueError(
        f"`add_adapter` and `load_lora_adapter` of this {type(model).__name__} take LoRA adapters, got {given}. Pass a"
        " `peft.LoraConfig`, or a file that was trained with one."
    )


def _check_settings(model: Any, settings: Mapping[str, Any], where: str = "", new_classes: int = 0) -> None:
    """Raise if a LoRA, given as the fields of its config, cannot be taken out again or needs a dense weight."""
    rows = settings.get("trainable_token_indices")
    null = getattr(model.config, "num_classes", None)
    if isinstance(rows, dict) and null is not None and max(rows.get("class_embed") or [-1]) >= null + new_classes:
        raise ValueError(
            f"{where}The adapter trains rows {rows['class_embed']} of the label table; here row {null} is the null"
            " label. For new classes call `model.add_classes(...)` first, as when the adapter was trained;"
            " `pipe.load_lora_weights` does it where the adapter has their names."
        )
    beside = {name: settings.get(name) for name in ("modules_to_save", "bias")}
    if kept := [f"{name}={value!r}" for name, value in beside.items() if value not in (None, "none", [])]:
        raise ValueError(
            f"{where}{', '.join(kept)}: trains weights of the model itself, which diffusers cannot switch off or take"
            " out again. Name the layers in `target_modules`; for rows of the label table, `trainable_token_indices`."
        )
    if not any(isinstance(module, model._adapter_layer_class) for module in model.modules()):
        return
    wrong = [name for name in ("use_dora", "kasa_config") if settings.get(name)]
    if settings.get("init_lora_weights", True) not in _LORA_STARTS:
        wrong.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if wrong:
        raise ValueError(
            f"{where}{', '.join(wrong)}: reads a dense weight, which a ternary layer does not have. Use plain LoRA, or"
            " adapt the full-precision model that `model.dequantize()` gives."
        )


_NAMES, _NUMBERS = list[str] | None, dict[str, int | float] | None
# The settings of a LoRA that loading knows how to use, as JSON. The others must have their defaults: with some of them
# PEFT would change the model's own layers, or import a module that the file names.
_SAVED_SETTINGS: dict[str, Any] = {
    "alpha_pattern": _NUMBERS,
    "base_model_name_or_path": str | None,
    "bias": str,
    "exclude_modules": _NAMES,
    "fan_in_fan_out": bool,
    "inference_mode": bool,
    "init_lora_weights": bool | str,
    "layers_to_transform": list[int] | int | None,
    "lora_alpha": float,
    "lora_bias": bool,
    "lora_dropout": float,
    "modules_to_save": _NAMES,
    "peft_type": str,
    "peft_version": str | None,
    "r": int,
    "rank_pattern": dict[str, int] | None,
    "revision": str | None,
    "target_modules": list[str],
    "task_type": str | None,
    "trainable_token_indices": list[int] | dict[str, list[int]] | None,
    "use_dora": bool,
    "use_rslora": bool,
}


def _check_saved_settings(given: Any, settings: Mapping[str, Any]) -> None:
    """Raise unless the settings in a file are those of a plain LoRA, of PEFT's types, and name layers one by one.

    PEFT takes text for a regular expression, and one that a stranger wrote can take hours to match.
    """
    fields = {field.name: field for field in dataclasses.fields(LoraConfig)}
    for name, value in settings.items():
        if name not in _SAVED_SETTINGS:
            made = fields[name].default_factory if name in fields else dataclasses.MISSING
            default = made() if made is not dataclasses.MISSING else getattr(fields.get(name), "default", None)
            right, expected = name in fields and value == default, f"{default!r}, as in plain LoRA"
        else:
            hint = _SAVED_SETTINGS[name]
            right, expected = fits(value, hint, 1), inspect.formatannotation(hint)
            if hint in (_NAMES, _NUMBERS) or name in ("rank_pattern", "target_modules"):
                expected = "names of layers"
                right = right and all(re.fullmatch(r"[\w.]+", name) for name in value or ())
        if not right:
            raise ValueError(
                f"{given}: the adapter has {name}={value!r:.80}, expected {expected}. Save it again with"
                " `save_lora_adapter`."
            )


def _check_tensors(where: Any, model: Any, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raise unless an adapter holds LoRA tensors only, each with its partner and a layer of the model that it fits.

    diffusers would put a tensor with the name of one of the model's own weights in its place, for good.
    """
    modules = dict(model.named_modules())
    sizes = {"A.weight": ("in_features", -1), "B.weight": ("out_features", 0)}
    for key, tensor in state_dict.items():
        name, _, part = key.partition(".lora_")
        if part not in _LORA_PARTS and not key.endswith(_DELTA):
            _refuse_other_kinds(model, f"a tensor `{key}` in {where}")
        if tensor.dtype not in _LORA_DTYPES:
            raise ValueError(
                f"{where}: tensor `{key}` is {tensor.dtype}, expected float32, bfloat16 or float16. Save it again"
                " with `save_lora_adapter`."
            )
        if part and name not in modules:
            raise ValueError(
                f"{where}: tensor `{key}` is for a layer that {type(model).__name__} does not have. {_ITS_MODEL}"
            )
        if part in sizes:
            other = f"{name}.lora_{'B' if part[0] == 'A' else 'A'}.weight"
            if other not in state_dict:
                raise ValueError(f"{where} has `{key}`, but no `{other}`. Save it again.")
            if tensor.dim() != state_dict[other].dim() or tensor.dim() < 2:
                raise ValueError(
                    f"{where}: tensor `{key}` has shape {list(tensor.shape)}, expected two sides. Save it again."
                )
            attribute, dim = sizes[part]
            size = getattr(modules[name], attribute, tensor.shape[dim])
            if tensor.shape[dim] != size:
                raise ValueError(
                    f"{where}: tensor `{key}` has shape {list(tensor.shape)}, the layer's `{attribute}` is"
                    f" {size}. {_ITS_MODEL}"
                )


def _check_ranks(where: Any, state_dict: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Raise unless matrices, biases and rows are those that the settings say; PEFT finds it when it is too late."""
    ranks = settings.get("rank_pattern") or {}
    for key, tensor in state_dict.items():
        name, _, part = key.partition(".lora_")
        if key.endswith(_DELTA):
            rows = settings.get("trainable_token_indices") or {}
            rows = rows.get(key.removesuffix(_DELTA), []) if isinstance(rows, dict) else rows
            if tensor.dim() != 2 or len(rows) != len(tensor):
                raise ValueError(
                    f"{where}: tensor `{key}` has shape {list(tensor.shape)}, the adapter's settings name {len(rows)}"
                    " row(s) of the table. Download or save it again."
                )
        if part not in ("A.weight", "B.weight"):
            continue
        default = settings.get("r", LoraConfig.r) if settings else state_dict[f"{name}.lora_A.weight"].shape[0]
        rank = ranks.get(get_pattern_key(ranks, name), default)
        if tensor.shape["AB".index(part[0])] != rank:
            raise ValueError(
                f"{where}: tensor `{key}` has shape {list(tensor.shape)}, the adapter's rank is {rank}. Download or"
                " save it again."
            )
        if settings.get("lora_bias") and f"{name}.lora_B.bias" not in state_dict:
            raise ValueError(f"{where} has `{key}`, but no `{name}.lora_B.bias`. Save it again.")


def _read_adapter(
    given: Any, options: Mapping[str, Any]
) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any] | None, dict[str, str]]:
    """Return how to call an adapter, its tensors, its settings and the names of the label rows that it trains.

    Settings and names are found to be those that were saved.
    """
    where = "the adapter" if isinstance(given, dict) else given
    file = options.get("weight_name") or LORA_WEIGHT_NAME_SAFE
    if not file.endswith(".safetensors") or options.get("use_safetensors") is False:
        raise ValueError("Adapters are read from safetensors only, where a file holds no code. Save it as one.")
    with hub_errors(str(where)):
        try:
            state_dict, settings, metadata = fetch_adapter(given, options)
            metadata = metadata or {}
            classes = json.loads(metadata.get(_CLASSES, "{}"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(
                f"{where}: the adapter's settings are no JSON ({error}). Download or save it again."
            ) from error
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"{where} holds no readable safetensors file ({error}). Download or save it again."
            ) from error
    if not isinstance(settings, dict | None):
        raise ValueError(f"{where}: the adapter's settings are {settings!r:.80}, expected an object. Save it again.")
    if not fits(classes, dict[str, str], 1) or not all(key.isdecimal() for key in classes):
        raise ValueError(f"{where}: the adapter's classes are {classes!r:.80}, expected names by row. Save it again.")
    check_contents(where, state_dict, metadata)
    saved = metadata.get("terdit.config")
    if saved is not None and saved != _saved_config(settings, classes):
        raise ValueError(
            f"{where}: the adapter's settings are not those that were saved. The file is damaged or was changed;"
            " download or save it again."
        )
    if settings is None and not isinstance(given, dict):
        logger.warning(f"{where} carries no settings of its LoRA, so alpha is taken to be the rank.")
    return where, state_dict, settings, classes


_CLASSES = "terdit.classes"  # in a file's metadata: the names of the label rows that the adapter trains


def _saved_config(settings: dict[str, Any] | None, classes: Mapping[str, str]) -> str:
    """Write an adapter's settings, and names of classes where there are some, a second time: damage shows."""
    return canonical_json({**(settings or {}), **({_CLASSES: classes} if classes else {})})


def _refuse_offloaded(model: Any) -> None:
    """Raise where hooks of offloading hold the label table as it is."""
    if is_offloaded(model.label_table):
        raise ValueError(
            "The label table is offloaded, and its hooks hold it as it is, so no classes can be added or removed. Load"
            " and unload adapters before offloading, or after"
            " `accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)`."
        )


def _check_adapter(
    model: Any,
    where: Any,
    state_dict: dict[str, torch.Tensor],
    metadata: dict[str, Any] | None,
    prefix: str | None,
    new_classes: int = 0,
) -> None:
    """Raise unless an adapter that was read is plain LoRA that fits the model, once it has `new_classes` more."""
    start = "" if prefix is None else f"{prefix}."
    own, settings = (
        {key.removeprefix(start): value for key, value in (found or {}).items() if key.startswith(start)}
        for found in (state_dict, metadata)
    )
    if not own:  # diffusers warns
        raise ValueError(f"There is no LoRA in {where} whose names start with {prefix!r}. Try `prefix=None`.")
    if any("lora_magnitude_vector" in key for key in own):
        settings["use_dora"] = True
    tensors = convert_unet_state_dict_to_peft(own)
    _check_tensors(where, model, tensors)
    if metadata is not None:
        _check_saved_settings(where, {**settings, "target_modules": settings.get("target_modules")})
    _check_ranks(where, tensors, settings if metadata else {})
    _check_settings(model, settings, f"{where}: ", new_classes)


class TernaryAdapterMixin(PeftAdapterMixin):
    """`PeftAdapterMixin` that knows ternary layers; PEFT itself takes `nn.Linear` and its own list of others.

    The methods call `PeftAdapterMixin` by name, not `super()`: `take_adapters` lends them to models of other classes.
    """

    _adapter_layer_class: type[torch.nn.Module]

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add a fresh LoRA adapter and make it the active one; only its weights take gradients afterwards.

        Args:
            adapter_config (`peft.LoraConfig`): `target_modules` by name, such as `["to_q", "to_v", "to_out.0"]`.
            adapter_name (`str`, defaults to `"default"`): To tell several apart.

        Raises:
            ValueError: The adapter is not plain LoRA (DoRA, another method, a start from the dense weight), or the
                name is taken. The model is then as it was.
        """
        with _peft():
            if getattr(adapter_config, "peft_type", None) != "LORA":
                _refuse_other_kinds(self, type(adapter_config).__name__)
            _check_settings(self, vars(adapter_config))
            _teach(self, adapter_config)
            PeftAdapterMixin.add_adapter(self, adapter_config, adapter_name)

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict, prefix: str | None = None, hotswap: bool = False, **kwargs: Any
    ) -> None:
        """Load what `save_lora_adapter` wrote; see [`~loaders.PeftAdapterMixin.load_lora_adapter`].

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): Folder, Hub repository or tensors.
            prefix (`str`, *optional*): Prefix of the names in the file; `save_lora_adapter` writes none.
            hotswap (`bool`): Put the weights in the place of the adapter of that name, for compiled models.
            kwargs: `adapter_name`, `weight_name`, `revision`, `token`, ...

        Raises:
            ValueError: The adapter is not plain LoRA, or is of another model: a layer is missing or has another size.
                The model is then as it was.
            OSError: The file is missing or cannot be read.
        """
        with _peft():
            where, tensors, metadata, _ = _read_adapter(pretrained_model_name_or_path_or_dict, kwargs)
            _check_adapter(self, where, tensors, metadata, prefix)
            options = {**kwargs, "prefix": prefix, "hotswap": hotswap, "metadata": metadata}
            load_adapter(self, tensors, partial(_teach, self), **options)

    def save_lora_adapter(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str = "default",
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
        weight_name: str | None = None,
        classes: Mapping[str, str] | None = None,
    ) -> None:
        """Save an adapter, with a digest; see [`~loaders.PeftAdapterMixin.save_lora_adapter`].

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            adapter_name (`str`, defaults to `"default"`): Which one.
            upcast_before_saving (`bool`): Save float32.
            safe_serialization (`bool`): Only `True`: safetensors.
            weight_name (`str`, *optional*): The file's, by default `pytorch_lora_weights.safetensors`.
            classes (`dict[str, str]`, *optional*): Names of the label rows that are the adapter's, by row.

        Raises:
            ValueError: There is no such adapter, another format is asked for, or `save_directory` is a file.
            OSError: It cannot be written; what was there before is still there.
        """
        require_safetensors(safe_serialization)
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a folder, {save_directory} is a file.")
        with new_file(Path(save_directory, weight_name or LORA_WEIGHT_NAME_SAFE)) as path:
            PeftAdapterMixin.save_lora_adapter(
                self, path.parent, adapter_name, upcast_before_saving, weight_name=path.name
            )
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            tensors, settings = load_file(path), json.loads(metadata[LORA_ADAPTER_METADATA_KEY])
            if classes:
                metadata[_CLASSES] = canonical_json(classes)
                if not settings.get("trainable_token_indices"):
                    rows = [int(row) for row in classes]
                    settings["trainable_token_indices"] = {"class_embed": rows}
                    tensors[f"class_embed{_DELTA}"] = self.label_table.weight[rows].cpu()  # type: ignore[attr-defined]
                    metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings)
            metadata["terdit.sha256"] = state_dict_digest(tensors)
            metadata["terdit.config"] = _saved_config(settings, classes or {})
            save_file(tensors, path, metadata)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Raise on a ternary model; do as diffusers does on a full-precision one.

        Raises:
            ValueError: A ternary layer has an adapter.
        """
        if any(isinstance(module, TernaryLoraLinear) for module in self.modules()):  # type: ignore[attr-defined]
            raise ValueError(FUSE_MESSAGE)  # before a dense layer is fused
        PeftAdapterMixin.fuse_lora(self, *args, **kwargs)

    def unload_lora(self) -> None:
        """Take all adapters out; the model computes what it did before the first. Its own weights stay frozen."""
        for name, module in list(self.named_modules()):  # type: ignore[attr-defined]
            if adapter := getattr(module, "token_adapter", None):  # diffusers would leave half of its wrapper
                parent, _, child = name.rpartition(".")
                setattr(self.get_submodule(parent), child, adapter.base_layer)  # type: ignore[attr-defined]
        PeftAdapterMixin.unload_lora(self)


class PipelineAdapterMixin(LoraBaseMixin):
    """LoRA of a pipeline, as diffusers' pipelines have it; the classes that an adapter was taught come along."""

    _lora_loadable_modules = ["transformer"]
    _own_classes: int | None = None  # of the model without those of adapters; `None` where it has no others
    _adapter_classes: Mapping[str, dict[str, str]] = {}  # by adapter: names of its rows of the label table
    transformer: Any
    config: Any
    register_to_config: Any

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict,
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load an adapter, and make it the active one. Classes that the model does not know by name are added.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): Folder, Hub repository or tensors,
                as `save_lora_weights`, `transformer.save_lora_adapter` or PEFT wrote them.
            adapter_name (`str`, *optional*): To tell several apart.
            hotswap (`bool`): Put the weights in the place of the adapter of that name, for compiled models.
            kwargs: `weight_name`, `revision`, `token`, ...

        Raises:
            ValueError: The adapter is not plain LoRA, or is of another model. The pipeline is then as it was.
            OSError: The file is missing or cannot be read.
        """
        with _peft():
            where, tensors, metadata, classes = _read_adapter(pretrained_model_name_or_path_or_dict, kwargs)
            prefix = "transformer" if all(key.startswith("transformer.") for key in tensors) else None
            start = f"{prefix}." if prefix else ""
            trained, table = f"{start}trainable_token_indices", f"{start}class_embed{_DELTA}"
            tokens, model = (metadata or {}).get(trained), self.transformer
            new: dict[str, str] = {}
            if metadata and isinstance(tokens, dict) and fits(tokens.get("class_embed"), list[int], 0):
                rows, new = self._match_classes(tokens["class_embed"], classes)
                metadata = {**metadata, trained: {**tokens, "class_embed": rows}}
            _check_adapter(model, where, tensors, metadata, prefix, len(new))
            count = model.config.num_classes
            own = count if self._own_classes is None else self._own_classes
            added = {}
            if metadata and table in tensors:  # rows of new classes go to the table; PEFT could not combine adapters
                added = {row: tensors[table][i] for i, row in enumerate(rows) if row >= own}
                kept = [i for i, row in enumerate(rows) if row < own]
                metadata[trained] = {"class_embed": [rows[i] for i in kept]} if kept else None
                tensors = {**tensors, table: tensors[table][kept]}
                if not kept:
                    del tensors[table]
            taken = sorted(row for row in added if row < count and str(row) not in classes)
            if taken:
                raise ValueError(
                    f"{where}: the adapter has rows {taken} of the label table without names, and another adapter has"
                    " brought classes of these ids. Load it into a separate pipeline, or save it by"
                    " `pipe.save_lora_weights`."
                )
            if new:
                _refuse_offloaded(model)
                model.add_classes(len(new))
            try:
                options = {**kwargs, "adapter_name": adapter_name, "prefix": prefix, "metadata": metadata}
                load_adapter(model, tensors, partial(_teach, model), **options, hotswap=hotswap, _pipeline=self)
            except BaseException:
                if new:
                    model.remove_classes(len(new))
                raise
            if added:
                with torch.no_grad():
                    for row, weight in added.items():
                        model.label_table.weight[row] = weight.to(model.label_table.weight)
                self._own_classes = own
                names = {**(self.config.id2label or {}), **new}
                self.register_to_config(id2label=names)
                name, its = adapter_name or list(model.peft_config)[-1], {str(row) for row in added} & set(names)
                self._adapter_classes = {**self._adapter_classes, name: {row: names[row] for row in sorted(its)}}

    def _match_classes(self, rows: list[int], classes: Mapping[str, str]) -> tuple[list[int], dict[str, str]]:
        """Return the rows that trained rows have in this model, by their names, and the names that it does not know.

        Another adapter may have brought classes; then the ids of this one are others than when it was trained.
        """
        known = self.config.id2label or {}
        ids = {name: int(key) for key, name in reversed(known.items())}
        matched: list[int] = []
        new: dict[str, str] = {}
        first = self.transformer.config.num_classes
        for row in rows:
            name = classes.get(str(row))
            if name is not None and known.get(str(row)) != name and (row := ids.get(name, -1)) < 0:
                row = first + len(new)
                new[str(row)] = name
            matched.append(row)
        return matched, new

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        upcast_before_saving: bool = False,
        safe_serialization: bool = True,
    ) -> None:
        """Save an adapter with the names of the classes whose label rows it trains, for `load_lora_weights`.

        In diffusers this is a class method that takes tensors; here the pipeline has them, and the names.

        Args:
            save_directory (`str` or `os.PathLike`): Made if it does not exist.
            adapter_name (`str`, *optional*): Which one; not needed where there is one.
            weight_name (`str`, *optional*): The file's, by default `pytorch_lora_weights.safetensors`.
            upcast_before_saving (`bool`): Save float32.
            safe_serialization (`bool`): Only `True`: safetensors.

        Raises:
            ValueError: There is no such adapter, or several and none is named.
            OSError: It cannot be written; what was there before is still there.
        """
        configs = getattr(self.transformer, "peft_config", None) or {}
        name = next(iter(configs)) if adapter_name is None and len(configs) == 1 else adapter_name
        if name is None or name not in configs:
            raise ValueError(f"The model has the adapters {list(configs)}, got {name!r}. Pass one as `adapter_name`.")
        rows, names = configs[name].trainable_token_indices, self.config.id2label or {}
        rows = rows.get("class_embed", []) if isinstance(rows, dict) else []
        classes = {str(row): names[str(row)] for row in rows if str(row) in names} or self._adapter_classes.get(name)
        self.transformer.save_lora_adapter(
            save_directory, name, upcast_before_saving, safe_serialization, weight_name, classes
        )

    def unload_lora_weights(self) -> None:
        """Take all adapters out, and the classes that `load_lora_weights` added: the pipeline is what it was."""
        count = self._own_classes
        if count is not None:  # first, because it may be refused
            _refuse_offloaded(self.transformer)
            self.transformer.remove_classes(self.transformer.config.num_classes - count)
        super().unload_lora_weights()
        if count is None:
            return
        self._own_classes, self._adapter_classes = None, {}
        names = {key: name for key, name in (self.config.id2label or {}).items() if int(key) < count}
        self.register_to_config(id2label=names or None)

    def fuse_lora(self, components: Sequence[str] = ("transformer",), *args: Any, **kwargs: Any) -> None:
        """Raise on a ternary model; do as diffusers does on a full-precision one, whose new classes then stay.

        Raises:
            ValueError: A ternary layer has an adapter.
        """
        super().fuse_lora(components, *args, **kwargs)
        self._own_classes, self._adapter_classes = None, {}


class _LentMethods(TernaryAdapterMixin):
    """The same for a model of diffusers, whose pipelines name its tensors "transformer...."."""

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict,
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        TernaryAdapterMixin.load_lora_adapter(self, pretrained_model_name_or_path_or_dict, prefix, hotswap, **kwargs)


class _LentMethod:
    """A method of `_LentMethods` bound to one model of another class, so that copies and pickles keep it.

    The reference is weak: a cycle would hold the model's memory until Python collects garbage.
    """

    def __init__(self, name: str, model: ModelMixin):
        self.name, self.model = name, weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(_LentMethods, self.name)(self.model(), *args, **kwargs)

    def __reduce__(self):
        return _LentMethod, (self.name, self.model())


def take_adapters(model: Any, layer_class: type[torch.nn.Module] | None) -> None:
    """Let a model of any class of diffusers carry LoRA on ternary layers; `None` undoes this.

    The methods that have to know the layer are put on the model itself. Its class stays as it is.
    """
    if isinstance(model, TernaryAdapterMixin) or not isinstance(model, PeftAdapterMixin):
        return
    lent = {
        name: _LentMethod(name, model)
        for name in ("add_adapter", "load_lora_adapter", "save_lora_adapter", "fuse_lora", "unload_lora")
    }
    for name, value in {"_adapter_layer_class": layer_class, **lent}.items():
        if layer_class is None:
            vars(model).pop(name, None)
        else:
            setattr(model, name, value)

"""Ternary layers in any diffusers model, through diffusers' own `quantization_config`.

    AnyModel.from_pretrained(..., quantization_config=TernaryConfig(...))      ternarize (or import) while loading
    model.save_pretrained(folder); AnyModel.from_pretrained(folder)            loads as it was saved
    quantization.pack(model)                                                   after training in float format
    TernaryConfig(...).quantize(model); model.dequantize()                     a model in memory, and back

`TernaryConfig(lossless=True)` imports models that were published as dense tensors but are ternary: it finds the codes
and scales without any loss, and refuses what is not `scale * {-1, 0, +1}`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from torch import Tensor, nn

from ._diffusers import DiffusersQuantizer, QuantizationConfigMixin, remove_from_config
from .layers import TernaryLinear
from .lora import refuse_adapters, take_adapters
from .ops import pack_ternary, reference
from .storage.saving import refuse_interrupted
from .storage.weights import (
    PACKED_SUFFIX,
    PACKING,
    SCALE_SUFFIX,
    VERSION,
    check_weights,
    require_safetensors,
    state_dict_digest,
)


logger = logging.get_logger(__name__)

# Names in a config.json of the first models, and what they are called now.
_FIRST_NAMES = {"granularity": "scale_granularity", "exact": "lossless", "exclude": "modules_to_not_convert"}


class TernaryMethod(StrEnum):
    """`quant_method` in a config.json."""

    TERNARY = "ternary"


class TernaryConfig(QuantizationConfigMixin):
    """Which linear layers of a model become [`TernaryLinear`], and how.

    Args:
        scale_granularity (`str` or `int`, defaults to `"tensor"`): What one scale covers: `"tensor"`, `"row"`, or an
            int g for groups of g inputs.
        weight_format (`str`, defaults to `"packed"`): `"packed"` in two bits per weight, or `"float"` to train.
        lossless (`bool`, defaults to `False`): The weights are ternary already: take over codes and scales without
            loss, and refuse a weight that is not ternary. `False` rounds any weight, which ruins a model that was not
            trained for it; train it afterwards (`weight_format="float"`).
        include (`str` or `list[str]`, *optional*): Shell-style patterns that the whole name of a layer must match,
            such as `"transformer_blocks.*.ff.*"`; default every linear layer inside the model's lists of blocks.
        modules_to_not_convert (`str` or `list[str]`, *optional*): Layers to leave as they are, also where `include`
            names them. A name, as in other configs of diffusers: `"ff"`, `"attn.to_q"` or `"transformer_blocks.0"` is
            every module of that name, wherever it is, with all layers inside; parts of a name do not count. Or a
            shell-style pattern, which the whole name of a layer must match: `"*.norm1*"`.
        strict (`bool`, defaults to `False`): A layer that does not fit is an error, as it always is with `lossless`.
            `False` leaves it dense and says so in one line of the log. A layer fits if the group divides its inputs
            and, packed, its outputs are a multiple of 4.

    Raises:
        ValueError: A setting that is not one of these.
    """

    def __init__(
        self,
        scale_granularity: str | int = "tensor",
        weight_format: str = "packed",
        lossless: bool = False,
        include: str | list[str] | None = None,
        modules_to_not_convert: str | list[str] | None = None,
        strict: bool = False,
        **kwargs: Any,
    ):
        unknown = sorted(set(kwargs) - {"quant_method", "version"})
        if unknown:
            shown = (f"{name} (now `{_FIRST_NAMES[name]}`)" if name in _FIRST_NAMES else name for name in unknown)
            raise ValueError(
                f"TernaryConfig has no {', '.join(shown)}; it has scale_granularity, weight_format, lossless, include,"
                " modules_to_not_convert and strict."
            )
        if kwargs.get("version", VERSION) != VERSION:
            raise ValueError(
                f"This model's ternary layers are of format version {kwargs['version']!r}; this release reads"
                f" {VERSION!r}. Update diffusers-terdit."
            )
        reference.check_scale_granularity(scale_granularity)
        for option, value in (("lossless", lossless), ("strict", strict)):
            if not isinstance(value, bool):
                raise ValueError(f"`{option}` must be True or False, got {value!r}.")
        if weight_format not in ("packed", "float"):
            raise ValueError(f'`weight_format` must be "packed" or "float", got {weight_format!r}.')
        if lossless and weight_format == "float":
            raise ValueError(
                '`lossless=True` takes over ternary codes: use weight_format="packed", then `unpack()` layers.'
            )
        self.quant_method = TernaryMethod.TERNARY
        self.scale_granularity = scale_granularity
        self.weight_format = weight_format
        self.lossless = lossless
        self.strict = strict
        self.include = [include] if isinstance(include, str) else include
        self.modules_to_not_convert = (
            [modules_to_not_convert] if isinstance(modules_to_not_convert, str) else modules_to_not_convert
        )
        for option in ("include", "modules_to_not_convert"):
            names = getattr(self, option)
            if names is None:
                continue
            if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f'`{option}` must be names or patterns of modules, such as ["transformer_blocks.*"],'
                    f" got {names!r}."
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """Return the config that a config.json holds, under the names of today or of the first models."""
        settings = {_FIRST_NAMES.get(name, name): value for name, value in config_dict.items()}
        if isinstance(excluded := config_dict.get("exclude"), list):
            # A name without a wildcard meant one layer then; as a pattern it still does.
            settings["modules_to_not_convert"] = [
                f"[{name[:1]}]{name[1:]}" if isinstance(name, str) and not set(name) & set("*?[") else name
                for name in excluded
            ]
        try:
            return super().from_dict(settings, return_unused_kwargs, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"The `quantization_config` in config.json: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they are saved in config.json."""
        return {**super().to_dict(), "quant_method": self.quant_method.value, "version": VERSION}

    to_diff_dict = to_dict  # what `print` shows

    @torch.no_grad()
    def quantize(self, model: ModelMixin) -> ModelMixin:
        """Ternarize the chosen layers of a model in memory, in place; it saves and loads as a quantized model.

        Args:
            model ([`~diffusers.ModelMixin`]): A model of any class of diffusers, with dense weights.

        Returns:
            [`~diffusers.ModelMixin`]: The same model.

        Raises:
            ValueError: No layer can be ternary (with `strict`: one cannot), one is not `scale * {-1, 0, +1}` with
                `lossless`, a name or pattern matches nothing, or the model is quantized already. The model is then
                as it was.
        """
        if not isinstance(model, ModelMixin):
            raise ValueError(f"`model` must be a model of diffusers, got {type(model).__name__}.")
        if getattr(model, "hf_quantizer", None) is not None:
            method = model.hf_quantizer.quantization_config.quant_method.value
            raise ValueError(
                f"This {type(model).__name__} is quantized already ({method}); call `dequantize()` first."
            )
        linears = select_layers(model, self, say_skipped=True)
        layers = {}
        for name, linear in linears.items():
            layer = new_layer(linear, self).to_empty(device=linear.weight.device)
            for key, value in ternary_tensors(linear.weight, self, name).items():
                getattr(layer, key).data = value
            layer.bias = linear.bias
            layers[name] = layer.train(linear.training)
        for name, layer in layers.items():
            model.set_submodule(name, layer)
        quantizer = TernaryQuantizer(self, pre_quantized=False)
        quantizer.layers = layers
        model.hf_quantizer = quantizer
        model.register_to_config(quantization_config=self)
        take_adapters(model, TernaryLinear)
        return model


def pack(model: ModelMixin) -> ModelMixin:
    """Pack the ternary layers of a model that was trained with `weight_format="float"`, in place.

    Args:
        model ([`~diffusers.ModelMixin`]): Quantized with a [`TernaryConfig`].

    Returns:
        [`~diffusers.ModelMixin`]: The same model; it computes and is saved with two bits per weight.

    Raises:
        ValueError: It is not such a model, or a layer cannot be packed. The model is then as it was.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, TernaryQuantizer):
        raise ValueError(
            f"This {type(model).__name__} was not quantized with a TernaryConfig. Call"
            " `TernaryConfig().quantize(model)`."
        )
    refuse_adapters(model, "packing it")
    layers = {name: model.get_submodule(name) for name in quantizer.layers or {}}
    for name, layer in layers.items():
        try:
            layer.check_packable()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for layer in layers.values():
        layer.pack()
    quantizer.quantization_config.weight_format = "packed"
    return model


def select_layers(model: nn.Module, config: TernaryConfig, say_skipped: bool = False) -> dict[str, nn.Linear]:
    """Return the linear layers of a model that a config chooses and that can be ternary, by name.

    The same config chooses the same layers again when a saved model is loaded.

    Args:
        model (`torch.nn.Module`): With dense layers.
        config ([`TernaryConfig`]): What it chooses.
        say_skipped (`bool`): Whether to log the layers that it chooses and that do not fit.

    Raises:
        ValueError: There are none, one of them is shared or, with `strict` or `lossless`, does not fit.
    """
    if any(isinstance(module, TernaryLinear) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} has ternary layers already; it needs no TernaryConfig.")
    names: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    linears = {name: module for name, module in names.items() if type(module) is nn.Linear}
    blocks = tuple(f"{name}." for name, module in names.items() if isinstance(module, nn.ModuleList))
    included = {name for name in linears if name.startswith(blocks)} if config.include is None else set()
    excluded: set[str] = set()
    some = ", ".join(list(linears)[:5]) + (", ..." if len(linears) > 5 else "")
    for option, chosen in (("include", included), ("modules_to_not_convert", excluded)):
        for pattern in getattr(config, option) or []:
            matched = {name for name in linears if fnmatchcase(name, pattern)}
            if option == "modules_to_not_convert":
                matched |= {name for name in linears if f".{pattern}." in f".{name}."}
            if not matched:
                raise ValueError(
                    f"{option}: {pattern!r} matches no linear layer of {type(model).__name__}, which has {some}."
                )
            chosen.update(matched)
    found = {name: linear for name, linear in linears.items() if name in included - excluded}
    if not found:
        raise ValueError(f"No linear layer of {type(model).__name__} is chosen; `include` some of {some}.")
    misfits = {name: reason for name, linear in found.items() if (reason := _misfit(linear, config))}
    if misfits and (config.strict or config.lossless or len(misfits) == len(found)):
        name, reason = next(iter(misfits.items()))
        raise ValueError(
            f"{name} cannot be ternary: {reason} Name it in `modules_to_not_convert`, or choose another"
            " `scale_granularity`."
        )
    if misfits and say_skipped:
        name, reason = next(iter(misfits.items()))
        shown = ", ".join(list(misfits)[:5]) + (", ..." if len(misfits) > 5 else "")
        logger.warning(
            f"{len(misfits)} of {len(found)} chosen layers stay dense: {shown}. {name}: {reason} `strict=True` makes"
            " this an error."
        )
    found = {name: linear for name, linear in found.items() if name not in misfits}
    first: dict[int, str] = {}
    for name, linear in found.items():
        if first.setdefault(id(linear), name) != name:
            raise ValueError(
                f"{name} and {first[id(linear)]} are one layer, used twice; name it in `modules_to_not_convert`, or"
                " make it two."
            )
    for name, linear in found.items():
        owners = [
            other
            for other, parameter in model.named_parameters(remove_duplicate=False)
            if parameter is linear.weight and other != f"{name}.weight"
        ]
        if owners:
            raise ValueError(
                f"{name}.weight is tied to {', '.join(owners)}; name the layer in `modules_to_not_convert`, or untie"
                " them."
            )
    return found


def _misfit(linear: nn.Linear, config: TernaryConfig) -> str | None:
    """Why a layer of this shape cannot be ternary."""
    try:
        reference.scale_shape(linear.out_features, linear.in_features, config.scale_granularity)
    except ValueError as error:
        return str(error)
    if config.weight_format == "packed" and linear.out_features % reference.CODES_PER_BYTE:
        return f"a packed layer needs outputs in multiples of 4, this one has {linear.out_features}."
    return None


def new_layer(linear: nn.Linear, config: TernaryConfig) -> TernaryLinear:
    """Return a ternary layer for the place of a dense one, on the meta device."""
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    with torch.device("meta"):
        return TernaryLinear(*sizes, config.weight_format, config.scale_granularity)


def ternary_tensors(weight: Tensor, config: TernaryConfig, name: str) -> dict[str, Tensor]:
    """Return the tensors of a ternary layer for a dense weight.

    Args:
        weight (`torch.Tensor`): (N, K), float.
        config ([`TernaryConfig`]): `lossless` takes over codes and scales; otherwise T = ternarize(weight), and the
            scale is the one with the least squared error, <W, T> / <T, T>.
        name (`str`): Name of the layer, for errors.

    Returns:
        `dict[str, torch.Tensor]`: `weight_packed` (N/4, K) uint8, or `weight` (N, K) in `weight`'s dtype; and
            `weight_scale` (1,), (N, 1) or (N, K/g), float32.

    Raises:
        ValueError: The weight is not finite or, with `lossless`, not ternary.
    """
    if config.lossless:
        ternary, scale = reference.exact_codes(weight, config.scale_granularity, name)
        return {PACKED_SUFFIX: pack_ternary(ternary), SCALE_SUFFIX: scale}
    if not weight.isfinite().all():
        raise ValueError(
            f"{name}.weight holds NaN or infinity, which round to none of {{-1, 0, +1}}. Take an undamaged one."
        )
    ternary = reference.round_to_ternary(weight, config.scale_granularity)  # (N, K) float32
    scale = reference.least_squares_scale(weight, ternary, config.scale_granularity)
    if config.weight_format == "float":
        return {"weight": weight, SCALE_SUFFIX: scale}
    return {PACKED_SUFFIX: pack_ternary(ternary), SCALE_SUFFIX: scale}


class TernaryQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads a model with a [`TernaryConfig`]."""

    use_keep_in_fp32_modules = True
    supports_parallel_loading = False  # shards are converted one after the other
    is_serializable = True
    is_trainable = True  # float weights train, packed ones carry adapters
    is_compileable = True
    quantization_config: TernaryConfig

    def __init__(self, quantization_config: TernaryConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.layers: dict[str, TernaryLinear] | None = None
        self._loaded_keys: list[str] = []
        self._kept_in_float32: list[str] = []
        self._files: list[str | Path] = []

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list) -> list[str]:
        """Keep list and files: which names change is known when the model is there."""
        self._files = checkpoint_files
        self._loaded_keys = list(loaded_keys)
        refuse_interrupted(Path(checkpoint_files[0]).parent)  # of `training.export.save_pipeline`
        return self._loaded_keys

    @property
    def _where(self) -> str:
        return ", ".join(str(file) for file in self._files)

    @contextmanager
    def _naming_files(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from error

    def _process_model_before_weight_loading(self, model, keep_in_fp32_modules=(), **kwargs):
        with self._naming_files():
            linears = select_layers(model, self.quantization_config, say_skipped=not self.pre_quantized)
        self.layers = {name: new_layer(linear, self.quantization_config) for name, linear in linears.items()}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        if self.pre_quantized:
            packed = self.quantization_config.weight_format == "packed"
            check_weights(model, self._files, packed=packed, ignore_unexpected=True)
        else:
            dense = {f"{name}.{key}" for name, linear in linears.items() for key, _ in linear.named_parameters()}
            if missing := sorted(dense - set(self._loaded_keys)):
                raise ValueError(
                    f"{self._where} has no {missing[0]} ({len(missing)} dense tensors are missing). Download or save"
                    " it again."
                )
            made = [f"{name}.{key}" for name, layer in self.layers.items() for key in layer.state_dict()]
            self._loaded_keys[:] = [*(key for key in self._loaded_keys if key not in dense), *made]
        if isinstance(keep_in_fp32_modules, list):
            self._kept_in_float32 = keep_in_fp32_modules
            self._kept_in_float32.append(SCALE_SUFFIX)
        model.register_to_config(quantization_config=self.quantization_config)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Convert the dense weights of the chosen layers to ternary ones; those of a saved model were checked."""
        if self.layers is None:
            raise ValueError(
                "TernaryConfig works with `from_pretrained` only; save the single file as a folder first."
            )
        for name, layer in self.layers.items():
            weight = None if self.pre_quantized else state_dict.pop(f"{name}.weight", None)
            if weight is None:
                continue  # a saved model, or the weight is in another shard
            with self._naming_files():
                shape = (layer.out_features, layer.in_features)
                if tuple(weight.shape) != shape or not weight.is_floating_point():
                    raise ValueError(
                        f"{name}.weight is {tuple(weight.shape)}, {weight.dtype}; the model asks for {shape}, floats."
                        " Download or save file and config.json again."
                    )
                for key, value in ternary_tensors(weight, self.quantization_config, name).items():
                    state_dict[f"{name}.{key}"] = value
        return state_dict

    def _process_model_after_weight_loading(self, model, **kwargs):
        if SCALE_SUFFIX in self._kept_in_float32:
            self._kept_in_float32.remove(SCALE_SUFFIX)  # it may be the class's own list
        model.is_quantized = False  # ternary layers take casts, so diffusers need not forbid them
        take_adapters(model, TernaryLinear)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        """Return what is saved: scales in float16 where that holds them exactly, two bytes instead of four.

        Raises:
            ValueError: `safe_serialization=False`.
        """
        require_safetensors(safe_serialization)
        saved = {
            key: saved_scale(value) if key.endswith(f".{SCALE_SUFFIX}") else value for key, value in state_dict.items()
        }
        metadata = {"terdit.version": VERSION, "terdit.model": state_dict_digest(saved)}
        if self.quantization_config.weight_format == "packed":
            metadata["terdit.packing"] = PACKING
        return saved, metadata

    @torch.no_grad()
    def _dequantize(self, model):
        refuse_adapters(model, "dequantizing it")
        for name in self.layers or {}:
            layer = model.get_submodule(name)
            dtype = model.dtype if layer.weight_format == "packed" else layer.weight.dtype
            model.set_submodule(name, dense_layer(layer, dtype))
        remove_from_config(model, "quantization_config")
        take_adapters(model, None)
        return model


def saved_scale(scale: Tensor) -> Tensor:
    """Return the scale in float16 where that holds every value: two bytes instead of four."""
    half = scale.half()
    return half if torch.equal(half.to(scale.dtype), scale) else scale


def dense_layer(layer: TernaryLinear, dtype: torch.dtype) -> nn.Linear:
    """Return an `nn.Linear` with the weight `scale * T`."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantize().to(dtype))
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)

"""`TernaryConfig`: ternary layers in any diffusers model, through diffusers' own `quantization_config`.

    AnyModel.from_pretrained(..., quantization_config=TernaryConfig(...))      ternarize (or import) while loading
    model.save_pretrained(folder); AnyModel.from_pretrained(folder)            loads as it was saved
    quantization.pack(model)                                                   after training in float format
    TernaryConfig(...).quantize(model); model.dequantize()                     a model in memory, and back

`TernaryConfig(exact=True)` imports models that were published as dense tensors but are ternary: it finds the codes and
scales without any loss, and refuses what is not `scale * {-1, 0, +1}`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from ._diffusers import DiffusersQuantizer, QuantizationConfigMixin
from .layers import TernaryLinear
from .lora import refuse_adapters, take_adapters
from .ops import pack_ternary, reference
from .storage.saving import refuse_interrupted
from .storage.weights import PACKED_SUFFIX, PACKING, SCALE_SUFFIX, VERSION, check_file, require_safetensors


class TernaryMethod(StrEnum):
    """`quant_method` of a config.json."""

    TERNARY = "ternary"


class TernaryConfig(QuantizationConfigMixin):
    """Which linear layers of a model become [`TernaryLinear`], and how.

    Args:
        granularity (`str` or `int`, defaults to `"tensor"`): What one scale covers: `"tensor"`, `"row"`, or an int g
            for groups of g inputs.
        weight_format (`str`, defaults to `"packed"`): `"packed"` in two bits per weight, or `"float"` to train.
        exact (`bool`, defaults to `False`): The weights are ternary already: take over codes and scales without loss,
            and refuse a weight that is not. `False` rounds any weight, which ruins a model that was not trained for
            it; train it afterwards (`weight_format="float"`).
        include (`str` or `list[str]`, *optional*): Patterns of module names such as `"transformer_blocks.*.ff.*"`, in
            the shell's style; default every linear layer inside the model's lists of blocks.
        exclude (`str` or `list[str]`, *optional*): Patterns of layers to leave as they are.

    Raises:
        ValueError: A setting that is not one of these.
    """

    def __init__(
        self,
        granularity: str | int = "tensor",
        weight_format: str = "packed",
        exact: bool = False,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        **kwargs: Any,
    ):
        unknown = set(kwargs) - {"quant_method", "version"}
        if unknown:
            raise ValueError(
                f"TernaryConfig has no {', '.join(sorted(unknown))}; it has granularity, weight_format, exact, include"
                " and exclude."
            )
        if kwargs.get("version", VERSION) != VERSION:
            raise ValueError(
                f"This model's ternary layers are of format version {kwargs['version']!r}; this release reads"
                f" {VERSION!r}. Update diffusers-terdit."
            )
        reference.check_scale_granularity(granularity)
        if not isinstance(exact, bool):
            raise ValueError(f"`exact` must be True or False, got {exact!r}.")
        if weight_format not in ("packed", "float"):
            raise ValueError(f'`weight_format` must be "packed" or "float", got {weight_format!r}.')
        if exact and weight_format == "float":
            raise ValueError(
                '`exact=True` takes over ternary codes: use weight_format="packed", then `unpack()` layers.'
            )
        self.quant_method = TernaryMethod.TERNARY
        self.granularity = granularity
        self.weight_format = weight_format
        self.exact = exact
        self.include = [include] if isinstance(include, str) else include
        self.exclude = [exclude] if isinstance(exclude, str) else exclude
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            if patterns is None:
                continue
            if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(
                    f'`{name}` must be patterns of module names, such as ["transformer_blocks.*"], got {patterns!r}.'
                )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """From what stands in config.json."""
        try:
            return super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"The `quantization_config` in config.json: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {**super().to_dict(), "quant_method": self.quant_method.value, "version": VERSION}

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults."""
        default = TernaryConfig().to_dict()
        return {key: value for key, value in self.to_dict().items() if value != default[key] or key == "quant_method"}

    @torch.no_grad()
    def quantize(self, model: ModelMixin) -> ModelMixin:
        """Ternarize the chosen layers of a model in memory, in place; it saves and loads as a quantized model.

        Args:
            model ([`~diffusers.ModelMixin`]): Of any class of diffusers, with dense weights.

        Returns:
            [`~diffusers.ModelMixin`]: The same model.

        Raises:
            ValueError: A layer cannot be ternary, is none of `scale * {-1, 0, +1}` with `exact`, the patterns match
                nothing, or the model is quantized already. The model is then as it was.
        """
        if not isinstance(model, ModelMixin):
            raise ValueError(f"`model` must be a model of diffusers, got {type(model).__name__}.")
        if getattr(model, "hf_quantizer", None) is not None:
            method = model.hf_quantizer.quantization_config.quant_method.value
            raise ValueError(
                f"This {type(model).__name__} is quantized already ({method}); call `dequantize()` first."
            )
        linears = select_layers(model, self)
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
        ValueError: It is no such model, or a layer cannot be packed. The model is then as it was.
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


def select_layers(model: nn.Module, config: TernaryConfig) -> dict[str, nn.Linear]:
    """The linear layers of a model that a config chooses, by name.

    Raises:
        ValueError: There are none, or one of them cannot be a ternary layer.
    """
    if any(isinstance(module, TernaryLinear) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} has ternary layers already; it needs no TernaryConfig.")
    names: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    linears = {name: module for name, module in names.items() if type(module) is nn.Linear}
    blocks = [f"{name}." for name, module in names.items() if isinstance(module, nn.ModuleList)]

    def chosen(name: str) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in config.exclude or []):
            return False
        if config.include is None:
            return any(name.startswith(prefix) for prefix in blocks)
        return any(fnmatchcase(name, pattern) for pattern in config.include)

    some = ", ".join(list(linears)[:5]) + (", ..." if len(linears) > 5 else "")
    for option in ("include", "exclude"):
        for pattern in getattr(config, option) or []:
            if not any(fnmatchcase(name, pattern) for name in linears):
                raise ValueError(
                    f"{option}: {pattern!r} matches no linear layer of {type(model).__name__}, which has {some}."
                )
    found = {name: linear for name, linear in linears.items() if chosen(name)}
    if not found:
        raise ValueError(f"No linear layer of {type(model).__name__} is chosen; `include` some of {some}.")
    first: dict[int, str] = {}
    for name, linear in found.items():
        if first.setdefault(id(linear), name) != name:
            raise ValueError(
                f"{name} and {first[id(linear)]} are one layer, used twice; `exclude` it, or make it two."
            )
    for name, linear in found.items():
        owners = [
            other
            for other, parameter in model.named_parameters(remove_duplicate=False)
            if parameter is linear.weight and other != f"{name}.weight"
        ]
        if owners:
            raise ValueError(f"{name}.weight is tied to {', '.join(owners)}; `exclude` the layer, or untie them.")
        try:
            reference.scale_shape(linear.out_features, linear.in_features, config.granularity)
            if config.weight_format == "packed" and linear.out_features % reference.CODES_PER_BYTE:
                raise ValueError(
                    f"a packed layer needs outputs in multiples of 4, this one has {linear.out_features}."
                )
        except ValueError as error:
            raise ValueError(
                f"{name} cannot be ternary: {error} `exclude` it, or choose another granularity."
            ) from None
    return found


def new_layer(linear: nn.Linear, config: TernaryConfig) -> TernaryLinear:
    """A ternary layer in the place of a dense one, on the meta device."""
    with torch.device("meta"):
        return TernaryLinear(
            linear.in_features, linear.out_features, linear.bias is not None, config.weight_format, config.granularity
        )


def ternary_tensors(weight: Tensor, config: TernaryConfig, name: str) -> dict[str, Tensor]:
    """The tensors of a ternary layer from a dense weight.

    Args:
        weight (`torch.Tensor`): (N, K), float.
        config ([`TernaryConfig`]): `exact` takes over codes and scales; otherwise T = ternarize(weight), and the scale
            is the one with the least squared error, <W, T> / <T, T>.
        name (`str`): Of the layer, for errors.

    Returns:
        `dict[str, torch.Tensor]`: `weight_packed` (N/4, K) uint8, or `weight` (N, K) in `weight`'s dtype; and
            `weight_scale` (1,), (N, 1) or (N, K/g), float32.

    Raises:
        ValueError: The weight is not finite or, with `exact`, not ternary.
    """
    if config.exact:
        ternary, scale = exact_codes(weight, config.granularity, name)
        return {PACKED_SUFFIX: pack_ternary(ternary), SCALE_SUFFIX: scale}
    if not weight.isfinite().all():
        raise ValueError(
            f"{name}.weight holds NaN or infinity, which round to none of {{-1, 0, +1}}. Take an undamaged one."
        )
    ternary = reference.round_to_ternary(weight, config.granularity)  # (N, K) float32
    scale = least_squares_scale(weight, ternary, config.granularity)
    if config.weight_format == "float":
        return {"weight": weight, SCALE_SUFFIX: scale}
    return {PACKED_SUFFIX: pack_ternary(ternary), SCALE_SUFFIX: scale}


def _by_scale(matrix: Tensor, granularity: str | int) -> Tensor:
    """(N, K) -> (scales, values that share one)."""
    if granularity == "tensor":
        return matrix.reshape(1, -1)
    return matrix if granularity == "row" else matrix.reshape(-1, int(granularity))


def least_squares_scale(weight: Tensor, ternary: Tensor, granularity: str | int) -> Tensor:
    """The scale for which `scale * T` is nearest to the weight: as `weight_scale`, float32; 0 where T is 0."""
    shape = reference.scale_shape(weight.shape[0], weight.shape[1], granularity)
    values, codes = _by_scale(weight.float(), granularity), _by_scale(ternary.float(), granularity)
    # float64 where the device has it: a matrix has millions of terms
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    scale = (values * codes).sum(1, dtype=wide) / codes.abs().sum(1, dtype=wide).clamp_min(1)
    return scale.float().reshape(shape)


def exact_codes(weight: Tensor, granularity: str | int, name: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a dense weight that is exactly `scale * {-1, 0, +1}`.

    Args:
        weight (`torch.Tensor`): (N, K), float.
        granularity (`str` or `int`): What one scale covers.
        name (`str`): Of the layer, for errors.

    Returns:
        Two `torch.Tensor`: T (N, K) int8 and the scale as `weight_scale`, float32: `scale * T` is the weight bit for
            bit.

    Raises:
        ValueError: A group holds two magnitudes, or a value that is not finite; with its place and values.
    """
    shape = reference.scale_shape(weight.shape[0], weight.shape[1], granularity)
    blocks = reference.row_blocks(weight)  # float32 forms of a few rows at a time
    scales = [_by_scale(block.float().abs(), granularity).amax(1) for block in blocks]
    if granularity == "tensor":
        scales = [torch.stack(scales).amax(0)] * len(blocks)
    ternary = torch.empty_like(weight, dtype=torch.int8)
    row = 0
    for block, scale, out in zip(blocks, scales, reference.row_blocks(ternary), strict=True):
        values = _by_scale(block.float(), granularity)  # (scales, values that share one)
        wrong = ((values.abs() != scale[:, None]) & (values != 0)) | ~values.isfinite()
        if wrong.any():
            index, place = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"{name}.weight is not ternary: {_place(weight, values, index, place, row, granularity)} holds"
                f" {values[index, place]:.6g} beside {scale[index]:.6g}. Another granularity may fit; without `exact`"
                " the weight is rounded, which changes the model."
            )
        out.copy_(values.sign().reshape(block.shape))
        row += len(block)
    return ternary, (scales[0] if granularity == "tensor" else torch.cat(scales)).reshape(shape)


def _place(weight: Tensor, values: Tensor, index: int, place: int, row: int, granularity: str | int) -> str:
    """Words for where a value stands that is not ternary, of a block of values that begins at a row of the weight."""
    down, column = divmod(index * values.shape[1] + place, weight.shape[1])
    if isinstance(granularity, str):
        return f"row {row + down}"
    start = column - place
    return f"row {row + down}, group {start // values.shape[1]} (inputs {start} to {start + values.shape[1] - 1})"


def find_granularity(weight: Tensor, name: str) -> str | int:
    """The coarsest granularity for which a dense weight is ternary: "tensor", "row", 256, 128, 64 or 32 inputs.

    Raises:
        ValueError: There is none.
    """
    for granularity in ("tensor", "row", *(g for g in (256, 128, 64, 32) if weight.shape[1] % g == 0)):
        try:
            exact_codes(weight, granularity, name)
            return granularity
        except ValueError as error:
            reason = error
    raise ValueError(f"No granularity fits the first layer: {reason}") from reason


class TernaryQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads a model with a [`TernaryConfig`]."""

    use_keep_in_fp32_modules = True
    quantization_config: TernaryConfig

    def __init__(self, quantization_config: TernaryConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.layers: dict[str, TernaryLinear] | None = None
        self._loaded_keys: list[str] = []
        self._kept_in_float32: list[str] = []
        self._files = "the checkpoint"  # for errors
        self._floats: set[str] = set()

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list) -> list[str]:
        """Keep the list: which of its names change is known when the model is there."""
        for file in checkpoint_files:
            if isinstance(file, (str, Path)):
                refuse_interrupted(Path(file).parent)  # of `training.save_pipeline`
            if self.pre_quantized and isinstance(file, (str, Path)):
                check_file(file, self.quantization_config.weight_format == "packed")
        self._files = ", ".join(str(file) for file in checkpoint_files)
        self._loaded_keys = list(loaded_keys)
        return self._loaded_keys

    def _process_model_before_weight_loading(self, model, keep_in_fp32_modules=(), **kwargs):
        with self._naming_files():
            linears = select_layers(model, self.quantization_config)
        self.layers = {name: new_layer(linear, self.quantization_config) for name, linear in linears.items()}
        for name, layer in self.layers.items():
            model.set_submodule(name, layer)
        self._floats = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
        if isinstance(keep_in_fp32_modules, list):
            self._kept_in_float32 = keep_in_fp32_modules
            self._kept_in_float32.append(SCALE_SUFFIX)
        if not self.pre_quantized:
            dense = {f"{name}.weight": name for name in self.layers}
            missing = sorted(set(dense) - set(self._loaded_keys))
            if missing:
                raise ValueError(
                    f"{self._files} has no {missing[0]} ({len(missing)} dense weights are missing). Download or save"
                    " it again."
                )
            made = [PACKED_SUFFIX if self.quantization_config.weight_format == "packed" else "weight", SCALE_SUFFIX]
            kept = [key for key in self._loaded_keys if key not in dense]
            self._loaded_keys[:] = [*kept, *(f"{name}.{key}" for name in self.layers for key in made)]
        model.register_to_config(quantization_config=self.quantization_config)

    @contextmanager
    def _naming_files(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self._files}: {error}") from error

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Dense weights of the chosen layers to ternary ones, tensor by tensor; saved ones are checked."""
        if self.layers is None:
            raise ValueError(
                "TernaryConfig works with `from_pretrained` only; save the single file as a folder first."
            )
        with self._naming_files():
            return self._updated(state_dict, self.layers)

    def _updated(self, state_dict: dict[str, Any], layers: dict[str, TernaryLinear]) -> dict[str, Any]:
        for name in self._floats & state_dict.keys():
            if not state_dict[name].is_floating_point():
                raise ValueError(
                    f"{name} is {state_dict[name].dtype}, the model asks for floats. Download or save the file again."
                )
        for name, layer in layers.items():
            if self.pre_quantized:
                self._check(name, layer, state_dict)
            elif f"{name}.weight" in state_dict:
                weight = state_dict.pop(f"{name}.weight")
                if tuple(weight.shape) != (layer.out_features, layer.in_features):
                    raise ValueError(
                        f"{name}.weight has shape {tuple(weight.shape)}, the model asks for"
                        f" {(layer.out_features, layer.in_features)}. Download or save file and config.json again."
                    )
                for key, value in ternary_tensors(weight, self.quantization_config, name).items():
                    state_dict[f"{name}.{key}"] = value
        return state_dict

    @staticmethod
    def _check(name: str, layer: TernaryLinear, state_dict: dict[str, Any]) -> None:
        for key, expected in layer.state_dict().items():
            found = state_dict.get(f"{name}.{key}")
            if found is None:
                continue  # in another shard; what is missing altogether is refused below
            fits = found.dtype == torch.uint8 if key == PACKED_SUFFIX else found.is_floating_point()
            if tuple(found.shape) != tuple(expected.shape) or not fits:
                raise ValueError(
                    f"{name}.{key} is {tuple(found.shape)}, {found.dtype}; the model asks for"
                    f" {tuple(expected.shape)}, {expected.dtype}. Download or save file and config.json again."
                )

    def update_missing_keys(self, model, missing_keys: list[str], prefix: str) -> list[str]:
        """A saved model without some of its tensors would be none: an error, where diffusers would warn."""
        ours = {f"{name}.{key}" for name, layer in (self.layers or {}).items() for key in layer.state_dict()}
        missing = sorted(missing_keys if self.pre_quantized else ours & set(missing_keys))
        if missing:
            raise ValueError(
                f"{self._files} has no {missing[0]} ({len(missing)} tensors are missing). Was it saved with other"
                " patterns or another weight_format?"
            )
        return missing_keys

    def _process_model_after_weight_loading(self, model, **kwargs):
        if SCALE_SUFFIX in self._kept_in_float32:
            self._kept_in_float32.remove(SCALE_SUFFIX)  # it may be the class's own list
        model.is_quantized = False  # ternary layers take casts, so the host need not forbid them
        take_adapters(model, TernaryLinear)
        return model

    def get_state_dict_and_metadata(self, state_dict, safe_serialization=False):
        """Scales go to the file in float16 where that holds them exactly: two bytes for a group instead of four."""
        require_safetensors(safe_serialization)
        saved = {
            key: saved_scale(value) if key.endswith(f".{SCALE_SUFFIX}") else value for key, value in state_dict.items()
        }
        metadata = {"terdit.version": VERSION}
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
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = FrozenDict(config)
        take_adapters(model, None)
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        """Shards are converted one after the other."""
        return False

    @property
    def is_serializable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Float weights train; packed ones carry adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def saved_scale(scale: Tensor) -> Tensor:
    """In float16 where that holds every value: two bytes for a scale instead of four."""
    half = scale.half()
    return half if torch.equal(half.to(scale.dtype), scale) else scale


def dense_layer(layer: TernaryLinear, dtype: torch.dtype) -> nn.Linear:
    """`nn.Linear` with the weight `scale * T`."""
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.dequantize().to(dtype))
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.train(layer.training)

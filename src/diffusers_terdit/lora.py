"""LoRA adapters on ternary layers, and every private name of PEFT that this package uses."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders import peft as peft_loader
from diffusers.utils import is_peft_available
from safetensors import SafetensorError


if is_peft_available():  # diffusers has imported it by now
    from peft.tuners.lora.layer import Linear as LoraLinear
else:
    LoraLinear = torch.nn.Module

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

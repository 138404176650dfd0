"""Every private name of diffusers that this package imports or looks up.

`tests/test_diffusers.py` fails when one of them changes, `tests/repo/test_private_names.py` when another file uses
one.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from types import FunctionType
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import _fetch_state_dict
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from diffusers.utils.peft_utils import _create_lora_config
from transformers.quantizers import auto as of_transformers


def register(
    package: str,
    classes: Iterable[type],
    blocks: Iterable[type],
    quantizers: Mapping[Enum, tuple[type[QuantizationConfigMixin], type[DiffusersQuantizer]]],
) -> None:
    """Make diffusers find `package`'s classes by name, as it does its own.

    Three tables: `LOADABLE_CLASSES` lets a `model_index.json`, on the Hub too, say `["diffusers_terdit", "..."]`;
    attributes on `diffusers` let `DiffusionPipeline` and `AutoModel` resolve a class name; the block registry serves
    the step caches.
    """
    LOADABLE_CLASSES.setdefault(package, {"ModelMixin": ["save_pretrained", "from_pretrained"]})
    for cls in classes:
        if not hasattr(diffusers, cls.__name__):
            setattr(diffusers, cls.__name__, cls)
    for block in blocks:
        TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0))
    for method, (config, quantizer) in quantizers.items():
        AUTO_QUANTIZATION_CONFIG_MAPPING[method.value] = config
        AUTO_QUANTIZER_MAPPING[method.value] = quantizer
        # A `quant_backend` of PipelineQuantizationConfig must be in the tables of transformers, too.
        of_transformers.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(method.value, config)
        of_transformers.AUTO_QUANTIZER_MAPPING.setdefault(method.value, _refuse_model_of_transformers)


def _refuse_model_of_transformers(config: QuantizationConfigMixin, **kwargs: Any) -> None:
    raise ValueError(
        f"A {type(config).__name__} quantizes models of diffusers; this one is of transformers. Name others in"
        ' PipelineQuantizationConfig: components_to_quantize=["transformer"], or a quant_mapping with a config of'
        " transformers for this one."
    )


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or of diffusers' group offloading move the weights of the model or a part of it."""
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return any(hasattr(module, "_hf_hook") for module in model.modules()) or any(
        registry.get_hook(_GROUP_OFFLOADING) is not None for registry in registries if registry is not None
    )


def reset_step_caches(model: ModelMixin) -> None:
    """Forget what diffusers' step caches keep between the steps of one run of a sampler."""
    model._reset_stateful_cache()


def remove_from_config(model: ModelMixin, key: str) -> None:
    """Remove a key from a model's config, which `register_to_config` can only set."""
    model._internal_dict = FrozenDict({name: value for name, value in model.config.items() if name != key})


def unexpected_tensors(model: ModelMixin, names: Iterable[str]) -> set[str]:
    """Return the names of tensors that a model has not, and does not ignore."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or []]
    return {name for name in {*names} - model.state_dict().keys() if not any(key.search(name) for key in ignored)}


def fetch_adapter(
    given: Any, options: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, dict[str, str] | None]:
    """Read an adapter as `load_lora_adapter` does: from a dict of tensors, a folder, a file or the Hub.

    Args:
        given: The first argument of `load_lora_adapter`.
        options: Its keyword arguments, such as `weight_name` or `revision`.

    Returns:
        The tensors by name, the settings that were saved with them, `None` where there are none, and the metadata of
        the file, `None` where there is none.
    """
    names = ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder", "weight_name", "metadata")
    chosen = {name: options.get(name) for name in names}
    chosen["force_download"] = options.get("force_download", False)
    chosen |= {"use_safetensors": True, "return_file_metadata": True}
    user_agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    return _fetch_state_dict(given, allow_pickle=False, user_agent=user_agent, **chosen)


def load_adapter(model: Any, tensors: dict[str, torch.Tensor], prepare: Callable[[Any], None], **options: Any) -> None:
    """Call diffusers' `load_lora_adapter`, and `prepare` with the config that it makes, before PEFT has it.

    There is no hook for that. The method runs with its own names, so that no other thread meets a changed one.
    """

    def create(*args: Any, **kwargs: Any) -> Any:
        config = _create_lora_config(*args, **kwargs)
        prepare(config)
        return config

    method = PeftAdapterMixin.load_lora_adapter
    FunctionType(method.__code__, {**method.__globals__, "_create_lora_config": create})(model, tensors, **options)

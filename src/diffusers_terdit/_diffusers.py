"""Every private name of diffusers that this package imports or looks up.

`tests/test_diffusers.py` fails when one of them changes, and when another file uses one.
"""

from collections.abc import Iterable, Mapping
from enum import Enum

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin


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


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether hooks of accelerate or of diffusers' group offloading move the weights of the model or a part of it."""
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    return any(hasattr(module, "_hf_hook") for module in model.modules()) or any(
        registry.get_hook(_GROUP_OFFLOADING) is not None for registry in registries if registry is not None
    )


def has_hooks(model: torch.nn.Module) -> bool:
    """Whether offloading, step caches or layerwise casting keep the state of a run in the model or a part of it."""
    return is_offloaded(model) or any(
        registry.hooks
        for module in model.modules()
        if (registry := getattr(module, "_diffusers_hook", None)) is not None
    )


def reset_step_caches(model: ModelMixin) -> None:
    """Forget what diffusers' step caches keep between the steps of one run of a sampler."""
    model._reset_stateful_cache()

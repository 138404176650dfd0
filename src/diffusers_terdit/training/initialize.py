"""Start from a trained model: load it, transfer its weights, go to ternary by degrees."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import resolve_model
from ..layers import TernaryLinear
from ..models.transformer_terdit import TerDiTTransformer2DModel
from ..ops import reference
from .checkpointing import is_checkpoint, restore_tensors


def empty_transformer(config: Mapping[str, Any], **changes: Any) -> TerDiTTransformer2DModel:
    """Return a model on the CPU whose weights are yet to be loaded: it draws no random numbers."""
    with torch.device("meta"):
        empty = TerDiTTransformer2DModel.from_config(config, **changes)
    return empty.to_empty(device="cpu")


def load_transformer(path: str | os.PathLike, average: bool = False) -> TerDiTTransformer2DModel:
    """Load the transformer of a pipeline (folder, Hub repository, bundled name), a model folder or a `checkpoint-N`.

    Args:
        path (`str` or `os.PathLike`): Where it is, or the name of a bundled checkpoint.
        average (`bool`): Take the averaged weights of a `checkpoint-N`, not the raw ones.

    Raises:
        OSError: There is no model at `path`.
        ValueError: `path` is neither a folder nor a Hub id, and no bundled checkpoint's name.
    """
    folder = Path(path)
    if is_checkpoint(folder):
        model = empty_transformer(TerDiTTransformer2DModel.load_config(folder))
        restore_tensors(folder / f"{'ema' if average else 'model'}.safetensors", model.state_dict())
        return model.eval()
    folder = Path(resolve_model(str(path)))
    subfolder = None if (folder / "config.json").is_file() else "transformer"
    return TerDiTTransformer2DModel.from_pretrained(str(folder), subfolder=subfolder)


@torch.no_grad()
def transfer_weights(source: TerDiTTransformer2DModel, target: TerDiTTransformer2DModel) -> list[str]:
    """Copy weights between models of the same shape: full precision to ternary, the other way, or like to like.

    A ternary model takes the full-precision weights as its float weights, and the least-squares scale, which brings
    `scale * T` nearest to them. A packed source gives its codes; a full-precision model takes dense `scale * T`.

    Args:
        source ([`TerDiTTransformer2DModel`]): Trained, in any format. May be changed.
        target ([`TerDiTTransformer2DModel`]): Float format; written in place. May have other classes.

    Returns:
        `list[str]`: Parameters of `target` that keep their fresh values: the label table, where the classes differ.

    Raises:
        ValueError: The shapes differ elsewhere.
    """
    if source.config.ternary and not target.config.ternary:
        source = source.dequantize()
    elif source.config.weight_format == "packed":
        source.unpack()
    weights = source.state_dict()
    if target.config.ternary and not source.config.ternary:
        for name, layer in target.ternary_layers().items():
            weight, granularity = weights[f"{name}.weight"], layer.scale_granularity
            ternary = reference.round_to_ternary(weight, granularity)
            weights[f"{name}.weight_scale"] = reference.least_squares_scale(weight, ternary, granularity)
    fresh = []
    for name, value in target.state_dict().items():
        if name not in weights or weights[name].shape != value.shape:
            if name != "class_embed.weight":
                found = list(weights[name].shape) if name in weights else "absent"
                raise ValueError(
                    f"`{name}` is {list(value.shape)} in the new model, {found} in the one to start from. Give the new"
                    " one its sizes."
                )
            fresh.append(name)
        else:
            value.copy_(weights[name])
    return fresh


def gradual_ternarization(model: TerDiTTransformer2DModel) -> Callable[[float], None]:
    """Blend full-precision and ternary weights while a model that starts from full precision becomes ternary.

    Every ternary layer computes `(1 - strength) * W + strength * scale * T` instead of `scale * T` until the returned
    function is called with 1. The state dict does not change: an ordinary ternary model is saved.

    Returns:
        `Callable[[float], None]`: Sets the strength, 0 to 1; at 1 the layers are themselves again.

    Source: https://huggingface.co/blog/1_58_llm_extreme_quantization, with a straight-through gradient to both parts.
    """
    strength = torch.zeros((), device=model.device)  # a tensor, so that compiled layers need not be compiled again

    def forward(layer: TernaryLinear, hidden_states: Tensor) -> Tensor:
        ternary = TernaryLinear.forward(layer, hidden_states)
        dense = nn.functional.linear(hidden_states, layer.weight, layer.bias)
        return torch.lerp(dense.to(ternary.dtype), ternary, strength.to(ternary.dtype))

    layers = model.ternary_layers().values()
    for layer in layers:
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]

    def set_strength(value: float) -> None:
        strength.fill_(value)
        for layer in layers:
            if value >= 1:
                layer.__dict__.pop("forward", None)

    return set_strength

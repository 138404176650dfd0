"""Statistics to watch while a model trains: digest of the weights, ternary codes and scales, gate sizes."""

import torch
from torch import Tensor

from ..layers import TernaryLinear
from ..models.transformer_terdit import TerDiTTransformer2DModel
from ..ops import pack_ternary, reference, unpack_ternary
from ..storage.weights import state_dict_digest
from .sharding import call_full, full_tensor


def weights_digest(model: torch.nn.Module) -> str:
    """Return the sha256 of a model's tensors in the order of their names: names, dtypes, shapes and bytes."""
    return state_dict_digest(model.state_dict())


@torch.no_grad()
def packed_codes(model: TerDiTTransformer2DModel) -> dict[str, Tensor]:
    """Return the ternary weights, two bits each: layer name -> (N/4, K) uint8, on the CPU."""
    return {name: pack_ternary(_ternary(layer)).cpu() for name, layer in model.ternary_layers().items()}


def _ternary(layer: TernaryLinear) -> Tensor:
    if layer.weight_format == "packed":
        return layer.ternary_weight(torch.int8)
    return reference.ternarize(full_tensor(layer.weight.detach()), layer.scale_granularity).to(torch.int8)


@torch.no_grad()
def ternary_statistics(
    model: TerDiTTransformer2DModel, previous_codes: dict[str, Tensor] | None = None
) -> dict[str, float | list[str]]:
    """Return shares and sizes that show how the ternary weights develop.

    Args:
        model ([`TerDiTTransformer2DModel`]): Float or packed.
        previous_codes (`dict`, *optional*): An earlier `packed_codes(model)`, to count flips.

    Returns:
        `dict`: shares of all ternary weights: `zero_share`; in float format `near_threshold_share`, those within 5 %
        of the magnitude where rounding goes from 0 to 1; with `previous_codes`, `flip_share`, those whose code
        changed. Of the scales: `scale_min`, `scale_median`, `scale_max` (absolute) and `scale_negative_share`. And
        `dead_layers`, the names of layers whose codes are all 0. Empty for a model without ternary layers.
    """
    total = zeros = near = flips = 0
    scales, dead = [], []
    for name, layer in model.ternary_layers().items():
        codes = _ternary(layer)
        layer_zeros = int((codes == 0).sum())
        total += codes.numel()
        zeros += layer_zeros
        if layer.weight_format == "float":
            weight = full_tensor(layer.weight.detach())
            mean = reference.expand_scale(reference.absmean(weight, layer.scale_granularity), codes.shape[1])
            ratio = weight.float().abs() / (mean + reference.EPS)  # rounds to 0 below 0.5
            near += int(((ratio - 0.5).abs() <= 0.025).sum())
        if layer_zeros == codes.numel():
            dead.append(name)
        if previous_codes is not None:
            flips += int((codes.cpu() != unpack_ternary(previous_codes[name], torch.int8)).sum())
        scales.append(full_tensor(layer.weight_scale.detach()).flatten().cpu())
    if not total:
        return {}
    scale = torch.cat(scales)
    statistics: dict[str, float | list[str]] = {
        "zero_share": zeros / total,
        "scale_min": scale.abs().min().item(),
        "scale_median": scale.abs().median().item(),
        "scale_max": scale.abs().max().item(),
        "scale_negative_share": (scale < 0).float().mean().item(),
        "dead_layers": dead,
    }
    if model.config.weight_format == "float":
        statistics["near_threshold_share"] = near / total
    if previous_codes is not None:
        statistics["flip_share"] = flips / total
    return statistics


@torch.no_grad()
def gate_sizes(model: TerDiTTransformer2DModel, timestep: int = 500, max_labels: int = 16) -> dict[str, list[float]]:
    """Return how much each block adds: the root mean square of its two gates, at one timestep, over the first labels.

    Returns:
        `dict[str, list[float]]`: `gate_msa` and `gate_mlp`, one number per block.
    """
    labels = torch.arange(min(model.config.num_classes, max_labels), device=model.device)
    timesteps = torch.full_like(labels, timestep)
    timestep_proj = model.time_proj(timesteps).to(model.dtype)
    temb = call_full(model.time_embed, timestep_proj) + call_full(model.class_embed, labels)  # (B, E)
    gates: dict[str, list[float]] = {"gate_msa": [], "gate_mlp": []}
    for block in model.transformer_blocks:
        modulation = call_full(block.get_submodule("adaln"), temb)  # (B, 6 * D)
        _, _, gate_msa, _, _, gate_mlp = modulation.chunk(6, dim=-1)
        gates["gate_msa"].append(gate_msa.float().square().mean().sqrt().item())
        gates["gate_mlp"].append(gate_mlp.float().square().mean().sqrt().item())
    return gates

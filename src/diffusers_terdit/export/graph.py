"""The graph of a model that every format is written from, and the order of bits in which other software has codes."""

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..lora import refuse_adapters
from ..models.transformer_terdit import TerDiTTransformer2DModel
from ..ops import reference, unpack_ternary


LINEAR = torch.ops.diffusers_terdit.linear.default  # (input, weight_packed, weight_scale, bias, None)
INTEGER_LINEAR = torch.ops.diffusers_terdit.integer_linear.default
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class _TimeProjection(nn.Module):
    """`Timesteps` with constant frequencies: the last bit of somebody's `exp` counts a thousandfold in an angle."""

    frequencies: Tensor

    def __init__(self, channels: int):
        super().__init__()
        exponents = torch.arange(channels // 2, dtype=torch.float32) / (channels // 2)
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * exponents), persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class _Sample(nn.Module):
    """The transformer with tensors for inputs and output."""

    def __init__(self, transformer: TerDiTTransformer2DModel):
        super().__init__()
        self.transformer = copy.copy(transformer)  # shares its weights
        projection = _TimeProjection(transformer.time_proj.num_channels)
        self.transformer._modules = {**transformer._modules, "time_proj": projection}

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return self.transformer(hidden_states, timestep, class_labels, return_dict=False)[0]


def trace(transformer: TerDiTTransformer2DModel) -> ExportedProgram:
    """Return a model as a graph of torch's ops, in which a ternary layer is one node that holds its packed weight.

    Args:
        transformer ([`TerDiTTransformer2DModel`]): Packed, or full precision; float32, on the CPU. It stays as it is.

    Returns:
        `torch.export.ExportedProgram`: (hidden_states (B, C, h, w) float32, timestep (B,) float32, class_labels (B,)
            int64) -> sample (B, out_channels, h, w), for any batch and size.

    Raises:
        ValueError: The model is in float format, is not float32 on the CPU, or carries adapters.
    """
    refuse_adapters(transformer, "exporting it")
    config = transformer.config
    if config.ternary and config.weight_format != "packed":
        raise ValueError("This model is in float format, to train; what is exported is packed. Call `pack()` first.")
    kinds = {(p.device.type, p.dtype) for p in transformer.parameters() if p.is_floating_point()}
    if kinds != {("cpu", torch.float32)}:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        raise ValueError(f'Models are exported from the CPU, in float32; this is {found}. Call `to("cpu").float()`.')
    patch, batch = config.patch_size, Dim("batch", min=1)
    sides = {axis: patch * Dim(name, min=2) for axis, name in ((2, "rows"), (3, "columns"))}
    inputs = {
        "hidden_states": torch.zeros(2, config.in_channels, 4 * patch, 6 * patch),
        "timestep": torch.zeros(2),
        "class_labels": torch.zeros(2, dtype=torch.int64),
    }
    shapes = {"hidden_states": {0: batch, **sides}, "timestep": {0: batch}, "class_labels": {0: batch}}
    with torch.no_grad(), quiet():
        program = torch.export.export(_Sample(transformer).eval(), (), inputs, dynamic_shapes=shapes, strict=False)
        table: dict[Any, Any] = {}
        if INTEGER_LINEAR in {node.target for node in program.graph.nodes}:
            table[INTEGER_LINEAR] = _rounded(transformer)
        if config.num_key_value_heads is not None:
            table[ATTENTION] = _with_all_heads
        return program.run_decompositions(table) if table else program  # it takes as long as tracing


def _rounded(transformer: TerDiTTransformer2DModel):
    """Return what a layer with integer inputs is in the graph: rounding only where the model was trained with it."""
    trained = transformer.config.activation_bits

    def linear(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
        if trained is None:
            return LINEAR(input, weight_packed, weight_scale, bias, None)
        top = reference.LARGEST_CODE[trained]  # `reference.round_activations`, where nothing is in place
        step = input.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
        codes = (input / step).round().clamp(-top, top)
        output = LINEAR(codes, weight_packed, weight_scale, None, None) * step
        return output if bias is None else output + bias

    return linear


def _with_all_heads(query: Tensor, key: Tensor, value: Tensor, *args: Any, enable_gqa: bool = False, **kwargs: Any):
    """Attention in which every query head has its own key and value: OpenVINO knows no other."""
    if not enable_gqa:
        return NotImplemented
    repeats = query.shape[1] // key.shape[1]  # (B, H, L, D/H)
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    return ATTENTION(query, key, value, *args, **kwargs)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what exporters say about their own insides: deprecations, and optional packages that they miss."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


def codes_low_first(weight_packed: Tensor, zero: int, columns: int | None = None) -> Tensor:
    """Return the codes of a layer as other software packs them: row by row, the first input in the lowest bits.

    Args:
        weight_packed (`torch.Tensor`): (N/4, K), uint8, this package's order.
        zero (`int`): Code of 0: -1 is one less, +1 one more.
        columns (`int`, *optional*): Inputs to fill up to, with zeros; default K.

    Returns:
        `torch.Tensor`: (N * columns / 4,), uint8.
    """
    codes = unpack_ternary(weight_packed, torch.int8).add_(zero).view(torch.uint8)  # (N, K)
    if columns is not None:
        codes = nn.functional.pad(codes, (0, columns - codes.shape[1]), value=zero)
    first, second, third, fourth = codes.reshape(-1, 4).unbind(1)
    return first | second << 2 | third << 4 | fourth << 6

"""Ternary arithmetic. `reference` is the truth in plain PyTorch; this module registers it as torch ops.

`ternary_linear` is one op for every device and scale: torch picks the kernel, `torch.compile` sees one node, and autograd
gives gradients to the input, the scale and the bias (not to the packed codes, which are integers). Backward decodes the
weight again instead of keeping it. Imports torch only.
"""

import torch
from torch import Tensor
from torch.library import custom_op

from . import cpu, reference
from .reference import dequantize, pack_ternary, ternarize, unpack_ternary

__all__ = ["dequantize", "float_linear", "pack_ternary", "ternarize", "ternary_linear", "unpack_ternary"]


@custom_op("diffusers_terdit::ternary_linear", mutates_args=())
def _ternary_linear(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    return reference.ternary_linear(input, weight_packed, weight_scale, bias)


@custom_op("diffusers_terdit::ternary_linear_input_grad", mutates_args=())
def _ternary_linear_input_grad(grad: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    return reference.ternary_linear_input_grad(grad, weight_packed, weight_scale)


_ternary_linear.register_kernel("cpu")(cpu.ternary_linear)
_ternary_linear_input_grad.register_kernel("cpu")(cpu.ternary_linear_input_grad)


@_ternary_linear.register_fake
def _(input, weight_packed, weight_scale, bias):
    return input.new_empty(*input.shape[:-1], weight_packed.shape[0] * reference.CODES_PER_BYTE)


@_ternary_linear_input_grad.register_fake
def _(grad, weight_packed, weight_scale):
    return grad.new_empty(*grad.shape[:-1], weight_packed.shape[1])


def _save_for_backward(ctx, inputs, output):
    input, weight_packed, weight_scale, bias = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[2] else None, weight_packed, weight_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    input, weight_packed, weight_scale = ctx.saved_tensors
    input_grad = scale_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        input_grad = _ternary_linear_input_grad(grad, weight_packed, weight_scale)
    if ctx.needs_input_grad[2]:
        weight_grad = grad.flatten(0, -2).T @ input.flatten(0, -2)
        scale_grad = reference.scaled_linear_scale_grad(weight_grad, unpack_ternary(weight_packed), weight_scale)
    if ctx.needs_input_grad[3]:
        bias_grad = grad.flatten(0, -2).float().sum(0).to(ctx.bias_dtype)
    return input_grad, None, scale_grad, bias_grad


_ternary_linear.register_autograd(_backward, setup_context=_save_for_backward)


def _check(input: Tensor, in_features: int, out_features: int, weight_scale: Tensor) -> None:
    if input.shape[-1] != in_features:
        raise ValueError(f"`input` must have {in_features} features in its last dimension, got {tuple(input.shape)}.")
    matches = weight_scale.shape == (1,) or (
        weight_scale.dim() == 2 and weight_scale.shape[0] == out_features and in_features % weight_scale.shape[1] == 0
    )
    if not matches:
        raise ValueError(
            f"`weight_scale` must have shape (1,), ({out_features}, 1) or ({out_features}, {in_features} / group), got"
            f" {tuple(weight_scale.shape)}."
        )


def _autocast(input: Tensor) -> Tensor:
    device_type = input.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return input.to(torch.get_autocast_dtype(device_type))
    return input


def ternary_linear(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input @ (scale * T)^T + bias` with T decoded from two bits per weight.

    Args:
        input (`torch.Tensor`): (..., K), float. Cast to the autocast dtype inside autocast.
        weight_packed (`torch.Tensor`): (N/4, K), uint8, as `pack_ternary` gives it.
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32. Applied in float32.
        bias (`torch.Tensor`, *optional*): (N,), float.

    Returns:
        `torch.Tensor`: (..., N), the (autocast) dtype of `input`.

    Raises:
        ValueError: The last dimension of `input` or the shape of `weight_scale` does not fit.
    """
    _check(input, weight_packed.shape[1], weight_packed.shape[0] * reference.CODES_PER_BYTE, weight_scale)
    return _ternary_linear(_autocast(input), weight_packed, weight_scale, bias)


class _FloatLinear(torch.autograd.Function):
    """`scaled_linear` of a ternarized float weight. Keeps the weight, not its ternary copy, for backward."""

    @staticmethod
    def forward(ctx, input, weight, weight_scale, bias, scale_granularity):
        ctx.save_for_backward(input, weight, weight_scale)
        ctx.scale_granularity = scale_granularity
        ctx.bias_dtype = None if bias is None else bias.dtype
        ternary = ternarize(weight, scale_granularity).to(input.dtype)
        return reference.scaled_linear(input, ternary, weight_scale, bias)

    @staticmethod
    def backward(ctx, grad):
        input, weight, weight_scale = ctx.saved_tensors
        ternary = ternarize(weight, ctx.scale_granularity).to(grad.dtype)
        input_grad = weight_grad = scale_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            input_grad = reference.scaled_linear_input_grad(grad, ternary, weight_scale)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            product = grad.flatten(0, -2).T @ input.flatten(0, -2)  # (N, K)
            if ctx.needs_input_grad[2]:
                scale_grad = reference.scaled_linear_scale_grad(product, ternary, weight_scale).to(weight_scale.dtype)
            scale = reference.expand_scale(weight_scale, weight.shape[1])
            weight_grad = (product.float() * scale).to(weight.dtype)
        if ctx.needs_input_grad[3]:
            bias_grad = grad.flatten(0, -2).float().sum(0).to(ctx.bias_dtype)
        return input_grad, weight_grad, scale_grad, bias_grad, None


def float_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    scale_granularity: str | int = "tensor",
) -> Tensor:
    """`input @ (scale * ternarize(weight))^T + bias`, differentiable: what training computes.

    Args:
        input (`torch.Tensor`): (..., K), float. Cast to the autocast dtype inside autocast; the weight is ternarized
            from its own dtype first.
        weight (`torch.Tensor`): (N, K), float; its gradient is the ternary weight's (straight through).
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32.
        bias (`torch.Tensor`, *optional*): (N,), float.
        scale_granularity (`str` or `int`): What the ternarizing mean runs over: "tensor", "row" or inputs per group.

    Returns:
        `torch.Tensor`: (..., N), the (autocast) dtype of `input`. Equal to `ternary_linear` of the packed weight.
    """
    _check(input, weight.shape[1], weight.shape[0], weight_scale)
    return _FloatLinear.apply(_autocast(input), weight, weight_scale, bias, scale_granularity)

"""Ternary arithmetic. `reference` is the truth in plain PyTorch; this module registers it as torch ops.

`ternary_linear` (packed weight) and `float_linear` (float weight, ternarized on the fly: what training computes) are
one op each for every device and scale: torch picks the kernel, `torch.compile` sees one node, and autograd gives
gradients to the input, the scale, the bias and the float weight. Backward decodes or ternarizes again instead of
keeping the ternary matrix. `integer_linear` rounds the input to integers first, for speed. Imports torch only (numba
where a kernel wants it).
"""

from functools import wraps

import torch
from torch import Tensor
from torch.library import custom_op

from . import cpu, gpu, reference
from .reference import dequantize, pack_ternary, quantize_activations, ternarize, unpack_ternary


__all__ = [
    "dequantize",
    "float_linear",
    "has_integer_kernel",
    "integer_linear",
    "pack_ternary",
    "quantize_activations",
    "ternarize",
    "ternary_linear",
    "unpack_ternary",
]


def _outside_autocast(kernel):
    """Autocast ends at the op: inside, it would undo the kernels' own choice of dtype."""

    @wraps(kernel)
    def run(tensor, *args):
        with torch.autocast(tensor.device.type, enabled=False):
            return kernel(tensor, *args)

    return run


@custom_op("diffusers_terdit::linear", mutates_args=())
@_outside_autocast
def _linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    function = reference.ternary_linear if weight.dtype == torch.uint8 else reference.float_linear
    return function(input, weight, weight_scale, bias)


@custom_op("diffusers_terdit::linear_backward", mutates_args=())
@_outside_autocast
def _linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dtype == torch.uint8:
        ternary = unpack_ternary(weight, grad.dtype)
    else:
        ternary = ternarize(weight, reference.group_size(weight_scale, weight.shape[1])).to(grad.dtype)
    return reference.linear_backward(grad, input, ternary, weight_scale, need_input_grad)


for _device_type, _kernels in (("cpu", cpu), ("cuda", gpu)):
    _linear.register_kernel(_device_type)(_outside_autocast(_kernels.linear))
    _linear_backward.register_kernel(_device_type)(_outside_autocast(_kernels.linear_backward))


@custom_op("diffusers_terdit::integer_linear", mutates_args=())
@_outside_autocast
def _integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    return reference.integer_linear(input, weight_packed, weight_scale, bias, bits)


_integer_linear.register_kernel("cpu")(_outside_autocast(cpu.integer_linear))
_integer_linear.register_kernel("cuda")(_outside_autocast(gpu.integer_linear))


# On a GPU `torch.compile` sees these two and plain operations around them, which it fuses with their neighbours.


@custom_op("diffusers_terdit::product", mutates_args=())
@_outside_autocast
def _product(input: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    return gpu.product(input, weight_packed, weight_scale)


@custom_op("diffusers_terdit::integer_product", mutates_args=())
def _integer_product(rows: Tensor, weight_packed: Tensor) -> Tensor:
    return gpu.integer_product(rows, weight_packed)


def _out_features(weight: Tensor) -> int:
    return weight.shape[0] * (reference.CODES_PER_BYTE if weight.dtype == torch.uint8 else 1)


@_linear.register_fake
def _(input, weight, weight_scale, bias):
    return input.new_empty(*input.shape[:-1], _out_features(weight))


@_integer_linear.register_fake
def _(input, weight_packed, weight_scale, bias, bits):
    return input.new_empty(*input.shape[:-1], _out_features(weight_packed))


@_product.register_fake
def _(input, weight_packed, weight_scale):
    return input.new_empty(*input.shape[:-1], _out_features(weight_packed))


@_integer_product.register_fake
def _(rows, weight_packed):
    return rows.new_empty(len(rows), _out_features(weight_packed), dtype=torch.int32)


@_linear_backward.register_fake
def _(grad, input, weight, weight_scale, need_input_grad):
    input_grad = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if need_input_grad else grad.new_empty(0)
    if input is None:
        return input_grad, grad.new_empty(0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    weight_grad = weight.new_empty(_out_features(weight), weight.shape[1], dtype=torch.float32)
    return input_grad, weight_grad, torch.empty_like(weight_scale, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    input, weight, weight_scale, bias, *_ = inputs
    needs_input = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    ctx.save_for_backward(input if needs_input else None, weight, weight_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    input, weight, weight_scale = ctx.saved_tensors
    need_input, need_weight, need_scale, need_bias, *_ = ctx.needs_input_grad
    input_grad, weight_grad, scale_grad = _linear_backward(grad, input, weight, weight_scale, need_input)
    return (
        input_grad if need_input else None,
        weight_grad.to(weight.dtype) if need_weight else None,
        scale_grad.to(weight_scale.dtype) if need_scale else None,
        grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype) if need_bias else None,
    )


def _integer_backward(ctx, grad):
    return *_backward(ctx, grad), None  # straight through the rounding


def _save_for_product_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _product_backward(ctx, grad):
    weight_packed, weight_scale = ctx.saved_tensors
    inner, _ = reference.split_scale(weight_scale, grad.dtype)
    scale = torch.ones_like(weight_scale[:1]) if inner is None else inner
    input_grad, _, _ = _linear_backward(grad, None, weight_packed, scale, True)
    return input_grad, None, None


_linear.register_autograd(_backward, setup_context=_save_for_backward)
_product.register_autograd(_product_backward, setup_context=_save_for_product_backward)
_integer_linear.register_autograd(_integer_backward, setup_context=_save_for_backward)


def _checked_input(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Raise a `ValueError` on shapes and dtypes that do not fit; cast the input as autocast would."""
    if weight.dim() != 2:
        raise ValueError(f"The weight must be a matrix, got shape {tuple(weight.shape)}.")
    out_features, in_features = _out_features(weight), weight.shape[1]
    if input.dim() == 0 or input.shape[-1] != in_features or not input.is_floating_point():
        raise ValueError(
            f"`input` must be floating point with {in_features} features in its last dimension, got"
            f" {tuple(input.shape)}, {input.dtype}."
        )
    shape, grouped = tuple(weight_scale.shape), weight_scale.dim() == 2
    fits = shape == (1,) or (grouped and shape[0] == out_features and shape[1] > 0 and in_features % shape[1] == 0)
    if not fits or not weight_scale.is_floating_point():
        raise ValueError(
            f"`weight_scale` must be floating point of shape (1,), ({out_features}, 1) or ({out_features},"
            f" {in_features} / group), got {shape}, {weight_scale.dtype}."
        )
    if bias is not None and (tuple(bias.shape) != (out_features,) or not bias.is_floating_point()):
        raise ValueError(
            f"`bias` must be floating point of shape ({out_features},), got {tuple(bias.shape)}, {bias.dtype}."
        )
    device_type = input.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return input.to(torch.get_autocast_dtype(device_type)) if autocast and input.dtype != torch.float64 else input


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
        ValueError: A shape or dtype does not fit.
    """
    if weight_packed.dtype != torch.uint8:
        raise ValueError(f"`weight_packed` must be uint8, as `pack_ternary` gives it, got {weight_packed.dtype}.")
    input = _checked_input(input, weight_packed, weight_scale, bias)
    if _is_fused(input) and not (torch.is_grad_enabled() and weight_scale.requires_grad):
        _, outer = reference.split_scale(weight_scale, input.dtype)
        return reference.scale_and_shift(_product(input, weight_packed, weight_scale), outer, bias).to(input.dtype)
    return _linear(input, weight_packed, weight_scale, bias)


def float_linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`input @ (scale * ternarize(weight))^T + bias`, differentiable: what training computes.

    Args:
        input (`torch.Tensor`): (..., K), float. Cast to the autocast dtype inside autocast; the weight is ternarized
            from its own dtype first.
        weight (`torch.Tensor`): (N, K), float; its gradient is the ternary weight's (straight through). The
            ternarizing mean runs over what one scale covers.
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32. Applied in float32.
        bias (`torch.Tensor`, *optional*): (N,), float.

    Returns:
        `torch.Tensor`: (..., N), the (autocast) dtype of `input`. Equal to `ternary_linear` of the packed weight.

    Raises:
        ValueError: A shape or dtype does not fit.
    """
    if not weight.is_floating_point():
        raise ValueError(f"`weight` must be floating point, got {weight.dtype}; `ternary_linear` takes packed codes.")
    input = _checked_input(input, weight, weight_scale, bias)
    return _linear(input, weight, weight_scale, bias)


def integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None, bits: int = 16
) -> Tensor:
    """`ternary_linear` with each row of the input rounded to integers, whose products with T are summed exactly.

    The gradient is that of `ternary_linear`. Where `has_integer_kernel` is false this is slow.

    Args:
        input (`torch.Tensor`): (..., K), float; K up to 65,536 with 16 bits. Cast to the autocast dtype inside
            autocast. A row with NaN or infinity gives a row of NaN.
        weight_packed (`torch.Tensor`): (N/4, K), uint8.
        weight_scale (`torch.Tensor`): (1,) or (N, 1), float32.
        bias (`torch.Tensor`, *optional*): (N,), float.
        bits (`int`, defaults to 16): 16: the rounding is 12 to 75 times finer than bfloat16's arithmetic. 8: relative
            error around 1 %.

    Returns:
        `torch.Tensor`: (..., N), the (autocast) dtype of `input`; float32 arithmetic after the integer sums.

    Raises:
        ValueError: A shape, dtype or number of bits does not fit.
    """
    if weight_packed.dtype != torch.uint8:
        raise ValueError(f"`weight_packed` must be uint8, as `pack_ternary` gives it, got {weight_packed.dtype}.")
    input = _checked_input(input, weight_packed, weight_scale, bias)
    if not reference.takes_integers(weight_scale, input.shape[-1], bits):
        raise ValueError(
            "Integer activations need 8 bits, or 16 and at most 65,536 inputs, and one scale per matrix or row; got"
            f" {bits=}, {input.shape[-1]} inputs, `weight_scale` {tuple(weight_scale.shape)}."
        )
    if _is_fused(input) and not torch.is_grad_enabled():
        return gpu.integer_linear(input, weight_packed, weight_scale, bias, bits, multiply=_integer_product)
    return _integer_linear(input, weight_packed, weight_scale, bias, bits)


def _is_fused(input: Tensor) -> bool:
    """Whether `torch.compile` is to fuse what surrounds a matmul: on a GPU it costs as much as a tenth of it."""
    return torch.compiler.is_compiling() and input.device.type == "cuda"


@torch.compiler.assume_constant_result
def has_integer_kernel(device_type: str) -> bool:
    """Whether `integer_linear` is fast on such a device: a CPU with AVX2 and numba, a GPU with 8-bit tensor cores."""
    if device_type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= gpu.OLDEST
    return device_type == "cpu" and cpu.integer_kernels() is not None

"""Ternary arithmetic as torch ops: schema, fake tensors, autograd, input checks.

`ternary_linear` (packed weight) and `float_linear` (float weight, ternarized on the fly: what training computes) are
one op for every device and scale: torch picks the kernel, `torch.compile` sees one node, and autograd gives
gradients to the input, the scale, the bias and the float weight. Backward decodes or ternarizes again instead of
keeping the ternary matrix. `integer_linear` rounds the input to integers first, for speed. `linear` is what a layer
calls: it asks `choose_kernel` which of them runs.

`reference` computes each op on any device. Kernels for a device register themselves here with `register_kernels`.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library, infer_schema, register_autograd, register_fake, register_vmap
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference


logger = logging.getLogger(__name__)


# ---- rounding ----


def straight_through(grad: Tensor) -> Tensor:
    """Return the gradient of a float weight, given that of its ternary matrix: the same, unclipped.

    Source: Bengio et al. (https://arxiv.org/abs/1308.3432), as TerDiT (https://arxiv.org/abs/2405.14854) uses it.
    """
    return grad


class _Ternarize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale_granularity):
        return reference.ternarize(weight, scale_granularity)

    @staticmethod
    def backward(ctx, grad):
        return straight_through(grad), None


def ternarize(weight: Tensor, scale_granularity: str | int = "tensor") -> Tensor:
    """Round a weight to {-1, 0, +1}: `round(W / (mean|W| + 1e-6))`, half to even, clamped; straight-through gradient.

    Args:
        weight (`torch.Tensor`): (N, K), float. Computed in float32 whatever its dtype.
        scale_granularity (`str` or `int`): What the mean runs over: "tensor", "row", or groups of this many inputs.

    Returns:
        `torch.Tensor`: (N, K), `weight`'s dtype, values in {-1, 0, +1}.

    Raises:
        ValueError: `weight` is not a floating-point matrix, is empty, or K is not a multiple of the group.

    Source: TerDiT section 3.1 (https://arxiv.org/abs/2405.14854).
    """
    return _Ternarize.apply(weight, scale_granularity)


class _QuantizeActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, bits):
        codes, step = reference.quantize_activations(input, bits)
        ctx.save_for_backward(step)
        ctx.mark_non_differentiable(step)
        return codes, step

    @staticmethod
    def backward(ctx, grad, _):
        (step,) = ctx.saved_tensors
        return (grad.float() / step).to(grad.dtype), None  # the codes are `input / step`, as if nothing were rounded


def quantize_activations(input: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round each row (token) to signed integers: `input ~ codes * step`, half to even; straight-through gradient.

    Args:
        input (`torch.Tensor`): (..., K), float. Computed in float32 whatever its dtype.
        bits (`int`, defaults to 8): 8 gives codes from -127 to 127, 16 from -32639 to 32639 (which float32 holds, half
            precision does not).

    Returns:
        Two `torch.Tensor`: the codes (..., K), integers in `input`'s dtype, and the step (..., 1), float32: the row's
        largest absolute value over the largest code.

    Raises:
        ValueError: `bits` is neither 8 nor 16.

    Source: BitNet b1.58, section 2 (https://arxiv.org/abs/2402.17764).
    """
    return _QuantizeActivations.apply(input, bits)


# ---- the ops ----

_library = Library("diffusers_terdit", "DEF")
# Weights of one input that one matmul multiplies: 50 MiB in half precision, what the L2 of an H100 holds. A wider
# layer fills the GPU by itself.
MULTIPLIED_TOGETHER = 25 * 2**20


def _outside_autocast(kernel):
    """End autocast at the op: inside, it would undo the kernels' own choice of dtype."""

    @wraps(kernel)
    def run(tensor, *args):
        if not torch.is_autocast_enabled(tensor.device.type):  # entering it takes as long as the launch of a kernel
            return kernel(tensor, *args)
        with torch.autocast(tensor.device.type, enabled=False):
            return kernel(tensor, *args)

    return run


def _op(kernel):
    """Define the op of a function's name, which the function computes on any device; return it.

    torch's `custom_op` takes 10 us longer in each call.
    """
    name = kernel.__name__.removeprefix("_")
    _library.define(name + infer_schema(kernel, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _register(name, "CompositeExplicitAutograd", kernel)
    return getattr(getattr(torch.ops, _library.ns), name).default


def _register(name: str, key: str, kernel: Callable) -> None:
    _library.impl(name, _outside_autocast(kernel), key)


@_op
def _linear(
    input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, float_weight: Tensor | None
) -> Tensor:
    """`float_weight` only gets a gradient: `weight` is its codes."""
    function = reference.ternary_linear if weight.dtype == torch.uint8 else reference.float_linear
    return function(input, weight, weight_scale, bias)


@_op
def _pack(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    return reference.pack_float(weight, weight_scale)


@_op
def _linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dtype == torch.uint8:
        ternary = reference.unpack_ternary(weight, grad.dtype)
    else:
        granularity = reference.granularity_of(weight_scale, weight.shape[1])
        ternary = reference.round_to_ternary(weight, granularity).to(grad.dtype)
    return reference.linear_backward(grad, input, ternary, weight_scale, need_input_grad)


@_op
def _integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    return reference.integer_linear(input, weight_packed, weight_scale, bias, bits)


@_op
def _linears(
    input: Tensor,
    weights_packed: list[Tensor],
    weight_scales: list[Tensor],
    biases: list[Tensor | None],
    bits: int | None,
) -> list[Tensor]:
    """`_linear` or, with `bits`, `_integer_linear` of one input and each of several packed weights. No gradients."""
    return reference.linears(input, weights_packed, weight_scales, biases, bits)


# On a GPU `torch.compile` sees these and plain operations around them, which it fuses with their neighbors.


@_op
def _product(input: Tensor, weight_packed: Tensor, factor: Tensor | None, float_weight: Tensor | None) -> Tensor:
    """`float_weight` only gets a gradient, as for `_linear`."""
    return reference.product(input, weight_packed, factor)


@_op
def _products(input: Tensor, weights_packed: list[Tensor], factors: list[Tensor | None]) -> Tensor:
    """`_product` of one input and each of several weights, next to each other: (..., sum of N). No gradients."""
    return reference.products(input, weights_packed, factors)


@_op
def _product_backward(
    grad: Tensor, input: Tensor | None, weight_packed: Tensor, factor: Tensor | None, need_input_grad: bool
) -> tuple[Tensor, Tensor]:
    return reference.product_backward(grad, input, weight_packed, factor, need_input_grad)


@_op
def _integer_product(rows: Tensor, weight_packed: Tensor) -> Tensor:
    return reference.integer_product(rows, weight_packed)


@_op
def _round_to_bytes(input: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return reference.round_to_bytes(input, bits)


@_op
def _fp8_product(rows: Tensor, step: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    return reference.fp8_product(rows, step, weight_packed, weight_scale)


def is_fused(input: Tensor) -> bool:
    """Whether `torch.compile` is to fuse what surrounds a matmul, which on a GPU costs up to a tenth of it."""
    return torch.compiler.is_compiling() and input.device.type == "cuda"


def _out_features(weight: Tensor) -> int:
    return weight.shape[0] * (reference.CODES_PER_BYTE if weight.dtype == torch.uint8 else 1)


@register_fake(_pack.name(), lib=_library)
def _(weight, weight_scale):
    packed = weight.new_empty(weight.shape[0] // reference.CODES_PER_BYTE, weight.shape[1], dtype=torch.uint8)
    return packed, torch.empty_like(weight_scale, dtype=torch.float32)


@register_fake(_linear.name(), lib=_library)
def _(input, weight, weight_scale, bias, float_weight):
    return input.new_empty(*input.shape[:-1], _out_features(weight))


@register_fake(_integer_linear.name(), lib=_library)
def _(input, weight_packed, weight_scale, bias, bits):
    return input.new_empty(*input.shape[:-1], _out_features(weight_packed))


@register_fake(_linears.name(), lib=_library)
def _(input, weights_packed, weight_scales, biases, bits):
    return [input.new_empty(*input.shape[:-1], _out_features(weight)) for weight in weights_packed]


@register_vmap(_linears.name(), lib=_library)
def _(info, in_dims, input, *layers):
    outputs = _linears(input.movedim(in_dims[0], 0), *layers)  # more rows
    return outputs, [0] * len(outputs)


@register_fake(_product.name(), lib=_library)
def _(input, weight_packed, factor, float_weight):
    return input.new_empty(*input.shape[:-1], _out_features(weight_packed))


@register_fake(_products.name(), lib=_library)
def _(input, weights_packed, factors):
    return input.new_empty(*input.shape[:-1], sum(map(_out_features, weights_packed)))


@register_fake(_product_backward.name(), lib=_library)
def _(grad, input, weight_packed, factor, need_input_grad):
    in_features = weight_packed.shape[1]
    input_grad = grad.new_empty(*grad.shape[:-1], in_features) if need_input_grad else grad.new_empty(0)
    shape = (0,) if input is None else (_out_features(weight_packed), in_features)
    return input_grad, grad.new_empty(shape, dtype=torch.float32)


@register_fake(_integer_product.name(), lib=_library)
def _(rows, weight_packed):
    return rows.new_empty(len(rows), _out_features(weight_packed), dtype=torch.int32)


@register_fake(_round_to_bytes.name(), lib=_library)
def _(input, bits):
    rows, columns = input.shape
    codes = input.new_empty(rows * bits // 8, columns, dtype=torch.int8)
    return codes, input.new_empty(rows, 1, dtype=torch.float32)


@register_fake(_fp8_product.name(), lib=_library)
def _(rows, step, weight_packed, weight_scale):
    return rows.new_empty(len(rows), _out_features(weight_packed), dtype=torch.bfloat16)


@register_fake(_linear_backward.name(), lib=_library)
def _(grad, input, weight, weight_scale, need_input_grad):
    input_grad = grad.new_empty(*grad.shape[:-1], weight.shape[1]) if need_input_grad else grad.new_empty(0)
    if input is None:
        return input_grad, grad.new_empty(0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    weight_grad = weight.new_empty(_out_features(weight), weight.shape[1], dtype=torch.float32)
    return input_grad, weight_grad, torch.empty_like(weight_scale, dtype=torch.float32)


def _save_for_backward(ctx, inputs, output):
    input, weight, weight_scale, bias, *others = inputs
    needs_input = any(ctx.needs_input_grad[position] for position in (1, 2, 4))
    ctx.save_for_backward(input if needs_input else None, weight, weight_scale)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight_dtype = others[0].dtype if ctx.needs_input_grad[4] else weight.dtype


def _backward(ctx, grad):
    """Gradients of `_linear` and of `_integer_linear`, as if its input were not rounded."""
    input, weight, weight_scale = ctx.saved_tensors
    need_input, need_weight, need_scale, need_bias, need_float_weight = ctx.needs_input_grad
    input_grad, ternary_grad, scale_grad = _linear_backward(grad, input, weight, weight_scale, need_input)
    if need_weight or need_float_weight:
        ternary_grad = straight_through(ternary_grad).to(ctx.weight_dtype)
    return (
        input_grad if need_input else None,
        ternary_grad if need_weight else None,
        scale_grad.to(weight_scale.dtype) if need_scale else None,
        grad.reshape(-1, grad.shape[-1]).float().sum(0).to(ctx.bias_dtype) if need_bias else None,
        ternary_grad if need_float_weight else None,
    )


def _save_for_product_backward(ctx, inputs, output):
    input, weight_packed, factor, float_weight = inputs
    ctx.save_for_backward(input if ctx.needs_input_grad[3] else None, weight_packed, factor)
    ctx.weight_dtype = None if float_weight is None else float_weight.dtype


def _gradients_of_product(ctx, grad):
    input, weight_packed, factor = ctx.saved_tensors
    need_input, _, _, need_float_weight = ctx.needs_input_grad
    input_grad, ternary_grad = _product_backward(grad, input, weight_packed, factor, need_input)
    weight_grad = straight_through(ternary_grad).to(ctx.weight_dtype) if need_float_weight else None
    return input_grad if need_input else None, None, None, weight_grad


register_autograd(_linear.name(), _backward, lib=_library, setup_context=_save_for_backward)
register_autograd(_product.name(), _gradients_of_product, lib=_library, setup_context=_save_for_product_backward)
register_autograd(_integer_linear.name(), _backward, lib=_library, setup_context=_save_for_backward)


# ---- which kernel runs ----


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


class Choice(NamedTuple):
    """The kernel that computes a layer on a device, and why it is this one."""

    kernel: str
    bits: int | str | None  # of the integers that it rounds each row of the input to, or "fp8"; `None`: it does not
    reason: str


class Case(NamedTuple):
    """A layer and its input, as far as the choice of a kernel depends on them."""

    dtype: torch.dtype  # of the matmul: autocast's, or the input's
    out_features: int  # N
    in_features: int  # K
    scale_granularity: str | int
    packed: bool
    requested_bits: int | str | None  # the caller's choice of speed: 8, 16, "fp8", None or "auto"
    trained_bits: int | None  # what the layer was trained with: 8 or None

    def why_exact(self, bits: int | None) -> str | None:
        """Return why no device computes this layer in integers of these bits, or `None` where one may."""
        if bits is None and self.requested_bits == "fp8":
            return (
                "fp8 needs a GPU of compute capability 8.9, and packed layers with sizes in multiples of 16 and one"
                " scale per matrix or row"
            )
        if bits is None:
            return f"{name_of(self.dtype)} is not rounded unless asked for"
        if not self.packed:
            return "a float weight is ternarized in every call"
        if self.trained_bits and self.scale_granularity not in ("tensor", "row"):
            return "integers have a step per group, and the layer was trained with one per row"
        if self.in_features > reference.MOST_INPUTS[bits]:
            return f"int32 does not hold sums of {self.in_features} inputs of {bits} bits"
        return None

    def why_rounded(self) -> str:
        """Return why this layer is computed in integers."""
        if self.trained_bits:
            return f"the layer was trained with {self.trained_bits}-bit inputs"
        if self.requested_bits == "auto":
            return "16-bit integers are faster and more accurate than bfloat16 arithmetic"
        return f"{self.requested_bits}-bit inputs were asked for"


class _Device(NamedTuple):
    choose: Callable[[torch.device, Case], Choice]
    check_integers: Callable[[int], None]
    packs_first: Callable[[torch.dtype], bool]
    has_products: bool


_devices: dict[str, _Device] = {}


def register_kernels(
    device_type: str,
    choose: Callable[[torch.device, Case], Choice],
    check_integers: Callable[[int], None],
    linear: Callable[..., Tensor],
    linear_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    integer_linear: Callable[..., Tensor],
    product: Callable[..., Tensor] = reference.product,
    product_backward: Callable[..., tuple[Tensor, Tensor]] = reference.product_backward,
    integer_product: Callable[..., Tensor] = reference.integer_product,
    round_to_bytes: Callable[..., tuple[Tensor, Tensor]] = reference.round_to_bytes,
    fp8_product: Callable[..., Tensor] = reference.fp8_product,
    products: Callable[..., Tensor] | None = None,
    pack: Callable[..., tuple[Tensor, Tensor]] = reference.pack_float,
    packs_first: Callable[[torch.dtype], bool] = lambda dtype: False,
    linears: Callable[..., list[Tensor]] = reference.linears,
) -> None:
    """Let a type of device compute the ops with its own kernels.

    Args:
        device_type (`str`): "cpu", "cuda", ...
        choose (`Callable`): (device, case) -> the [`Choice`] that these kernels make.
        check_integers (`Callable`): (bits) -> nothing; see `check_integers`.
        linear (`Callable`): Kernel of the op of the same name, as are those below.
        linear_backward (`Callable`): See `reference.linear_backward`.
        integer_linear (`Callable`): See `reference.integer_linear`.
        product (`Callable`): See `reference.product`.
        product_backward (`Callable`): See `reference.product_backward`.
        integer_product (`Callable`): See `reference.integer_product`.
        round_to_bytes (`Callable`): See `reference.round_to_bytes`.
        fp8_product (`Callable`): See `reference.fp8_product`.
        products (`Callable`, *optional*): See `reference.products`. `None`: exact layers of one input are `linears`.
        pack (`Callable`): See `reference.pack_float`.
        packs_first (`Callable`): (dtype) -> whether a float weight is packed, once for the product and its gradients.
        linears (`Callable`): See `reference.linears`. Exact ones are asked for where there are no `products`.
    """
    _devices[device_type] = _Device(choose, check_integers, packs_first, products is not None)

    def linear_of_codes(input, weight, weight_scale, bias, float_weight):
        return linear(input, weight, weight_scale, bias)

    def product_of_codes(input, weight_packed, factor, float_weight):
        return product(input, weight_packed, factor)

    kernels: dict[str, Callable] = {
        "linear": linear_of_codes,
        "linear_backward": linear_backward,
        "integer_linear": integer_linear,
        "product": product_of_codes,
        "product_backward": product_backward,
        "integer_product": integer_product,
        "round_to_bytes": round_to_bytes,
        "fp8_product": fp8_product,
        "pack": pack,
        "linears": linears,
    }
    if products is not None:
        kernels["products"] = products
    for name, kernel in kernels.items():
        _register(name, device_type.upper(), kernel)


@cache
def warn_once(message: str) -> None:
    """Log a warning the first time."""
    logger.warning(message)


@cache
def decide(device: torch.device, *case: Any) -> Choice:
    """Return the choice for a [`Case`] and log it at level DEBUG; `choose_kernel` names the arguments."""
    given = Case(*case)
    if given.requested_bits not in (None, 8, 16, "fp8", "auto"):
        raise ValueError(f'`requested_bits` must be None, 8, 16, "fp8" or "auto", got {given.requested_bits!r}.')
    if device.type in _devices:
        choice = _devices[device.type].choose(device, given)
    else:
        choice = Choice("reference", None, f"there are no kernels for {device.type}")
    logger.debug(f"{given} on {device}: {choice}")
    return choice


@torch.compiler.assume_constant_result
def choose_kernel(
    device: torch.device,
    dtype: torch.dtype,
    out_features: int,
    in_features: int,
    scale_granularity: str | int = "tensor",
    packed: bool = True,
    requested_bits: int | str | None = "auto",
    trained_bits: int | None = None,
) -> Choice:
    """Return which kernel `linear` runs, and why. A line at level DEBUG says so, once for each distinct case.

    Args:
        device (`torch.device`): Of the layer.
        dtype (`torch.dtype`): Of the input, or autocast's.
        out_features (`int`): N.
        in_features (`int`): K.
        scale_granularity (`str` or `int`): "tensor", "row", or inputs per group.
        packed (`bool`): Two bits per weight; `False`: float format.
        requested_bits (`int`, `str` or `None`): As in `linear`.
        trained_bits (`int`, *optional*): As in `linear`.

    Returns:
        [`Choice`]: Name of the kernel, bits of the integers that it rounds the input to or `None`, and the reason.

    Raises:
        ValueError: Other `requested_bits`.
    """
    return decide(device, dtype, out_features, in_features, scale_granularity, packed, requested_bits, trained_bits)


@torch.compiler.assume_constant_result
def _packs_first(device_type: str, dtype: torch.dtype) -> bool:
    return device_type in _devices and _devices[device_type].packs_first(dtype)


@torch.compiler.assume_constant_result
def _has_products(device_type: str) -> bool:
    return device_type in _devices and _devices[device_type].has_products


def has_integer_kernel(device_type: str) -> bool:
    """Whether `integer_linear` is fast on such a device: a CPU with AVX2 and numba, a GPU with 8-bit tensor cores."""
    return choose_kernel(torch.device(device_type), torch.float32, 8, 8, requested_bits=8).bits is not None


def check_integers(device_type: str, bits: int | str) -> None:
    """Warn, once, where a caller asks for integers, or "fp8", and no kernel of the device computes in them.

    Raises:
        ImportError: A package is missing that such a kernel needs.
    """
    if isinstance(bits, str):
        choice = choose_kernel(torch.device(device_type), torch.bfloat16, 16, 16, requested_bits=bits)
        if choice.bits is None:
            warn_once(f"Ternary layers compute exactly on this {device_type} device: {choice.reason}.")
    elif device_type in _devices:
        _devices[device_type].check_integers(bits)
    else:
        warn_once(f"There are no integer kernels for this {device_type} device; ternary layers compute exactly.")


# ---- what is called ----


def _check_packed(weight_packed: Tensor) -> None:
    if weight_packed.dtype != torch.uint8:
        raise ValueError(f"`weight_packed` must be uint8, as `pack_ternary` gives it, got {weight_packed.dtype}.")


def _check_float(weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"`weight` must be floating point, got {weight.dtype}; `ternary_linear` takes packed codes.")


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


_held_codes: list[WeakTensorKeyDictionary] = []  # weight -> its state, and what `_pack` gave


@contextmanager
def held_codes() -> Iterator[None]:
    """Ternarize and pack each float weight once inside: for the micro-batches of an optimizer step.

    The codes stay until the end, two bits per weight. They are made again after an optimizer's step, and where torch
    sees a weight change. It does not see a change through `.data`. Compiled code packs in every call.
    """
    held = WeakTensorKeyDictionary()
    hook = register_optimizer_step_post_hook(lambda *_: held.clear())  # fused ones change weights unseen
    _held_codes.append(held)
    try:
        yield
    finally:
        _held_codes[:] = [other for other in _held_codes if other is not held]
        hook.remove()


def _codes_of(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`_pack`, or what it gave inside [`held_codes`]."""
    passing = torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or weight.is_inference()
    if passing or not _held_codes or not weight.requires_grad:
        return _pack(weight.detach(), weight_scale.detach())
    held, state = _held_codes[-1], (weight._version, weight.device, weight_scale.shape)
    before, codes = held.get(weight, (None, None))
    if before != state:
        codes = _pack(weight.detach(), weight_scale.detach())
        held[weight] = state, codes
    return codes


def _exact(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The op for either format of the weight."""
    float_weight = None
    whole = weight.dtype != torch.uint8 and len(weight) % reference.CODES_PER_BYTE == 0
    if whole and _packs_first(input.device.type, input.dtype):
        packed, mean = _codes_of(weight, weight_scale)
        # There is no code for NaN: the mean of a weight that is not finite is not, either.
        weight_scale, float_weight, weight = weight_scale + 0 * mean, weight, packed
    inner_is_trained = torch.is_grad_enabled() and weight_scale.requires_grad and reference.is_grouped(weight_scale)
    if is_fused(input) and weight.dtype == torch.uint8 and not inner_is_trained:
        inner, outer = reference.split_scale(weight_scale, input.dtype)
        return _finish(_product(input, weight, inner, float_weight), outer, bias)
    return _linear(input, weight, weight_scale, bias, float_weight)


def _finish(product: Tensor, outer: Tensor | None, bias: Tensor | None) -> Tensor:
    """`reference.scale_and_shift` for autograd and the compiler, in the dtype of `product` (..., N)."""
    output = reference.at_least_float32(product)
    output = output if outer is None else output * outer.reshape(-1)  # (..., N) * (1,) or (N,)
    return (output if bias is None else output + bias).to(product.dtype)


def _exact_of_packed(input: Tensor, layers: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
    """`_exact` of packed layers without gradients: those that are small are multiplied together."""
    outputs: list[Tensor] = []
    for together in _groups(layers):
        scales = [reference.split_scale(weight_scale, input.dtype) for _, weight_scale, _ in together]
        weights = [weight_packed for weight_packed, _, _ in together]
        product = _products(input, weights, [inner for inner, _ in scales])
        parts = product.split([_out_features(weight) for weight in weights], dim=-1)
        finish = _finish if is_fused(input) else reference.finish  # in place, which would keep a compiler from fusing
        outputs += [
            finish(part, outer, bias) for part, (_, outer), (_, _, bias) in zip(parts, scales, together, strict=True)
        ]
    return outputs


def _groups(layers: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[list[tuple[Tensor, Tensor, Tensor | None]]]:
    """Split packed layers, in their order, into groups of `MULTIPLIED_TOGETHER` weights at most, or of one layer."""
    groups: list[list[tuple[Tensor, Tensor, Tensor | None]]] = []
    left = 0
    for layer in layers:
        size = reference.CODES_PER_BYTE * layer[0].numel()
        if size > left:
            groups.append([])
            left = MULTIPLIED_TOGETHER
        groups[-1].append(layer)
        left -= size
    return groups


def _in_integers(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    if is_fused(input) and not torch.is_grad_enabled() and not reference.is_grouped(weight_scale):
        return _in_fused_integers(input, [(weight_packed, weight_scale, bias)], bits)[0]
    return _integer_linear(input, weight_packed, weight_scale, bias, bits)


def _in_fused_integers(input: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]], bits: int) -> list[Tensor]:
    return reference.integer_linears_by_bytes(input, weights, bits, _round_to_bytes, _integer_product)


def _in_fp8(input: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
    rows, step = reference.round_to_fp8(input.reshape(-1, input.shape[-1]))
    outputs = []
    for weight_packed, weight_scale, bias in weights:
        output = _fp8_product(rows, step, weight_packed, weight_scale)
        output = (output if bias is None else output.float() + bias).to(input.dtype)
        outputs.append(output.reshape(*input.shape[:-1], output.shape[-1]))
    return outputs


def _wants_gradients(input: Tensor, layers: list[tuple[Tensor, Tensor, Tensor | None]]) -> bool:
    tensors = [input, *(tensor for layer in layers for tensor in layer[1:] if tensor is not None)]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _bits(
    cast: Tensor, weight: Tensor, weight_scale: Tensor, requested_bits: int | str | None, trained_bits: int | None
) -> int | str | None:
    # `len(range(...))` makes ints of sizes for which `torch.compile` has symbols
    out_features, in_features = len(range(_out_features(weight))), len(range(weight.shape[1]))
    granularity = reference.granularity_of(weight_scale, in_features)
    packed = weight.dtype == torch.uint8
    return choose_kernel(
        cast.device, cast.dtype, out_features, in_features, granularity, packed, requested_bits, trained_bits
    ).bits


def _compute(
    input: Tensor,
    cast: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    bits: int | str | None,
    trained_bits: int | None,
) -> Tensor:
    """`linear` of the bits that were chosen; `cast` is `input` as autocast casts it."""
    layer = (weight, weight_scale, bias)
    if isinstance(bits, str):
        return _exact(cast, *layer) if _wants_gradients(cast, [layer]) else _in_fp8(cast, [layer])[0]
    if bits is not None:
        return _in_integers(cast, weight, weight_scale, bias, bits)
    if trained_bits is None:
        return _exact(cast, weight, weight_scale, bias)
    codes, step = quantize_activations(input, trained_bits)  # (..., K), (..., 1)
    if cast.dtype == torch.float16:
        power, step = reference.split_power(step, 9)  # a code times it is a normal number of float16, too
        codes = codes * power.to(codes.dtype)
    output = _exact(codes.to(cast.dtype), weight, weight_scale, None) * step  # float32
    return (output if bias is None else output + bias).to(input.dtype)


def linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    requested_bits: int | str | None = "auto",
    trained_bits: int | None = None,
) -> Tensor:
    """`input @ (scale * T)^T + bias`, by the kernel that `choose_kernel` names: what a layer computes.

    Args:
        input (`torch.Tensor`): (..., K), float. Cast to the autocast dtype inside autocast.
        weight (`torch.Tensor`): (N/4, K) uint8, packed; or (N, K) float, ternarized on the fly.
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32. Applied in float32.
        bias (`torch.Tensor`, *optional*): (N,), float.
        requested_bits (`int`, `str` or `None`): 8 or 16 lets a kernel round each row of the input to integers, for
            speed, and "fp8" to float8_e4m3fn, where no gradient is wanted; `None` does not; "auto" does where that is
            at least as accurate as arithmetic in the dtype.
        trained_bits (`int`, *optional*): 8 rounds each row of the input to integers on every device: the layer's
            meaning. The gradient passes straight through.

    Returns:
        `torch.Tensor`: (..., N), the (autocast) dtype of `input`.

    Raises:
        ValueError: A shape or dtype does not fit, or other `requested_bits`.
    """
    if weight.dtype != torch.uint8:
        _check_float(weight)
    cast = _checked_input(input, weight, weight_scale, bias)
    bits = _bits(cast, weight, weight_scale, requested_bits, trained_bits)
    return _compute(input, cast, weight, weight_scale, bias, bits, trained_bits)


def decode_weight(weight_packed: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what [`decoded_linear`] multiplies with: T, with what part of the scale goes inside, (N, K) `dtype`."""
    inner, _ = reference.split_scale(weight_scale, dtype)
    return reference.times(reference.unpack_ternary(weight_packed, dtype), inner)


def decoded_linear(input: Tensor, decoded: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """[`ternary_linear`] of a weight that [`decode_weight`] decoded before.

    Args:
        input (`torch.Tensor`): (..., K), float. Cast to the autocast dtype inside autocast, and then `decoded`'s.
        decoded (`torch.Tensor`): (N, K).
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32. One of groups gets no gradient.
        bias (`torch.Tensor`, *optional*): (N,), float.

    Returns:
        `torch.Tensor`: (..., N), `decoded`'s dtype.

    Raises:
        ValueError: A shape or dtype does not fit.
    """
    cast = _checked_input(input, decoded, weight_scale, bias)
    _, outer = reference.split_scale(weight_scale, cast.dtype)
    return _finish(torch.nn.functional.linear(cast, decoded), outer, bias)


def linears(
    input: Tensor,
    layers: list[tuple[Tensor, Tensor, Tensor | None]],
    requested_bits: int | str | None = "auto",
    trained_bits: int | None = None,
) -> list[Tensor]:
    """[`linear`] of one input and each of several packed layers, which share what is made of the input.

    The bits are those of [`linear`], but on a GPU where exact layers are multiplied together: there a matmul of
    another width may sum in another order.

    Args:
        input (`torch.Tensor`): (..., K), float. Cast to the autocast dtype inside autocast.
        layers (`list` of `tuple`): `weight_packed` (N/4, K) uint8, `weight_scale` and `bias` or `None`, each.
        requested_bits (`int`, `str` or `None`): As in [`linear`].
        trained_bits (`int`, *optional*): As in [`linear`].

    Returns:
        List of `torch.Tensor`: (..., N) each, the (autocast) dtype of `input`.

    Raises:
        ValueError: A shape or dtype does not fit, or other `requested_bits`.
    """
    for weight_packed, _, _ in layers:
        _check_packed(weight_packed)
    if not layers:
        return []
    (cast, *_) = [_checked_input(input, *layer) for layer in layers]
    bits = [_bits(cast, weight, scale, requested_bits, trained_bits) for weight, scale, _ in layers]
    first = bits[0]
    as_they_are = first is not None or trained_bits is None  # `_compute` rounds the inputs of others
    if as_they_are and len(set(bits)) == 1 and not _wants_gradients(input, layers):
        if isinstance(first, str):
            return _in_fp8(cast, layers)
        if first is None and _has_products(cast.device.type):
            return _exact_of_packed(cast, layers)
        if first is not None and is_fused(cast):
            return _in_fused_integers(cast, layers, first)
        if not (is_fused(cast) or torch.jit.is_tracing()):  # TorchScript takes no such lists
            return _linears(cast, *map(list, zip(*layers, strict=True)), first)
    return [_compute(input, cast, *layer, each, trained_bits) for layer, each in zip(layers, bits, strict=True)]


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
    _check_packed(weight_packed)
    input = _checked_input(input, weight_packed, weight_scale, bias)
    return _exact(input, weight_packed, weight_scale, bias)


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
    _check_float(weight)
    input = _checked_input(input, weight, weight_scale, bias)
    return _exact(input, weight, weight_scale, bias)


def integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None = None, bits: int = 16
) -> Tensor:
    """`ternary_linear` with each row of the input rounded to integers, whose products with T are summed exactly.

    With scales of groups each group of a row is rounded with its own step. The gradient is that of
    `ternary_linear`. Where `has_integer_kernel` is false this is slow.

    Args:
        input (`torch.Tensor`): (..., K), float; K up to 65,536 with 16 bits. Cast to the autocast dtype inside
            autocast. A row with NaN or infinity gives a row of NaN.
        weight_packed (`torch.Tensor`): (N/4, K), uint8.
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32. What groups give is added in float32.
        bias (`torch.Tensor`, *optional*): (N,), float.
        bits (`int`, defaults to 16): 16: the rounding is 8 to 70 times finer than bfloat16's arithmetic. 8: relative
            error around 1 %, more on inputs with outliers.

    Returns:
        `torch.Tensor`: (..., N), the (autocast) dtype of `input`; float32 arithmetic after the integer sums.

    Raises:
        ValueError: A shape, dtype or number of bits does not fit.
    """
    _check_packed(weight_packed)
    input = _checked_input(input, weight_packed, weight_scale, bias)
    if input.shape[-1] > reference.MOST_INPUTS.get(bits, 0):
        raise ValueError(
            f"Integer activations need 8 bits, or 16 and at most 65,536 inputs; got {bits=}, {input.shape[-1]} inputs."
        )
    return _in_integers(input, weight_packed, weight_scale, bias, bits)

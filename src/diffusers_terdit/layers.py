"""`TernaryLinear`, a linear layer with weights in {-1, 0, +1} and a float scale."""

import math
from collections.abc import Sequence
from numbers import Integral

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .modeling import TernaryModelMixin, warn_half_precision_codes
from .ops import (
    check_integers,
    choose_kernel,
    decode_weight,
    decoded_linear,
    dequantize,
    linear,
    linears,
    pack_ternary,
    reference,
    ternarize,
    unpack_ternary,
)


class TernaryLinear(TernaryModelMixin):
    r"""Linear layer whose weight is a scale times -1, 0 or +1: \(y = x\,(s\,T)^\top + b\).

    Two formats with one meaning:

    - `"float"`, for training: a float `weight` from which every forward takes T = ternarize(weight); its gradient
      passes straight through the rounding.
    - `"packed"`, for inference and adapters: `weight_packed` holds T in two bits per weight and takes no gradient.

    `pack()` goes from the first to the second without changing what the layer computes, `unpack()` back.

    Args:
        in_features (`int`): K, size of each input.
        out_features (`int`): N, size of each output; a multiple of 4 in packed format.
        bias (`bool`, defaults to `True`): Whether to add a learned (N,) bias.
        weight_format (`str`, defaults to `"float"`): `"float"` or `"packed"`. A fresh packed layer has T = 0.
        scale_granularity (`str` or `int`, defaults to `"tensor"`): What one scale covers: `"tensor"` the matrix,
            `"row"` an output, an int g a group of g inputs of an output. The ternarizing mean covers the same.
        activation_bits (`int`, *optional*): 8 rounds each token of the input to 8-bit integers before the matmul, in
            training and in inference: the layer's meaning, for models that are trained with it. `None` does not round.

    Attributes:
        weight (`torch.nn.Parameter`): (N, K), float. Only in float format.
        weight_packed (`torch.nn.Parameter`): (N/4, K), uint8, no gradient; bytes as in
            `ops/reference.py`. Only in packed format.
        weight_scale (`torch.nn.Parameter`): (1,), (N, 1) or (N, K/g), float32 whatever the layer is cast to.
        bias (`torch.nn.Parameter` or `None`): (N,), float.

    Raises:
        ValueError: A wrong `weight_format`, `scale_granularity` or `activation_bits`, N not a multiple of 4 in packed
            format, or K not a multiple of the group.

    Source: TerDiT (https://arxiv.org/abs/2405.14854).
    """

    _no_split_modules: list[str] = []

    @register_to_config
    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        weight_format: str = "float",
        scale_granularity: str | int = "tensor",
        activation_bits: int | None = None,
    ):
        super().__init__()
        if activation_bits not in (None, 8):
            raise ValueError(f"`activation_bits` must be None or 8, got {activation_bits!r}.")
        if weight_format not in ("float", "packed"):
            raise ValueError(f'`weight_format` must be "float" or "packed", got {weight_format!r}.')
        sizes = (in_features, out_features)
        if not all(isinstance(size, Integral) and not isinstance(size, bool) and size >= 1 for size in sizes):
            raise ValueError(
                f"A layer needs at least one input and output, as ints, got {in_features=}, {out_features=}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self._requested_bits: int | str | None = "auto"
        if weight_format == "packed":
            self.check_packable()
            packed = torch.empty(out_features // reference.CODES_PER_BYTE, in_features, dtype=torch.uint8)
            self.weight_packed = nn.Parameter(packed, requires_grad=False)
        else:
            self.weight = nn.Parameter(torch.empty(out_features, in_features))
        shape = reference.scale_shape(out_features, in_features, scale_granularity)
        self.weight_scale = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.decoded: Tensor | None
        self.register_buffer("decoded", None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weight, of which 3 in 4 ternarize to non-zero; a scale that keeps the input's variance."""
        with torch.no_grad():
            if self.weight_format == "packed":
                self.weight_packed.fill_(reference.ZERO_BYTE)
            else:
                nn.init.xavier_uniform_(self.weight)
            self.weight_scale.fill_(1 / math.sqrt(0.75 * self.in_features))
            if self.bias is not None:
                self.bias.zero_()

    @property
    def weight_format(self) -> str:
        """`"float"` or `"packed"`."""
        return self.config["weight_format"]

    @property
    def scale_granularity(self) -> str | int:
        """`"tensor"`, `"row"` or inputs per group."""
        return self.config["scale_granularity"]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of `hidden_states` (or of autocast)."""
        weight = self.weight_packed if self.weight_format == "packed" else self.weight
        trained_bits = self.config["activation_bits"]
        if self.decoded is not None and self._requested_bits in (None, "auto"):
            device_type = hidden_states.device.type
            autocast = torch.is_autocast_enabled(device_type)
            dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_states.dtype
            if dtype == self.decoded.dtype:
                return decoded_linear(hidden_states, self.decoded, self.weight_scale, self.bias)
        return linear(hidden_states, weight, self.weight_scale, self.bias, self._requested_bits, trained_bits)

    def _is_plain(self) -> bool:
        """Whether a call of this module is an op of its parameters and nothing else: no adapter, hook or wrapper."""
        return (
            type(self) is TernaryLinear
            and self.weight_format == "packed"
            and self.decoded is None
            and type(self.weight_packed) is type(self.weight_scale) is nn.Parameter
            and "forward" not in vars(self)  # accelerate and diffusers put their hooks there
            and self._compiled_call_impl is None
            and not (
                self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
            )
            and not torch.nn.modules.module._has_any_global_hook()
        )

    def set_activation_bits(self, bits: int | str | None) -> None:
        """Round the inputs of a packed layer to integers, for speed. Never saved: it is not the layer's meaning.

        It acts where there is a kernel: a CPU with AVX2, and numba; a GPU with 8-bit tensor cores, for layers with one
        scale per matrix or row. Elsewhere the layer computes exactly. Each row of the input has its own step;
        with scales of groups, each group of a row has.

        Args:
            bits (`int`, `str` or `None`): 16: relative error around 1e-4, far below that of bfloat16. 8: around 1 %,
                twice as fast; more on inputs with outliers. `"fp8"`: float8_e4m3fn, around 3 %, on a GPU of compute
                capability 8.9, where no gradient is wanted; elsewhere exact. `None`: never. `"auto"`, the state of a
                new layer: 16 for inputs in bfloat16 on a CPU, `None` for others. Where exact arithmetic was measured
                to be as fast as 16 bits, it takes their place.

        Raises:
            ValueError: Another value, or the layer was trained with 8-bit inputs: then they are its meaning.
            ImportError: 8 or 16 on a CPU without numba.
        """
        if bits not in (None, 8, 16, "fp8", "auto") or isinstance(bits, bool):
            raise ValueError(f'`bits` must be None, 8, 16, "fp8" or "auto", got {bits!r}.')
        trained = self.config["activation_bits"]
        if trained is not None and bits not in (trained, "auto"):
            raise ValueError(
                f'This layer was trained with {trained}-bit inputs; it has no other meaning: pass {trained} or "auto",'
                f" got {bits!r}."
            )
        if bits is not None and bits != "auto":
            check_integers(self.weight_scale.device.type, bits)
        self._requested_bits = bits

    def computes_exactly(self, dtype: torch.dtype) -> bool:
        """Whether a call in this dtype rounds no input to integers or fp8."""
        shape = self.out_features, self.in_features, self.scale_granularity, self.weight_format == "packed"
        trained_bits = self.config["activation_bits"]
        device = self.weight_scale.device
        return not (trained_bits or choose_kernel(device, dtype, *shape, self._requested_bits).bits)

    @torch.no_grad()
    def hold_decoded(self, dtype: torch.dtype | None) -> None:
        """Hold the matrix of a packed layer decoded in a dtype, for exact calls in it; `None`: no longer.

        It is never saved. The packed weight stays; what loads or unpacks it takes the decoded one away.
        """
        self.decoded = None
        if dtype is not None and self.weight_format == "packed":
            self.decoded = decode_weight(self.weight_packed, self.weight_scale, dtype)

    def _load_from_state_dict(self, *args, **kwargs):
        self.decoded = None
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def ternary_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """T, (out_features, in_features) in {-1, 0, +1}."""
        if self.weight_format == "packed":
            return unpack_ternary(self.weight_packed, dtype)
        return ternarize(self.weight, self.scale_granularity).to(dtype)

    def dequantize(self) -> Tensor:
        """The dense weight `scale * T`: (out_features, in_features), float32."""
        return dequantize(self.ternary_weight(), self.weight_scale.detach())

    @torch.no_grad()
    def pack(self) -> "TernaryLinear":
        """Go to packed format, in place. The layer computes the same before and after; the float weight is gone.

        Raises:
            ValueError: `out_features` is not a multiple of 4, or the weight is not finite.
        """
        if self.weight_format == "float":
            self.check_packable()
            packed = pack_ternary(self.ternary_weight())
            self._replace("weight", "weight_packed", nn.Parameter(packed, requires_grad=False))
            self.register_to_config(weight_format="packed")
        return self

    @torch.no_grad()
    def unpack(self) -> "TernaryLinear":
        """Go to float format, in place, to train on: c * T in float32, c the deviation of a fresh weight."""
        if self.weight_format == "packed":
            self.decoded = None
            deviation = math.sqrt(2 / (self.in_features + self.out_features))
            weight = self.ternary_weight(torch.float32).mul_(deviation)
            self._replace("weight_packed", "weight", nn.Parameter(weight))
            self.register_to_config(weight_format="float")
        return self

    def _replace(self, old: str, new: str, parameter: nn.Parameter) -> None:
        """Put a parameter in another's place, so that state dicts and optimizers see the order of construction."""
        parameters = {new if name == old else name: p for name, p in self._parameters.items()}
        self._parameters.clear()
        self._parameters.update({**parameters, new: parameter})

    def check_packable(self) -> None:
        """Raise the `ValueError` of `pack()`: `out_features` is not a multiple of 4, or the weight is not finite."""
        if self.out_features % reference.CODES_PER_BYTE:
            raise ValueError(
                f"A packed layer needs `out_features` to be a multiple of {reference.CODES_PER_BYTE}, got"
                f" {self.out_features}. Keep this layer in float format, or pad its outputs."
            )
        if "weight" in self._parameters and not self.weight.isfinite().all():
            raise ValueError(
                "The weight holds NaN or infinity, which round to none of {-1, 0, +1}. Take one from before training"
                " diverged."
            )

    def _apply(self, fn, recurse=True):
        """Move or cast, but keep the scale in float32 and the codes in uint8."""
        kept = {n: p for n, p in self._parameters.items() if n in ("weight_scale", "weight_packed") and p is not None}
        # The host casts a gradient in place, through `.data`: keep the storage, not the object.
        before = {n: (p.data, None if p.grad is None else p.grad.data) for n, p in kept.items()}
        decoded = None if self.decoded is None else self.decoded.dtype
        super()._apply(fn, recurse)
        for name, (data, grad) in before.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != data.dtype:
                parameter.grad = None
                parameter.data = data.to(parameter.device)
                parameter.grad = None if grad is None else grad.to(parameter.device)
        if self.decoded is not None and self.decoded.dtype != decoded:
            self.hold_decoded(self.decoded.dtype)  # not a cast: what is inside the matrix depends on the dtype
        if self.weight_format == "float":
            warn_half_precision_codes(self.weight.dtype)
        return self

    def extra_repr(self) -> str:
        """For `print(model)`."""
        bits = "2-bit packed" if self.weight_format == "packed" else "float"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" weight={bits}, scale={self.scale_granularity!r}"
            + (f", activations={self.config['activation_bits']}-bit" if self.config["activation_bits"] else "")
            + (f", computes with {self._requested_bits} bits" if self._requested_bits in (8, 16) else "")
            + (", computes in fp8" if self._requested_bits == "fp8" else "")
        )


def call_all(layers: Sequence[nn.Module], hidden_states: Tensor) -> list[Tensor]:
    """Call layers of one input: `[layer(hidden_states) for layer in layers]`, by [`linears`] where they are packed.

    That rounds the input to integers once, or makes its tables once, and on a GPU multiplies several matrices at once.
    Each layer is called as a module where somebody wants to see its call.
    """
    plain = [layer for layer in layers if isinstance(layer, TernaryLinear) and layer._is_plain()]
    settings = {(layer._requested_bits, layer.config["activation_bits"]) for layer in plain}
    if len(plain) == len(layers) and len(settings) == 1:
        weights = [(layer.weight_packed, layer.weight_scale, layer.bias) for layer in plain]
        return linears(hidden_states, weights, *settings.pop())
    return [layer(hidden_states) for layer in layers]

"""Choose the kernel that computes a ternary layer on a CPU, and say why: the one place that decides it.

Exact arithmetic is `lookup`, in float32, or `exact_amx`, for bfloat16; in float64, for few outputs, and without numba,
it is `decode`. Integers are computed by the first kernel of `integer_kernels` that this processor runs. They all give
the same bits, those of `reference.integer_linear`. Where there is none, layers compute exactly, and
`ops.integer_linear` calls the reference.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from .. import reference
from ..torch_ops import Case, Choice, name_of, register_kernels, warn_once
from . import decode, exact


INSTALL_NUMBA = "pip install numba"
# Kernels whose 16-bit integers were measured no faster than the exact product of such a processor, and in which dtypes
NO_FASTER_THAN_EXACT = {
    "amx_int8": (torch.bfloat16,),
    "avx512_vnni": (torch.float32, torch.bfloat16, torch.float16),  # measured on Intel; Zen 4 and 5 have their own
    "avx_vnni": (torch.float32, torch.bfloat16, torch.float16),
    "avx2": (torch.float32, torch.bfloat16, torch.float16),
    "neon_sdot": (torch.float32, torch.bfloat16, torch.float16),  # by their numbers of instructions
}
FEWEST_OUTPUTS = 128  # of a layer that pays for the tables of lookups (measured on Zen 3)
NO_AVX2 = "This processor has no AVX2 (ARM: dotprod), which the integer kernels need; ternary layers compute exactly."


@cache
def has_numba() -> bool:
    """Whether there are compiled kernels; looked up once, since every layer of a step asks."""
    return find_spec("numba") is not None


@cache
def integer_kernels() -> dict[str, Callable[..., list[Tensor]]]:
    """Return the integer kernels that this processor runs, by name, best first; none without numba.

    Each computes `reference.integer_linear` of one input and several weights, see `torch_ops.linears`.
    """
    if not has_numba():
        return {}
    # numba is optional, and importing it takes half a second
    from . import instructions, integer, integer_amx, integer_lookup

    kernels = (integer_amx.KERNEL, integer_lookup.KERNEL, *integer.KERNELS)
    processor = instructions.processor()
    return {kernel.name: partial(integer.linears, kernel) for kernel in kernels if kernel.runs_on(processor)}


def choose(device: torch.device, case: Case) -> Choice:
    """Return the kernel for a case: see `torch_ops.choose_kernel`."""
    bits = case.trained_bits or case.requested_bits
    if isinstance(bits, str):  # "auto", or "fp8"
        bits = 16 if bits == "auto" and case.dtype == torch.bfloat16 else None
    reason, name = case.why_exact(bits), next(iter(integer_kernels()), None)
    if reason is None and name is None:
        reason = "the integer kernels need " + ("AVX2" if has_numba() else f"numba: {INSTALL_NUMBA}")
        if case.requested_bits == "auto" and not case.trained_bits and not has_numba():
            warn_once(f"bfloat16 on this CPU would be faster and more accurate with numba: {INSTALL_NUMBA}")
    products = exact_products(case.dtype, case.out_features)
    slow = bits == 16 and products is not None and case.dtype in NO_FASTER_THAN_EXACT.get(str(name), ())
    if reason is None and slow:
        reason = f"16-bit integers ({name}) would be no faster"
    if reason is None:
        return Choice(str(name), bits, case.why_rounded())
    how = f"matmul in {name_of(decode.matmul_dtype(case.dtype))}" if products is None else products[0]
    return Choice(f"exact, {how}", None, reason)


@cache
def _of_numba() -> tuple[ModuleType, ...]:
    """The modules of exact products; an import inside a function takes three microseconds, in every call."""
    from . import exact_amx, instructions, lookup

    return exact_amx, instructions, lookup


def exact_products(dtype: torch.dtype, outputs: int) -> tuple[str, exact.Products] | None:
    """Return what multiplies inputs of a dtype exactly, in words and as a function; `None`: `decode`."""
    if dtype == torch.float64 or not has_numba():
        return None
    exact_amx, instructions, lookup = _of_numba()
    if dtype == torch.bfloat16 and instructions.processor().features >= exact_amx.FEATURES:
        return "AMX in bfloat16", exact_amx.products
    return ("lookups in float32", lookup.products) if outputs >= FEWEST_OUTPUTS else None


def check_integers(bits: int) -> None:
    """Raise or warn where a caller asks for integers in vain: see `torch_ops.check_integers`."""
    if integer_kernels():
        return
    if not has_numba():
        raise ImportError(f"Integer activations of {bits} bits on a CPU need numba: {INSTALL_NUMBA}")
    warn_once(NO_AVX2)


def integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Compute `reference.integer_linear` with the best kernel."""
    return integer_linears(input, [(weight_packed, weight_scale, bias)], bits)[0]


def integer_linears(input: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]], bits: int) -> list[Tensor]:
    """Compute `reference.integer_linear` of each weight, (weight_packed, weight_scale, bias), with the best kernel."""
    for kernel in integer_kernels().values():
        return kernel(input, weights, bits)
    return [reference.integer_linear(input, *weight, bits) for weight in weights]


def _packs_first(dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and has_numba()


def _packed(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A weight of either format in bytes, and its scale, NaN where the weight is not finite."""
    if weight.dtype == torch.uint8:
        return weight, weight_scale
    packed, mean = pack(weight, weight_scale)
    return packed, weight_scale + 0 * mean


def pack(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `reference.pack_float`."""
    if not _packs_first(weight.dtype):
        return reference.pack_float(weight, weight_scale)
    from . import pack

    return pack.pack(weight, weight_scale)


def linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `reference.ternary_linear` (uint8 `weight`) or `reference.float_linear` (float `weight`)."""
    out_features = len(weight) * (reference.CODES_PER_BYTE if weight.dtype == torch.uint8 else 1)
    products = exact_products(input.dtype, out_features)
    if products is None:
        return decode.linear(input, weight, weight_scale, bias)
    return exact.linears(products[1], input, [(*_packed(weight, weight_scale), bias)], [out_features])[0]


def linears(
    input: Tensor,
    weights_packed: list[Tensor],
    weight_scales: list[Tensor],
    biases: list[Tensor | None],
    bits: int | None,
) -> list[Tensor]:
    """Compute `reference.linears`, sharing what is made of the input."""
    weights = list(zip(weights_packed, weight_scales, biases, strict=True))
    if bits is not None:
        return integer_linears(input, weights, bits)
    out_features = [reference.CODES_PER_BYTE * len(weight) for weight in weights_packed]
    found = {exact_products(input.dtype, count) for count in out_features}
    products = found.pop() if found else None
    if found or products is None:
        return [linear(input, *weight) for weight in weights]
    return exact.linears(products[1], input, weights, out_features)


def linear_backward(
    grad: Tensor, input: Tensor | None, weight: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.linear_backward`."""
    scaled_first = weight_scale.dim() == 2  # and in float32
    dtype = torch.promote_types(grad.dtype, torch.float32) if scaled_first else grad.dtype
    products = exact_products(dtype, weight.shape[1])
    if products is None or reference.is_grouped(weight_scale):
        return decode.linear_backward(grad, input, weight, weight_scale, need_input_grad)
    return exact.linear_backward(products[1], grad, input, *_packed(weight, weight_scale), need_input_grad)


register_kernels(
    "cpu",
    choose,
    check_integers,
    linear,
    linear_backward,
    integer_linear,
    pack=pack,
    packs_first=_packs_first,
    linears=linears,
)

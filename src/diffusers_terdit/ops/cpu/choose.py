"""Choose the kernel that computes a ternary layer on a CPU, and say why: the one place that decides it.

Exact arithmetic is `decode`. Integers are computed by the first kernel of `integer_kernels` that this processor runs.
All of them give the same bits, those of `reference.integer_linear`. Where there is none, layers compute exactly, and
`ops.integer_linear` calls the reference.
"""

from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import reference
from ..torch_ops import Case, Choice, name_of, register_kernels, warn_once
from . import decode


INSTALL_NUMBA = "pip install numba"
NO_AVX2 = "This processor has no AVX2, which the integer kernels need; ternary layers compute exactly."


@cache
def integer_kernels() -> dict[str, Callable[..., Tensor]]:
    """Return the integer kernels that this processor runs, by name, best first; none without numba."""
    if find_spec("numba") is None:
        return {}
    # numba is optional, and importing it takes half a second
    from . import instructions, integer, integer_amx, integer_lookup

    kernels = (integer_amx.KERNEL, integer_lookup.KERNEL, *integer.KERNELS)
    processor = instructions.processor()
    return {kernel.name: partial(integer.linear, kernel) for kernel in kernels if kernel.runs_on(processor)}


def choose(device: torch.device, case: Case) -> Choice:
    """Return the kernel for a case: see `torch_ops.choose_kernel`."""
    bits = case.trained_bits or case.requested_bits
    if bits == "auto":
        bits = 16 if case.dtype == torch.bfloat16 else None
    assert not isinstance(bits, str)
    reason = case.why_exact(bits)
    if reason is None:
        for name in integer_kernels():
            return Choice(name, bits, case.why_rounded())
        reason = "the integer kernels need " + ("AVX2" if find_spec("numba") else f"numba: {INSTALL_NUMBA}")
        if case.requested_bits == "auto":
            faster = f"bfloat16 on this CPU would be faster and more accurate with numba: {INSTALL_NUMBA}"
            warn_once(NO_AVX2 if find_spec("numba") else faster)
    return Choice(f"exact, matmul in {name_of(decode.matmul_dtype(case.dtype))}", None, reason)


def check_integers(bits: int) -> None:
    """Raise or warn where a caller asks for integers in vain: see `torch_ops.check_integers`."""
    if integer_kernels():
        return
    if find_spec("numba") is None:
        raise ImportError(f"Integer activations of {bits} bits on a CPU need numba: {INSTALL_NUMBA}")
    warn_once(NO_AVX2)


def integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """Compute `reference.integer_linear` with the best kernel."""
    kernel = next(iter(integer_kernels().values()), reference.integer_linear)
    return kernel(input, weight_packed, weight_scale, bias, bits)


register_kernels("cpu", choose, check_integers, decode.linear, decode.linear_backward, integer_linear)

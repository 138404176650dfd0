"""Which kernel computes a ternary layer on a GPU, and why: this is the one place that decides it.

The weight is decoded by one Triton kernel where there is Triton, a C compiler for its launcher, and a GPU that it
supports; elsewhere by plain PyTorch. Both give the same bits. The vendor's library multiplies what was decoded.
"""

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch

from .. import reference
from ..torch_ops import Case, Choice, name_of, register_kernels, warn_once
from . import decode


logger = logging.getLogger(__name__)

OLDEST = (7, 5)  # compute capability that Triton supports, and the first with 8-bit tensor cores


@cache
def decoder(device: torch.device) -> decode.Decoder:
    """Return Triton's kernel where it runs on this device (it is tried, once), else PyTorch's decoder."""
    if find_spec("triton") is None:
        logger.info("Triton is not installed; ternary weights are decoded by PyTorch (the same results, slower).")
        return decode.unpack
    try:
        if not _is_recent(device):
            raise RuntimeError(f"{torch.cuda.get_device_name(device)} is too old for it")
        from . import triton_kernels  # Triton is optional

        packed = torch.arange(81, dtype=torch.uint8, device=device).reshape(9, 9)
        if not torch.equal(triton_kernels.unpack(packed, torch.float32), reference.unpack_ternary(packed)):
            raise RuntimeError("its kernel gave wrong results")
    except Exception as error:  # no C compiler, a broken installation, another driver: Triton raises what it likes
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        logger.info(f"Triton does not work on {device} ({reason}); PyTorch decodes ternary weights, slower.")
        return decode.unpack
    return triton_kernels.unpack


def _is_recent(device: torch.device | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


def choose(device: torch.device, case: Case) -> Choice:
    """Return the kernel for a case: see `torch_ops.choose_kernel`."""
    bits = case.trained_bits or case.requested_bits
    bits = bits if isinstance(bits, int) else None  # "auto": the exact kernels are as fast as those of integers
    reason = case.why_exact(bits)
    if reason is None and case.scale_granularity not in ("tensor", "row"):
        reason = "integers on a GPU need one scale per matrix or row"
    if reason is None and not _is_recent(device):
        reason = f"integers need 8-bit tensor cores, compute capability {'.'.join(map(str, OLDEST))}"
    if reason is not None:
        return Choice(f"exact, matmul in {name_of(case.dtype)}", None, reason)
    fits = decode.takes_integers(case.out_features, case.in_features)
    return Choice(f"integers, matmul in {'int8' if fits else 'float64'}", bits, case.why_rounded())


def check_integers(bits: int) -> None:
    """Warn where a caller asks for integers in vain: see `torch_ops.check_integers`."""
    if not _is_recent(None):
        warn_once("There are no integer kernels for this cuda device; ternary layers compute exactly.")


def _with_decoder(function: Callable) -> Callable:
    @wraps(function)
    def run(tensor, *args):
        return function(decoder(tensor.device), tensor, *args)

    return run


register_kernels(
    "cuda",
    choose,
    check_integers,
    _with_decoder(decode.linear),
    _with_decoder(decode.linear_backward),
    _with_decoder(decode.integer_linear),
    _with_decoder(decode.product),
    _with_decoder(decode.integer_product),
)

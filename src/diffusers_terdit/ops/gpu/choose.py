"""Which kernel computes a ternary layer on a GPU, and why: this is the one place that decides it.

The weight is decoded, and a float weight packed, by Triton kernels where there is Triton, a C compiler for its
launcher, and a GPU that it supports; elsewhere by plain PyTorch. Both give the same bits. The vendor's library
multiplies what was decoded.
"""

import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib.util import find_spec

import torch

from .. import reference
from ..torch_ops import Case, Choice, name_of, register_kernels, warn_once
from . import decode
from .decode import IN_PYTORCH, Kernels


logger = logging.getLogger(__name__)

FIRST_WITH_FP8 = (8, 9)
OLDEST = (7, 5)  # compute capability that Triton supports, and the first with 8-bit tensor cores


@cache
def kernels(device: torch.device) -> Kernels:
    """Return Triton's kernels where they run on this device (they are tried, once), else PyTorch's.

    Raises:
        RuntimeError: The first call is inside the capture of a CUDA graph, which trying them would break.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"The first ternary layer on {device} cannot run inside the capture of a CUDA graph: its kernels are"
            " compiled and tried first. Call the model once before capturing."
        )
    if find_spec("triton") is None:
        logger.warning(
            "Triton is not installed; PyTorch decodes ternary weights on the GPU: the same results, slower."
        )
        return IN_PYTORCH
    try:
        if not _is_recent(device):
            raise RuntimeError(f"{torch.cuda.get_device_name(device)} is too old for it")
        from . import triton_kernels  # Triton is optional

        ternary = (torch.arange(192, device=device) % 3 - 1).float().reshape(16, 12)
        packed = reference.pack_ternary(ternary)
        right = torch.equal(triton_kernels.pack(ternary, ternary.new_empty(1))[0], packed)
        for dtype in (torch.float32, torch.bfloat16):
            right &= torch.equal(triton_kernels.unpack(packed, dtype), ternary.to(dtype))
        for bits in (8, 16):
            rows, step = triton_kernels.round_to_bytes(ternary / 3, bits)
            expected, step_expected = reference.round_to_bytes(ternary / 3, bits)
            right &= torch.equal(rows, expected) and torch.equal(step, step_expected)
            scaled = rows.int(), step, step_expected[:1, 0], ternary[0], torch.bfloat16
            right &= torch.allclose(triton_kernels.scale_sums(*scaled), reference.scale_sums(*scaled), rtol=1e-2)
        if not right:
            raise RuntimeError("its kernels gave wrong results")
    except Exception as error:  # no C compiler, a broken installation, another driver: Triton raises what it likes
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        logger.warning(f"Triton does not work on {device} ({reason}); PyTorch decodes ternary weights, slower.")
        return IN_PYTORCH
    return Kernels(*(getattr(triton_kernels, name) for name in Kernels._fields))


def _is_recent(device: torch.device | None) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST


@cache
def _multiplies_bytes(device: torch.device | None) -> bool:
    """Whether there is a matmul of bytes: 8-bit tensor cores; on ROCm `torch._int_mm` is tried, once."""
    if torch.version.hip is None:
        return _is_recent(device)
    try:
        rows = torch.ones(32, 32, dtype=torch.int8, device=device or "cuda")
        return bool((torch._int_mm(rows, rows) == 32).all())
    except RuntimeError:
        return False


def _multiplies_fp8(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= FIRST_WITH_FP8


def choose(device: torch.device, case: Case) -> Choice:
    """Return the kernel for a case: see `torch_ops.choose_kernel`."""
    bits = case.trained_bits or case.requested_bits
    fits = decode.takes_fp8(case.out_features, case.in_features, case.scale_granularity)
    if bits == "fp8" and case.packed and fits and _multiplies_fp8(device):
        return Choice("fp8, matmul in float8_e4m3fn", "fp8", "fp8 inputs were asked for")
    bits = bits if isinstance(bits, int) else None  # "auto": the exact kernels are as fast as those of integers
    reason = case.why_exact(bits)
    if reason is None and case.scale_granularity not in ("tensor", "row"):
        reason = "integers on a GPU need one scale per matrix or row"
    if reason is None and not _multiplies_bytes(device):
        reason = f"integers need 8-bit tensor cores, compute capability {'.'.join(map(str, OLDEST))}"
    if reason is not None:
        scaled = case.scale_granularity not in ("tensor", "row")
        whole = case.packed or case.out_features % reference.CODES_PER_BYTE == 0  # packed in each forward pass
        pieces = whole and decode.takes_pieces(device, case.dtype, scaled)
        return Choice(f"exact, matmul in {'3 x bfloat16' if pieces else name_of(case.dtype)}", None, reason)
    fits = decode.takes_integers(case.out_features, case.in_features)
    return Choice(f"integers, matmul in {'int8' if fits else 'float64'}", bits, case.why_rounded())


def check_integers(bits: int) -> None:
    """Warn where a caller asks for integers in vain: see `torch_ops.check_integers`."""
    if not _multiplies_bytes(None):
        warn_once("There are no integer kernels for this cuda device; ternary layers compute exactly.")


def _with_kernels(function: Callable) -> Callable:
    @wraps(function)
    def run(tensor, *args):
        return function(kernels(tensor.device), tensor, *args)

    return run


def _with_decoder(function: Callable) -> Callable:
    return _with_kernels(wraps(function)(lambda kernels, *args: function(kernels.unpack, *args)))


register_kernels(
    "cuda",
    choose,
    check_integers,
    _with_decoder(decode.linear),
    _with_decoder(decode.linear_backward),
    _with_kernels(decode.integer_linear),
    _with_decoder(decode.product),
    _with_decoder(decode.product_backward),
    _with_decoder(decode.integer_product),
    round_to_bytes=_with_kernels(lambda kernels, *args: kernels.round_to_bytes(*args)),
    fp8_product=_with_decoder(decode.fp8_product),
    products=_with_decoder(decode.products),
    pack=_with_kernels(lambda kernels, *args: kernels.pack(*args)),
    packs_first=lambda dtype: True,
    linears=_with_kernels(decode.linears),
)

"""Warnings about missing integer kernels."""

from functools import cache
from importlib.util import find_spec

from diffusers.utils import logging


logger = logging.get_logger(__name__)


INSTALL_NUMBA = "pip install 'diffusers-terdit[cpu]'"


@cache
def warn_no_integer_kernel(device_type: str) -> None:
    """Say, once, why integer activations that were asked for, or would be used, are not."""
    if device_type != "cpu":
        logger.warning(f"There are no integer kernels for this {device_type} device; ternary layers compute exactly.")
    elif find_spec("numba") is None:
        logger.warning(f"bfloat16 on this CPU would be faster and more accurate with numba: {INSTALL_NUMBA}")
    else:
        logger.warning("This processor has no AVX2, which the integer kernels need; ternary layers compute exactly.")

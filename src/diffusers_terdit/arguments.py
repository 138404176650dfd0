"""Types of command-line options, shared by `terdit` and the programs: values in their range, or a clear error."""

import argparse
import math
from collections.abc import Callable

from PIL import ImageColor


_MAX_INT = 2**63 - 1  # of torch's integers and seeds


def at_least(least: int, most: int = _MAX_INT) -> Callable[[str], int]:
    """Return the type of an integer option from `least` to `most`."""
    expected = f"{least} or more" if most == _MAX_INT else f"{least} to {most}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer, {expected}, got {text!r:.80}")
        return value

    return parse


seed = at_least(0, 2**32 - 1)  # NumPy's range


def keep_limit(text: str) -> int:
    """Parse how many to keep: 1 or more, or -1 for all."""
    return -1 if text == "-1" else at_least(1)(text)


def granularity(text: str) -> str | int:
    """Parse what one ternary scale covers: "tensor", "row", or a number of inputs."""
    return text if text in ("tensor", "row") else at_least(1)(text)


def color(text: str) -> str:
    """Parse an opaque color as Pillow names it: "white", "#808080"."""
    try:
        opaque = len(ImageColor.getrgb(text)) == 3
    except ValueError:
        opaque = False
    if not opaque:
        raise argparse.ArgumentTypeError(f"expected a color, such as white, black or #808080, got {text!r:.80}")
    return text


def column(text: str) -> str | None:
    """Parse the name of a column of a data set; "none" is for no column."""
    return None if text == "none" else text


def positive(text: str) -> float:
    """Parse a number above 0."""
    return _number(text, "above 0", lambda value: value > 0)


def not_negative(text: str) -> float:
    """Parse a number, 0 or more."""
    return _number(text, "0 or more", lambda value: value >= 0)


def share(text: str) -> float:
    """Parse a probability, 0 to 1."""
    return _number(text, "0 to 1", lambda value: 0 <= value <= 1)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"expected a number, {expected}, got {text!r:.80}")
    return value

"""Types of command-line options, shared by `terdit` and the programs: numbers in their range, or a clear error."""

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return the type of an integer option that is `least` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected an integer, {least} or more, got {text!r}")
        return value

    return parse


def keep_limit(text: str) -> int:
    """Parse how many to keep: 1 or more, or -1 for all."""
    return -1 if text == "-1" else at_least(1)(text)


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
        raise argparse.ArgumentTypeError(f"expected a number, {expected}, got {text!r}")
    return value

"""What the parsers of `terdit` and of the programs share: help, spelling, and types that check a value's range."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from PIL import ImageColor


DTYPES = ("float32", "bfloat16", "float16")
ACTIVATION_BITS = (16, 8, "fp8")
_MAX_INT = 2**63 - 1  # of torch's integers and seeds


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help that shows each default that says something, and keeps the lines of a description."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if "%(default)" in text or default in (None, argparse.SUPPRESS, "", []) or default is False:
            return text
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        shown = f"{default:,}" if type(default) is int else shown
        return f"{text} (default: {shown.replace('%', '%%')})"


class Parser(argparse.ArgumentParser):
    """A parser of options that may be written with dashes or underscores, whose usage errors are one line."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, **options})

    def parse_known_args(self, args=None, namespace=None):
        """Parse as `argparse` does, and read `--guidance-scale` as `--guidance_scale`."""
        args = list(sys.argv[1:] if args is None else args)
        end = args.index("--") if "--" in args else len(args)
        spelled = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in args[:end]]
        return super().parse_known_args(spelled + args[end:], namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line, not a page of usage."""
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` explains the options)\n")


def activation_bits(text: str) -> int | str:
    """Type of an option that goes to `set_activation_bits`; its choices are `ACTIVATION_BITS`."""
    return int(text) if text in ("8", "16") else text


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


def dtype(text: str) -> str:
    """Parse the name of one of `DTYPES`, or a short one: fp32, bf16, fp16."""
    return {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(text, text)


def number(text: str) -> float:
    """Parse a finite number."""
    return _number(text, "finite", lambda value: True)


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

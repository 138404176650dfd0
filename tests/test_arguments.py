"""Types of options: what is in the range is a number, anything else one line that says what is expected."""

from argparse import ArgumentTypeError

import pytest

from diffusers_terdit.arguments import (
    at_least,
    color,
    column,
    granularity,
    keep_limit,
    not_negative,
    positive,
    seed,
    share,
)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (at_least(0), "0", 0),
        (at_least(1, 9), "9", 9),
        (seed, str(2**32 - 1), 2**32 - 1),
        (keep_limit, "-1", -1),
        (keep_limit, "3", 3),
        (granularity, "row", "row"),
        (granularity, "64", 64),
        (color, "white", "white"),
        (color, "#808080", "#808080"),
        (column, "label", "label"),
        (column, "none", None),
        (positive, "1e-8", 1e-8),
        (not_negative, "0", 0.0),
        (share, "1", 1.0),
    ],
)
def test_a_value_in_the_range(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((at_least(1), text) for text in ("0", "-1", "1.0", "", "x", str(2**63), "9" * 5000)),
        (at_least(1, 9), "10"),
        *((seed, text) for text in ("-1", str(2**32))),
        *((keep_limit, text) for text in ("0", "-2", "all")),
        *((granularity, text) for text in ("0", "column", "")),
        *((color, text) for text in ("whit", "", "#ffffff80", "x" * 5000)),
        *((positive, text) for text in ("0", "-1", "nan", "inf", "1e999")),
        (not_negative, "-1e-9"),
        *((share, text) for text in ("1.1", "-0.1", "nan")),
    ],
    ids=lambda value: value[:9] if isinstance(value, str) else "",
)
def test_a_value_out_of_the_range(kind, text):
    with pytest.raises(ArgumentTypeError, match="expected ") as error:
        kind(text)
    assert repr(text)[:9] in str(error.value)
    assert len(str(error.value)) < 150

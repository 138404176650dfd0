"""Parsers: help with defaults, either spelling of an option, and values in their range or one line of reason."""

from argparse import ArgumentTypeError

import pytest

from diffusers_terdit.arguments import (
    Parser,
    at_least,
    color,
    column,
    granularity,
    keep_limit,
    not_negative,
    number,
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
        (number, "-0.5", -0.5),
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
        (number, "nan"),
        *((share, text) for text in ("1.1", "-0.1", "nan")),
    ],
    ids=lambda value: value[:9] if isinstance(value, str) else "",
)
def test_a_value_out_of_the_range(kind, text):
    with pytest.raises(ArgumentTypeError, match="expected ") as error:
        kind(text)
    assert repr(text)[:9] in str(error.value)
    assert len(str(error.value)) < 150


@pytest.fixture
def parser():
    parser = Parser(prog="tool", description="Two lines\n  of text.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="The step size; 5 %% is too much.")
    parser.add_argument("--labels", nargs="+", default=[], help="Names.")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1], help="Seeds.")
    parser.add_argument("--mark", default="100 %", help="A mark.")
    parser.add_argument("--output", help="A picture.")
    parser.add_argument("--over_write", action="store_true", help="Replace it.")
    parser.add_argument("rest", nargs="*", help="What is left.")
    return parser


def test_help_shows_the_defaults_that_say_something(parser):
    shown = parser.format_help()
    assert "Two lines\n  of text." in shown
    assert "The step size; 5 % is too much. (default: 0.0001)" in shown
    assert "Seeds. (default: 0 1)" in shown
    assert "A mark. (default: 100 %)" in shown
    assert shown.count("(default") == 3


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--learning-rate", "1"], {"learning_rate": 1.0}),
        (["--learning-rate=1"], {"learning_rate": 1.0}),
        (["--learning_rate", "1", "--over-write"], {"learning_rate": 1.0, "over_write": True}),
        (["--output=a-b"], {"output": "a-b"}),
        (["--output=--a-b=c-d"], {"output": "--a-b=c-d"}),
        (["--labels", "a-b", "c-d"], {"labels": ["a-b", "c-d"]}),
        (["--", "--a-b", "c-d"], {"rest": ["--a-b", "c-d"]}),
    ],
)
def test_dashes_in_options_are_underscores_and_values_stay(parser, arguments, values):
    assert vars(parser.parse_args(arguments)).items() >= values.items()


def test_a_usage_error_is_one_line(parser, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--learning-rate", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "tool: argument --learning_rate: invalid float value: 'x' (`tool --help` explains the options)\n"
    )

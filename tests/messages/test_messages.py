"""Every error that a user can meet names what was given, why that is wrong and what to do instead.

A new `raise` in src/ needs a row in the file of this folder that is named for its subject: a
`Row(provoke, given, reason, way_out)`, where `provoke` brings the error about and the others are parts of its message.
"""

import ast
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import rows_arithmetic
import rows_files
import rows_metrics
import rows_models
import rows_training
from message_table import Fixed, World

import diffusers_terdit


SRC = Path(diffusers_terdit.__file__).parent
ROWS = [row for rows in (rows_arithmetic, rows_models, rows_files, rows_training, rows_metrics) for row in rows.ROWS]
# No user meets these two, which are caught and logged: a part of the statement, and what provokes it.
LOGGED = {
    "too old for it": "tests/ops/gpu/test_choose.py",
    "wrong results": "a GPU whose compiler is wrong",
}


@dataclass(frozen=True)
class Raise:
    """A statement that raises a new error with a message."""

    path: Path
    first: int
    last: int
    code: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(SRC.parents[1])}:{self.first}: {self.code}"


def raises_in(path: Path) -> list[Raise]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Raise)]
    new = [node for node in nodes if isinstance(node.exc, ast.Call) and node.exc.args]  # not `raise`, `raise update`
    return [Raise(path, node.lineno, node.end_lineno, ast.unparse(node)) for node in new]


RAISES = [found for path in sorted(SRC.rglob("*.py")) for found in raises_in(path)]


def raised_by(error: BaseException, message: str) -> set[Raise]:
    """The statements that raised the error, and those that it came from whose words it repeats."""
    found = set()
    while error is not None:
        frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        last = next(((path, line) for path, line in reversed(frames) if path.is_relative_to(SRC)), None)
        if last and str(error) in message:
            found |= {r for r in RAISES if r.path == last[0] and r.first <= last[1] <= r.last}
        error = error.__cause__ or error.__context__
    return found


@pytest.fixture(scope="session")
def outcome(tmp_path_factory):
    """`outcome(row)`: type, message and statements of the error, and the row's folder; each row is provoked once."""
    shared = tmp_path_factory.mktemp("saved")

    @cache
    def run(row):
        tmp = tmp_path_factory.mktemp("row")
        with ExitStack() as stack, pytest.raises(row.error) as caught:
            row.provoke(World(tmp, shared, stack))
        message = str(caught.value)
        return type(caught.value), message, raised_by(caught.value, message), tmp

    return run


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.reason} - {row.given}")
def test_an_error_says_what_was_given_why_and_the_way_out(row, outcome):
    kind, message, statements, tmp = outcome(row)
    assert kind is row.error, message
    assert statements, f"no statement of src/ said {message!r}"
    for part in (row.given, row.reason, row.way_out):
        assert part.replace("TMP", str(tmp)) in message
    if not isinstance(row.given, Fixed):  # only the caller knows it: the message formats it in
        assert not any(row.given in statement.code for statement in statements), message


def test_every_raise_has_a_row(outcome):
    provoked = set().union(*(outcome(row)[2] for row in ROWS))
    logged = {r for r in RAISES if any(part in r.code for part in LOGGED)}
    assert len(logged - provoked) == len(LOGGED), "LOGGED names a statement that is gone, or that a row provokes"
    left = [str(r) for r in RAISES if r not in provoked | logged]
    assert not left, "add a `Row` for each of these to a file rows_*.py in tests/messages:\n" + "\n".join(left)

"""Every error that a user can meet names what was given, why that is wrong and what to do instead."""

from collections import Counter
from importlib.util import find_spec

import pytest
import rows_arithmetic
import rows_examples
import rows_files
import rows_metrics
import rows_models
import rows_training
from message_table import REASON, ROOT, Fixed, World, chain_of, collect_sites, place_of


MODULES = (rows_arithmetic, rows_models, rows_files, rows_training, rows_metrics, rows_examples)
ROWS = [row for module in MODULES for row in module.ROWS]
SITES = collect_sites()
if find_spec("gradio") is None:  # then the app's rows are left out, too
    SITES = [site for site in SITES if site.path != "examples/app.py" or "needs Gradio" in site.code]

# Not in the table: a part of the code's text, and why. "tests/...": this test provokes it.
ELSEWHERE = {
    ("examples/app.py", "needs Gradio"): "tests/examples/test_app.py::test_without_gradio_it_says_what_to_install",
    # These pass on an error that another row provokes, in one line.
    **{
        (f"examples/{name}.py", "raise SystemExit(f'{Path(__file__).name}: {error}')"): "started as a program"
        for name in ("train_terdit", "cache_latents", "evaluate")
    },
    # No user meets these two: they are caught, and logged.
    ("src/diffusers_terdit/ops/gpu/choose.py", "too old for it"): "tests/ops/gpu/test_choose.py::TestDecoder",
    ("src/diffusers_terdit/ops/gpu/choose.py", "wrong results"): "needs a GPU whose compiler is wrong",
}

provoked: dict[str, set] = {}  # sites by row


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture
def world(request, tmp_path, shared):
    return World(request, tmp_path, shared)


def site_at(place):
    return next((s for s in SITES if place and s.path == place[0] and s.first <= place[1] <= s.last), None)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_error_says_what_was_given_why_and_the_way_out(row, world):
    with pytest.raises(row.error) as caught:
        row.provoke(world)
    assert type(caught.value) is row.error
    message = f"{caught.value} {world.errors.getvalue().rpartition('error: ')[2]}"
    sites = [site_at(place_of(error)) for error in chain_of(caught.value, message)]
    provoked[row.name] = set(sites) - {None}
    assert provoked[row.name], f"no statement of src/ or examples/ said {message!r}"
    parts = [row.given, row.reason, row.reason if row.way_out is REASON else row.way_out]
    for part in parts:
        part = part.replace("TMP", str(world.tmp))
        assert part, row
        assert part in message
    if not isinstance(row.given, Fixed):  # only the caller knows it: the message formats it in
        assert not any(row.given in site.text for site in provoked[row.name]), message


def test_rows_have_names_of_their_own():
    assert [name for name, count in Counter(row.name for row in ROWS).items() if count > 1] == []


def test_what_is_not_in_the_table_is_one_place_and_its_test_exists():
    for (path, part), why in ELSEWHERE.items():
        assert sum(site.path == path and part in site.code for site in SITES) == 1, (path, part)
        if why.startswith("tests/"):
            file, *names = why.split("::")
            text = (ROOT / file).read_text("utf-8")
            assert all(f"def {name}(" in text or f"class {name}" in text for name in names), why


def test_every_place_that_raises_has_a_row():
    """Last in the file: the rows say where they were raised."""
    if set(provoked) != {row.name for row in ROWS}:
        pytest.skip("not all rows ran")
    found = {site for sites in provoked.values() for site in sites}
    left = [s for s in SITES if s not in found and not any(s.path == p and part in s.code for p, part in ELSEWHERE)]
    assert not left, "\n".join(["no row provokes:", *map(str, left)])
    idle = [key for key in ELSEWHERE if any(s in found and s.path == key[0] and key[1] in s.code for s in SITES)]
    assert not idle, "the table provokes it"

"""`benchmark.py gpu`, tried out on a CPU: what it writes has the right shape; its figures mean nothing here."""

import argparse
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from diffusers_terdit.models.transformer_terdit import SIZES
from diffusers_terdit.ops import reference


torch_compile = torch.compile  # the fixture below replaces it
ROOT = Path(__file__).parent.parent.parent
TOY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8, "num_classes": 10}


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(ROOT / "examples"))
    import benchmark
    import gpu_benchmark

    yield {"benchmark": benchmark, "gpu": gpu_benchmark}
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture
def measure(scripts, monkeypatch, tmp_path):
    """`measure("--parts", "layers", ...)`: what is in gpu.json and gpu.md afterwards."""
    monkeypatch.setitem(SIZES, "toy", TOY)
    # no compiler is needed here; what `torch.compile` makes of the layers is tested with them
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", "gpu", "--output_dir", str(tmp_path), *args])
        scripts["benchmark"].main()
        return json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text("utf-8")

    return command


def test_layers(measure):
    data, page = measure("--device", "cpu", "--parts", "layers", "--shapes", "64x48", "--rows", "3", "--turns", "2")
    records = data["layers"]["records"]
    modes = {record["mode"] for record in records}
    assert {"dense", "unpack in every call", "exact", "int16", "int8", "decode alone", "exact, compiled"} <= modes
    assert {record["dtype"] for record in records} == {"bfloat16", "float16"}
    for record in records:
        low, middle, high = sorted(record["over_dense"])
        assert record["over_dense"] == [middle, low, high]
        assert record["microseconds"] > 0
        if record["mode"].startswith("exact"):
            assert 0 < record["error"] < 4e-3
    assert "no GPU: a trial of the code" in page
    assert "| 64 x 48 |" in page
    assert data["layers"]["command"] in page


def test_steps(measure, monkeypatch, scripts):
    args = ["--device", "cpu", "--parts", "steps", "--presets", "toy", "--batch_sizes", "1", "2", "--turns", "1"]
    data, page = measure(*args, "--dtypes", "bfloat16")
    records = data["steps"]["records"]
    assert {record["batch"] for record in records} == {1, 2}
    by_mode = {record["mode"]: record for record in records}
    wanted = {"dense", "dense, eager", "exact", "exact, eager", "int16", "int8", "unpack in every call"}
    assert set(by_mode) == wanted
    assert by_mode["dense"]["over_dense"] == [1, 1, 1]
    assert by_mode["exact"]["weights_bytes"] < by_mode["dense"]["weights_bytes"]
    assert by_mode["unpack in every call"]["error"] == 0
    assert all(record["error"] < 0.1 for record in records)
    assert "### toy, bfloat16" in page


def test_steps_of_two_presets_keep_every_mode(measure, monkeypatch):
    # Dynamo keeps eight graphs of a block for all models together: sixteen are compiled here.
    monkeypatch.setattr(torch, "compile", partial(torch_compile, backend="eager"))
    monkeypatch.setitem(SIZES, "other toy", TOY | {"attention_head_dim": 8})
    args = ["--device", "cpu", "--parts", "steps", "--presets", "toy", "other toy", "--turns", "1"]
    data, _ = measure(*args, "--dtypes", "bfloat16")
    assert data["steps"]["left_out"] == []
    modes = Counter(record["mode"] for record in data["steps"]["records"])
    assert set(modes.values()) == {4}
    assert "dense" in modes


@pytest.mark.parametrize("placement", ["resident", "model offload", "group offload"])
@pytest.mark.parametrize("packed", [True, False])
def test_a_card(scripts, monkeypatch, packed, placement):
    monkeypatch.setitem(SIZES, "toy", TOY)
    answer = scripts["gpu"].measure_card("toy", None, packed, placement, "float32", "cpu", steps=2)
    assert answer["fits"]
    assert answer["seconds"] > 0


def test_cards_run_in_processes_of_their_own(scripts, monkeypatch, tmp_path):
    asked = []

    def answer(command, **options):
        settings = json.loads(command[-1])
        asked.append(settings)
        if settings["limit"] == 2.0 and not settings["packed"]:
            return argparse.Namespace(returncode=1, stdout="", stderr="Traceback\nRuntimeError: no driver\n")
        fits = settings["limit"] != 4.0 or settings["packed"]
        measured = {"fits": True, "seconds": 2.0, "steps": 10, "peak_bytes": 1_200_000_000, "reserved": 0}
        return argparse.Namespace(returncode=0, stdout=f"noise\n{json.dumps(measured if fits else {'fits': False})}\n")

    monkeypatch.setattr(scripts["gpu"].subprocess, "run", answer)
    args = argparse.Namespace(limits=[2.0, 4.0], presets=["terdit-4.2b-256"], dtypes=["bfloat16"], device="cuda")
    args.placements, args.weights = list(scripts["gpu"].PLACEMENTS), "all"
    left_out: list[str] = []
    records = [record for part in scripts["gpu"].cards(args, left_out, []) for record in part]
    assert len(asked) == 18
    assert len(records) == 15
    assert "no driver" in left_out[0]
    assert len([*scripts["gpu"].cards(args, [], records)]) == 0
    assert len(asked) == 18 + 3  # what failed is tried again
    section = scripts["gpu"].cards_section(records)
    assert "| 4 GB | dense | resident | does not fit | - |" in section
    assert "| none | packed | group offload | 1.20 | 200.0 |" in section


def test_a_run_goes_on_where_it_stopped(measure, monkeypatch, scripts):
    args = ["--device", "cpu", "--parts", "steps", "--presets", "toy", "--dtypes", "bfloat16", "--turns", "1"]
    cut_short, page = measure(*args, "--batch_sizes", "1")
    measured = []
    original = scripts["gpu"].measure_step
    monkeypatch.setattr(
        scripts["gpu"], "measure_step", lambda models, *case: measured.append(case[:2]) or original(models, *case)
    )
    whole, _ = measure(*args, "--batch_sizes", "1", "2")
    assert measured == [("toy", 2)]
    count = len(cut_short["steps"]["records"])
    assert whole["steps"]["records"][:count] == cut_short["steps"]["records"]
    assert len(whole["steps"]["records"]) == 2 * count
    assert "--output_dir" not in page
    measure(*args, "--batch_sizes", "1", "--fresh")
    assert measured == [("toy", 2), ("toy", 1)]


def test_the_page_can_be_rendered_again(measure, tmp_path):
    _, page = measure("--device", "cpu", "--parts", "layers", "--shapes", "8x16", "--rows", "2", "--turns", "1")
    (tmp_path / "gpu.md").unlink()
    assert measure("--render")[1] == page


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--render"], "gpu.json does not exist"),
        (["--device", "cpu", "--turns", "0"], "must be 1 or more"),
        *([] if torch.cuda.is_available() else [([], "This torch sees no GPU")]),
    ],
)
def test_wrong_settings(measure, args, message):
    with pytest.raises(SystemExit, match=message):
        measure(*args)


def test_a_library_that_is_not_there_is_left_out_once(scripts, monkeypatch, capsys):
    left_out: list[str] = []
    for _ in range(2):
        for name, make in scripts["gpu"].PEERS.items():
            if name.startswith(("gemlite", "humming")):
                try:
                    make(torch.zeros(4, 8, dtype=torch.int8), 1.0, torch.bfloat16)
                except ImportError as error:
                    scripts["gpu"].say_once(left_out, f"{name}: {scripts['gpu'].first_line(error)}")
    assert len(left_out) == 4
    assert all("No module named" in reason for reason in left_out)


@pytest.mark.gpu
def test_a_captured_call_gives_what_it_gave(scripts):
    x = torch.randn(8, 64, device="cuda")
    packed = reference.pack_ternary(torch.ones(32, 64)).cuda()
    out = torch.empty(8, 32, device="cuda")
    replay = scripts["gpu"].captured(
        lambda: out.copy_(reference.ternary_linear(x, packed, x.new_ones(1), None)), "cuda"
    )
    expected = out.clone()
    out.zero_()
    replay()
    assert torch.equal(out, expected)

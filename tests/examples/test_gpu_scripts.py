"""The scripts behind `make gpu`, tried out on a CPU with toy sizes: what they write has the right shape."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_terdit.models.transformer_terdit import SIZES


EXAMPLES = Path(__file__).parents[2] / "examples"
TOY = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 8, "num_classes": 1000}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`run("gpu_pipeline", "--steps", "2", ...)`: its JSON and its page."""
    monkeypatch.setitem(SIZES, "toy", TOY)
    for folder in (EXAMPLES, EXAMPLES / "benchmarks"):
        monkeypatch.syspath_prepend(folder)

    def script(name, *args, written=None):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *args, "--output_dir", str(tmp_path)])
        module.main()
        path = tmp_path / f"{written or name}.json"
        return json.loads(path.read_text()), path.with_suffix(".md").read_text("utf-8")

    return script


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter runs where there is no GPU")
def test_every_design_of_a_layer_multiplies_right(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, EXAMPLES / "benchmarks" / "gpu_shootout.py", "--output_dir", tmp_path]
    command += ["--device", "cpu", "--presets", "toy", "--rows", "64", "--dtype", "float16", "--blocks", "1"]
    # in a process of its own: Triton reads the setting when it is imported, which torch does as well
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent / "src")])
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path})
    records = json.loads((tmp_path / "gpu_shootout.json").read_text())["records"]
    assert len(records) == 14
    largest = {"dense": 1e-3, "exact": 1e-3, "int8": 1e-2, "fp8": 4e-2}
    for record in records:
        assert "failed" not in record
        kind = record["design"].split(",")[0]
        assert kind == "decode alone" or 0 < record["error"] < largest[kind]
    assert "## toy, 64 rows, float16" in (tmp_path / "gpu_shootout.md").read_text("utf-8")


def test_pictures_go_on_where_they_stopped(run, capsys):
    args = ["--device", "cpu", "--presets", "toy", "--dtype", "float32", "--steps", "2", "--batch_sizes"]
    run("gpu_pipeline", *args, "1")
    capsys.readouterr()
    data, page = run("gpu_pipeline", *args, "1", "2")
    assert capsys.readouterr().out.count('"batch": 2') == len(data["records"]) / 2 == 4
    assert {(record["compiled"], record["batch"]) for record in data["records"]} == {
        (compiled, batch) for compiled in (False, True) for batch in (1, 2)
    }
    assert all(record["milliseconds_per_step"] > 0 and record["picture_seconds"] > 0 for record in data["records"])
    assert "| 2 | DPM-Solver++ | compiled |" in page
    assert run("gpu_pipeline", "--render")[1] == page


def test_a_training_step_is_measured_once(run, monkeypatch, capsys):
    asked, original = [], subprocess.run

    def peak_memory(command, **options):  # a process of its own would not know the toy
        if "--measure" not in command:
            return original(command, **options)
        asked.append(command[-1])
        return SimpleNamespace(stdout="1.5\n")

    monkeypatch.setattr(subprocess, "run", peak_memory)
    args = ["training", "--preset", "toy", "--layers", "1", "--batch_size", "2", "--repeats", "1"]
    data, page = run("benchmark", *args, written="training")
    assert [record["model"] for record in data["records"]] == asked
    assert data["records"][0]["ratio"] == 1
    assert "| full precision |" in page
    assert run("benchmark", *args, written="training")[0] == data
    assert "holds this already" in capsys.readouterr().out


def test_what_pytest_counts(run, monkeypatch, tmp_path):
    gpu_tests = importlib.import_module("gpu_tests")
    file = tmp_path / "test_some.py"
    file.write_text(
        "import time, pytest\n"
        "def test_right(): pass\n"
        "@pytest.mark.skip\n"
        "def test_left_out(): pass\n"
        "def test_wrong(): assert 1 == 2, 'no'\n"
        "def test_slow(): time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_tests, "FILES", [str(file)])
    counted = gpu_tests.run_part(["-k", "not slow"], seconds=60)
    assert counted["complete"]
    assert {key: counted[key] for key in ("passed", "failed", "skipped")} == {"passed": 1, "failed": 1, "skipped": 1}
    ((name, line),) = counted["failures"].items()
    assert name.endswith("test_some::test_wrong")
    assert line == "AssertionError: no"
    cut_short = gpu_tests.run_part([], seconds=5)
    assert not cut_short["complete"]
    assert cut_short["passed"] >= 1
    page = gpu_tests.page({"place": "here", "command": "this", "records": [{"part": "some", **counted}]})
    assert "| some | 1 | 1 | 1 | yes |" in page
    assert "test_some::test_wrong`: AssertionError: no" in page

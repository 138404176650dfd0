"""A few of every fault of `stress_files.py`; its 100,000 are `make stress`."""

import json
import pickle
from pathlib import Path

import pytest
import torch

import stress_files
from diffusers_terdit import TernaryLinear, modeling
from diffusers_terdit.modeling import MAX_BLOCKS
from diffusers_terdit.storage.weights import DTYPE_NAMES
from stress_files import BAD, FAULTS, GOOD, WEIGHTS, judge, markdown, payloads, run, tensors_of, write


RESULTS = Path(__file__).parent.parent / "docs" / "results"


def test_every_fault_loads_as_the_files_say_or_raises_an_error_that_names_one(monkeypatch):
    """And the worker, killed from outside at case 1, is counted as a crash; the next case gets another."""
    ordinary = stress_files.Worker.run

    def kill_once(self, number):
        if number == 1:
            self.process.kill()
            self.process.wait()
            return self.process.stdout.readline()
        return ordinary(self, number)

    monkeypatch.setattr(stress_files.Worker, "run", kill_once)
    report = run(len(FAULTS) * 14, seed=1)
    assert [(failure["number"], failure["outcome"]) for failure in report["failures"]] == [(1, "crashed")]
    assert report["restarts"] == 1
    assert report["next"] == len(FAULTS) * 14
    assert report["faults"].keys() == FAULTS.keys()
    for outcome in GOOD[:3]:
        assert sum(counts.get(outcome, 0) for counts in report["faults"].values()) > 10
    assert report["bytes"] < 2**28


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # payloads leave their files open
@pytest.mark.parametrize("number", range(8))
def test_every_payload_would_make_the_canary(tmp_path, number):
    opened = pickle.loads(pickle.dumps(payloads(tmp_path)[number]))
    assert (tmp_path / "canary").exists()
    if hasattr(opened, "close"):
        opened.close()


@pytest.fixture
def layer(tmp_path, monkeypatch):
    monkeypatch.setattr(stress_files, "_NAMES", dict(DTYPE_NAMES))
    torch.manual_seed(0)
    TernaryLinear(16, 8).pack().save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    return TernaryLinear.from_pretrained(tmp_path), files


def test_the_judge_passes_what_the_files_say(layer, tmp_path):
    assert judge("layer", layer[1], layer[0], tmp_path) == "loaded"


@pytest.mark.parametrize("name", ["weight_scale", "bias", "weight_packed"])
def test_the_judge_notices_a_single_bit(layer, tmp_path, name):
    loaded, files = layer
    loaded.state_dict()[name].view(torch.uint8).reshape(-1)[0] ^= 1
    with pytest.raises(AssertionError, match=f"{name} is not what its file says"):
        judge("layer", files, loaded, tmp_path)


def test_the_judge_notices_a_digest_that_was_passed_over(layer, tmp_path):
    loaded, files = layer
    tensors, metadata = tensors_of(files[WEIGHTS])
    tensors["bias"] = ("F32", [8], b"\0\0\x80\x3f" * 8)
    with pytest.raises(AssertionError, match="does not match its digest"):
        judge("layer", {**files, WEIGHTS: write(tensors, metadata)}, loaded, tmp_path)


def test_the_judge_notices_nan(layer, tmp_path):
    loaded, files = layer
    tensors, metadata = tensors_of(files[WEIGHTS])
    tensors["bias"] = ("F32", [8], b"\0\0\x80\x7f" * 8)
    metadata.pop("terdit.sha256")
    loaded.bias.data.fill_(float("inf"))
    with pytest.raises(AssertionError, match="bias holds NaN or infinity"):
        judge("layer", {**files, WEIGHTS: write(tensors, metadata)}, loaded, tmp_path)


def test_the_committed_figures_are_of_100_000_inputs_without_a_failure():
    report = json.loads((RESULTS / "stress.json").read_text("utf-8"))
    assert report["next"] >= 100_000
    assert report["faults"].keys() == FAULTS.keys()
    for fault, counts in report["faults"].items():
        assert sum(counts.values()) >= 1000, fault
        assert not set(counts) & set(BAD), fault
    assert report["failures"] == []
    assert (RESULTS / "stress.md").read_text("utf-8") == markdown(report)


def test_the_page_says_the_limits_that_hold():
    page = (RESULTS.parent / "SECURITY.md").read_text("utf-8")
    assert f"more than {MAX_BLOCKS:,} blocks" in page
    assert "above 2^31 - 1" in page
    assert modeling._MAX_INT == 2**31 - 1
    inputs = json.loads((RESULTS / "stress.json").read_text("utf-8"))["next"]
    assert f"{inputs:,} damaged and hostile files" in page

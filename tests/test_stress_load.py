"""A few cycles of `stress_load.py`, and leaks made on purpose, which its judge notices; 1,000 are `make stress`."""

import ctypes
import gc
import json
import os
import threading
from pathlib import Path

import pytest
import torch

import stress_load
from stress_load import BOUNDS, SCENARIOS, digits, growth, judge, judge_all, markdown, measure, watch


RESULTS = Path(__file__).parent.parent / "docs" / "results"
COUNTED = set(BOUNDS) - {"bytes"}  # memory needs more cycles than a test has: the first ones grow


@pytest.fixture(scope="module", autouse=True)
def _one_thread_and_few_objects():
    """The objects that are there before are left out: to look through them for every note takes long."""
    before = torch.get_num_threads()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


QUICK = ("load, sample, delete", "errors", "LoRA")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in SCENARIOS
        if name not in ("images", "safetensors alone")
    ],
)
def test_a_few_cycles_keep_no_tensor_file_or_thread_and_hardly_an_object(name):
    notes = measure(name, 24 if name == "load, sample, delete" else 4)["notes"]
    slopes = growth(notes)
    assert not {"tensors", "files", "threads"} & set(judge(notes)), slopes
    assert slopes["objects"] < 10


def leaks(kind):
    """A cycle that keeps something, and the list of what it keeps."""
    kept = []
    if kind == "pipeline":
        return lambda cycle: kept.append(digits()), kept
    if kind == "tensor":
        return lambda cycle: kept.append(torch.zeros(1)), kept
    if kind == "object":
        return lambda cycle: kept.append([cycle]), kept
    if kind == "file":
        return lambda cycle: kept.append(open(os.devnull)), kept
    if kind == "memory":

        def allocate(cycle):
            block = ctypes.create_string_buffer(100_000)
            kept.append(ctypes.string_at(block, 100_000))

        return allocate, kept

    def start(cycle):
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        kept.append((thread, stop))

    return start, kept


@pytest.mark.parametrize(
    ("kind", "noticed"),
    [
        ("pipeline", {"tensors", "objects", "bytes"}),
        ("tensor", {"tensors"}),
        ("object", {"objects"}),
        ("file", {"files"}),
        ("thread", {"threads"}),
        ("memory", {"bytes"}),
    ],
)
def test_the_judge_notices_what_is_kept_in_every_cycle(kind, noticed):
    body, kept = leaks(kind)
    try:
        assert noticed <= set(judge(watch(8, body)))
    finally:
        for item in kept:
            if kind == "file":
                item.close()
            if kind == "thread":
                item[1].set()
                item[0].join()


def test_the_judge_passes_what_only_grows_at_first():
    kept = []
    assert not COUNTED & set(judge(watch(8, lambda cycle: kept.append([cycle]) if cycle < 3 else None)))


def test_the_committed_figures_show_no_leak():
    report = json.loads((RESULTS / "stress_load.json").read_text("utf-8"))
    assert list(report["scenarios"]) == list(SCENARIOS)
    assert not any(judge_all(report).values()), judge_all(report)
    for result in report["scenarios"].values():
        assert result["notes"][-1]["cycle"] == result["cycles"]
        assert len(result["notes"]) > 30
    assert report["scenarios"]["load, sample, delete"]["cycles"] >= 1000
    assert 100 * report["scenarios"]["images"]["cycles"] >= 10_000
    assert (RESULTS / "stress_load.md").read_text("utf-8") == markdown(report)
    assert stress_load.NOTES == 40

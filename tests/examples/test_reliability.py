"""examples/reliability: a few of every fault, kills of every program, races, and leaks; `make stress` does more."""

import gc
import json
import mmap
import os
import pickle
import random
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

import data_files
import files
import kills
import load
import page
import races
from diffusers_terdit import TernaryLinear
from diffusers_terdit.storage.configs import MAX_BLOCKS


RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_committed_page_renders_from_reports_without_a_failure():
    assert (RESULTS / "reliability.md").read_text("utf-8") == page.render(RESULTS)
    reports = [json.loads((RESULTS / f"reliability_{name}.json").read_text()) for name in page.REPORTS]
    hostile, damaged, raced, killed, loaded = reports
    assert hostile["next"] >= 100_000
    assert hostile["failures"] == []
    assert hostile["faults"].keys() == files.FAULTS.keys()
    for kind, cls in data_files.KINDS.items():
        found = damaged["kinds"][kind]
        assert found["next"] >= cls.count // 10
        assert found["failures"] == []
        assert found["faults"].keys() == cls.faults.keys()
    for kind in races.KINDS:
        found = raced["kinds"][kind]["outcomes"]
        assert found["A"] + found["B"] >= 50
        assert not found["mixture"] + found["other error"]
    assert killed["programs"].keys() == kills.PROGRAMS.keys()
    for found in killed["programs"].values():
        assert found["resumed"] == found["kills"] >= 200
        assert found["failures"] == []
        assert found["mounted"]
    assert loaded["scenarios"].keys() == load.SCENARIOS.keys()
    assert not any(load.judge_all(loaded).values())
    security = (RESULTS.parent / "SECURITY.md").read_text("utf-8")
    assert f"{hostile['next']:,} damaged and hostile files" in security
    assert f"more than {MAX_BLOCKS:,} blocks" in security


# Files


def test_every_fault_loads_as_the_files_say_or_raises_an_error_that_names_one():
    report = files.run(len(files.FAULTS) * 10, seed=1)
    assert report["failures"] == []
    assert report["faults"].keys() == files.FAULTS.keys()
    for outcome in files.GOOD[:3]:
        assert sum(counts.get(outcome, 0) for counts in report["faults"].values()) > 10
    assert report["bytes"] < 2**28


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # payloads leave their files open
def test_every_payload_would_make_the_canary(tmp_path):
    for number in range(8):
        root = tmp_path / str(number)
        root.mkdir()
        opened = pickle.loads(pickle.dumps(files.payloads(root)[number]))
        assert (root / "canary").exists()
        if hasattr(opened, "close"):
            opened.close()


def test_the_judge_of_files_notices_a_bit_a_digest_and_infinity(tmp_path):
    TernaryLinear(16, 8).pack().save_pretrained(tmp_path)
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = TernaryLinear.from_pretrained(tmp_path)
    assert files.judge("layer", saved, loaded) == "loaded"
    tensors, metadata = files.tensors_of(saved[files.WEIGHTS])
    infinite = {**tensors, "bias": ("F32", [8], b"\0\0\x80\x7f" * 8)}
    with pytest.raises(AssertionError, match="does not match its digest"):
        files.judge("layer", {**saved, files.WEIGHTS: files.write(infinite, metadata)}, loaded)
    for name in ("weight_scale", "weight_packed"):
        bits = loaded.state_dict()[name].view(torch.uint8).reshape(-1)
        bits[0] ^= 1
        with pytest.raises(AssertionError, match=f"{name} is not what its file says"):
            files.judge("layer", saved, loaded)
        bits[0] ^= 1
    loaded.bias.data.fill_(float("inf"))
    with pytest.raises(AssertionError, match="bias holds NaN or infinity"):
        files.judge("layer", {**saved, files.WEIGHTS: files.write(infinite, {})}, loaded)


def test_faults_change_the_tensors_of_a_pickle_and_keep_the_others():
    saved = {files.PTH: files.dump_pickle({"a": torch.ones(2), "b": torch.ones(3)})}
    files.edit_tensors(random.Random(0), saved, lambda tensors: tensors.update(a=("F32", [0], b"")))
    changed = files.load_pickle(saved[files.PTH])
    assert [tuple(tensor.shape) for tensor in changed.values()] == [(0,), (3,)]


# What training reads


@pytest.mark.parametrize("kind", data_files.KINDS)
def test_damage_of_what_training_reads_gives_the_same_bits_an_error_or_the_next_image(kind):
    faults = data_files.KINDS[kind].faults
    report = data_files.run(kind, len(faults) * (20 if kind == "images" else 1), seed=1)
    assert report["failures"] == []
    assert report["faults"].keys() == faults.keys()
    assert len(report["kinds"][kind]) > 2


def test_the_judge_of_data_files_notices_a_bit_that_no_digest_tells(tmp_path):
    (tmp_path / "base").mkdir()
    adapters = data_files.Adapters()
    adapters.make(tmp_path / "base")
    adapters.start(tmp_path / "base")
    whole = kills.files_of(tmp_path / "base")
    same = adapters.use(tmp_path / "base")
    assert adapters.says(whole)
    assert data_files.own_digest_matches(whole)
    damaged = {name: data[:-1] + bytes([data[-1] ^ 1]) for name, data in whole.items()}
    assert not adapters.says(damaged)
    assert not data_files.own_digest_matches(damaged)
    adapters.kept.proj_out.bias.data += 1  # as a file would that overwrites the model's own weights
    with pytest.raises(AssertionError, match="changed the model's own weights"):
        adapters.use(tmp_path / "base")
    adapters.kept = adapters.model()
    assert adapters.use(tmp_path / "base") == same


# Races


def test_loads_while_another_process_saves_are_whole():
    found = races.race("model", 8, seed=0)["outcomes"]
    assert found["A"] + found["B"] == 8
    assert not found["mixture"] + found["other error"]


def test_the_judge_of_races_tells_mixtures(tmp_path):
    for which in "AB":
        races.save("pipeline", which, tmp_path / which)
    known = {races.contents("pipeline", tmp_path / which) for which in "AB"}
    for name in ("scheduler/scheduler_config.json", "model_index.json", "transformer/config.json", str(next(
            path.relative_to(tmp_path / "A") for path in (tmp_path / "A").rglob("*.safetensors")))):  # fmt: skip
        races.save("pipeline", "A", tmp_path / "mixed")
        (tmp_path / "mixed" / name).write_bytes((tmp_path / "B" / name).read_bytes())
        assert races.contents("pipeline", tmp_path / "mixed") not in known
    assert len(known) == 2


# Kills


def test_killed_programs_leave_nothing_torn_and_end_as_undisturbed_ones(tmp_path):
    """In a new process: after a backward pass, autograd does not work in a fork."""
    command = [sys.executable, kills.__file__, "--kills", "1", "--others", "1", "--output_dir", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "reliability_kills.json").read_text())
    assert report["programs"].keys() == kills.PROGRAMS.keys()
    for found in report["programs"].values():
        assert found["kills"] == found["resumed"] == sum(found["states"].values()) >= 1
        assert found["disk"]["folder without permission"] == sum(found["twice"].values()) == 1
    assert not (tmp_path / "reliability_kills.progress.json").exists()


def test_the_judge_of_kills_knows_old_new_and_interrupted_and_notices_mixtures(tmp_path):
    models, folder = kills.Models(tmp_path), tmp_path / "out"
    old = models.old["shards"]
    kills.place(folder, old)
    models.run("shards", folder)
    models.new["shards"] = new = kills.files_of(folder)
    models.finished("shards", folder)
    assert models.state("shards", folder) == "new"
    (folder / "diffusion_pytorch_model.saving").write_text("1")
    assert models.state("shards", folder) == "interrupted"
    kills.place(folder, old)
    assert models.state("shards", folder) == "old"
    kills.place(folder, {**new, "config.json": old["config.json"]})
    with pytest.raises(AssertionError, match="neither the old nor the new"):
        models.state("shards", folder)
    kills.place(folder, {**new, "config.json": new["config.json"][:-1]})
    with pytest.raises(AssertionError, match="other bytes"):
        models.finished("shards", folder)
    kills.place(folder, {**new, "new.00000000.partial/config.json": b"{}"})
    with pytest.raises(AssertionError, match="files differ"):
        models.finished("shards", folder)


# Leaks


@pytest.fixture
def few_objects():
    """Leave out the objects that are there before: to look through them for every note takes long."""
    before = torch.get_num_threads()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("errors", "LoRA") else pytest.param(name, marks=pytest.mark.slow)
        for name in load.SCENARIOS
        if name not in ("images", "safetensors alone")
    ],
)
def test_a_few_cycles_keep_no_tensor_file_or_thread_and_hardly_an_object(name):
    notes = load.measure(name, 24 if name == "load, sample, delete" else 4)["notes"]
    slopes = load.growth(notes)
    assert not {"tensors", "files", "threads"} & set(load.judge(notes)), slopes
    assert slopes["objects"] < 10


def thread():
    stop = threading.Event()
    started = threading.Thread(target=stop.wait)
    started.start()
    return started, stop


def pages():
    """100 kB of the system: malloc may give what an earlier test has freed, which adds nothing."""
    memory = mmap.mmap(-1, 100_000)
    memory.write(b"1" * 100_000)
    return memory


KEPT = {
    "pipeline": (load.digits, {"tensors", "objects", "bytes"}),
    "tensor": (lambda: torch.zeros(1), {"tensors"}),
    "object": (lambda: [0], {"objects"}),
    "file": (partial(open, os.devnull), {"files"}),
    "thread": (thread, {"threads"}),
    "memory": (pages, {"bytes"}),
}


@pytest.mark.usefixtures("few_objects")
@pytest.mark.parametrize("kind", KEPT)
def test_the_judge_of_leaks_notices_what_is_kept_in_every_cycle(kind):
    kept, (make, noticed) = [], KEPT[kind]
    try:
        assert noticed <= set(load.judge(load.watch(8, lambda cycle: kept.append(make()))))
    finally:
        for item in kept:
            if kind == "file":
                item.close()
            if kind == "thread":
                item[1].set()
                item[0].join()


@pytest.mark.usefixtures("few_objects")
def test_the_judge_of_leaks_passes_what_only_grows_at_first():
    kept = []
    notes = load.watch(8, lambda cycle: kept.append([cycle]) if cycle < 3 else None)
    assert not {"tensors", "objects", "files", "threads"} & set(load.judge(notes))

"""A few kills of each program of `stress_kills.py`, full disks and pairs of processes; its 200 are `make stress`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stress_kills import PROGRAMS, Models, files_of, markdown, place


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
OUTCOMES = ("full", "read-only disk", "folder without permission")


def test_killed_programs_leave_nothing_torn_and_end_as_undisturbed_ones(tmp_path):
    """In a process of its own: after a backward pass, autograd does not work in a fork."""
    command = [sys.executable, str(ROOT / "tests" / "stress_kills.py"), "--kills", "1", "--others", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--output_dir", tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "stress_kills.json").read_text())
    assert report["programs"].keys() == PROGRAMS.keys()
    for found in report["programs"].values():
        assert found["kills"] == found["resumed"] == sum(found["states"].values()) >= 1
        assert found["disk"]["folder without permission"] == sum(found["twice"].values()) == 1
    assert (tmp_path / "stress_kills.md").read_text() == markdown(report)
    assert not (tmp_path / "stress_kills.progress.json").exists()


class TestJudge:
    @pytest.fixture
    def models(self, tmp_path):
        models = Models(tmp_path)
        for variant in models.variants[:2]:
            place(tmp_path / "out", models.old[variant])
            models.run(variant, tmp_path / "out")
            models.new[variant] = files_of(tmp_path / "out")
        return models, tmp_path / "out"

    def test_it_knows_the_old_the_new_and_the_interrupted(self, models):
        models, folder = models
        models.finished("shards", folder)
        assert models.state("shards", folder) == "new"
        (folder / "diffusion_pytorch_model.saving").write_text("1")
        assert models.state("shards", folder) == "interrupted"
        place(folder, models.old["shards"])
        assert models.state("shards", folder) == "old"

    def test_it_notices_a_mixture(self, models):
        models, folder = models
        place(folder, {**models.new["one file"], "config.json": models.old["one file"]["config.json"]})
        with pytest.raises(AssertionError, match="neither the old nor the new"):
            models.state("one file", folder)

    @pytest.mark.parametrize("change", ["torn", "lost", "left"])
    def test_it_notices_other_bytes_and_other_files(self, models, change):
        models, folder = models
        if change == "torn":
            (folder / "config.json").write_bytes(models.new["shards"]["config.json"][:-1])
        elif change == "lost":
            (folder / "config.json").unlink()
        else:
            (folder / "new.00000000.partial").mkdir()
            (folder / "new.00000000.partial" / "config.json").write_text("{}")
        with pytest.raises(AssertionError, match="other bytes" if change == "torn" else "files differ"):
            models.finished("shards", folder)


def test_the_committed_figures_are_of_200_kills_of_each_program_without_a_failure():
    report = json.loads((RESULTS / "stress_kills.json").read_text("utf-8"))
    assert report["programs"].keys() == PROGRAMS.keys()
    for name, found in report["programs"].items():
        assert found["kills"] >= 200, name
        assert found["resumed"] == sum(found["states"].values()) == sum(found["moments"].values()) == found["kills"]
        assert found["writing"] > 20, name
        assert found["failures"] == [], name
        assert found["mounted"]
        assert sum(found["twice"].values()) == found["disk"]["full"] + found["disk"]["fitted"] >= 20
        assert all(found["disk"][outcome] for outcome in OUTCOMES), name
    assert (RESULTS / "stress_kills.md").read_text("utf-8") == markdown(report)

"""examples/experiments/recipe.py: arms that the program has, and those that it lacks, on tiny IDX files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import fashion
import recipe
from idx_files import idx
from tiny_training import fresh_model


RESULTS = Path(__file__).parents[2] / "docs" / "results"
TINY = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 128, "patch_size": 14}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run arms for 3 steps, and return their records."""
    for part, count in (("train", 130), ("t10k", 20)):
        images = np.random.default_rng(count).integers(0, 255, (count, 28, 28)).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    fashion.main(["--data_dir", str(tmp_path), "--judge", str(tmp_path / "judge"), "--epochs", "1"])
    changes = {"COMMON": {**recipe.COMMON, **TINY, "train_batch_size": 4, "num_validation_images": 1}}
    changes |= {"STEPS": 3, "NUM_IMAGES": 20, "HELD_OUT": 5, "SAMPLING_STEPS": 2}
    for name, value in changes.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setitem(recipe.PLANS, "screen", [(arm, 3, 0, {}) for arm in recipe.ARMS])

    def run(*arms):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        paths = {
            "data_dir": tmp_path,
            "judge": tmp_path / "judge",
            "runs_dir": tmp_path / "runs",
            "output_dir": tmp_path,
        }
        words = [str(word) for key, value in paths.items() for word in (f"--{key}", value)]
        recipe.main([*words, "--part", "screen", *(word for arm in arms for word in ("--arm", arm))])
        return [json.loads(line) for line in (tmp_path / "recipe.jsonl").read_text("utf-8").splitlines()]

    return run


def test_arms_are_trained_and_judged_once(run, tmp_path):
    arms = [recipe.BASE, recipe.FIRST_THIRD, "noise prediction", "Muon", "a Hadamard basis", "raw weights"]
    arms += ["prediction of the clean image"]
    records = run(*arms)
    assert {record["run"]["arm"] for record in records} == set(arms)
    for record in records:
        result = record["result"]
        assert result["frechet_distance"] > 0
        assert 0 <= result["recognised"] <= 1
        assert (result["held_out_loss"] is None) == (record["run"]["arm"] == "noise prediction")
    losses = {record["run"]["arm"]: record["result"]["held_out_loss"] for record in records}
    assert len(set(losses.values())) == len(arms)  # every arm differs from the others
    page = (tmp_path / "recipe.md").read_text("utf-8")
    assert all(f"| {arm} |" in page for arm in arms[1:])
    assert run(*arms) == records


def test_a_layer_in_a_rotated_basis_sees_its_input_in_it():
    matrix = recipe.hadamard(128)
    assert torch.allclose(matrix @ matrix, torch.eye(128), atol=1e-6)
    model = fresh_model(num_attention_heads=2, attention_head_dim=64, ffn_dim=128)
    layer = model.transformer_blocks[0].attn.to_q
    hidden = torch.randn(3, 128)
    plain = layer(hidden @ matrix)
    recipe.rotate_inputs(model)
    assert torch.allclose(layer(hidden), plain, atol=1e-5)


def test_a_clean_image_is_turned_into_the_velocity_that_leads_there():
    model = fresh_model()
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([10.0, 500.0, 1000.0]), torch.tensor([1, 2, 10])
    clean = model(*inputs, return_dict=False)[0]
    recipe.predict_clean(model)
    velocity = model(*inputs, return_dict=False)[0]
    step = torch.tensor([0.05, 0.5, 1]).view(3, 1, 1, 1)  # the first is divided by no less
    assert torch.allclose(inputs[0] - step * velocity, clean, atol=1e-5)


def test_the_committed_page_renders_from_the_committed_records():
    assert recipe.render(RESULTS) == (RESULTS / "recipe.md").read_text("utf-8")

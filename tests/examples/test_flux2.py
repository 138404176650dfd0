"""`benchmark.py flux2`: the shape of the model, the folder it writes and imports, the times, the committed page."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors import safe_open

from diffusers_terdit import TernaryLinear
from diffusers_terdit.conversion import convert_dense_checkpoint


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "examples"))
import flux2_page  # noqa: E402


TINY = {
    **flux2_page.KLEIN_4B,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 16,
    "joint_attention_dim": 48,
    "axes_dims_rope": (16, 16, 16, 16),
    "timestep_guidance_channels": 32,
}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(flux2_page, "SHARD_BYTES", 200_000)


def test_the_shape_is_that_of_the_published_model():
    model = flux2_page.meta_model(flux2_page.KLEIN_4B)
    layers = flux2_page.select_layers(model, flux2_page.TernaryConfig(scale_granularity=128))
    assert len(layers) == 100
    assert 3.8e9 < sum(parameter.numel() for parameter in model.parameters()) < 4.0e9


def test_what_is_written_imports_and_computes_what_the_dense_one_does(tmp_path, small_shards):
    sizes = flux2_page.write_dense(TINY, tmp_path / "dense")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    convert_dense_checkpoint(tmp_path / "dense", tmp_path / "packed", scale_granularity=flux2_page.GROUP)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["scale_granularity"] == 128
    dense, packed = (Flux2Transformer2DModel.from_pretrained(tmp_path / name) for name in ("dense", "packed"))
    layers = [module for module in packed.modules() if isinstance(module, TernaryLinear)]
    assert sizes["ternary_layers"] == len(layers) == 12 + 2 * 2
    assert sizes["ternary_weights"] == sum(layer.weight_packed.numel() * 4 for layer in layers)
    assert sizes["groups"] == sum(layer.weight_scale.numel() for layer in layers)
    assert sizes["other_parameters"] + sizes["ternary_weights"] == sum(p.numel() for p in dense.parameters())
    inputs = flux2_page.inputs(TINY, torch.float32, 4, 6)
    with torch.no_grad():
        expected, found = (model.float()(**inputs, return_dict=False)[0] for model in (dense, packed))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # what the bound counts is what the tensors take
    assert tensor_bytes(tmp_path / "packed") == pytest.approx(flux2_page.bound(sizes) / 1.03, rel=1e-6)


def tensor_bytes(folder):
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_blocks_are_timed_and_agree():
    found = flux2_page.time_blocks(TINY, 2, 4, 6)
    for times in found["cpu_seconds"].values():
        assert {mode: len(seconds) for mode, seconds in times.items()} == dict.fromkeys(flux2_page.BLOCK_MODES, 2)
        assert all(second > 0 for seconds in times.values() for second in seconds)
    errors = found["relative_error"]
    assert errors["dense, float32"] == 0
    assert errors["packed, float32"] < 1e-5
    assert errors["packed, bfloat16"] < 2 * errors["dense, bfloat16"] < 0.1


def test_a_forward_pass_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(flux2_page, "SIDE", 4)
    monkeypatch.setattr(flux2_page, "TEXT_TOKENS", 6)
    flux2_page.write_dense(TINY, tmp_path / "dense")
    found = flux2_page.measure_import(tmp_path / "dense", str(tmp_path / "packed"), lambda: 1.0)
    assert found["cpu_seconds"] > 0
    found = flux2_page.measure_forward(tmp_path / "packed", "bfloat16", lambda: 1.0)
    assert found["peak_gib"] == 1.0
    assert found["cpu_seconds"] > 0


class TestPage:
    def test_the_committed_page_is_what_the_committed_json_renders_to(self):
        data = json.loads((RESULTS / "flux2.json").read_text())
        assert flux2_page.page(data) == (RESULTS / "flux2.md").read_text("utf-8")

    def test_the_measured_folder_is_within_the_bound(self):
        sizes = json.loads((RESULTS / "flux2.json").read_text())["sizes"]
        assert sizes["packed_bytes"] <= flux2_page.bound(sizes)

    def test_without_results_there_is_nothing_to_render(self, tmp_path):
        command = [sys.executable, ROOT / "examples" / "benchmark.py", "flux2", "--render", "--output_dir", tmp_path]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1
        assert "measure first, without --render" in result.stderr


@pytest.mark.slow
def test_the_folder_of_the_4b_model_is_within_the_bound_and_its_weights_are_never_dense(tmp_path):
    """9 GB on disk and some ten minutes."""
    sizes = flux2_page.write_dense(flux2_page.KLEIN_4B, tmp_path / "dense")
    imported = flux2_page.in_a_process("import", tmp_path / "dense", str(tmp_path / "packed"))
    assert flux2_page.folder_bytes(tmp_path / "packed") <= flux2_page.bound(sizes)
    found = flux2_page.in_a_process("forward", tmp_path / "packed", "bfloat16")
    dense_gib = 2 * (sizes["ternary_weights"] + sizes["other_parameters"]) / 2**30
    assert imported["peak_gib"] < 0.4 * dense_gib
    assert found["peak_gib"] < 0.4 * dense_gib

"""`benchmark.py numerics`: the float64 reference, what is measured, the committed page."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.ops import has_integer_kernel


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "examples"))
import benchmark  # noqa: E402
import numerics_page  # noqa: E402


@pytest.mark.parametrize("granularity", ["tensor", "row", 8])
@torch.no_grad()
def test_the_reference_computes_in_float64_throughout(tiny_model, tiny_inputs, granularity):
    """The dense model of the same values, with other matmuls, agrees far below float32's rounding."""
    inputs = tiny_inputs(dtype=torch.float64)
    model = tiny_model("packed", scale_granularity=granularity, num_key_value_heads=2)
    found = numerics_page.in_float64(model)(**inputs).sample
    dense = numerics_page.in_float64(model.dequantize())(**inputs).sample
    torch.testing.assert_close(found, dense, rtol=1e-12, atol=1e-13)
    narrow = model(**tiny_inputs()).sample  # it is the model's forward pass
    torch.testing.assert_close(found.float(), narrow, rtol=1e-4, atol=1e-5)
    assert model.dtype == torch.float32


def test_the_loop_is_the_pipelines(tiny_pipeline):
    pipe = tiny_pipeline(weight_format="packed")
    exact = copy.deepcopy(pipe.transformer).double()
    expected = pipe(
        numerics_page.labels_of(exact), num_inference_steps=4, guidance_scale=2.0,
        generator=numerics_page.generators(), output_type="latent",
    ).images  # fmt: skip
    with torch.no_grad():
        found = numerics_page.float64_pictures(pipe, exact, 4, 2.0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-4)


def test_errors_are_those_of_the_arithmetic(tiny_pipeline, monkeypatch, tmp_path):
    pipe = tiny_pipeline(weight_format="packed")
    monkeypatch.setattr(TerDiTPipeline, "from_pretrained", lambda folder: pipe)
    argv = ["benchmark.py", "numerics", "--models", "digits", "--steps", "2", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark.main()
    data = json.loads((tmp_path / "numerics.json").read_text())
    assert data["command"].endswith("numerics --models digits --steps 2")
    assert (tmp_path / "numerics.md").read_text("utf-8") == numerics_page.page(data)
    layer = {(r["mode"], r["dtype"]): r["error"] for r in data["layer"]}
    model = {(r["mode"], r["dtype"]): r for r in data["models"]["digits"]}
    assert layer.keys() == model.keys() == set(numerics_page.modes())
    for mode in ("dense", "exact"):
        for error in (layer[mode, "float32"]["gaussian"], model[mode, "float32"]["forward"]):
            assert 0 < error < 2e-6
        assert 1e-4 < layer[mode, "float16"]["gaussian"] < 1e-3 < layer[mode, "bfloat16"]["gaussian"] < 1e-2
    if has_integer_kernel("cpu"):
        assert 1e-5 < layer["int16", "float32"]["gaussian"] < layer["int16", "float32"]["outliers"] < 1e-3
        assert 5e-3 < layer["int8", "float32"]["gaussian"] < layer["int8", "float32"]["outliers"] < 0.1


def test_the_committed_page_is_what_the_committed_json_renders_to():
    data = json.loads((RESULTS / "numerics.json").read_text())
    assert (RESULTS / "numerics.md").read_text("utf-8") == numerics_page.page(data)
    assert list(data["models"]) == list(numerics_page.MODELS)
    assert data["steps"] == numerics_page.STEPS
    assert len(data["layer"]) == 12

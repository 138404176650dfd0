"""What `inspect_weights` counts, and what it refuses."""

import re

import pytest

from diffusers_terdit import TernaryLinear
from diffusers_terdit.storage.inspection import HEADERS, inspect_weights
from diffusers_terdit.training.statistics import ternary_statistics
from tiny import rewrite_weights


FILE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("weight_format", ["packed", "float"])
@pytest.mark.parametrize("granularity", ["tensor", "row", 8])
@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_it_counts_what_the_model_holds(tiny_model, tmp_path, weight_format, granularity, shards):
    model = tiny_model(weight_format, scale_granularity=granularity)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    report = inspect_weights(tmp_path)
    assert (len(report.files) > 1) == (shards == "20KB")
    assert report.total().bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert report.total().weights == sum(p.numel() for p in model.unpack().parameters())
    assert report.total().tensors == len(model.state_dict())
    assert sum(group.bytes for name, group in report.groups.items() if name != HEADERS) == sum(
        path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in report.files
    )
    statistics = ternary_statistics(model)
    ternary = report.total("ternary ").weights - len(report.scales)
    assert report.total("ternary ").zeros == round(statistics["zero_share"] * ternary)
    assert report.scales.abs().median().item() == statistics["scale_median"]
    assert report.granularities == {granularity}
    assert (report.packing == "row-chunk-2bit") == (weight_format == "packed")
    assert report.layers == len(model.ternary_layers())
    assert set(report.groups) >= {"ternary scales", "adaLN bias and norm", "norms", "class embedding", "final layer"}


def test_it_tells_dead_layers(tiny_model, tmp_path):
    model = tiny_model("packed")
    model.transformer_blocks[1].ff.up_proj.reset_parameters()  # a fresh packed layer is zero
    model.save_pretrained(tmp_path)
    assert inspect_weights(tmp_path).dead_layers == ["transformer_blocks.1.ff.up_proj"]


def test_files_are_read_as_strictly_as_on_loading(tmp_path):
    TernaryLinear(8, 8).pack().save_pretrained(tmp_path)
    rewrite_weights(tmp_path / FILE, lambda t: t["bias"].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{FILE}: tensor `bias` holds NaN or infinity"):
        inspect_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        inspect_weights(tmp_path)
    (tmp_path / f"{FILE}.index.json").write_text('{"metadata": {}, "weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match="a shard is a plain file name"):
        inspect_weights(tmp_path)


@pytest.mark.parametrize("shards", ["10GB", "50kB"])
def test_a_model_that_was_saved_as_a_variant_is_read(tiny_model, tmp_path, shards):
    model = tiny_model("packed")
    for folder, variant in (("plain", None), ("variant", "fp16")):
        model.save_pretrained(tmp_path / folder, variant=variant, max_shard_size=shards)
    plain, found = (inspect_weights(tmp_path / folder) for folder in ("plain", "variant"))
    assert (found.layers, found.total()) == (plain.layers, plain.total())
    model.save_pretrained(tmp_path / "variant", variant="other", max_shard_size=shards)
    with pytest.raises(OSError, match=r"has no diffusion_pytorch_model\.safetensors"):
        inspect_weights(tmp_path / "variant")

"""Everything loads from a Hub repository as it does from a folder, after `import diffusers_terdit`."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear
from fake_hub import patch_constants, run_with_hub


REPO = "user/terdit"


@pytest.mark.parametrize("loader", [TerDiTPipeline, DiffusionPipeline])
def test_pushed_pipeline_loads_and_samples_the_same(pushed, loader, sample):
    pipe = loader.from_pretrained(REPO)
    assert type(pipe) is TerDiTPipeline
    assert torch.equal(sample(pipe), sample(pushed))


def test_model_index_names_the_package_not_a_file_of_it(fake_hub, pushed):
    index = json.loads(fake_hub.repos[REPO].files("main")["model_index.json"])
    assert index["transformer"] == ["diffusers_terdit", "TerDiTTransformer2DModel"]
    assert index["_class_name"] == "TerDiTPipeline"


@pytest.mark.parametrize("loader", [TerDiTTransformer2DModel, AutoModel])
def test_transformer_loads_alone_from_a_pipeline_repository(pushed, loader):
    model = loader.from_pretrained(REPO, subfolder="transformer")
    assert type(model) is TerDiTTransformer2DModel
    expected = pushed.transformer.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("loader", "weight_format"), [(TerDiTTransformer2DModel, "float"), (AutoModel, "packed")])
def test_model_alone_in_a_repository(fake_hub, tiny_model, tiny_inputs, loader, weight_format):
    model = tiny_model(weight_format)
    model.push_to_hub("user/model", token=fake_hub.token)
    again = loader.from_pretrained("user/model")
    assert torch.equal(again(**tiny_inputs()).sample, model(**tiny_inputs()).sample)


def test_layer_alone_in_a_repository(fake_hub):
    layer = TernaryLinear(16, 8, weight_format="packed", scale_granularity=4)
    layer.save_pretrained("layer", push_to_hub=True, repo_id="user/layer", token=fake_hub.token)
    again = TernaryLinear.from_pretrained("user/layer")
    assert torch.equal(again.weight_packed, layer.weight_packed)
    assert again.scale_granularity == 4


def test_sharded_model_loads_from_the_hub(fake_hub, tiny_model, tmp_path):
    model = tiny_model("packed")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    fake_hub.upload_folder("user/sharded", tmp_path / "sharded")
    assert sum(name.endswith(".safetensors") for name in fake_hub.repos["user/sharded"].files("main")) > 2
    state_dict = TerDiTTransformer2DModel.from_pretrained("user/sharded").state_dict()
    assert all(torch.equal(tensor, state_dict[name]) for name, tensor in model.state_dict().items())


def test_second_load_downloads_nothing_and_offline_works(fake_hub, pushed, monkeypatch, sample):
    expected = sample(TerDiTPipeline.from_pretrained(REPO))
    downloads = len(fake_hub.downloads)
    assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), expected)
    assert len(fake_hub.downloads) == downloads
    patch_constants(monkeypatch, HF_HUB_OFFLINE=True)
    assert torch.equal(sample(TerDiTPipeline.from_pretrained(REPO)), expected)


def test_what_the_import_does(fake_hub, pushed, tmp_path):
    """Without it diffusers names the package that is missing; it prints nothing and brings nothing optional."""
    code = f"""
import contextlib, io, json, sys
import diffusers.hooks, diffusers.models.cache_utils
from diffusers import AutoencoderKL, AutoModel, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.loaders import PeftAdapterMixin
hosts = set(sys.modules)
try:
    DiffusionPipeline.from_pretrained({REPO!r})
except ValueError as error:
    message = str(error)
before, said = set(sys.modules), io.StringIO()
with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    import diffusers_terdit
new, seen = set(sys.modules) - before, [set(sys.modules) - hosts, set(sys.modules)]
roots, every = [sorted({{name.split(".")[0] for name in names}}) for names in seen]
models = [name for name in new if name.startswith("transformers.models")]
kind = type(DiffusionPipeline.from_pretrained({REPO!r})).__name__
found = {{"message": message, "said": said.getvalue(), "kind": kind, "models": models}}
print(json.dumps({{**found, "roots": roots, "every": every}}))
"""
    found = json.loads(run_with_hub(fake_hub, code, tmp_path))  # one line
    assert "diffusers_terdit.py" in found["message"]
    assert found["kind"] == "TerDiTPipeline"
    assert found["said"] == ""
    assert found["models"] == []
    optional = {"peft", "datasets", "sklearn", "matplotlib", "torchvision", "pandas", "onnxruntime", "gradio"}
    assert optional & set(found["roots"]) == set()
    assert {"datasets", "sklearn", "matplotlib"} & set(found["every"]) == set()


def test_the_python_of_the_page_runs(fake_hub, monkeypatch):
    """Its blocks are ```py, not ```python, because they need this Hub."""
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text("utf-8")
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    namespace = {}
    snippets = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, "hub.md", "exec"), namespace)
    assert len(snippets) == 4
    assert namespace["image"].size == (8, 8)
    assert type(namespace["pipe"]).__name__ == "TerDiTPipeline"
    assert type(namespace["pipe"]) is not TerDiTPipeline
    card = fake_hub.repos["me/my-digits"].files()["README.md"].decode()
    assert "![three](card_images/00.png)" in card
    assert "<!-- diffusers-terdit: written anew by every push, up to the closing mark -->" in page

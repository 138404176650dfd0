import copy
import json

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, training
from diffusers_terdit.hub.model_card import model_card
from diffusers_terdit.pipelines.schedulers import training_scheduler
from tiny_training import fresh_model, optimizer_of, take_steps


def export(model, folder, **kwargs):
    pipe = training.export.to_pipeline(model, **kwargs)
    training.export.save_pipeline(pipe, folder)
    return pipe


class TestExport:
    def test_float_model_packed_export_and_loaded_pipeline_give_the_same_samples(self, tmp_path):
        model = fresh_model().eval()
        take_steps(model, optimizer_of(model), 3)
        before = copy.deepcopy(model.state_dict())
        exported = export(model, tmp_path, id2label={i: str(i) for i in range(10)})
        loaded = TerDiTPipeline.from_pretrained(tmp_path)
        trained = TerDiTPipeline(model, training_scheduler())
        images = [
            pipe(
                [3, 7], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent"
            ).images
            for pipe in (trained, exported, loaded)
        ]
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2])
        assert loaded.transformer.config.weight_format == "packed"
        assert loaded.labels["7"] == 7
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_exporting_again_replaces_the_pipeline_and_keeps_other_files(self, tmp_path):
        (tmp_path / "checkpoint-1").mkdir()
        export(fresh_model(0), tmp_path)
        export(fresh_model(1), tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoint-1",
            "model_index.json",
            "scheduler",
            "transformer",
        ]
        codes = training.statistics.packed_codes(fresh_model(1))
        loaded = TerDiTPipeline.from_pretrained(tmp_path).transformer
        for name, layer in loaded.ternary_layers().items():
            assert torch.equal(layer.weight_packed, codes[name])

    def test_scales_stay_float32_in_a_half_precision_export(self, tmp_path):
        model = fresh_model()
        pipe = training.export.to_pipeline(model)
        pipe.transformer.to(torch.float16)
        training.export.save_pipeline(pipe, tmp_path)
        dtypes = {
            n: t.dtype for n, t in load_file(tmp_path / "transformer/diffusion_pytorch_model.safetensors").items()
        }
        assert {d for n, d in dtypes.items() if n.endswith("weight_scale")} == {torch.float32}
        assert {d for n, d in dtypes.items() if n.endswith("weight_packed")} == {torch.uint8}
        assert dtypes["proj_in.weight"] == torch.float16

    def test_the_full_precision_baseline_is_exported_as_it_is(self, tmp_path):
        model = fresh_model(ternary=False)
        export(model, tmp_path)
        loaded = TerDiTPipeline.from_pretrained(tmp_path).transformer
        assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())

    def test_a_flow_model_gets_the_scheduler_of_flow(self):
        pipe = training.export.to_pipeline(fresh_model(learn_sigma=False, prediction_type="flow_prediction"))
        assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)

    def test_a_model_that_does_not_say_what_it_predicts_gets_no_scheduler_by_chance(self):
        with pytest.raises(ValueError, match="does not say what it predicts"):
            training.export.to_pipeline(fresh_model(learn_sigma=False))

    def test_a_model_without_learned_variance_samples_with_the_schedulers_own(self, tmp_path):
        export(fresh_model(learn_sigma=False, prediction_type="epsilon"), tmp_path)
        pipe = TerDiTPipeline.from_pretrained(tmp_path)
        assert pipe.scheduler.config.variance_type == "fixed_small"
        assert pipe([0], num_inference_steps=2, output_type="latent").images.isfinite().all()
        assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"][1] == "DDPMScheduler"


class TestCard:
    def test_the_card_says_how_to_load_and_how_it_was_trained(self):
        pipe = training.export.to_pipeline(fresh_model(), id2label={i: f"kind {i}" for i in range(10)})
        options = training.export.card_options(pipe, {"steps": "12,000"}, ["samples/a.png"], license="mit")
        card = ModelCard(model_card(pipe, "me/tiny", options))
        assert card.data.license == "mit"
        assert card.data.library_name == "diffusers"
        assert {"terdit", "ternary", "1.58-bit", "class-conditional"} <= set(card.data.tags)
        assert 'from_pretrained("me/tiny")' in card.text
        assert "| steps | 12,000 |" in card.text
        assert "](samples/a.png)" in card.text
        assert "zero share" in card.text

    def test_the_full_precision_baseline_is_not_called_ternary(self):
        pipe = training.export.to_pipeline(fresh_model(ternary=False))
        card = model_card(pipe, "twin", training.export.card_options(pipe, {}))
        assert "ternary" not in card.replace("terdit", "")


def test_a_grid_has_whole_names_and_keeps_the_images_of_a_label_together():
    """Reads the picture back: where each color is, and that more text takes more lines."""
    colors = [(r, g, 0) for r in (50, 150) for g in (0, 100, 200)]  # two labels of three images
    images = [Image.new("RGB", (8, 8), color) for color in colors]

    def grid(*labels):
        return np.asarray(training.export.image_grid(images, labels=labels, scale=2, per_label=3)).astype(int)

    short = grid("a", "b")
    assert short.shape[1] == 3 * 24 + 8
    places = [np.argwhere((short == color).all(-1)) for color in colors]
    tops, lefts = zip(*(place.min(0).tolist() for place in places), strict=True)
    assert all(len(place) == 16 * 16 for place in places)
    assert list(tops) == [22] * 3 + [22 + 24 + 14] * 3
    assert list(lefts) == [8, 32, 56] * 2
    wrapped = grid("one two three four five six", "b")
    assert wrapped.shape[0] > short.shape[0]
    assert wrapped.shape[1] == short.shape[1]
    assert grid("internationalization", "b").shape[1] > short.shape[1]
    assert grid("x" * 1000, "b").shape[1] <= 160 + 16


def test_many_images_of_a_label_are_a_block():
    images = [Image.new("RGB", (64, 64))] * 9
    assert training.export.image_grid(images, per_label=9).size == (3 * 72 + 8, 3 * 72 + 8)
    assert training.export.image_grid(images * 4, per_label=9).size == (6 * 72 + 8, 6 * 72 + 8)

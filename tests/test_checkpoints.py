"""The bundled checkpoints: small, packed, and their samples are what their labels say."""

import pytest
import torch

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, training
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.evaluation.digits import digits_classifier


def recognized(images, labels):
    """Share of images (B, 1, 8, 8) in [-1, 1] that the classifier reads as their labels."""
    return (digits_classifier()(images / 2 + 0.5)["logits"].argmax(1) == torch.tensor(labels)).float().mean().item()


def test_digits_are_recognized():
    pipe = TerDiTPipeline.from_pretrained(bundled("digits"))
    pipe.set_progress_bar_config(disable=True)
    held_out, labels = training.data.Digits(train=False), [i % 10 for i in range(100)]
    assert recognized(held_out.images, held_out.labels) >= 0.98
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 20, "guidance_scale": 1.5, "generator": generator, "output_type": "latent"}
    assert recognized(pipe(labels, **options).images.clamp(-1, 1), labels) >= 0.97


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_they_are_small_and_hold_no_float_masters(name):
    files = [path for path in bundled(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < {"digits": 200_000, "emoji": 1_500_000}[name]
    assert not [path for path in files if "checkpoint-" in str(path.relative_to(bundled(name)))]
    assert TerDiTTransformer2DModel.load_config(bundled(name) / "transformer")["weight_format"] == "packed"

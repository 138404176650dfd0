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


def test_clothes_have_the_outlines_of_their_labels():
    """28 by 28 pixels: how wide and how high the picture of each label is, in the median of eight."""
    pipe = TerDiTPipeline.from_pretrained(bundled("fashion"))
    pipe.set_progress_bar_config(disable=True)
    names = ["trouser", "dress", "sneaker", "ankle boot"]
    labels = [name for name in names for _ in range(8)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(labels))]
    images = pipe(labels, num_inference_steps=10, generator=generators, output_type="pt").images[:, 0]
    ink = (images > 0.2).float()
    wide, high = (ink.amax(side).sum(1).unflatten(0, (4, 8)).median(1).values.tolist() for side in (1, 2))
    sizes = dict(zip(names, zip(wide, high, strict=True), strict=True))
    assert all(sizes[name][0] <= 18 and sizes[name][1] >= 26 for name in ("trouser", "dress")), sizes
    assert all(sizes[name][0] >= 26 for name in ("sneaker", "ankle boot")), sizes
    assert sizes["sneaker"][1] + 4 < sizes["ankle boot"][1] < sizes["dress"][1], sizes


@pytest.mark.parametrize("name", ["digits", "emoji", "fashion"])
def test_they_are_small_and_hold_no_float_masters(name):
    files = [path for path in bundled(name).rglob("*") if path.is_file()]
    assert (
        sum(path.stat().st_size for path in files)
        < {"digits": 200_000, "emoji": 1_500_000, "fashion": 600 * 1024}[name]
    )
    assert not [path for path in files if "checkpoint-" in str(path.relative_to(bundled(name)))]
    assert TerDiTTransformer2DModel.load_config(bundled(name) / "transformer")["weight_format"] == "packed"

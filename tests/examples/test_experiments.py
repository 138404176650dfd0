"""examples/experiments: the committed pages, a short run of each experiment, resuming, and the step caches."""

import json
import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)
from PIL import Image

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.pipelines.schedulers import default_scheduler
from tiny import randomize


pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
import adaln_norm
import common
import few_steps
import text_to_image
import train_text_to_image
import worth_it
from common import Records, Variant


RESULTS = Path(__file__).parents[2] / "docs" / "results"
EXPERIMENTS = {module.__name__: module for module in (adaln_norm, worth_it, text_to_image, few_steps)}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_committed_page_renders_from_the_committed_records(name):
    assert EXPERIMENTS[name].render(RESULTS) == (RESULTS / f"{name}.md").read_text(encoding="utf-8")


def test_variants_that_overlap_are_called_so():
    assert common.verdict([1, 2, 3], [4, 5, 6]) == "**better** (-60.0%)"
    assert common.verdict([4, 5, 6], [1, 2, 3]) == "**worse** (+150.0%)"
    assert common.verdict([1, 2, 3], [2.5, 9, 9]).startswith("tie (")
    assert common.verdict([math.inf] * 3, [1, 2, 3]) == "not every seed finite"


# Training


@pytest.fixture
def tiny(monkeypatch):
    size = common.Size(1, 2, 8, 16, 4, 8, (1e-3, 2e-3, 4e-3), 2, 8, 2)
    monkeypatch.setitem(common.SIZES, "tiny", size)
    return size


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "full", "adaln": "plain"},
        {"adaln": "full"},
        {"adaln": "bitnet"},
        {"weights": "four levels"},
        {"scale": "absmean"},
        {"scale": "row", "full_share": 0.5, "blend_share": 0.5},
    ],
    ids=str,
)
def test_a_variant_trains_and_is_exported_as_it_computes(tiny, options):
    variant = Variant("tiny", **options)
    model = randomize(common.build(variant, 0)).eval()
    dense = common.exported(model)
    assert not any(isinstance(module, TernaryLinear) for module in dense.modules())
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 4, 10])
    with torch.no_grad():
        expected, got = (m(*inputs, return_dict=False)[0] for m in (model, dense))
    assert 0 < (expected - got).abs().max() < 0.05 * expected.abs().max()  # bfloat16
    result = common.train(variant, 1e-3, seed=0, curve=True)
    assert [point["step"] for point in result["curve"]] == [2, 4]
    keys = ("noise_error", "noise_error_held_out", "frechet_distance", "max_grad_norm")
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in keys)


def test_variants_differ_in_what_they_say():
    def block(size="64", **options):
        return common.build(Variant(size, **options), 3).transformer_blocks[0]

    weights = [block(**options).ff.up_proj.weight for options in ({}, {"scale": "row"}, {"weights": "four levels"})]
    assert all(torch.equal(weight, weights[0]) for weight in weights)  # the variants of a seed share them
    assert block(scale="row").ff.up_proj.weight_scale.shape == (192, 1)
    levels, counts = common.FourLevelLinear(64, 32, bias=False).levels().unique(return_counts=True)
    assert levels.tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert counts.min() > 0.8 * counts.max()  # a fresh weight is uniform
    layer = common.AbsmeanLinear(16, 8, bias=False)
    layer(torch.randn(5, 16)).square().sum().backward()
    assert layer.weight.grad.any()
    assert layer.weight_scale.grad is None  # not learned
    before, linear = block(adaln="bitnet").ff.up_proj
    assert isinstance(before, torch.nn.RMSNorm)
    assert isinstance(linear, TernaryLinear)


def test_bytes_and_compute_are_equal_where_the_page_says_so():
    names = ("ternary, 64", "bfloat16, equal bytes", "bfloat16, equal bytes, equal compute")
    ternary, small, long = (worth_it.costs(worth_it.ALL_VARIANTS[name]) for name in names)
    assert small["file_bytes"] == pytest.approx(ternary["file_bytes"], rel=0.005)
    assert long["training_flops"] == pytest.approx(ternary["training_flops"], rel=0.001)


# Records


def test_a_killed_run_resumes_where_it_was(tiny, tmp_path, monkeypatch):
    train, calls = common.train, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*args)

    def run():
        parts = {"one": lambda records: common.run_variant(records, Variant("tiny"))}
        common.main("", "adaln_norm", parts, lambda folder, plot: "page", ["--output_dir", str(tmp_path)])

    monkeypatch.setattr(common, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run()
    path = tmp_path / "adaln_norm.jsonl"
    before = path.read_text()
    assert len(before.splitlines()) == 2
    path.write_text(before + '{"run": {"arm"')  # killed while writing
    run()
    after, done = path.read_text(), len(calls)
    assert after.startswith(before)
    assert all(json.loads(line) for line in after.splitlines())
    run()
    assert (len(calls), path.read_text()) == (done, after)
    # another experiment in the folder copies a run
    run = json.loads(after.splitlines()[0])
    copied = Records(tmp_path / "worth_it.jsonl").get(run["run"], lambda: pytest.fail("ran again"))
    assert copied == run["result"]


# Text to image


def test_every_text_to_image_variant_runs_and_is_judged(tmp_path, monkeypatch):
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    monkeypatch.setattr(train_text_to_image, "MODEL", size)
    monkeypatch.setattr(train_text_to_image, "train_vae", partial(train_text_to_image.train_vae, steps=2))
    names = (text_to_image.DENSE, text_to_image.UNTRAINED, text_to_image.DISTILLED)
    variants = {name: text_to_image.VARIANTS[name] for name in names}
    variants = {name: replace(variant, steps=variant.steps // 500) for name, variant in variants.items()}
    monkeypatch.setattr(text_to_image, "VARIANTS", variants)
    monkeypatch.setattr(text_to_image, "SEEDS", (0,))
    monkeypatch.setattr(text_to_image, "drawn", lambda: list(range(12)))
    monkeypatch.setattr(text_to_image, "SAMPLING", ["--num_inference_steps", "2", "--guidance_scale", "1.5"])
    path = tmp_path / "text_to_image.jsonl"
    text_to_image.run_variants(list(variants), (0,), Records(path))
    records = Records(path)
    assert len(records.records) == len(variants) + 1
    results = {name: records.find(text_to_image.run_of(variant, 0)) for name, variant in variants.items()}
    for name, result in results.items():
        assert 0 <= result["all three"] <= result["digit"] <= 1
        assert result["frechet_distance"] > 0
        assert (result["file_bytes"] < results[text_to_image.DENSE]["file_bytes"]) == variants[name].ternary
    text_to_image.draw({name: {"seeds": [result]} for name, result in results.items()}, tmp_path / "shown.png")
    assert (tmp_path / "shown.png").stat().st_size > 1000


# Few steps


def tiny_pipeline(kind: str) -> TerDiTPipeline:
    model = TerDiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=3, num_attention_heads=2, attention_head_dim=8, ffn_dim=32,
        num_classes=4, learn_sigma=kind == "noise",
    )  # fmt: skip
    scheduler = default_scheduler() if kind == "noise" else FlowMatchEulerDiscreteScheduler()
    names = {str(index): name for index, name in enumerate(("ant", "bee", "cat", "dog"))}
    return TerDiTPipeline(transformer=randomize(model).eval(), scheduler=scheduler, id2label=names)


@pytest.fixture(params=["noise", "velocity"])
def study(request) -> few_steps.Study:
    return few_steps.Study(tiny_pipeline(request.param), "tiny", [0, 1, 2], 1.5)


# Every cache, set so that it never skips.
NEVER = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=0.0),
    "MagCache": lambda pipe: MagCacheConfig(threshold=0.0, num_inference_steps=12, mag_ratios=[1.01] * 12),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(cache_interval=1),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=1, current_timestep_callback=lambda: pipe.current_timestep
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=1,
        is_guidance_distilled=True,
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "SeaCache": lambda pipe: SeaCacheConfig(threshold=0.0, raw_vision_callback=few_steps.raw_vision),
    "TextKVCache": lambda pipe: TextKVCacheConfig(),
}


@pytest.mark.parametrize("name", NEVER)
def test_a_cache_that_never_skips_changes_nothing(study, name):
    pipe = study.pipe
    expected = pipe(**study.call([0, 1], 12, 0), output_type="pt").images
    with few_steps.step_information(pipe), few_steps.counted(pipe) as counts:
        pipe.transformer.enable_cache(NEVER[name](pipe))
        images = pipe(**study.call([0, 1], 12, 0), output_type="pt").images
    assert torch.equal(images, expected)
    assert counts == {"evaluations": 12, "attention": 36, "feed_forward": 36}


@pytest.fixture(scope="module")
def digits() -> few_steps.Study:
    return few_steps.Study(TerDiTPipeline.from_pretrained(bundled("digits")), "trained", [1, 2], 1.5)


@pytest.mark.parametrize("name", [name for name in few_steps.CACHES if name != "FirstBlockCache 0.05"])
def test_a_cache_skips_work_and_starts_empty_in_every_call(digits, name):
    plain = few_steps.Row("DPM-Solver++", 25)  # where FirstBlockCache 0.05 skips 6 % of the blocks
    expected = digits.plain(plain, [1, 2])
    (images, computed), (again, _) = (digits.images(replace(plain, cache=name), [1, 2]) for _ in range(2))
    assert computed["attention"] < 0.9
    assert (computed["feed_forward"] == 1) == (name.endswith("attention") or name.startswith("Pyramid"))
    assert torch.equal(images, again)
    assert 0 < max(common.root_mean_square(images, expected)) < 40  # an unrelated digit is 90 away
    assert torch.equal(digits.images(plain, [1, 2])[0], expected)  # nothing is left behind


def test_the_cache_is_empty_after_a_call_that_failed(study):
    def fail(pipe, step, timestep, kwargs):
        if step == 2:
            raise KeyboardInterrupt
        return {}

    study.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    expected = study.pipe(**study.call([0], 4, 0), output_type="latent").images
    with pytest.raises(KeyboardInterrupt):
        study.pipe(**study.call([1], 4, 1), callback_on_step_end=fail)
    assert torch.equal(study.pipe(**study.call([0], 4, 0), output_type="latent").images, expected)


def test_sea_cache_without_the_step_runs_in_full_and_says_so(study, caplog):
    expected = study.pipe(**study.call([0, 1], 12, 0), output_type="pt").images
    study.pipe.transformer.enable_cache(SeaCacheConfig(threshold=10.0))
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        images = study.pipe(**study.call([0, 1], 12, 0), output_type="pt").images
    finally:
        logger.removeHandler(caplog.handler)
    assert torch.equal(images, expected)
    assert "fail-open" in caplog.text


def test_few_steps_of_a_folder_give_page_picture_and_records(tmp_path, monkeypatch):
    few = few_steps.rows(("Euler", 8), ("UniPC", 8), ("Heun", 4))
    changes = {"REFERENCE_STEPS": 8, "FEW": {"velocity": few}, "SOLUTION": {"velocity": few[0]}, "SETTING_STEPS": 4}
    changes |= {"DRAWN": {"velocity": [("Euler 8", None), ("UniPC 8", "Euler 8")]}}
    changes |= {"CACHE_STEPS": (8,), "CACHED_SAMPLER": {"velocity": {8: "Euler"}}}
    for name, value in changes.items():
        monkeypatch.setattr(few_steps, name, value)
    tiny_pipeline("velocity").save_pretrained(tmp_path / "model")
    for shade, name in enumerate(("ant", "bee", "cat", "dog")):
        (tmp_path / "real" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 40 * shade).save(tmp_path / "real" / name / "a.png")
    command = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--rounds", "1"]
    command += ["--labels", "bee", "3", "--real_images", str(tmp_path / "real")]
    few_steps.main(command)
    path = tmp_path / "out" / "few_steps.jsonl"
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == len(few) + len(few_steps.SETTINGS["velocity"]) + len(few_steps.CACHES) + 1  # and the times
    assert records[0]["run"]["labels"] == [1, 3]
    assert records[0]["result"]["evaluations"] == 8
    text = (tmp_path / "out" / "few_steps.md").read_text()
    assert all(name in text for name in ["own picture nearest", *few_steps.CACHES, "`solver_order=3`"])
    assert (tmp_path / "out" / "few_steps.model.png").stat().st_size > 1000
    few_steps.main(command)
    assert path.read_text().splitlines() == lines

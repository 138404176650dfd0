"""examples/few_steps.py: step caches of diffusers on this model, and tiny runs of the whole script."""

import base64
import io
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
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

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.pipelines.schedulers import default_scheduler
from tiny import randomize


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"

pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT / "examples"))
import few_steps  # noqa: E402
from few_steps import CACHES, Row, Study  # noqa: E402


# Some schedulers of diffusers 0.42 hand torch tensors to numpy, in ways that numpy 2 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context and return_scalar:DeprecationWarning"),
]

KINDS = ("noise", "velocity")
SAMPLER = {"noise": "DDPM", "velocity": "Euler"}


def tiny_pipeline(kind: str, channels: int = 3) -> TerDiTPipeline:
    model = TerDiTTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=channels,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        ffn_dim=32,
        num_classes=4,
        learn_sigma=kind == "noise",
    )
    scheduler = default_scheduler() if kind == "noise" else FlowMatchEulerDiscreteScheduler()
    names = {str(index): name for index, name in enumerate(("ant", "bee", "cat", "dog"))}
    return TerDiTPipeline(transformer=randomize(model).eval(), scheduler=scheduler, id2label=names)


@pytest.fixture(params=KINDS)
def study(request) -> Study:
    return Study(tiny_pipeline(request.param), "tiny", [0, 1, 2], 1.5)


# Every cache, set so that it never skips.
NEVER = {
    "FirstBlockCache": lambda clock: FirstBlockCacheConfig(threshold=0.0),
    "MagCache": lambda clock: MagCacheConfig(threshold=0.0, num_inference_steps=12, mag_ratios=[1.01] * 12),
    "TaylorSeer": lambda clock: TaylorSeerCacheConfig(cache_interval=1),
    "PyramidAttentionBroadcast": lambda clock: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=1, current_timestep_callback=lambda: clock.timestep
    ),
    "FasterCache": lambda clock: FasterCacheConfig(
        spatial_attention_block_skip_range=1,
        is_guidance_distilled=True,
        attention_weight_callback=lambda module: 0.5,
        current_timestep_callback=lambda: clock.timestep,
    ),
    "SeaCache": lambda clock: SeaCacheConfig(threshold=0.0, raw_vision_callback=few_steps.raw_vision),
}


SKIPPING = [(name, "digits") for name in CACHES] + [("FirstBlockCache 0.2", "emoji"), ("TaylorSeer, lite", "emoji")]
SKIPPING.remove(("FirstBlockCache 0.05", "digits"))  # skips 6 % of the blocks here
PLAIN = {"digits": ("DPM-Solver++", 25), "emoji": ("Euler", 12)}


@pytest.fixture(scope="module")
def trained() -> dict[str, Study]:
    pipes = {name: TerDiTPipeline.from_pretrained(bundled(name)) for name in PLAIN}
    return {name: Study(pipe, "trained", [1, 2], 1.5) for name, pipe in pipes.items()}


class TestCaches:
    @pytest.mark.parametrize("name", NEVER)
    def test_a_cache_that_never_skips_changes_nothing(self, study, name):
        pipe, call = study.pipe, study.call([0, 1], 12, 0)
        expected = pipe(**call, output_type="pt").images
        with few_steps.step_information(pipe) as clock, few_steps.counted(pipe) as counts:
            pipe.transformer.enable_cache(NEVER[name](clock))
            images = pipe(**study.call([0, 1], 12, 0), output_type="pt").images
        assert torch.equal(images, expected)
        assert counts == {"evaluations": 12, "attention": 36, "feed_forward": 36}

    @pytest.mark.parametrize(("name", "model"), SKIPPING)
    def test_a_cache_skips_work_and_starts_empty_in_every_call(self, trained, name, model):
        study = trained[model]
        plain = Row(*PLAIN[model])
        row = Row(plain.sampler, plain.steps, cache=name)
        expected = study.plain(plain, [1, 2])
        with study.set(row), few_steps.counted(study.pipe) as counts:
            images = [study.pipe(**study.call([1, 2], row.steps, 0), output_type="pt").images for _ in range(2)]
        layers = len(study.pipe.transformer.transformer_blocks)
        computed = few_steps.computed(counts, layers)
        assert computed["evaluations"] == 2 * row.steps
        assert computed["attention"] < 0.9
        attention_only = name.endswith("attention") or name.startswith("Pyramid")
        assert (computed["feed_forward"] == 1) == attention_only
        assert torch.equal(images[0], images[1])
        assert 0 < max(few_steps.root_mean_square(images[0], expected)) < 40  # an unrelated digit is 90 away
        assert torch.equal(study.images(plain, [1, 2])[0], expected)  # nothing is left behind

    def test_the_cache_is_empty_after_a_call_that_failed(self, study):
        def fail(pipe, step, timestep, kwargs):
            if step == 2:
                raise KeyboardInterrupt
            return {}

        study.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        expected = study.pipe(**study.call([0], 4, 0), output_type="latent").images
        with pytest.raises(KeyboardInterrupt):
            study.pipe(**study.call([1], 4, 1), callback_on_step_end=fail)
        assert torch.equal(study.pipe(**study.call([0], 4, 0), output_type="latent").images, expected)

    def test_first_block_cache_skips_more_the_higher_its_threshold(self, study):
        shares = []
        for threshold in (0.0, 0.2, 10.0):
            study.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            with few_steps.counted(study.pipe) as counts:
                study.pipe(**study.call([0], 20, 0))
            study.pipe.transformer.disable_cache()
            shares.append(counts["attention"])
        assert shares == sorted(shares, reverse=True)
        assert shares[0] == 60
        assert shares[-1] == 20 + 2  # the first block always, the others in the first step only

    def test_sea_cache_without_the_step_runs_in_full_and_says_so(self, study, caplog):
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

    def test_text_kv_cache_finds_nothing_to_do(self, study):
        expected = study.pipe(**study.call([0, 1], 12, 0), output_type="pt").images
        study.pipe.transformer.enable_cache(TextKVCacheConfig())
        assert torch.equal(study.pipe(**study.call([0, 1], 12, 0), output_type="pt").images, expected)

    def test_faster_cache_may_not_leave_out_half_of_the_guided_batch(self, study):
        with pytest.raises(ValueError, match=r"first half of a guided batch.*is_guidance_distilled=True"):
            study.pipe.transformer.enable_cache(FasterCacheConfig(unconditional_batch_skip_range=2))
        assert not study.pipe.transformer.is_cache_enabled

    def test_mag_cache_calibration_is_read(self, study):
        study.pipe.scheduler = few_steps.SAMPLERS[study.kind][SAMPLER[study.kind]][0].from_config(study.config)
        ratios = few_steps.mag_ratios(study.pipe, 12, study.call([0, 1], 12, 0))
        assert len(ratios) == 12
        assert ratios[0] == 1
        assert all(0.1 < ratio < 10 for ratio in ratios)
        assert not study.pipe.transformer.is_cache_enabled


class TestMeasures:
    def test_noise_share_falls_from_one_to_zero(self, study):
        clock = few_steps.Clock(study.pipe)
        study.pipe.scheduler.set_timesteps(50)
        shares = []
        for clock.step in range(50):
            shares.append(clock.noise_share)
        assert shares == sorted(shares, reverse=True)
        assert 1 >= shares[0] > 0.98
        assert 0 <= shares[-1] < 0.05

    def test_noise_share_of_half_signal(self):
        pipe = tiny_pipeline("noise")
        pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        step = int((pipe.scheduler.alphas_cumprod - 0.5).abs().argmin())
        pipe.scheduler.set_timesteps(timesteps=[step])
        clock = few_steps.Clock(pipe)
        clock.step = 0
        assert math.isclose(clock.noise_share, 0.5, abs_tol=0.01)

    def test_root_mean_square_is_in_shades(self):
        images = torch.zeros(2, 3, 4, 4)
        images[1] = 0.5
        assert few_steps.root_mean_square(images, torch.zeros(2, 3, 4, 4)) == [0, 127.5]

    def test_nearest(self):
        real = torch.tensor([0.0, 0.5, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 2)
        images = torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
        found = few_steps.nearest(images, [0, 1], real)
        assert found["nearest_is_own"] == 0.5
        assert math.isclose(found["distance_to_own"], 25.5, rel_tol=1e-4)  # the lower one of 25.5 and 102

    @pytest.mark.parametrize("channels", [1, 3])
    def test_strip_is_the_images_side_by_side(self, channels):
        images = torch.stack([torch.full((channels, 2, 3), 0.2 * i) for i in range(4)])
        picture = Image.open(io.BytesIO(base64.b64decode(few_steps.strip(images)))).convert("L")
        assert picture.size == (12, 2)
        assert np.asarray(picture)[1, ::3].tolist() == [0, 51, 102, 153]

    def test_start_noise_is_the_same_for_every_sampler(self, study):
        seen = {}

        def note(module, args):
            seen.setdefault(row.name, args[0][:3].clone())

        handle = study.pipe.transformer.register_forward_pre_hook(note)
        for name in few_steps.SAMPLERS[study.kind]:
            row = Row(name, 2)
            study.images(row, [0, 1, 2])
        handle.remove()
        assert len(seen) > 3
        first = next(iter(seen.values()))
        for noise in seen.values():  # Heun's first sigma is not 1 with noise prediction: its input is scaled
            assert torch.allclose(noise, first, atol=0.02)

    @pytest.mark.parametrize(("model", "steps"), [("digits", 60), ("emoji", 12)])
    def test_samplers_agree_in_the_limit(self, trained, model, steps):
        study = trained[model]
        images = {}
        for name in few_steps.SAMPLERS[study.kind]:
            if name != "DDPM" and (name, model) != ("Heun", "emoji"):  # 23 evaluations would not be enough
                images[name] = study.images(Row(name, steps), [1, 2])[0]
        for name, drawn in images.items():
            assert max(few_steps.root_mean_square(drawn, images["DPM-Solver++"])) < 4, name


def write_faces(folder: Path, names: list[str]) -> None:
    for shade, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        Image.new("L", (8, 8), 40 * shade).save(folder / name / "a.png")


class TestScript:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch):
        monkeypatch.setattr(few_steps, "REFERENCE_STEPS", 8)
        few = {
            kind: [Row(row.sampler, min(row.steps, 8), row.changes) for row in rows[:1] + rows[-2:]]
            for kind, rows in few_steps.FEW.items()
        }
        monkeypatch.setattr(few_steps, "FEW", few)
        monkeypatch.setattr(few_steps, "SOLUTION", {"noise": Row("DPM-Solver++", 8), "velocity": Row("Euler", 8)})
        monkeypatch.setattr(few_steps, "CACHE_STEPS", (8,))
        monkeypatch.setattr(few_steps, "CACHED_SAMPLER", {"noise": {8: "DDPM"}, "velocity": {8: "Euler"}})
        monkeypatch.setattr(few_steps, "SETTING_STEPS", 4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_folder_gives_page_picture_and_records(self, kind, tmp_path):
        pytest.importorskip("matplotlib")
        tiny_pipeline(kind).save_pretrained(tmp_path / "model")
        write_faces(tmp_path / "real", ["ant", "bee", "cat", "dog"])
        command = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--rounds", "1"]
        command += ["--labels", "bee", "3", "--real_images", str(tmp_path / "real")]
        few_steps.main(command)
        lines = (tmp_path / "out" / "few_steps.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        rows = len(few_steps.FEW[kind]) + len(few_steps.SETTINGS[kind]) + len(CACHES)
        assert len(records) == rows + 1  # and the times
        assert records[0]["run"]["labels"] == [1, 3]
        assert records[0]["result"]["evaluations"] == 8
        assert all(len(times) == 1 for times in records[-1]["result"].values())
        text = (tmp_path / "out" / "few_steps.md").read_text()
        for name in ["network evaluations", *CACHES, "`solver_order=3`", "own picture nearest"]:
            assert name in text
        assert (tmp_path / "out" / "few_steps.model.png").stat().st_size > 1000

        few_steps.main(command)
        assert (tmp_path / "out" / "few_steps.jsonl").read_text().splitlines() == lines
        few_steps.main(["--render", str(tmp_path / "out")])
        assert (tmp_path / "out" / "few_steps.md").read_text() == text

    def test_pictures_of_other_classes_are_refused(self, tmp_path):
        write_faces(tmp_path / "real", ["ant", "bee", "cat"])
        with pytest.raises(ValueError, match="one picture of each of the model's 4 classes"):
            few_steps.real_images(tmp_path / "real", tiny_pipeline("noise"))

    def test_a_folder_without_records_is_not_rendered(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            few_steps.main(["--render", str(tmp_path)])
        assert "no few_steps.jsonl" in capsys.readouterr().err


def test_twenty_steps_of_dpm_solver_draw_digits():
    study = Study(TerDiTPipeline.from_pretrained(bundled("digits")), "digits", list(range(10)), 1.5)
    with study.set(Row("DPM-Solver++", 20)):
        found = few_steps.judge(few_steps.sample_digits(study.pipe, 100, 20, 1.5, 0))
    assert found["recognised"] > 0.9


def test_the_committed_page_is_made_from_the_committed_records():
    records = few_steps.Records(RESULTS / "few_steps.jsonl")
    assert (RESULTS / "few_steps.md").read_text(encoding="utf-8") == few_steps.page(records, RESULTS, plot=False)

"""Every scheduler of docs/schedulers.md on the bundled checkpoints; what the page says about each comes true."""

import re
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.pipelines.finite import FiniteCheck
from diffusers_terdit.pipelines.schedulers import (
    default_scheduler,
    fitting_scheduler,
    scheduler_by_name,
    training_scheduler,
)


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "schedulers.md"

pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT / "examples" / "experiments"))
import schedulers  # noqa: E402


DIGITS = [i % 10 for i in range(20)]
FACES = [3, 40]
SETTINGS = [*((name, {}) for name in schedulers.NOISE), *schedulers.FLOW.items()]  # (scheduler, what has to be set)
REFUSED = [name for name, reason in schedulers.OTHERS.items() if reason.startswith("refused")]


def options(name: str, changes: dict) -> dict:
    """What a pipeline is made with: the scheduler, and a model without learned variance for one of flows."""
    scheduler = getattr(diffusers, name).from_config(default_scheduler().config, **changes)
    return {"scheduler": scheduler, "learn_sigma": name in schedulers.NOISE}


@pytest.fixture(scope="module")
def digits() -> TerDiTPipeline:
    return schedulers.pipeline("digits")


@pytest.fixture(scope="module")
def emoji() -> TerDiTPipeline:
    return schedulers.pipeline("emoji")


@pytest.fixture(scope="module")
def solution(emoji) -> torch.Tensor:
    return schedulers.draw(emoji, "FlowMatchEulerDiscreteScheduler", {}, FACES, 20)


@pytest.mark.parametrize("name", schedulers.NOISE)
def test_it_draws_digits(digits, name):
    images = schedulers.draw(digits, name, {}, DIGITS, 10)
    assert schedulers.recognised(images, DIGITS) >= 0.85
    assert schedulers.recognised(images.flip(-2), DIGITS) < 0.6  # the classifier can say no


@pytest.mark.parametrize("name", schedulers.FLOW)
def test_it_draws_faces(emoji, solution, name):
    images = schedulers.draw(emoji, name, schedulers.FLOW[name], FACES, 8)
    assert schedulers.nearest_is_own(images, solution) == 1
    assert max(schedulers.root_mean_square(images, solution)) < 40  # another face is 70 to 110 away


@pytest.mark.parametrize(
    ("name", "changes"), [setting for setting in SETTINGS if setting[0] != "LTXEulerAncestralRFScheduler"], ids=str
)
def test_a_step_reads_nothing_from_the_device(tiny_pipeline, monkeypatch, name, changes):
    """On the meta device a tensor has no values: a step that reads one, or mixes devices, raises."""
    pipe = tiny_pipeline(num_layers=1, **options(name, changes))
    monkeypatch.setattr(FiniteCheck, "__call__", lambda *args: None)  # the one read, a step late
    pipe.to("meta")
    images = pipe([3, 4], num_inference_steps=5, guidance_scale=1.0, output_type="latent").images
    assert images.shape == (2, 3, 8, 8)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "changes"), SETTINGS, ids=str)
def test_a_gpu_draws_what_the_cpu_draws(tiny_pipeline, name, changes):
    pipe = tiny_pipeline(vae=True, **options(name, changes))
    images = []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        pipe.to(device)
        images.append(pipe([3, 4], num_inference_steps=5, generator=generator, output_type="pt").images.cpu())
    torch.testing.assert_close(*images, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [*REFUSED, *(name for name, changes in schedulers.FLOW.items() if not changes)])
def test_a_model_of_noise_refuses_it(digits, name):
    with pytest.raises(ValueError, match=rf"{name} cannot sample this model.*\(epsilon\)"):
        schedulers.draw(digits, name, {}, [3], 4)


@pytest.mark.parametrize("name", [name for name, changes in schedulers.FLOW.items() if changes])
def test_swapped_in_as_the_readme_does_it_draws_the_same_faces(emoji, name):
    """`from_config` alone leaves DPM-Solver and its kin on noise; the pipeline knows better, and draws no blank."""
    images = [schedulers.draw(emoji, name, changes, FACES, 8) for changes in ({}, schedulers.FLOW[name])]
    assert torch.equal(*images)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_a_model_of_flows_refuses_a_scheduler_of_noise(emoji, name):
    with pytest.raises(ValueError, match=rf"{name} cannot sample this model, which was trained for rectified flow"):
        schedulers.draw(emoji, name, {}, FACES, 4)


@pytest.mark.parametrize("half", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}], ids=str)
def test_half_of_the_settings_of_flow_are_completed(emoji, half):
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        images = [schedulers.draw(emoji, name, changes, FACES, 8) for changes in (half, schedulers.FLOW[name])]
        assert torch.equal(*images)


def test_a_flow_of_another_scheduler_is_no_flow_of_ddim(emoji):
    flow = diffusers.DPMSolverMultistepScheduler.from_config(
        emoji.scheduler.config, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
    )
    with pytest.raises(ValueError, match=r"DDIMScheduler cannot sample this model.*rectified flow"):
        fitting_scheduler(diffusers.DDIMScheduler.from_config(flow.config), "flow_prediction")
    assert fitting_scheduler(flow, "flow_prediction") is flow


@pytest.mark.parametrize("recorded", [None, "flow_prediction"])
def test_what_a_model_predicts_outlives_its_scheduler(tiny_pipeline, tmp_path, recorded):
    """Recorded in the model's config; a model saved before is what the scheduler given at construction samples."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = tiny_pipeline(learn_sigma=False, scheduler=flow, prediction_type=recorded)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(flow.config)
    expected = pipe([1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert pipe.scheduler.config.flow_shift == 3.0
    assert pipe.scheduler.config.prediction_type == pipe.prediction_type == "flow_prediction"
    pipe.save_pretrained(tmp_path)
    again = TerDiTPipeline.from_pretrained(tmp_path)
    assert again.prediction_type == "flow_prediction"
    images = again([1], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(images, expected)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_scheduler_learns_what_the_model_predicts(tiny_pipeline, prediction):
    pipe = tiny_pipeline(
        learn_sigma=False, prediction_type=prediction, scheduler=diffusers.DDIMScheduler(prediction_type="epsilon")
    )
    run = {"num_inference_steps": 3, "output_type": "pt"}
    images = pipe([1], generator=torch.Generator().manual_seed(0), **run).images
    pipe.scheduler = diffusers.DDIMScheduler(prediction_type=prediction)
    assert torch.equal(pipe([1], generator=torch.Generator().manual_seed(0), **run).images, images)


class TestOwnSteps:
    def test_timesteps(self, digits):
        own = diffusers.DDPMScheduler.from_config(default_scheduler().config)
        own.set_timesteps(5)
        digits.scheduler = default_scheduler()
        run = {"output_type": "pt", "guidance_scale": 1.5}
        images = digits([3], num_inference_steps=5, generator=torch.Generator().manual_seed(0), **run).images
        steps = own.timesteps.tolist()
        again = digits([3], timesteps=steps, generator=torch.Generator().manual_seed(0), **run).images
        assert digits.num_timesteps == 5
        torch.testing.assert_close(again, images)

    def test_sigmas(self, emoji):
        emoji.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(emoji.scheduler.config)
        images = emoji([3], sigmas=[1.0, 0.6, 0.3], output_type="pt").images
        assert emoji.num_timesteps == 3
        assert images.isfinite().all()

    @pytest.mark.parametrize(
        "steps", [{"sigmas": [1.0]}, {"timesteps": []}, {"timesteps": [1], "sigmas": [1.0]}], ids=str
    )
    def test_what_the_scheduler_does_not_take(self, digits, steps):
        digits.scheduler = default_scheduler()
        with pytest.raises(ValueError, match="DDPMScheduler takes `timesteps`, one list"):
            digits([3], **steps)


@pytest.mark.parametrize(
    "name", sorted(set(schedulers.OTHERS) - set(REFUSED) - {"DPMSolverMultistepInverseScheduler"})
)
def test_it_does_not_run_in_silence(digits, name):
    with pytest.raises((TypeError, ValueError, ImportError, RuntimeError, AttributeError, LookupError)):
        schedulers.draw(digits, name, {}, [3], 4)


def test_parallel_ddpm_is_ddpm(digits):
    images = [schedulers.draw(digits, name, {}, [3, 4], 10) for name in ("DDPMScheduler", "DDPMParallelScheduler")]
    torch.testing.assert_close(*images)


def test_flow_schedulers_stay_open_to_models_without_a_variance(tiny_pipeline):
    pipe = tiny_pipeline(learn_sigma=False, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    assert pipe([1], num_inference_steps=2, output_type="pt").images.isfinite().all()


def test_the_page_names_every_scheduler_of_diffusers_once():
    assert not set(schedulers.NOISE) & set(schedulers.OTHERS)
    assert not set(schedulers.FLOW) & set(schedulers.OTHERS)
    named = {*schedulers.NOISE, *schedulers.FLOW, *schedulers.OTHERS}
    assert set(re.findall(r"^\| `(\w+)`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == named
    if diffusers.__version__ == "0.42.1":
        assert set(schedulers.scheduler_names()) == named


def test_the_page_is_what_the_script_writes(monkeypatch, capsys):
    lines = {"noise_lines": r"^\| `.*[0-9] \|.*$", "flow_lines": r"^\| `.*\(\d.*$"}
    text = PAGE.read_text(encoding="utf-8")
    noise, flow = text.split("## A model that predicts a velocity")
    made = text.splitlines()[-1]
    assert re.fullmatch(r"Measured on [\d-]+ at commit [0-9a-f]+\. Made on .+ torch .+\.", made)
    monkeypatch.setattr(schedulers, "made", lambda: made)
    monkeypatch.setattr(schedulers, "noise_lines", lambda count: re.findall(lines["noise_lines"], noise, re.MULTILINE))
    monkeypatch.setattr(schedulers, "flow_lines", lambda faces: re.findall(lines["flow_lines"], flow, re.MULTILINE))
    assert schedulers.page().replace(diffusers.__version__, "0.42.1") == text
    schedulers.main([])
    assert capsys.readouterr().out == schedulers.page() + "\n"


def test_a_scheduler_by_name_keeps_the_shift_and_takes_nothing_it_does_not_know(caplog):
    current = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    found = scheduler_by_name("dpm", current, "flow_prediction")
    assert found.config.flow_shift == 3.0
    assert scheduler_by_name("euler", found, "flow_prediction").config.shift == 3.0
    assert "base_shift" not in found.config
    assert "not expected" not in caplog.text


@pytest.mark.parametrize(
    ("short", "prediction", "name"),
    [
        ("dpm", "flow_prediction", "DPMSolverMultistepScheduler"),
        ("DPM", "epsilon", "DPMSolverMultistepScheduler"),
        ("unipc", "epsilon", "UniPCMultistepScheduler"),
        ("ddim", "epsilon", "DDIMScheduler"),
        ("DDIMScheduler", "epsilon", "DDIMScheduler"),
        ("euler", "epsilon", "EulerDiscreteScheduler"),
        ("euler", "flow_prediction", "FlowMatchEulerDiscreteScheduler"),
        ("Heun", "epsilon", "HeunDiscreteScheduler"),
        ("heun", "flow_prediction", "FlowMatchHeunDiscreteScheduler"),
        ("flowmatchheundiscretescheduler", "flow_prediction", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_short_names(short, prediction, name):
    current = training_scheduler(flow_matching=prediction == "flow_prediction")
    assert type(scheduler_by_name(short, current, prediction)).__name__ == name

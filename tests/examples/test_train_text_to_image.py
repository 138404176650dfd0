"""examples/train_text_to_image.py: captions, training, distillation, resume, the folder it leaves, what it refuses."""

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import TernaryLinear, training
from diffusers_terdit.ops import reference


pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"
RESULTS = EXAMPLES.parent / "docs" / "results"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "experiments")]
import text_to_image as experiment  # noqa: E402
from common import Records  # noqa: E402

import train_text_to_image as script  # noqa: E402


SHORT = ["--train_batch_size", "8", "--lr_warmup_steps", "1", "--logging_steps", "1", "--num_validation_images", "2"]
SHORT += ["--num_inference_steps", "2"]
PROMPT = "a bold three slanted left"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A transformer of 16 thousand weights, and a VAE that has hardly been trained."""
    size = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    monkeypatch.setattr(script, "MODEL", size)
    monkeypatch.setattr(script, "train_vae", functools.partial(script.train_vae, steps=2))


@pytest.fixture
def run(tmp_path):
    """`run(..., output_dir="out", steps=4)`: train in this process; the output folder."""

    def train(*args, output_dir="out", steps=4):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        folder = tmp_path / output_dir
        script.main([*SHORT, "--max_train_steps", str(steps), *map(str, args), "--output_dir", str(folder)])
        return folder

    return train


@pytest.fixture
def dense(run):
    """A folder of a model in full precision."""
    return run("--demo", output_dir="dense")


@pytest.fixture
def refused(run, capsys):
    """The message with which a run ends that must not start."""

    def message(*args, **kwargs):
        with pytest.raises(SystemExit) as error:
            run(*args, **kwargs)
        return f"{error.value}{capsys.readouterr().err}"

    return message


def picture(folder):
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    args = script.parse_args(["--demo", *SHORT])
    return script.sample_images(pipe, [PROMPT, "a nine"], [0, 1], args)


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_bits(folder, other, step=4):
    for part in ("model", "ema", "optimizer"):
        tensors, others = (load_file(f / f"checkpoint-{step}" / f"{part}.safetensors") for f in (folder, other))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items()), part


def ternary_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}


class TestCaptions:
    def test_each_third_of_a_class_has_its_word(self):
        digits = script.CaptionedDigits(train=True)
        captions = [digits.caption(i) for i in range(len(digits))]
        assert len(digits.captions) == len(set(digits.captions)) == 90
        assert [digits.captions[label] for label in digits.labels] == captions
        for word in ("bold", "thin", "slanted left", "slanted right"):
            for name in digits.names:
                of_class = [caption for caption in captions if name in caption.split()]
                assert len([c for c in of_class if word in c]) / len(of_class) == pytest.approx(1 / 3, abs=0.03)

    def test_bold_is_more_ink(self):
        digits = script.CaptionedDigits(train=True)
        bold, thin = (
            [i for i in range(len(digits)) if f"a {word}eight" in digits.caption(i)] for word in ("bold ", "thin ")
        )
        assert digits.images[bold].flatten(1).mean(1).min() > digits.images[thin].flatten(1).mean(1).max()

    def test_slant(self):
        upright, right = torch.zeros(2, 1, 8, 8).unbind()
        upright[0, :, 3] = 1
        for row in range(8):
            right[0, row, 7 - row] = 1
        images = torch.stack([right, right.flip(-1), upright, torch.zeros_like(upright)])
        assert script.slant(images).tolist() == pytest.approx([1, -1, 0, 0])

    def test_the_held_out_digits_take_the_limits_of_the_training_digits(self):
        train, held_out = script.CaptionedDigits(True), script.CaptionedDigits(False)
        assert len(held_out) == 300
        assert all(torch.equal(train.limits[name], held_out.limits[name]) for name in script.WORDS)

    def test_every_word_is_a_token(self):
        digits = script.CaptionedDigits(train=True)
        tokenizer = script.word_tokenizer(digits.captions)
        tokens = tokenizer(digits.captions, padding="max_length").input_ids
        assert not any(tokenizer.unk_token_id in row for row in tokens)
        assert len({tuple(row) for row in tokens}) == 90
        assert tokenizer("").input_ids == [tokenizer.eos_token_id]


class TestTraining:
    def test_a_run_leaves_a_pipeline_that_draws_prompts(self, dense):
        pipe = DiffusionPipeline.from_pretrained(dense)
        assert isinstance(pipe, PixArtAlphaPipeline)
        options = {"use_resolution_binning": False, "clean_caption": False, "num_inference_steps": 2}
        images = [
            pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt", **options).images
            for prompt in (PROMPT, "a nine")
        ]
        assert images[0].shape == (1, 1, 8, 8)
        assert not torch.equal(*images)
        assert [path.name for path in training.checkpointing.find(dense)] == ["checkpoint-4"]
        assert len(losses_of(dense)) == 4
        with Image.open(dense / "samples" / "step-4.png") as grid:
            assert grid.width > 256
        assert not list(dense.rglob("*.partial"))

    def test_the_average_is_exported_packed_and_computes_the_same(self, run, dense):
        folder = run("--demo", "--ternary", "--pretrained_model_name_or_path", dense, "--ema_decay", 0.5)
        transformer = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        layers = ternary_layers(transformer)
        assert len(layers) == 10
        average = load_file(folder / "checkpoint-4" / "ema.safetensors")
        for name, layer in layers.items():
            assert layer.weight_format == "packed"
            ternary = reference.ternarize(average[f"{name}.weight"], "tensor")
            assert torch.equal(layer.dequantize(), ternary * average[f"{name}.weight_scale"])
        assert torch.equal(transformer.proj_out.weight, average["proj_out.weight"])
        pipe = PixArtAlphaPipeline.from_pretrained(folder)
        pipe.transformer.dequantize()
        again = script.sample_images(pipe, [PROMPT, "a nine"], [0, 1], script.parse_args(["--demo", *SHORT]))
        torch.testing.assert_close(picture(folder), again, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("granularity", ["row", "16"])
    def test_other_granularities(self, run, dense, granularity):
        folder = run(
            "--demo", "--ternary", "--scale_granularity", granularity, "--pretrained_model_name_or_path", dense
        )
        transformer = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
        assert {str(layer.scale_granularity) for layer in ternary_layers(transformer).values()} == {granularity}

    def test_training_on_starts_from_the_model(self, run, dense):
        folder = run("--demo", "--pretrained_model_name_or_path", dense, "--learning_rate", 0)
        assert torch.equal(picture(folder), picture(dense))

    def test_the_teacher_is_followed(self, run, dense):
        options = ("--demo", "--ternary", "--pretrained_model_name_or_path", dense)
        alone = run(*options, output_dir="alone")
        unheard = run(*options, "--teacher", dense, "--distillation_weight", 0, output_dir="unheard")
        assert_same_bits(alone, unheard)
        taught = run(*options, "--teacher", dense, output_dir="taught")
        assert losses_of(taught)[0] > losses_of(alone)[0]

    def test_a_model_has_nothing_to_learn_from_itself(self, run, dense):
        loss = losses_of(run("--demo", "--pretrained_model_name_or_path", dense, "--teacher", dense, steps=1))
        alone = losses_of(run("--demo", "--pretrained_model_name_or_path", dense, output_dir="alone", steps=1))
        assert loss == alone

    @pytest.mark.parametrize("ternary", [False, True])
    def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one(self, run, dense, ternary):
        options = ["--demo", "--checkpointing_steps", 2]
        if ternary:
            options += ["--ternary", "--pretrained_model_name_or_path", dense, "--teacher", dense]
        whole, parts = run(*options), run(*options, output_dir="parts")
        training.checkpointing.rotate(parts, 2)
        for path in (parts / "checkpoint-4").iterdir():  # as if the run had been killed after step 3
            path.unlink()
        (parts / "checkpoint-4").rmdir()
        assert run(*options, "--resume_from_checkpoint", "latest", output_dir="parts") == parts
        assert_same_bits(whole, parts)
        assert losses_of(whole) == losses_of(parts)
        assert torch.equal(picture(whole), picture(parts))

    def test_bfloat16_and_gradient_checkpointing(self, run, dense):
        options = ("--demo", "--ternary", "--pretrained_model_name_or_path", dense)
        folder = run(*options, "--mixed_precision", "bf16", "--gradient_checkpointing")
        assert load_file(folder / "checkpoint-4" / "model.safetensors")["proj_out.weight"].dtype == torch.float32
        exact = losses_of(run(*options, output_dir="exact"))
        assert losses_of(folder) == pytest.approx(exact, rel=0.02)
        assert losses_of(folder) != exact

    def test_own_images_and_captions(self, run, dense, tmp_path):
        data = tmp_path / "data"
        data.mkdir()
        rows = []
        for i in range(6):
            Image.new("L", (12, 10), 40 * i).save(data / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": "a bold one" if i % 2 else "a thin two"})
        (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        folder = run("--train_data_dir", data, "--pretrained_model_name_or_path", dense, "--ternary")
        assert ternary_layers(PixArtAlphaPipeline.from_pretrained(folder).transformer)

    def test_two_processes(self, tmp_path, dense):
        code = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import train_text_to_image as t; t.main()"
        starter = tmp_path / "start.py"
        starter.write_text(code)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        launcher += ["--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d", str(starter)]
        options = ["--demo", "--ternary", "--pretrained_model_name_or_path", str(dense), "--max_train_steps", "2"]
        command = [*launcher, *SHORT, *options, "--output_dir", str(tmp_path / "two")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stderr
        assert "2 process(es)" in result.stdout
        state = json.loads((tmp_path / "two" / "checkpoint-2" / training.checkpointing.STATE_NAME).read_text())
        assert state["batch_size"] == 16
        assert ternary_layers(PixArtAlphaPipeline.from_pretrained(tmp_path / "two").transformer)


class TestRefusals:
    def test_data(self, refused, tmp_path):
        assert "pass one of --demo, --train_data_dir" in refused()
        assert "pass one of" in refused("--demo", "--train_data_dir", tmp_path)
        assert "goes with --pretrained_model_name_or_path" in refused("--train_data_dir", tmp_path)

    def test_captions(self, refused, dense, tmp_path):
        options = ("--train_data_dir", tmp_path, "--pretrained_model_name_or_path", dense)
        assert "has no metadata.jsonl" in refused(*options)
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png"}\n')
        assert "line 1 has no file_name or no text" in refused(*options)

    def test_a_folder_in_use(self, refused, dense):
        assert "holds checkpoint-4. Pass --resume_from_checkpoint latest" in refused("--demo", output_dir="dense")

    def test_another_batch_size(self, refused, dense):
        message = refused("--demo", "--resume_from_checkpoint", "latest", "--train_batch_size", 4, output_dir="dense")
        assert "trained with 8 samples per step and seed 0, this run has 4 and 0" in message

    def test_models_it_cannot_train(self, refused, dense):
        config = dense / "transformer" / "config.json"
        text = config.read_text()
        config.write_text(text.replace('"use_additional_conditions": false', '"use_additional_conditions": true'))
        options = ("--demo", "--pretrained_model_name_or_path", dense)
        assert "is told size and aspect ratio" in refused(*options)
        config.write_text(text)
        DPMSolverMultistepScheduler(prediction_type="v_prediction").save_pretrained(dense / "scheduler")
        assert "not 'v_prediction'" in refused(*options)

    def test_a_vae_of_colours_with_the_demo(self, refused, dense, tiny_vae):
        tiny_vae.save_pretrained(dense / "vae")
        message = refused("--demo", "--pretrained_model_name_or_path", dense)
        assert "pictures of 1 channel, this VAE takes 3; pass --train_data_dir" in message

    def test_a_gradient_that_is_not_finite(self, run):
        with pytest.raises(FloatingPointError, match="Lower --learning_rate"):
            run("--demo", "--learning_rate", 1e30, steps=8)


class TestExperiment:
    def test_the_committed_page_is_what_the_committed_records_render_to(self, monkeypatch):
        monkeypatch.undo()  # the small model
        assert experiment.render(RESULTS) == (RESULTS / "text_to_image.md").read_text(encoding="utf-8")

    def test_the_picture_is_there_and_small(self):
        assert 1000 < (RESULTS / "text_to_image.png").stat().st_size < 100_000

    def test_every_arm_runs_is_judged_and_not_run_again(self, tmp_path, monkeypatch):
        arms = {name: replace(arm, steps=arm.steps // 500) for name, arm in experiment.ARMS.items()}
        arms = {
            name: replace(arm, scale_granularity=16 if arm.scale_granularity == 32 else arm.scale_granularity)
            for name, arm in arms.items()
        }
        monkeypatch.setattr(experiment, "ARMS", arms)
        monkeypatch.setattr(experiment, "SEEDS", (0,))
        monkeypatch.setattr(experiment, "drawn", lambda: list(range(12)))
        monkeypatch.setattr(experiment, "SAMPLING", ["--num_inference_steps", "2", "--guidance_scale", "1.5"])
        path = tmp_path / "text_to_image.jsonl"
        for _ in range(2):
            experiment.run_arms(list(arms), (0,), Records(path))
        records = Records(path)
        assert len(records.records) == len(arms) + 1
        for name, arm in arms.items():
            result = records.find(experiment.run_of(arm, 0))
            assert 0 <= result["all three"] <= result["digit"] <= 1
            assert result["frechet_distance"] > 0
            dense = records.find(experiment.run_of(arms[experiment.DENSE], 0))["file_bytes"]
            assert (result["file_bytes"] < dense) == arm.ternary, name
        page = experiment.render(tmp_path, plot=True)
        assert all(f"| {name} |" in page for name in arms)
        assert "one seed" in page
        assert (tmp_path / "text_to_image.png").stat().st_size > 1000

    def test_without_results_there_is_nothing_to_render(self, tmp_path):
        with pytest.raises(SystemExit, match="run the parts first"):
            experiment.render(tmp_path)

    def test_real_digits_are_what_their_captions_say(self):
        digits = experiment.digits(True)
        rows = list(range(200))
        found = experiment.judged((digits.images[rows] + 1) / 2, rows, digits)
        assert found["ink"] == found["slant"] == 1
        assert found["digit"] > 0.98
        wrong = [(i + 7) % 200 for i in rows]
        assert experiment.judged((digits.images[rows] + 1) / 2, wrong, digits)["all three"] < 0.2

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            ([3.0, 4.0], [1.0, 2.0], "no, the opposite"),
            ([1.0, 2.0], [3.0, 4.0], "yes"),
            ([1.0, 3.5], [3.0, 4.0], "within the spread"),
            ([1.0], [3.0], "one seed"),
        ],
    )
    def test_answers(self, first, second, expected):
        outcomes = zip(("a", "b"), (first, second), strict=True)
        found = {name: {"seeds": [{"x": value} for value in values]} for name, values in outcomes}
        assert expected in experiment.answer(found, "a", "b", -1, "x")
        assert experiment.answer(found, "a", "c", -1, "x") == "not run"

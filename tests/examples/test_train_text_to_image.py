"""examples/train_text_to_image.py: captions, training, distillation, resume, the folder it leaves, what it refuses."""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import TernaryLinear, training
from diffusers_terdit.ops import reference


pytest.importorskip("sklearn")
import train_text_to_image as script


SHORT = ["--train_batch_size", "8", "--lr_warmup_steps", "1", "--logging_steps", "1", "--num_validation_images", "2"]
SHORT += ["--num_inference_steps", "2"]
PROMPT = "a bold three slanted left"
SIZE = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}


@pytest.fixture(scope="module", autouse=True)
def small():
    """A transformer of 16 thousand weights, and a VAE that has hardly been trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "MODEL", SIZE)
        patch.setattr(script, "train_vae", functools.partial(script.train_vae, steps=2))
        yield


def train(folder, *args, steps=4):
    """Train in this process; the output folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    script.main([*SHORT, "--max_train_steps", str(steps), *map(str, args), "--output_dir", str(folder)])
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder of a model in full precision."""
    return train(tmp_path_factory.mktemp("text") / "dense", "--demo")


@pytest.fixture
def tune(dense):
    return ("--demo", "--ternary", "--pretrained_model_name_or_path", dense)


def picture(folder):
    pipe = PixArtAlphaPipeline.from_pretrained(folder)
    return script.sample_images(pipe, [PROMPT, "a nine"], [0, 1], script.parse_args(["--demo", *SHORT]))


def losses_of(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_bits(folder, other):
    for part in ("model", "ema", "optimizer"):
        tensors, others = (load_file(f / "checkpoint-4" / f"{part}.safetensors") for f in (folder, other))
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items()), part


def ternary_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, TernaryLinear)}


def test_each_third_of_a_class_has_its_word_and_every_word_is_a_token():
    digits = script.CaptionedDigits(train=True)
    captions = [digits.caption(i) for i in range(len(digits))]
    assert len(digits.captions) == len(set(digits.captions)) == 90
    assert [digits.captions[label] for label in digits.labels] == captions
    for word in ("bold", "thin", "slanted left", "slanted right"):
        of_class = [caption for caption in captions if "eight" in caption.split()]
        assert len([c for c in of_class if word in c]) / len(of_class) == pytest.approx(1 / 3, abs=0.03)
    held_out = script.CaptionedDigits(train=False)
    assert all(torch.equal(digits.limits[name], held_out.limits[name]) for name in script.WORDS)
    tokenizer = script.word_tokenizer(digits.captions)
    tokens = tokenizer(digits.captions, padding="max_length").input_ids
    assert not any(tokenizer.unk_token_id in row for row in tokens)
    assert len({tuple(row) for row in tokens}) == 90


def test_a_run_leaves_a_pipeline_that_draws_prompts(dense):
    images = picture(dense)
    assert images.shape == (2, 1, 8, 8)
    assert not torch.equal(*images)
    assert [path.name for path in training.checkpointing.find(dense)] == ["checkpoint-4"]
    assert len(losses_of(dense)) == 4
    with Image.open(dense / "samples" / "step-4.png") as grid:
        assert grid.width > 256
    assert not list(dense.rglob("*.partial"))


@pytest.mark.parametrize("granularity", ["tensor", "16"])
def test_the_average_is_exported_packed_and_computes_the_same(tmp_path, tune, granularity):
    folder = train(tmp_path / "out", *tune, "--ema_decay", 0.5, "--scale_granularity", granularity)
    transformer = PixArtTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    layers = ternary_layers(transformer)
    assert len(layers) == 10
    average = load_file(folder / "checkpoint-4" / "ema.safetensors")
    for name, layer in layers.items():
        assert layer.weight_format == "packed"
        assert str(layer.scale_granularity) == granularity
        if granularity == "tensor":
            ternary = reference.ternarize(average[f"{name}.weight"], "tensor")
            assert torch.equal(layer.dequantize(), ternary * average[f"{name}.weight_scale"])
    assert torch.equal(transformer.proj_out.weight, average["proj_out.weight"])


def test_the_teacher_is_followed(tmp_path, dense, tune):
    alone = train(tmp_path / "alone", *tune)
    unheard = train(tmp_path / "unheard", *tune, "--teacher", dense, "--distillation_weight", 0)
    assert_same_bits(alone, unheard)
    taught = train(tmp_path / "taught", *tune, "--teacher", dense, steps=1)
    assert losses_of(taught)[0] > losses_of(alone)[0]
    # a model has nothing to learn from itself
    itself = ("--demo", "--pretrained_model_name_or_path", dense)
    assert losses_of(train(tmp_path / "own", *itself, "--teacher", dense, steps=1)) == losses_of(
        train(tmp_path / "none", *itself, steps=1)
    )


def test_a_resumed_run_ends_in_the_bits_of_an_unbroken_one(tmp_path, dense, tune):
    options = [*tune, "--teacher", dense, "--checkpointing_steps", 2]
    whole = train(tmp_path / "whole", *options)
    parts = train(tmp_path / "parts", *options)
    for path in (parts / "checkpoint-4").iterdir():  # as if the run had been killed after step 3
        path.unlink()
    (parts / "checkpoint-4").rmdir()
    train(parts, *options, "--resume_from_checkpoint", "latest")
    assert_same_bits(whole, parts)
    assert losses_of(whole) == losses_of(parts)
    assert torch.equal(picture(whole), picture(parts))


def test_own_images_bfloat16_gradient_checkpointing_and_two_processes(tmp_path, dense):
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for i in range(16):
        Image.new("L", (12, 10), 10 * i).save(data / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": "a bold one" if i % 2 else "a thin two"})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d", script.__file__]
    options = ["--train_data_dir", data, "--ternary", "--pretrained_model_name_or_path", dense]
    options += ["--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [*launcher, *SHORT, *options, "--output_dir", tmp_path / "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert json.loads((checkpoint / training.checkpointing.STATE_NAME).read_text())["batch_size"] == 16
    assert load_file(checkpoint / "model.safetensors")["proj_out.weight"].dtype == torch.float32
    assert ternary_layers(PixArtAlphaPipeline.from_pretrained(tmp_path / "two").transformer)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "pass one of --demo, --train_data_dir"),
        (("--train_data_dir", "."), "goes with --pretrained_model_name_or_path"),
        (("--train_data_dir", ".", "--pretrained_model_name_or_path", "DENSE"), "has no metadata.jsonl"),
        (("--train_data_dir", "rows", "--pretrained_model_name_or_path", "DENSE"), "line 1 has no file_name"),
        (("--demo", "--output_dir", "DENSE"), "holds checkpoint-4. Pass --resume_from_checkpoint latest"),
        (
            ("--demo", "--output_dir", "DENSE", "--resume_from_checkpoint", "latest", "--train_batch_size", "4"),
            "trained with 8 samples per step and seed 0, this run has 4 and 0",
        ),
        (("--demo", "--pretrained_model_name_or_path", "velocity"), "not 'v_prediction'"),
        (("--demo", "--pretrained_model_name_or_path", "color"), "pictures of 1 channel, this VAE takes 3"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, monkeypatch, tmp_path, tiny_vae, dense, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "metadata.jsonl").write_text('{"file_name": "1.png"}\n')
    pipe = PixArtAlphaPipeline.from_pretrained(dense)
    if "velocity" in args:
        pipe.scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
        pipe.save_pretrained("velocity")
    if "color" in args:
        pipe.vae = tiny_vae
        pipe.save_pretrained("color")
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    with pytest.raises(SystemExit) as error:
        script.main([*SHORT, *(str(dense) if arg == "DENSE" else arg for arg in args)])
    assert message in f"{error.value}{capsys.readouterr().err}"


def test_a_gradient_that_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match="Lower --learning_rate"):
        train(tmp_path, "--demo", "--learning_rate", 1e30, steps=8)

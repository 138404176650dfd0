"""examples/train_lora.py: the demo, class folders, a flow model, a latent model, and the lines that its card gives."""

import json
import os
import re
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline, training
from diffusers_terdit.checkpoints import bundled


pytest.importorskip("sklearn")
pytest.importorskip("peft")
import train_lora


TINY = ["--rank", "2", "--max_train_steps", "4", "--train_batch_size", "4", "--num_inference_steps", "2"]
TINY += ["--num_class_images", "6", "--validation_steps", "2", "--logging_steps", "2"]
FILE = "pytorch_lora_weights.safetensors"


def run(folder, *flags):
    train_lora.main([*map(str, flags), *TINY, "--output_dir", str(folder)])
    return json.loads((folder / "report.json").read_text())


def snippet(folder):
    """Names that the card's Python leaves behind."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(code.replace(", generator", ", num_inference_steps=2, generator"), names)
    return names


def write_images(folder, names, size=8):
    generator = torch.Generator().manual_seed(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        pixels = torch.randint(0, 256, (size, size), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / name / "0.png")
    return folder


def test_the_demo_leaves_an_adapter_that_its_card_loads_and_a_base_as_it_was(tmp_path, monkeypatch):
    recognized = train_lora.recognized
    monkeypatch.setattr(train_lora, "recognized", lambda pipe, args: recognized(pipe, args, count=20))
    report = run(tmp_path / "one", "--demo")
    assert report["before"] == report["after, adapter disabled"]
    found = snippet(tmp_path / "one")
    assert len(found["images"]) == 1
    assert found["pipe"].labels["mirrored three"] == 10
    before = TerDiTPipeline.from_pretrained(bundled("digits")).transformer.state_dict()
    after = found["pipe"].transformer.state_dict()
    after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items()}
    blocks = [name for name in before if name.startswith("transformer_blocks")]
    assert all(torch.equal(after[name], before[name]) for name in blocks)
    tensors = load_file(tmp_path / "one" / FILE)
    assert [tuple(tensor.shape) for name, tensor in tensors.items() if "class_embed" in name] == [(1, 64)]
    assert len(tensors) == 2 * 8 * 3 + 1
    assert all((tmp_path / "one" / name).is_file() for name in ("before.png", "after.png", "samples/step-2.png"))
    log = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [2, 4]
    assert all(record["loss"] > 0 and record["prior_loss"] >= 0 for record in log)
    run(tmp_path / "two", "--demo")
    again = load_file(tmp_path / "two" / FILE)
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_known_names_keep_their_label_and_others_become_classes(tmp_path):
    data = write_images(tmp_path / "data", ["ant", "seven", "zebra"])
    args = train_lora.parse_args(["--train_data_dir", str(data)])
    samples = train_lora.open_samples(args, TerDiTPipeline.from_pretrained(bundled("digits")))
    assert samples.id2label == {10: "ant", 7: "seven", 11: "zebra"}
    assert sorted(samples.labels) == [7, 10, 11]


def test_a_new_look_of_an_old_class_needs_no_new_row(tmp_path):
    data = write_images(tmp_path / "data", ["seven"])
    run(tmp_path / "out", "--train_data_dir", data, "--gradient_checkpointing")
    assert snippet(tmp_path / "out")["pipe"].transformer.config.num_classes == 10
    assert not any("class_embed" in n for n in load_file(tmp_path / "out" / FILE))


def test_new_classes_of_a_flow_model(tmp_path):
    data = write_images(tmp_path / "data", ["a new face"], size=32)
    assert run(tmp_path / "out", "--model", "emoji", "--train_data_dir", data)["seconds"] > 0
    assert snippet(tmp_path / "out")["pipe"].labels["a new face"] == 130


def test_pictures_of_a_latent_model_pass_its_vae(tiny_pipeline, tmp_path):
    tiny_pipeline(True, weight_format="packed").save_pretrained(tmp_path / "model")
    data = write_images(tmp_path / "data", ["two", "twelve"], size=16)
    assert run(tmp_path / "out", "--model", tmp_path / "model", "--train_data_dir", data)["seconds"] > 0
    assert snippet(tmp_path / "out")["pipe"].labels["twelve"] == 10


def test_images_without_classes_train_a_model_without_classes_alone(tiny_pipeline, tmp_path):
    one = {"weight_format": "packed", "num_classes": 1, "class_dropout_prob": 0.0}
    tiny_pipeline(**one).save_pretrained(tmp_path / "model")
    data = write_images(tmp_path / "data", ["any"]) / "any"
    assert run(tmp_path / "out", "--model", tmp_path / "model", "--train_data_dir", data)["seconds"] > 0
    assert len(snippet(tmp_path / "out")["images"]) == 1
    with pytest.raises(SystemExit, match="without classes, and digits draws 10 classes"):
        run(tmp_path / "ten", "--model", "digits", "--train_data_dir", data)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train_lora, "recognized", lambda pipe, args: {})
    with pytest.raises(FloatingPointError, match="Lower --learning_rate"):
        run(tmp_path, "--demo", "--learning_rate", "1e30")


def test_a_resumed_run_gives_the_same_bits(tmp_path, monkeypatch):
    data = write_images(tmp_path / "data", ["ant", "seven"])
    run(tmp_path / "whole", "--train_data_dir", data)
    step = train_lora.Trainer.train_step

    def stop_at_two(trainer, *batch):
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, *batch)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        monkeypatch.setattr(train_lora.Trainer, "train_step", stop_at_two)
        train_lora.main(["--train_data_dir", str(data), *TINY, "--output_dir", str(tmp_path / "out")])
        assert [path.name for path in training.checkpointing.find(tmp_path / "out")] == ["checkpoint-2"]
        assert not (tmp_path / "out" / FILE).exists()
        monkeypatch.setattr(train_lora.Trainer, "train_step", step)
        with pytest.raises(SystemExit, match=r"holds checkpoint-2\. Pass --resume_from_checkpoint latest"):
            run(tmp_path / "out", "--train_data_dir", data)
        resume = ["--train_data_dir", data, "--resume_from_checkpoint", "latest"]
        with pytest.raises(SystemExit, match=r"is of another run: seed was 0, is 1"):
            run(tmp_path / "out", *resume, "--seed", 1)
        run(tmp_path / "out", *resume)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    whole, resumed = (load_file(tmp_path / name / FILE) for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert (tmp_path / "out" / "log.jsonl").read_text().count("\n") == 2


def test_the_answers_of_the_frozen_model_for_old_classes_are_kept(tmp_path):
    """They move less than in a run that does not learn them, at the same pictures, noise and times."""
    data = write_images(tmp_path / "data", ["ant"])
    steps = ["--max_train_steps", "60", "--logging_steps", "20", "--validation_steps", "100"]
    error = {}
    for weight in (1e-9, 1):
        folder = tmp_path / str(weight)
        flags = [*TINY, *steps, "--train_data_dir", str(data), "--prior_loss_weight", str(weight)]
        train_lora.main([*flags, "--output_dir", str(folder)])
        error[weight] = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["prior_loss"]
    assert error[1] < 0.7 * error[1e-9], error


@pytest.mark.slow
def test_the_demo_learns_its_class_and_keeps_the_others(tmp_path):
    train_lora.main(["--demo", "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"]["new"] < 0.3
    assert report["after"]["new"] > 0.9
    assert report["after"]["old"] > 0.95

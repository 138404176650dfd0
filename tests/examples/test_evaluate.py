"""examples/evaluate.py: samples that depend on (seed, index) alone, kill and resume, a report of what was measured."""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import evaluate as script
from diffusers_terdit import TerDiTPipeline, cli, evaluation, training
from diffusers_terdit.evaluation.inception import InceptionV3
from diffusers_terdit.pipelines.schedulers import training_scheduler
from tiny_inception import shapes, weights_path  # noqa: F401 - fixtures


pytest.importorskip("sklearn")
ROOT = Path(__file__).parents[2]
PACKED = ROOT / "tests" / "data" / "reference" / "tiny-qknorm-packed"
FAST = ["--num_inference_steps", "3"]


@pytest.fixture
def evaluate(tmp_path):
    """`evaluate("--num_images", 8, ..., output_dir="out")`: sample and measure in this process; the output folder."""

    def run(*args, output_dir="out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        script.main([*FAST, *map(str, args), "--output_dir", str(tmp_path / output_dir)])
        return tmp_path / output_dir

    return run


def report(folder):
    return json.loads((folder / "report.json").read_text())


def samples_bytes(folder):
    return (folder / "samples.npz").read_bytes()


@pytest.fixture
def latent_pipeline(tiny_model, tiny_vae, tmp_path):
    """Folder of a tiny pipeline with a VAE."""
    TerDiTPipeline(tiny_model("packed"), training_scheduler(), tiny_vae).save_pretrained(tmp_path / "latent")
    return tmp_path / "latent"


def test_the_same_bytes_for_any_batch_size(evaluate, latent_pipeline):
    for args in (("--num_images", 18), ("--model", latent_pipeline, "--num_images", 5, "--guidance_scale", 4)):
        one = evaluate(*args, "--batch_size", 1, output_dir=f"one-{len(args)}")
        many = evaluate(*args, "--batch_size", 16, output_dir=f"many-{len(args)}")
        assert samples_bytes(one) == samples_bytes(many)
    assert "Nothing was measured" in (one / "report.md").read_text("utf-8")


def test_the_same_bytes_from_two_processes_and_after_a_kill(evaluate, tmp_path):
    args = ("--num_images", "24", "--num_inference_steps", "20")
    whole = evaluate(*args, output_dir="whole")
    folder, parts = tmp_path / "killed", tmp_path / "killed" / "parts"
    command = [sys.executable, script.__file__, *FAST, *args, "--output_dir", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    killed = subprocess.Popen([*command, "--batch_size", "2"], env=environment)
    deadline = time.monotonic() + 120
    while len(list(parts.glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert 2 <= len(list(parts.glob("*.safetensors"))) < 12
    (parts / "00000020-00000021.partial").write_bytes(b"cut short")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        environment |= {"MASTER_PORT": str(probe.getsockname()[1]), "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    pair = [
        subprocess.Popen([*command, "--batch_size", "3"], env={**environment, "RANK": rank, "LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    assert [process.wait(300) for process in pair] == [0, 0]
    assert samples_bytes(folder) == samples_bytes(whole)
    assert not parts.exists()
    assert report(folder)["fid"] == pytest.approx(report(whole)["fid"], rel=1e-9)


def parts_of(folder, **changes):
    """Parts of a run of ten images, and the settings."""
    settings = {"seed": 0, "num_images": 10}
    for first, last in ((2, 4), (7, 7), (8, 9)):
        images = np.full((last - first + 1, 4, 4, 1), first, dtype=np.uint8)
        script.save_part(folder, range(first, last + 1), images, {**settings, **changes})
    return settings


def test_pending_batches_skip_what_is_there(tmp_path):
    settings = parts_of(tmp_path)
    (tmp_path / "00000008-00000009.safetensors").rename(tmp_path / "00000008-00000009.partial")
    assert script.pending(tmp_path, 11, 2, settings) == [range(0, 2), range(5, 7), range(8, 10), range(10, 11)]


def rewrite(path, change):
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        save_file({name: change(tensor) for name, tensor in tensors.items()}, path, file.metadata())


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x03"),
    "float32": lambda path: rewrite(path, lambda images: images.float()),
    "another image": lambda path: rewrite(path, lambda images: images + 1),
    "fewer images": lambda path: rewrite(path, lambda images: images[1:].clone()),
    "another range": lambda path: path.rename(path.with_stem("00000000-00000002")),
    "another name": lambda path: path.rename(path.with_stem("x")),
    "other settings": lambda path: parts_of(path.parent, seed=1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_drawn_again(tmp_path, damage):
    PartialState()  # its logger asks for it
    settings = parts_of(tmp_path)
    whole = script.pending(tmp_path, 10, 9, settings)
    assert whole == [range(0, 2), range(5, 7)]
    DAMAGES[damage](tmp_path / "00000002-00000004.safetensors")
    again = script.pending(tmp_path, 10, 9, settings)
    assert again == ([range(0, 9), range(9, 10)] if damage == "other settings" else [range(0, 7)])
    assert not (tmp_path / "00000002-00000004.safetensors").exists()


def test_settings_that_are_not_json_are_named(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json is not JSON"):
        evaluate("--num_images", 2)


def test_pixels_are_rounded_as_adm_does():
    values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.9921, 1.0, 3.0]).view(1, 1, 2, 4)
    assert script.to_uint8(values).ravel().tolist() == [0, 0, 0, 128, 191, 254, 255, 255]
    assert script.to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_the_report_says_what_was_measured_on_what(evaluate):
    args = ("--num_images", 128, "--scheduler", "DPMSolverMultistepScheduler", "--dtype", "bfloat16", "--save_images")
    folder = evaluate(*args)
    found = report(folder)
    assert (found["scheduler"], found["dtype"]) == ("DPMSolverMultistepScheduler", "bfloat16")
    assert found["images_seen_in_training"] == 768_000
    assert len(found["weights_sha256"]) == 64
    assert found["network"].startswith("digits classifier")
    assert found["reference"] == "digits, 1,497 images"
    text = (folder / "report.md").read_text("utf-8")
    assert f"| Fréchet distance | {found['fid']:.4g} |" in text
    assert "not comparable with published FIDs" in text
    with np.load(folder / "samples.npz") as file:
        images = file["arr_0"]
    assert (images.dtype, images.shape) == (np.uint8, (128, 8, 8, 1))
    with Image.open(folder / "images" / "000005.png") as image:
        assert np.array_equal(np.asarray(image), images[5, ..., 0])
    # measured again, not sampled again; other settings are refused
    before = (folder / "samples.npz").stat().st_mtime_ns
    evaluate(*args, "--batch_size", 3)
    assert (folder / "samples.npz").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"guidance_scale 1\.5 \(now 3\.0\)\. Pass another --output_dir"):
        evaluate(*args, "--guidance_scale", 3)


def test_images_seen_come_from_a_training_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "images_seen": 64}\n{"step": 1, "noise_error": 1.0}\n')
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "images_s')  # killed
    assert script.images_seen(tmp_path) == 64
    assert script.images_seen(tmp_path / "none") is None


def test_reference_statistics_are_kept_for_their_data_and_network(evaluate, tmp_path):
    images = script.to_uint8(training.data.Digits(train=False).images)
    np.savez(tmp_path / "held-out.npz", images)
    args = ("--num_images", 16, "--reference", tmp_path / "held-out.npz")
    args += ("--reference_statistics", tmp_path / "kept.safetensors")
    evaluate(*args)
    before = (tmp_path / "kept.safetensors").read_bytes()
    evaluate(*args)
    assert (tmp_path / "kept.safetensors").read_bytes() == before
    np.savez(tmp_path / "held-out.npz", images[:200])
    assert report(evaluate(*args))["reference"].endswith("200 images")


def test_a_folder_is_a_reference_and_an_unreadable_image_in_it_is_named_not_replaced(evaluate, tmp_path):
    digits = training.data.Digits(train=False)
    for i in range(40):
        path = tmp_path / "reference" / str(digits.labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((digits.images[i, 0] + 1) * 127.5).byte().numpy()).save(path)
    args = ("--num_images", 16, "--reference", tmp_path / "reference")
    assert report(evaluate(*args))["reference"].endswith("40 images")
    kept = (tmp_path / "out" / "reference.safetensors").read_bytes()
    assert report(evaluate(*args, "--background", "black"))["background"] == "black"
    assert (tmp_path / "out" / "reference.safetensors").read_bytes() != kept
    path.write_bytes(b"no picture")
    with pytest.raises(OSError, match=r"39\.png\) cannot be read"):
        evaluate(*args)


def test_without_a_network_pixels_are_compared_and_called_no_fid(evaluate, latent_pipeline, tmp_path):
    """The reference has no class folders, and transparent pixels."""
    (tmp_path / "reference").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 24, 24, 4), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "reference" / f"{i}.png")
    args = ("--model", latent_pipeline, "--num_images", 10, "--reference", tmp_path / "reference")
    folder = evaluate(*args)
    found = report(folder)
    assert found["network"].startswith("pixel averages")
    text = (folder / "report.md").read_text("utf-8")
    assert f"| Pixel Fréchet distance, not FID | {found['fid']:.4g} |" in text
    assert "| FID |" not in text
    areas = []
    for images in (
        np.load(folder / "samples.npz")["arr_0"],
        script.FolderImages(tmp_path / "reference", 16, 3, "white")[:],
    ):
        areas.append(torch.from_numpy(images / 255).view(len(images), 8, 2, 8, 2, 3).mean((2, 4)).flatten(1))
    assert found["fid"] == pytest.approx(evaluation.frechet_distance(*areas), rel=1e-4)
    assert report(evaluate(*args, "--background", "black"))["fid"] != pytest.approx(found["fid"], rel=1e-3)


def test_a_model_is_drawn_as_it_recommends(evaluate, tiny_model, tmp_path):
    pipe = TerDiTPipeline(
        tiny_model("packed", in_channels=1, num_classes=1),
        training_scheduler(),
        sampling_defaults={"guidance_scale": 1.0},
    )
    pipe.save_pretrained(tmp_path / "one")
    folder = evaluate("--model", tmp_path / "one", "--num_images", 12)
    assert (report(folder)["guidance_scale"], report(folder)["num_inference_steps"]) == (1.0, 3)
    with Image.open(folder / "samples.png") as grid:
        assert grid.width > 4 * grid.height  # not a column


def test_images_that_are_not_finite_are_refused(evaluate, latent_pipeline):
    pipe = TerDiTPipeline.from_pretrained(latent_pipeline)
    pipe.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    pipe.save_pretrained(latent_pipeline.with_name("broken"))
    with pytest.raises(FloatingPointError, match=r"Images \[0, 1\] hold NaN"):
        evaluate("--model", latent_pipeline.with_name("broken"), "--num_images", 2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--num_images", "0"), "expected an integer, 1 or more"),
        (("--scheduler", "Foo"), "no scheduler 'Foo'"),
        (("--inception_weights", "a", "--feature_network", "b"), "pass one of"),
        (("--num_images", 4, "--reference", "none.npz"), "no such file or folder"),
        (("--num_images", 4, "--reference", "big.npz"), r"\(16, 16, 1\), the samples \(8, 8, 1\)"),
        (("--model", "latent", "--num_images", 2, "--reference", "digits"), r"classifier takes images \(B, 1, 8, 8\)"),
        (("--num_images", 2, "--output_dir", "foreign"), "is not of this script"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, latent_pipeline, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    np.savez("big.npz", np.zeros((4, 16, 16, 1), np.uint8))
    Path("foreign").mkdir()
    np.savez("foreign/samples.npz", np.zeros((2, 8, 8, 1), np.uint8))
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    with pytest.raises((SystemExit, ValueError)) as error:
        script.main([*FAST, *map(str, args)])
    assert re.search(message, f"{error.value}{capsys.readouterr().err}")


@pytest.fixture
def stand_ins(tiny_vae, weights_path, tmp_path, monkeypatch):
    """Words of the commands in docs/reproduce.md, and what replaces them here."""
    monkeypatch.chdir(tmp_path)
    tiny_vae.save_pretrained(tmp_path / "vae")
    # ADM's reference file: moments of Inception's features, and images
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    found = evaluation.image_statistics(images, InceptionV3(weights_path))
    moments = {"mu": found.features.mean, "sigma": found.features.covariance}
    moments |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
    np.savez(tmp_path / "adm.npz", images, **{key: value.numpy() for key, value in moments.items()})
    for name, size, side in (("a", "600M", 256), ("b", "3B", 256), ("c", "3B", 512)):
        shutil.copytree(PACKED, tmp_path / "authors" / name)
        arguments = argparse.Namespace(model=f"DiT_Llama_{size}_patch2", image_size=side, vae="ema")
        torch.save(arguments, tmp_path / "authors" / name / "model_args.pth")
    return {
        "lucky-lance/TerDiT": tmp_path / "authors",
        "auto": tmp_path / "vae",
        "weights-inception-2015-12-05-6726825d.pth": weights_path,
        "VIRTUAL_imagenet256_labeled.npz": tmp_path / "adm.npz",
        "VIRTUAL_imagenet512.npz": tmp_path / "adm.npz",
        "50000": 5,
        "250": 2,
        "bfloat16": "float32",
        "cuda": "cpu",
    }


def test_every_command_of_the_reproduction_page_runs(stand_ins, tmp_path):
    """On a small network in the authors' format, few images, random Inception; evaluate.py runs once."""
    page = (ROOT / "docs" / "reproduce.md").read_text("utf-8")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    commands = [shlex.split(line, comments=True) for line in blocks.replace("\\\n", " ").splitlines()]
    commands = [[str(stand_ins.get(word, word)) for word in command] for command in commands if command]
    ran = []
    for command in commands:
        if command[:3] == ["accelerate", "launch", "examples/evaluate.py"]:
            AcceleratorState._reset_state(reset_partial_state=True)
            PartialState._reset_state()
            if "accelerate" not in ran:
                script.main(command[3:])
        elif command[0] == "terdit":
            assert cli.main(command[1:]) == 0, command
        else:
            raise AssertionError(f"no stand-in for {command}")
        ran.append(command[0])
    assert ran.count("accelerate") >= 4
    assert ran.count("terdit") >= 3
    (path,) = tmp_path.glob("results/*/report.json")
    found = json.loads(path.read_text())
    assert found.keys() >= {"fid", "sfid", "inception_score", "precision", "recall"}, path
    assert found["num_images"] == 5
    with Image.open(tmp_path / "figure5.png") as figure:
        assert figure.width > 8 * 16

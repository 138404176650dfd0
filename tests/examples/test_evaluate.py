"""Samples that depend on (seed, index) alone, and a report of what they were measured on."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from diffusers_terdit import TerDiTPipeline, cli, evaluation, training
from diffusers_terdit.evaluation.digits import digits_classifier, train_digits_classifier
from diffusers_terdit.evaluation.inception import InceptionV3
from diffusers_terdit.pipelines.schedulers import training_scheduler
from tiny_inception import shapes, weights_path  # noqa: F401 - fixtures


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PACKED = ROOT / "tests" / "data" / "reference" / "tiny-qknorm-packed"
FAST = ["--num_inference_steps", "3"]


@pytest.fixture(scope="session")
def script():
    sys.path.insert(0, str(EXAMPLES))
    import evaluate

    yield evaluate
    sys.path.remove(str(EXAMPLES))


@pytest.fixture
def evaluate(script, tmp_path):
    """`evaluate("--num_images", 8, ..., output_dir="out")`: sample and measure in this process; the output folder."""

    def run(*args, output_dir="out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        script.main([*FAST, *map(str, args), "--output_dir", str(tmp_path / output_dir)])
        return tmp_path / output_dir

    return run


@pytest.fixture
def refused(evaluate, capsys):
    def message(*args, **kwargs):
        with pytest.raises(SystemExit) as error:
            evaluate(*args, **kwargs)
        return f"{error.value}{capsys.readouterr().err}"

    return message


def report(folder):
    return json.loads((folder / "report.json").read_text())


def samples_bytes(folder):
    return (folder / "samples.npz").read_bytes()


def start(folder, *args, processes=1):
    """The script in processes of its own."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--rdzv_endpoint", "localhost:0", "--rdzv_backend", "c10d"]
    command += [str(EXAMPLES / "evaluate.py"), *FAST, *map(str, args), "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture
def latent_pipeline(tiny_model, tiny_vae, tmp_path):
    """Folder of a tiny pipeline with a VAE."""
    pipe = TerDiTPipeline(tiny_model("packed"), training_scheduler(), tiny_vae)
    pipe.save_pretrained(tmp_path / "latent")
    return tmp_path / "latent"


class TestSamples:
    def test_the_same_bytes_for_any_batch_size(self, evaluate):
        one = evaluate("--num_images", 18, "--batch_size", 1, output_dir="one")
        many = evaluate("--num_images", 18, "--batch_size", 16, output_dir="many")
        assert samples_bytes(one) == samples_bytes(many)
        other = evaluate("--num_images", 18, "--seed", 1, output_dir="other")
        assert samples_bytes(one) != samples_bytes(other)

    def test_the_same_bytes_with_a_vae(self, evaluate, latent_pipeline):
        args = ("--model", latent_pipeline, "--num_images", 5, "--guidance_scale", 4)
        one = evaluate(*args, "--batch_size", 1, output_dir="one")
        assert samples_bytes(one) == samples_bytes(evaluate(*args, "--batch_size", 5, output_dir="many"))
        assert evaluation.open_samples(one / "samples.npz").shape == (5, 16, 16, 3)

    def test_the_same_bytes_from_two_processes_and_after_a_kill(self, evaluate, tmp_path):
        args = ("--num_images", 60, "--num_inference_steps", 20, "--batch_size", 2)
        whole = evaluate(*args, output_dir="whole")
        killed = start(tmp_path / "killed", *args)
        parts = tmp_path / "killed" / "parts"
        deadline = time.monotonic() + 120
        while len(list(parts.glob("*.npy"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert 2 <= len(list(parts.glob("*.npy"))) < 30
        (parts / "00000050-00000051.partial").write_bytes(b"cut short")
        finish(start(tmp_path / "killed", *args, "--batch_size", 3, processes=2))
        assert samples_bytes(tmp_path / "killed") == samples_bytes(whole)
        assert not parts.exists()
        assert report(tmp_path / "killed")["fid"] == pytest.approx(report(whole)["fid"], rel=1e-9)

    def test_labels_are_balanced_or_random(self, script):
        args = script.parse_args(["--seed", "3"])
        assert [script.label_of(args, i, 10) for i in range(12)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        args = script.parse_args(["--seed", "3", "--label_policy", "random"])
        labels = [script.label_of(args, i, 10) for i in range(2000)]
        assert set(labels) == set(range(10))
        assert min(np.bincount(labels)) > 150
        assert labels[:10] == [script.label_of(args, i, 10) for i in range(10)]

    def test_pixels_are_rounded_as_adm_does(self, script):
        values = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 0.9921, 1.0, 3.0]).view(1, 1, 2, 4)
        assert script.to_uint8(values).ravel().tolist() == [0, 0, 0, 128, 191, 254, 255, 255]
        assert script.to_uint8(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)

    def test_numpy_reads_what_was_written_and_pngs_show_it(self, evaluate):
        folder = evaluate("--num_images", 6, "--save_images")
        with np.load(folder / "samples.npz") as file:
            assert file.files == ["arr_0"]
            images = file["arr_0"]
        assert (images.dtype, images.shape) == (np.uint8, (6, 8, 8, 1))
        mapped = evaluation.open_samples(folder / "samples.npz")
        assert isinstance(mapped, np.memmap)
        assert np.array_equal(mapped, images)
        for i in range(6):
            with Image.open(folder / "images" / f"{i:06}.png") as image:
                assert np.array_equal(np.asarray(image), images[i, ..., 0])
        with Image.open(folder / "samples.png") as grid:
            assert grid.width > 500

    def test_another_scheduler_and_half_precision(self, evaluate):
        args = ("--num_images", 4, "--scheduler", "DPMSolverMultistepScheduler", "--dtype", "bfloat16")
        found = report(evaluate(*args))
        assert (found["scheduler"], found["dtype"]) == ("DPMSolverMultistepScheduler", "bfloat16")

    def test_images_that_are_not_finite_are_refused(self, evaluate, latent_pipeline):
        pipe = TerDiTPipeline.from_pretrained(latent_pipeline)
        pipe.vae.decoder.conv_out.bias.data.fill_(torch.nan)
        pipe.save_pretrained(latent_pipeline.with_name("broken"))
        with pytest.raises(FloatingPointError, match=r"Images \[0, 1\] hold NaN"):
            evaluate("--model", latent_pipeline.with_name("broken"), "--num_images", 2)


class TestResume:
    def test_a_finished_folder_is_measured_again_not_sampled_again(self, evaluate):
        folder = evaluate("--num_images", 8)
        before = (folder / "samples.npz").stat().st_mtime_ns
        evaluate("--num_images", 8, "--batch_size", 3)
        assert (folder / "samples.npz").stat().st_mtime_ns == before

    def test_images_of_other_settings_are_refused(self, evaluate, refused):
        evaluate("--num_images", 8)
        message = refused("--num_images", 8, "--guidance_scale", 3)
        assert "guidance_scale 1.5 (now 3.0)" in message
        assert "another --output_dir" in message

    def test_samples_of_unknown_origin_are_refused(self, refused, tmp_path):
        (tmp_path / "out").mkdir()
        np.savez(tmp_path / "out" / "samples.npz", np.zeros((2, 8, 8, 1), np.uint8))
        assert "not of this script" in refused("--num_images", 2)

    def test_pending_batches_skip_what_is_there(self, script, tmp_path):
        for name in ("00000002-00000004.npy", "00000007-00000007.npy", "00000008-00000009.partial"):
            (tmp_path / name).touch()
        assert script.pending(tmp_path, 11, 2) == [range(0, 2), range(5, 7), range(8, 10), range(10, 11)]


class TestReport:
    def test_it_says_what_was_measured_on_what(self, evaluate):
        folder = evaluate("--num_images", 128)
        found = report(folder)
        assert found["images_seen_in_training"] == 768_000
        assert len(found["weights_sha256"]) == 64
        assert found["network"].startswith("digits classifier")
        assert found["reference"] == "digits, 1,497 images"
        for key in ("seed", "guidance_scale", "num_inference_steps", "scheduler", "label_policy", "num_images"):
            assert key in found
        text = (folder / "report.md").read_text("utf-8")
        assert f"| Fréchet distance | {found['fid']:.4g} |" in text
        assert "not comparable with published FIDs" in text
        assert "| FID |" not in text

    def test_images_seen_come_from_a_training_log(self, script, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"step": 1, "images_seen": 64}\n{"step": 1, "noise_error": 1.0}\n')
        assert script.images_seen(tmp_path) == 64
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write('{"step": 2, "images_s')  # killed
        assert script.images_seen(tmp_path) == 64
        assert script.images_seen(tmp_path / "none") is None

    def test_a_copy_of_the_reference_is_perfect_and_damage_shows(self, script):
        network, digits = digits_classifier(), training.data.Digits(train=True)
        images = script.to_uint8(digits.images)
        reference = evaluation.image_statistics(images, network)
        assert evaluation.compare(evaluation.image_statistics(images.copy(), network), reference)["fid"] < 1e-3
        blurred = torch.nn.functional.avg_pool2d(digits.images, 3, 1, 1)
        found = evaluation.compare(evaluation.image_statistics(script.to_uint8(blurred), network), reference)
        assert found["fid"] > 1
        assert found["precision"] < 0.9

    def test_shuffled_labels_show_in_the_distance_per_class(self, script):
        """The unconditional distance cannot see them: class by class it does."""
        network, digits = digits_classifier(), training.data.Digits(train=True)
        images, labels = script.to_uint8(digits.images), np.array(digits.labels)
        shuffled = np.random.default_rng(0).permutation(labels)
        right, wrong = (
            np.mean([
                evaluation.compare(
                    evaluation.image_statistics(images[given == c], network),
                    evaluation.image_statistics(images[labels == c], network),
                )["fid"]
                for c in range(10)
            ])
            for given in (labels, shuffled)
        )  # fmt: skip
        assert right < 1e-3
        assert wrong > 1

    def test_reference_statistics_are_kept_for_their_data_and_network(self, evaluate, script, tmp_path, caplog):
        images = script.to_uint8(training.data.Digits(train=False).images)
        np.savez(tmp_path / "held-out.npz", images)
        args = ("--num_images", 16, "--reference", tmp_path / "held-out.npz")
        args += ("--reference_statistics", tmp_path / "kept.safetensors")
        evaluate(*args, output_dir="first")
        before = (tmp_path / "kept.safetensors").read_bytes()
        evaluate(*args, output_dir="second")
        assert (tmp_path / "kept.safetensors").read_bytes() == before
        assert report(tmp_path / "first")["fid"] == report(tmp_path / "second")["fid"]
        np.savez(tmp_path / "held-out.npz", images[:200])
        evaluate(*args, output_dir="third")
        assert report(tmp_path / "third")["reference"].endswith("200 images")

    def test_a_folder_of_images_is_a_reference(self, evaluate, tmp_path):
        digits = training.data.Digits(train=False)
        for i in range(40):
            path = tmp_path / "reference" / str(digits.labels[i]) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(((digits.images[i, 0] + 1) * 127.5).byte().numpy()).save(path)
        assert report(evaluate("--num_images", 16, "--reference", tmp_path / "reference"))["reference"].endswith(
            "40 images"
        )

    def test_an_unreadable_reference_image_is_named_not_replaced(self, evaluate, tmp_path):
        (tmp_path / "reference" / "0").mkdir(parents=True)
        for name in ("a.png", "b.png", "c.png"):
            Image.new("L", (8, 8)).save(tmp_path / "reference" / "0" / name)
        (tmp_path / "reference" / "0" / "b.png").write_bytes(b"no picture")
        with pytest.raises(OSError, match=r"b\.png\) cannot be read"):
            evaluate("--num_images", 16, "--reference", tmp_path / "reference")

    def test_a_loop_over_the_images_of_a_folder_ends(self, tmp_path):
        (tmp_path / "0").mkdir()
        for name in ("a.png", "b.png"):
            Image.new("L", (8, 8)).save(tmp_path / "0" / name)
        samples = training.data.ImageSamples.from_folder(tmp_path, resolution=8, channels=1)
        assert [label for _, label in itertools.islice(samples, 5)] == [0, 0]

    def test_a_model_without_a_reference_is_sampled_and_says_so(self, evaluate, latent_pipeline):
        folder = evaluate("--model", latent_pipeline, "--num_images", 2)
        assert "fid" not in report(folder)
        assert "Nothing was measured" in (folder / "report.md").read_text("utf-8")

    def test_any_network_measures(self, evaluate, latent_pipeline, tmp_path, monkeypatch):
        (tmp_path / "my_network.py").write_text(
            "import torch\n\ndef make():\n    return torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Flatten())\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
        np.savez(tmp_path / "images.npz", images)
        args = ("--model", latent_pipeline, "--num_images", 4, "--feature_network", "my_network:make")
        found = report(evaluate(*args, "--reference", tmp_path / "images.npz"))
        assert found["fid"] > 0
        assert "inception_score" not in found


class TestRefusals:
    def test_a_reference_that_is_not_there(self, refused, tmp_path):
        assert "no such file or folder" in refused("--num_images", 4, "--reference", tmp_path / "none.npz")

    def test_a_reference_of_another_size(self, refused, tmp_path):
        np.savez(tmp_path / "big.npz", np.zeros((4, 16, 16, 1), np.uint8))
        assert "(16, 16, 1), the samples (8, 8, 1)" in refused("--num_images", 4, "--reference", tmp_path / "big.npz")

    def test_a_reference_without_a_network(self, refused, latent_pipeline):
        message = refused("--model", latent_pipeline, "--num_images", 2, "--reference", "digits")
        assert "--inception_weights or --feature_network" in message

    def test_one_image_is_too_few_for_a_covariance(self, evaluate):
        with pytest.raises(ValueError, match="at least 2 images, got 1"):
            evaluate("--num_images", 1)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--num_images", "0"), "at least 1"),
            (("--scheduler", "Foo"), "no scheduler 'Foo'"),
            (("--inception_weights", "a", "--feature_network", "b"), "pass one of"),
        ],
    )
    def test_impossible_arguments(self, refused, args, message):
        assert message in refused(*args)

    def test_a_missing_model(self, evaluate, tmp_path):
        with pytest.raises(OSError, match="is not a folder"):
            evaluate("--model", tmp_path / "none")


def test_the_classifier_of_the_digits_is_what_its_function_trains():
    train, held_out = training.data.Digits(train=True), training.data.Digits(train=False)
    network = train_digits_classifier((train.images + 1) / 2, torch.tensor(train.labels), epochs=10)
    for candidate, least in ((network, 0.93), (digits_classifier(), 0.98)):
        right = candidate((held_out.images + 1) / 2)["logits"].argmax(1) == torch.tensor(held_out.labels)
        assert right.float().mean() >= least
    with pytest.raises(ValueError, match=r"\(B, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        digits_classifier()(torch.zeros(2, 3, 8, 8))


class TestReproduceThePaper:
    """Each command, on stand-ins: a small network in the authors' format, few images, random Inception."""

    @pytest.fixture
    def stand_ins(self, tiny_vae, weights_path, tmp_path, monkeypatch):
        """What the commands' words become."""
        monkeypatch.chdir(tmp_path)
        tiny_vae.save_pretrained(tmp_path / "vae")
        for size in (16, 32):  # ADM's reference files: moments of Inception's features, and images
            images = np.random.default_rng(size).integers(0, 256, (5, size, size, 3), dtype=np.uint8)
            found = evaluation.image_statistics(images, InceptionV3(weights_path))
            moments = {"mu": found.features.mean, "sigma": found.features.covariance}
            moments |= {"mu_s": found.spatial.mean, "sigma_s": found.spatial.covariance}
            np.savez(tmp_path / f"adm-{size}.npz", images, **{key: value.numpy() for key, value in moments.items()})
        return {
            "lucky-lance/TerDiT": PACKED,
            "auto": tmp_path / "vae",
            "weights-inception-2015-12-05-6726825d.pth": weights_path,
            "VIRTUAL_imagenet256_labeled.npz": tmp_path / "adm-16.npz",
            "VIRTUAL_imagenet512.npz": tmp_path / "adm-16.npz",
            "50000": 5,
            "250": 2,
            "bfloat16": "float32",
            "cuda": "cpu",
        }

    def test_every_command_of_the_page_runs(self, stand_ins, script, tmp_path):
        page = (ROOT / "docs" / "reproduce.md").read_text("utf-8")
        blocks = "".join(re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
        commands = [shlex.split(line, comments=True) for line in blocks.replace("\\\n", " ").splitlines()]
        commands = [[str(stand_ins.get(word, word)) for word in command] for command in commands if command]
        ran = []
        for command in commands:
            if command[:3] == ["accelerate", "launch", "examples/evaluate.py"]:
                AcceleratorState._reset_state(reset_partial_state=True)
                PartialState._reset_state()
                script.main(command[3:])
            elif command[0] == "terdit":
                where = command.index("--subfolder") if "--subfolder" in command else len(command)
                assert cli.main(command[1:where] + command[where + 2 :]) == 0, command
            else:
                raise AssertionError(f"no stand-in for {command}")
            ran.append(command[0])
        assert ran.count("accelerate") >= 4
        assert ran.count("terdit") >= 3
        for path in tmp_path.glob("results/*/report.json"):
            found = json.loads(path.read_text())
            assert found.keys() >= {"fid", "sfid", "inception_score", "precision", "recall"}, path
            assert found["num_images"] == 5
        with Image.open(tmp_path / "figure5.png") as figure:
            assert figure.width > 8 * 16

    def test_the_page_names_the_papers_numbers(self):
        page = (ROOT / "docs" / "reproduce.md").read_text("utf-8")
        assert all(number in page for number in ("2.42", "4.34", "9.66", "355 980 328 33 928 862 330 944"))

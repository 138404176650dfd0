"""The `terdit` command does what it prints."""

import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, FluxTransformer2DModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

from diffusers_terdit import TerDiTPipeline, TernaryConfig, TernaryLinear, __version__, cli
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.cli import DTYPES, build_parser, human_bytes, main, report_errors, usable_device
from diffusers_terdit.ops import choose_kernel, has_integer_kernel
from diffusers_terdit.training import checkpointing
from diffusers_terdit.training.export import image_grid
from fake_hub import patch_constants
from tiny import make_ternary, tiny_vae
from tiny_flux2 import tiny_flux2_pipeline
from tiny_training import fresh_model, optimizer_of


ROOT = Path(__file__).parent.parent
PACKED = ROOT / "tests" / "data" / "reference" / "tiny-qknorm-packed"


def test_generate_writes_a_labelled_grid_and_says_so(tmp_path, capsys):
    output = tmp_path / "new" / "grid.png"
    arguments = ["--labels", "3", "seven", "--num_images_per_label", "3", "--num_inference_steps", "2"]
    arguments += ["--scheduler", "DPMSolverMultistepScheduler", "--dtype", "bfloat16"]
    assert main(["generate", "digits", *arguments, "--output", str(output)]) == 0
    with PIL.Image.open(output) as grid:
        assert (grid.width, grid.height) == (3 * 136 + 8, 2 * 150 + 8)  # a row of three images for each label
    printed = capsys.readouterr().out
    assert all(
        part in printed for part in ("6 images of 8 x 8 pixels", "2 steps of DPMSolverMultistepScheduler", str(output))
    )


def test_generate_is_a_function_of_the_seed(tmp_path):
    def run(name, seed):
        path = tmp_path / name
        main(["generate", "--labels", "5", "--num_inference_steps", "2", "--seed", seed, "--output", str(path)])
        return path.read_bytes()

    assert run("a.png", "1") == run("b.png", "1") != run("c.png", "2")


def test_generate_takes_a_seed_per_image(tmp_path, capsys):
    def picture(*seeds):
        path = tmp_path / f"{'-'.join(seeds)}.png"
        arguments = ["--labels", "ghost", "joy", "--num_inference_steps", "2", "--output", str(path)]
        assert main(["generate", "emoji", *arguments, "--seed", *seeds]) == 0
        with PIL.Image.open(path) as image:
            return np.asarray(image)

    both, four = picture("4", "9"), picture("4")
    assert "2 images of" in (printed := capsys.readouterr().out)
    assert "4 images of 32 x 32 pixels" in printed
    assert "seeds 4, 9," in printed
    # Rows are labels: the first image of the first one has seed 4 in both.
    cell = np.s_[22:150, 8:136]
    assert (both[cell] == four[cell]).all()
    assert (both[cell] != picture("9", "4")[cell]).any()


def test_a_flow_model_takes_other_schedulers_in_their_flow_form(tmp_path):
    """With few steps every sampler draws about the same picture from the same noise, if it reads the velocity."""
    pictures = {}
    for name in ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        path = tmp_path / f"{name}.png"
        arguments = ["--labels", "ghost", "--num_inference_steps", "12", "--guidance_scale", "1"]
        assert main(["generate", "emoji", *arguments, "--scheduler", name, "--output", str(path)]) == 0
        with PIL.Image.open(path) as image:
            pictures[name] = np.asarray(image).astype(float)
    euler = pictures.pop("FlowMatchEulerDiscreteScheduler")
    assert all(0 < np.abs(picture - euler).mean() < 8 for picture in pictures.values())


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, terminal):
    leader, follower = os.openpty() if terminal else os.pipe()
    if terminal:
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with open(follower, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["generate", "--num_inference_steps", "3", "--output", str(tmp_path / "x.png")]) == 0
        stream.flush()
        os.set_blocking(leader, False)
        shown = b""
        while True:
            try:
                shown += os.read(leader, 4096)
            except BlockingIOError:
                break
    assert (b"3/3" in shown) == terminal


def draw(path, *arguments):
    """Run `generate` into a picture and return it and what it says of itself."""
    assert main(["generate", "emoji", "--num_inference_steps", "1", *arguments, "--output", str(path)]) == 0
    with PIL.Image.open(path) as image:
        return np.asarray(image), dict(image.text)


def test_a_piped_generate_says_how_far_it_is_in_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "LINE_SECONDS", 0)
    draw(tmp_path / "x.png", "--labels", "0", "1", "2", "--batch_size", "2")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"terdit: 50% done, \d+ s left", lines[0])


def test_images_are_the_same_in_any_batch_size(tmp_path):
    arguments = ["--labels", "ghost", "joy", "--num_images_per_label", "3", "--seed", "5"]
    one, three, six = (draw(tmp_path / f"{n}.png", *arguments, "--batch_size", n)[0] for n in "136")
    for other in (three, six):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_scale_enlarges_by_a_whole_factor(tmp_path):
    small, large = (draw(tmp_path / f"{n}.png", "--labels", "ghost", "--scale", n)[0] for n in "13")
    assert small.shape[0] == 32 + 14 + 16
    assert small.shape[1] >= 32 + 16
    assert (small[22:54, 8:40].repeat(3, 0).repeat(3, 1) == large[22:118, 8:104]).all()


def test_a_picture_says_how_it_was_drawn(tmp_path):
    _, text = draw(tmp_path / "x.png", "--labels", "ghost", "joy", "--num_images_per_label", "2", "--dtype", "fp16")
    assert json.loads(text.pop("labels")) == ["ghost"] * 2 + ["face with tears of joy, joy"] * 2
    assert json.loads(text.pop("seeds")) == [0, 1, 2, 3]
    assert text == {
        "model": "emoji", "num_inference_steps": "1", "guidance_scale": "1.5", "width": "32", "height": "32",
        "scheduler": "FlowMatchEulerDiscreteScheduler", "dtype": "float16",
        "device": str(usable_device("auto")), "Software": f"diffusers-terdit {__version__}",
    }  # fmt: skip


def test_a_model_is_drawn_as_it_recommends(tmp_path, capsys):
    assert main(["generate", "emoji", "--labels", "ghost", "--output", str(tmp_path / "x.jpg")]) == 0
    defaults = TerDiTPipeline.from_pretrained(bundled("emoji")).sampling_defaults
    printed = capsys.readouterr().out
    assert printed.startswith("1 image of 32 x 32 pixels")
    assert f": {defaults['num_inference_steps']} steps of" in printed
    assert f"guidance {defaults['guidance_scale']:g}, seed 0, " in printed


def test_a_picture_is_replaced_only_when_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["generate", "--labels", "3", "--num_inference_steps", "1"]
    for name in ("terdit-1.png", "terdit-2.png"):
        assert main(command) == 0
        assert capsys.readouterr().out.endswith(f"Written to {name}\n")
    before = Path("terdit-1.png").stat()
    assert main([*command, "--output", "terdit-1.png"]) == 1
    assert "terdit-1.png exists. Pass --overwrite" in capsys.readouterr().err
    assert Path("terdit-1.png").stat() == before
    assert main([*command, "--output", "terdit-1.png", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("labels", "drawn"),
    [
        (["ghost,joy"], ["ghost", "face with tears of joy, joy"]),
        (["clown_face", "Ghost"], ["clown face", "ghost"]),
        (["alien monster, space invader"], ["alien monster, space invader"]),
        (["0, ghost"], ["alien monster, space invader", "ghost"]),
    ],
    ids=str,
)
def test_labels_as_people_write_them(labels, drawn, tmp_path):
    text = draw(tmp_path / "x.png", "--labels", *labels)[1]
    assert [label.split(",")[0] for label in json.loads(text["labels"])] == [name.split(",")[0] for name in drawn]


def test_a_wrong_label_is_explained_in_the_words_of_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def said(*arguments):
        assert main(["generate", *arguments]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    message = said("--labels", "ghost", "emoji")
    assert "'ghost' is not a label of digits" in message
    assert "`terdit info digits --labels`" in message
    assert message.endswith("Put the model first: `terdit generate emoji --labels ...`.")
    message = said("emoji", "--labels", "\U0001f921")
    assert "is not a label of emoji" in message
    assert "Put the model first" not in message
    assert "Label 10" in (message := said("--labels", "10")) or "10 is out of range: digits has" in message


def test_a_name_that_is_a_path_is_explained_as_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("generate", "info"):
        assert main([command, "weights.safetensors"]) == 1
        assert "No file weights.safetensors is here" in capsys.readouterr().err
    Path("weights.safetensors").touch()
    assert main(["generate", "weights.safetensors"]) == 1
    assert "weights.safetensors is a file. Pass the folder" in capsys.readouterr().err


def test_a_folder_that_has_the_name_of_a_bundled_checkpoint_is_used_and_named(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundled("emoji"), "digits")
    monkeypatch.setattr(logging.get_logger("diffusers"), "propagate", True)
    assert main(["info", "digits"]) == 0
    assert "The folder digits here is used, not the bundled checkpoint of that name." in caplog.text


def test_a_pipeline_without_a_vae_is_refused_in_the_words_of_the_command(tmp_path, capsys):
    assert main(["convert", str(PACKED), str(tmp_path / "pipe")]) == 0
    assert "It has no VAE, so `terdit generate` cannot draw pictures" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "pipe"), "--output", str(tmp_path / "x.png")]) == 1
    message = capsys.readouterr().err
    assert "`terdit convert --vae`" in message
    assert "output_type" not in message


def test_a_vae_that_cannot_be_downloaded_is_the_reason_at_once(fake_hub, monkeypatch, tmp_path, capsys):
    patch_constants(monkeypatch, ENDPOINT="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", "http://127.0.0.1:9")
    start = time.monotonic()
    assert main(["convert", str(PACKED), str(tmp_path / "pipe"), "--vae", "auto"]) == 1
    assert time.monotonic() - start < 10
    message = capsys.readouterr().err.splitlines()[-1]
    assert "The connection to the Hub broke off at stabilityai/sd-vae-ft-" in message
    assert not (tmp_path / "pipe").exists()


@pytest.mark.parametrize("command", [["convert", str(PACKED)], ["pack", "digits"]], ids=lambda value: value[0])
def test_a_folder_that_holds_something_is_not_written_into(command, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert main([*command, str(tmp_path)]) == 1
    assert f"{tmp_path} exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_checkpoint_of_a_run_is_drawn_and_exported(tmp_path, capsys):
    """The pixels are those of the averaged weights; a folder of a run alone names its newest checkpoint."""
    model, run = fresh_model(learn_sigma=False, prediction_type="flow_prediction"), tmp_path / "run"
    average = fresh_model(2, learn_sigma=False, prediction_type="flow_prediction")
    names = {str(i): f"number {i}" for i in range(model.config.num_classes)}
    state = {"step": 2, "id2label": names, "sampling_defaults": {"num_inference_steps": 3, "guidance_scale": 1.0}}
    checkpointing.save(run / "checkpoint-2", model, average, optimizer_of(model), state)
    picture, folder = ["--labels", "number 1", "--output"], tmp_path / "exported"
    assert main(["generate", str(run / "checkpoint-2"), *picture, str(tmp_path / "a.png")]) == 0
    assert ": 3 steps of FlowMatchEulerDiscreteScheduler, guidance 1, seed 0" in capsys.readouterr().out
    assert main(["generate", str(run), *picture, str(tmp_path / "b.png")]) == 1
    assert f"Pass the newest checkpoint, {run / 'checkpoint-2'}." in capsys.readouterr().err
    assert main(["export", str(run / "checkpoint-2"), str(folder)]) == 0
    assert main(["generate", str(folder), *picture, str(tmp_path / "b.png")]) == 0
    first, second = (PIL.Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert TerDiTPipeline.from_pretrained(folder).transformer.config.weight_format == "packed"


def test_version_and_environment(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"diffusers-terdit {__version__}\n")
    assert main(["env"]) == 0
    rows = dict(re.split("  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["torch"] == torch.__version__
    assert rows["device"].startswith(str(usable_device("auto")))
    assert (rows["integer kernels"] == "none") == (not has_integer_kernel("cpu"))


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "diffusers_terdit", "--version"]
    assert subprocess.check_output(command, text=True) == f"diffusers-terdit {__version__}\n"


@pytest.mark.skipif(not has_integer_kernel("cpu"), reason="no AVX2 or no numba")
def test_generate_with_integer_activations(tmp_path, capsys):
    pictures = {}
    for bits, kind in ((None, "None"), (16, "16-bit"), (8, "8-bit"), ("fp8", "fp8")):
        arguments = ["--labels", "5", "--num_inference_steps", "3", "--output", str(tmp_path / f"{bits}.png")]
        assert main(["generate", *arguments, *(["--activation_bits", str(bits)] if bits else [])]) == 0
        assert (f"{kind} activations" in capsys.readouterr().out) == (bits is not None)
        with PIL.Image.open(tmp_path / f"{bits}.png") as picture:
            pictures[bits] = torch.from_numpy(np.asarray(picture.convert("L")).astype("float32"))
    assert (pictures[16] - pictures[None]).abs().max() <= 1
    assert 0 < (pictures[8] - pictures[None]).abs().max() <= 40
    assert torch.equal(pictures["fp8"], pictures[None])  # on a CPU it computes exactly, with a warning


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--labels", "eleven"], "'eleven' is not a label of digits. Close matches: 'seven'"),
        (["generate", "--output", "picture"], "picture does not name a picture"),
        (["info", str(ROOT / "docs")], "docs has no diffusion_pytorch_model.safetensors. It holds no weights"),
        (["push", "/no/such/folder", "user/name"], "/no/such/folder is not a folder"),
        (["convert", "/no/such/folder", "out"], "/no/such/folder is not a folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("terdit: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--device", "--output"])
def test_what_cannot_work_is_said_before_anything_is_loaded(option, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(TerDiTPipeline, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # the administrator may write everywhere
    value = "toaster" if option == "--device" else str(tmp_path / "new" / "x.png")
    assert main(["generate", option, value]) == 1
    assert {"--device": "cannot be used here", "--output": "no permission"}[option] in capsys.readouterr().err


def test_a_label_that_is_a_name_is_that_label_even_if_it_is_a_number(tiny_pipeline, tmp_path):
    """Folders "1" to "10" are numbered in the order "1", "10", "2", ..."""
    names = sorted(str(i) for i in range(1, 11))
    tiny_pipeline(id2label=dict(enumerate(names)), weight_format="packed").save_pretrained(tmp_path / "pipe")

    def picture(label):
        path = tmp_path / f"{label}.png"
        command = ["generate", str(tmp_path / "pipe"), "--labels", label, "--num_inference_steps", "2"]
        assert main([*command, "--output", str(path)]) == 0
        with PIL.Image.open(path) as image:
            return np.asarray(image)[22:, 8:136]  # below the name

    ten, zero = picture("10"), picture("0")  # no folder has the name "0"
    pipe = TerDiTPipeline.from_pretrained(tmp_path / "pipe")
    for label, found in ((pipe.labels["10"], ten), (0, zero)):
        image = pipe(label, num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
        assert np.array_equal(found, np.asarray(image_grid([image], labels=["1"], min_side=128))[22:, 8:136])
    assert pipe.labels["10"] == 1


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path, capsys):
    path = tmp_path / "a.png"
    path.write_bytes(b"a picture")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        code = main(["generate", "--num_inference_steps", "1", "--overwrite", "--output", str(path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert f"{path} cannot be written" in capsys.readouterr().err
    assert path.read_bytes() == b"a picture"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_images_per_label", "0"], "expected an integer, 1 or more, got '0'"),
        (["--num_inference_steps", "-1"], "expected an integer, 1 or more, got '-1'"),
        (["--seed", str(2**63)], "expected an integer"),
        (["--guidance_scale", "nan"], "expected a number, 0 or more, got 'nan'"),
        (["--num_images_per_label", str(10**11)], "1,000,000,000,000 images of 8 x 8 pixels make a picture of"),
        (["--height", "100000000"], "10 images of 8 x 100,000,000 pixels make a picture of"),
        (["--scheduler", "SchedulerMixin"], "diffusers has no scheduler 'SchedulerMixin'"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_cannot_be_drawn_is_one_line(flags, message, capsys, tmp_path):
    try:
        code = main(["generate", *flags, "--output", str(tmp_path / "x.png")])
    except SystemExit as stop:
        code = stop.code
    assert code in (1, 2)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [MemoryError("12 GB"), None], ids=["NumPy", "torch"])
def test_a_full_memory_is_one_line_and_a_programming_error_is_none(error, capsys):
    def run():
        if error:
            raise error
        torch.empty(2**60)

    assert report_errors("terdit", run) == 1
    assert "terdit: not enough memory (" in (printed := capsys.readouterr().err)
    assert len(printed.splitlines()) == 1
    with pytest.raises(RuntimeError, match="mat1"):
        report_errors("terdit", lambda: torch.zeros(1, 2) @ torch.zeros(3, 1))


@pytest.mark.parametrize("seconds", [0.5, 1.5, 3.0])
def test_an_interrupt_is_one_line_in_the_imports_too(seconds, tmp_path):
    code = "import sys; from diffusers_terdit_command import main; sys.exit(main())"
    command = [
        sys.executable,
        "-c",
        code,
        "generate",
        "--num_inference_steps",
        "1000000",
        "--output",
        tmp_path / "x.png",
    ]
    default = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may ignore it, and pass that on
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    finally:
        signal.signal(signal.SIGINT, default)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    assert (process.wait(60), process.communicate()[0]) == (130, "terdit: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_one_line(capsys, monkeypatch, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(TerDiTPipeline, "__call__", interrupted)
    assert main(["generate", "--output", str(tmp_path / "x.png")]) == 130
    assert capsys.readouterr().err.endswith("terdit: interrupted\n")


def test_convert_writes_a_pipeline_and_prints_what_it_holds(tmp_path, capsys):
    assert main(["convert", str(PACKED), str(tmp_path / "pipe")]) == 0
    assert "ternary" in capsys.readouterr().out
    pipe = TerDiTPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.get_label_ids("golden retriever") == [207]


def test_pack_of_an_unpacked_pipeline_gives_the_same_codes(tmp_path):
    pipe = TerDiTPipeline.from_pretrained(bundled())
    codes = {name: layer.weight_packed for name, layer in pipe.transformer.ternary_layers().items()}
    pipe.transformer.unpack()
    pipe.save_pretrained(tmp_path / "float")
    assert main(["pack", str(tmp_path / "float"), str(tmp_path / "packed")]) == 0
    packed = TerDiTPipeline.from_pretrained(tmp_path / "packed").transformer
    assert packed.config.weight_format == "packed"
    assert all(torch.equal(layer.weight_packed, codes[name]) for name, layer in packed.ternary_layers().items())


def test_generate_takes_a_hub_id(fake_hub, tmp_path):
    fake_hub.upload_folder("user/digits", bundled())
    arguments = ["--labels", "1", "--num_inference_steps", "2", "--output", str(tmp_path / "one.png")]
    assert main(["generate", "user/digits", *arguments]) == 0


def test_info_of_a_hub_model_downloads_its_weights_alone(fake_hub, tiny_pipeline, tmp_path, capsys):
    tiny_pipeline(vae=True, weight_format="packed").save_pretrained(tmp_path / "pipe")
    fake_hub.upload_folder("user/pipe", tmp_path / "pipe")
    fake_hub.upload_folder("user/model", tmp_path / "pipe" / "transformer")
    assert main(["info", "user/pipe"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^vae +not here$", printed, re.MULTILINE)
    assert not any(path.startswith("vae/") for path, _ in fake_hub.downloads)
    assert main(["info", str(tmp_path / "pipe")]) == 0
    assert re.search(r"^vae +\d+\.\d kB more$", capsys.readouterr().out, re.MULTILINE)
    assert main(["info", "user/model"]) == 0
    assert "where the bytes go" in capsys.readouterr().out


def test_info_tells_dead_layers_and_full_precision(tiny_model, tmp_path, capsys):
    TernaryLinear(16, 8, weight_format="packed").save_pretrained(tmp_path / "dead")  # a fresh packed layer is zero
    assert main(["info", str(tmp_path / "dead")]) == 0
    assert "all zero" in capsys.readouterr().out
    tiny_model(ternary=False).save_pretrained(tmp_path / "dense")
    assert main(["info", str(tmp_path / "dense")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^format +full precision$", printed, re.MULTILINE)
    assert "ternary" not in printed


def test_info_of_a_layer_and_of_a_file(tmp_path, capsys):
    TernaryLinear(16, 8, scale_granularity="row").pack().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        assert main(["info", str(path)]) == 0
        printed = capsys.readouterr().out
        assert re.search(r"^ternary codes +2-bit +128 +32 ", printed, re.MULTILINE)
        assert "8, one per row" in printed
        assert ("16 inputs, 8 outputs" in printed) == path.is_dir()
    save_file(load_file(path), path)  # as other programs do
    assert main(["info", str(path)]) == 0
    assert "none, so damage cannot be seen" in capsys.readouterr().out


@pytest.mark.parametrize("weight_format", ["packed", "float"])
def test_info_of_ternary_models_of_other_classes(weight_format, tmp_path, capsys):
    """A pipeline and its model, and a model of which no pipeline is there."""
    model = DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    config = TernaryConfig(scale_granularity="row", weight_format=weight_format, modules_to_not_convert=["norm1"])
    pipe = DiTPipeline(config.quantize(model), tiny_vae(), DDIMScheduler())
    pipe.save_pretrained(tmp_path / "pipe")
    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    TernaryConfig(16, weight_format).quantize(flux).save_pretrained(tmp_path / "flux")
    settings = f"weight_format='{weight_format}'"
    for folder, cls, covers, layers in (
        ("pipe", "DiTTransformer2DModel", "row", 6),
        ("pipe/transformer", "DiTTransformer2DModel", "row", 6),
        ("flux", "FluxTransformer2DModel", "group of 16", 14 + 6),
    ):
        assert main(["info", str(tmp_path / folder)]) == 0
        printed = capsys.readouterr().out
        assert re.search(rf"^class +{cls}$", printed, re.MULTILINE)
        assert re.search(rf"^quantization +TernaryConfig\(.*{settings}", printed, re.MULTILINE)
        assert re.search(rf"^  ternary +[\d,]+ in {layers} layers$", printed, re.MULTILINE), printed
        assert f"one per {covers}\n" in printed
        assert bool(re.search(r"^pipeline +DiTPipeline\npart +transformer$", printed, re.M)) == (folder == "pipe")
        assert main(["info", str(tmp_path / folder), "--kernels"]) == 0
        assert printed != (printed := capsys.readouterr().out)
        assert len(printed.splitlines()) > len(DTYPES)


def test_info_of_what_convert_makes_of_a_dense_pipeline(fake_hub, tmp_path, capsys):
    pipe = tiny_flux2_pipeline()
    make_ternary(pipe.transformer.float(), 32).half()
    pipe.save_pretrained(tmp_path / "published")
    assert main(["info", str(tmp_path / "published")]) == 1
    assert "without ternary parts" in (said := capsys.readouterr().err)
    assert said.endswith("where its bytes go: transformer, vae.\n")
    assert main(["convert", str(tmp_path / "published"), str(tmp_path / "packed")]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "packed")]) == 0
    printed = capsys.readouterr().out
    assert "Flux2KleinPipeline" in printed
    assert "scale_granularity=32" in printed
    fake_hub.upload_folder("user/flux2", tmp_path / "packed")
    assert main(["info", "user/flux2"]) == 0
    assert capsys.readouterr().out == printed
    assert not any(path.startswith("vae/diffusion") for path, _ in fake_hub.downloads)


@pytest.mark.parametrize("activation_bits", [None, 8])
@pytest.mark.parametrize("weight_format", ["packed", "float"])
def test_info_says_which_kernel_computes_the_layers(tmp_path, capsys, tiny_model, weight_format, activation_bits):
    model = tiny_model(weight_format, activation_bits=activation_bits)
    model.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path), "--kernels"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    rows = [re.split("  +", row) for row in rows if row.startswith("cpu")]
    assert re.split("  +", header) == ["device", "dtype", "layers", "kernel", "inputs", "why"]
    expected = Counter()
    for dtype in DTYPES:
        for layer in model.ternary_layers().values():
            kernel, bits, reason = choose_kernel(
                torch.device("cpu"),
                getattr(torch, dtype),
                layer.out_features,
                layer.in_features,
                packed=weight_format == "packed",
                trained_bits=activation_bits,
            )
            rounded = bits or activation_bits
            expected[dtype, kernel, f"{rounded}-bit" if rounded else "not rounded", reason] += 1
    assert {(dtype, *shown): int(layers) for _, dtype, layers, *shown in rows} == expected


def test_info_of_configs_that_leave_out_defaults(tmp_path, capsys):
    shutil.copytree(bundled(), tmp_path / "pipe")
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"):
        path = tmp_path / "pipe" / name
        config = json.loads(path.read_text())
        kept = {"num_classes", "num_layers", "scheduler", "transformer", "sample_size", "in_channels", "weight_format"}
        kept |= {"num_attention_heads", "attention_head_dim", "_class_name"}
        path.write_text(json.dumps({key: value for key, value in config.items() if key in kept}))
    assert main(["info", "digits"]) == 0
    whole = capsys.readouterr().out.replace(", with names (--labels)", "")
    assert main(["info", str(tmp_path / "pipe")]) == 0
    assert capsys.readouterr().out == whole


@pytest.mark.parametrize("flag", [None, "--labels"])
def test_info_of_edited_configs_works_or_names_the_file(flag, tmp_path, capsys):
    """Every key of every file is left out, or has values of other types."""
    folder = shutil.copytree(bundled(), tmp_path / "pipe")
    absent, counts = object(), Counter()
    for path in (
        folder / "model_index.json",
        folder / "scheduler/scheduler_config.json",
        folder / "transformer/config.json",
    ):
        config = json.loads(path.read_text())
        for key in config:
            for value in (absent, None, -1, "x", {"9" * 5000: "x"}):
                changed = {**config, key: value}
                path.write_text(json.dumps({k: v for k, v in changed.items() if v is not absent}))
                code, error = main(["info", str(folder), *([flag] if flag else [])]), capsys.readouterr().err
                counts[code] += 1
                assert code == 0 or error.startswith(f"terdit: {folder}"), (key, value, error)
        path.write_text(json.dumps(config))
    assert counts[0] > 20
    assert counts[1] > 20


def test_names_in_files_cannot_steer_a_terminal(tmp_path, capsys):
    path = shutil.copytree(bundled(), tmp_path / "pipe") / "model_index.json"
    labels = {"0": "\x1b]0;title\x07", "1": "one\n    2  forged", "2": "\u202etwo", "10": "caf\u00e9", "3": "\x1b["}
    path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": labels}))
    assert main(["info", str(tmp_path / "pipe"), "--labels"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        r"    0  \x1b]0;title\x07",
        r"    1  one\n    2  forged",
        r"    2  \u202etwo",
        r"    3  \x1b[",
        "   10  caf\u00e9",
    ]
    assert main(["info", str(tmp_path / "\x1b[2J")]) == 1
    assert "\x1b" not in capsys.readouterr().err


def test_info_prints_labels(capsys):
    assert main(["info", "digits", "--labels"]) == 0
    assert capsys.readouterr().out.splitlines()[3] == "    3  three"


def test_push_uploads_the_files_as_they_are(fake_hub, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    shutil.copytree(bundled(), tmp_path / "mine")
    (tmp_path / "mine" / "checkpoint-5").mkdir()
    (tmp_path / "mine" / "checkpoint-5" / "model.safetensors").write_bytes(b"not for others")
    (tmp_path / "mine" / "samples").mkdir()
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / "mine" / "samples" / "last.png")
    with open(tmp_path / "mine" / "README.md", "a") as card:
        card.write("\n![samples](samples/last.png)\n![elsewhere](https://example.org/x.png)\n![out](../secret.png)\n")
    (tmp_path / "secret.png").write_bytes(b"")
    options = ["--private", "--commit_message", "First", "--images", str(tmp_path / "mine" / "samples" / "last.png")]
    assert main(["push", str(tmp_path / "mine"), "user/new", *options]) == 0
    printed = capsys.readouterr()
    assert f"to {fake_hub.url}/user/new/commit/" in printed.out
    assert fake_hub.token not in printed.out + printed.err
    repo = fake_hub.repos["user/new"]
    files = repo.files()
    assert repo.private
    assert repo.commits[repo.sha()][0] == "First"
    whole = {path.relative_to(bundled()).as_posix(): path.read_bytes() for path in bundled().glob("*/*")}
    assert {name: files[name] for name in whole} == whole
    others = set(files) - set(whole) - {".gitattributes"}
    assert others == {"README.md", "model_index.json", "samples/last.png", "card_images/00.png"}
    # The text of the folder's own card is there, too.
    assert (bundled() / "README.md").read_text("utf-8").split("---\n")[2].strip().split("\n")[0] in files[
        "README.md"
    ].decode()
    again = TerDiTPipeline.from_pretrained("user/new").transformer.state_dict()
    pipe = TerDiTPipeline.from_pretrained(bundled()).transformer.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in pipe.items())


def test_push_to_a_branch_and_as_a_pull_request(fake_hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    assert main(["push", "digits", "user/new", "--revision", "v2", "--license", "mit"]) == 0
    assert "license: mit" in fake_hub.repos["user/new"].files("v2")["README.md"].decode()
    assert "model_index.json" not in fake_hub.repos["user/new"].files("main")
    capsys.readouterr()
    assert main(["push", "emoji", "user/new", "--create_pr"]) == 0
    assert "discussions/1" in capsys.readouterr().out
    assert "model_index.json" not in fake_hub.repos["user/new"].files("main")
    assert main(["push", "user/new", "user/newer"]) == 1


COMMANDS = ("generate", "info", "push", "convert", "export", "pack", "env")


def test_an_unknown_option_is_an_error_of_its_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--guidance-scale", "1", "--sede", "2"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("terdit generate: unrecognized arguments: --sede")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_no_default_that_says_nothing(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert not re.search(r"default: (None|False|\[\])", capsys.readouterr().out)


def flags_of(command, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    return set(re.findall(r"--\w+", capsys.readouterr().out)) - {"--help"}


def test_the_page_of_commands_names_every_flag_and_no_other(capsys):
    sections = re.split(r"^## ", (ROOT / "docs" / "command_line.md").read_text("utf-8"), flags=re.MULTILINE)
    sections = {section.split("`")[1].split()[-1]: section for section in sections if section.startswith("`terdit ")}
    assert sections.keys() == set(COMMANDS)
    for command, section in sections.items():
        assert set(re.findall(r"--\w+", section)) == flags_of(command, capsys)


def test_the_page_of_commands_shows_what_they_print(capsys, tmp_path, monkeypatch):
    """Every command parses; those that need no other files run here, and print this but for the time they took."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "command_line.md").read_text("utf-8")
    ran = 0
    for block in re.findall(r"^```console\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        for shown in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = shown.partition("\n")
            arguments = shlex.split(command)
            assert arguments.pop(0) == "terdit"
            build_parser().parse_args(arguments)
            if arguments[0] not in ("generate", "info", "pack") or "/" in command:
                continue
            code, printed = main(arguments), capsys.readouterr()
            expected = printed.out if code == 0 else printed.err.splitlines()[-1] + "\n"
            expected, output = (re.sub(r"\d+\.\d s\.", "N s.", text) for text in (expected, output))
            # "..." stands for lines that were left out.
            pattern = re.escape(output.rstrip("\n")).replace(re.escape("\n..."), "(\n.*)*")
            assert re.fullmatch(pattern, expected.rstrip("\n")), command
            ran += 1
    assert ran >= 6


def test_sizes_are_written_for_people():
    assert [human_bytes(n) for n in (5, 134_752, 1_057_000_000)] == ["5 bytes", "134.8 kB", "1.06 GB"]


def test_generate_takes_an_adapter_with_the_classes_that_it_was_taught(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from peft import LoraConfig

    pipe = TerDiTPipeline.from_pretrained(bundled("digits"))
    pipe.transformer.add_classes(1)
    pipe.register_to_config(id2label={**pipe.config.id2label, "10": "ten"})
    rows = {"class_embed": [10]}
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], trainable_token_indices=rows))
    pipe.save_lora_weights(tmp_path / "lora")
    monkeypatch.chdir(tmp_path)
    flags = ["--num_inference_steps", "2", "--output", "ten.png"]
    assert main(["generate", "digits", "--labels", "ten", *flags]) == 1
    assert main(["generate", "digits", "--lora", "lora", "--labels", "ten", *flags]) == 0
    assert Path("ten.png").is_file()
    assert main(["generate", "digits", "--lora", "nowhere", "--labels", "ten", *flags]) == 1

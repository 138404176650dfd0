"""The `terdit` command does what it prints."""

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.cli import build_parser, human_bytes, main
from diffusers_terdit.ops import has_integer_kernel


PACKED = Path(__file__).parent / "data" / "reference" / "tiny-qknorm-packed"


def test_generate_writes_a_labelled_grid_and_says_so(tmp_path, capsys):
    output = tmp_path / "new" / "grid.png"
    arguments = ["--labels", "3", "seven", "--num_images_per_label", "3", "--num_inference_steps", "2"]
    assert main(["generate", "digits", *arguments, "--output", str(output)]) == 0
    with PIL.Image.open(output) as grid:
        assert grid.width >= 2 * 64
        assert grid.height >= 3 * 64
    printed = capsys.readouterr().out
    assert all(part in printed for part in ("6 images of 8 x 8 pixels", "2 steps of DDPMScheduler", str(output)))


def test_generate_is_a_function_of_the_seed(tmp_path):
    def run(name, seed):
        main(
            [
                "generate",
                "--labels",
                "5",
                "--num_inference_steps",
                "2",
                "--seed",
                seed,
                "--output",
                str(tmp_path / name),
            ]
        )
        return (tmp_path / name).read_bytes()

    assert run("a.png", "1") == run("b.png", "1") != run("c.png", "2")


def test_generate_takes_another_scheduler_and_dtype(tmp_path, capsys):
    arguments = ["--scheduler", "DPMSolverMultistepScheduler", "--dtype", "bfloat16", "--num_inference_steps", "3"]
    assert main(["generate", *arguments, "--labels", "1", "--output", str(tmp_path / "x.png")]) == 0
    assert "DPMSolverMultistepScheduler" in capsys.readouterr().out


@pytest.mark.skipif(not has_integer_kernel("cpu"), reason="no AVX2 or no numba")
def test_generate_with_integer_activations(tmp_path, capsys):
    pictures = {}
    for bits in (None, 16, 8):
        arguments = ["--labels", "5", "--num_inference_steps", "3", "--output", str(tmp_path / f"{bits}.png")]
        assert main(["generate", *arguments, *(["--activation_bits", str(bits)] if bits else [])]) == 0
        assert (f"{bits}-bit activations" in capsys.readouterr().out) == (bits is not None)
        with PIL.Image.open(tmp_path / f"{bits}.png") as picture:
            pictures[bits] = torch.from_numpy(np.asarray(picture.convert("L")).astype("float32"))
    assert (pictures[16] - pictures[None]).abs().max() <= 1
    assert 0 < (pictures[8] - pictures[None]).abs().max() <= 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--labels", "eleven"], "'eleven' is not a label"),
        (["generate", "--labels", "10"], "out of range"),
        (["generate", "--num_inference_steps", "0"], "`num_inference_steps` must be a positive int"),
        (["generate", "--guidance_scale", "nan"], "must be finite"),
        (["generate", "--scheduler", "Nothing"], "no scheduler 'Nothing'"),
        (["generate", "nothing"], "No bundled checkpoint 'nothing'; there are 'digits', 'emoji'"),
        (["generate", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["info", "/no/such/folder"], "/no/such/folder is not a folder"),
        (["convert", "/no/such/folder", "out"], "/no/such/folder is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("terdit: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("weight_format", ["packed", "float"])
def test_info_counts_weights_not_bytes(tmp_path, capsys, weight_format):
    pipe = TerDiTPipeline.from_pretrained(bundled())
    expected = sum(layer.in_features * layer.out_features for layer in pipe.transformer.ternary_layers().values())
    total = sum(p.numel() for p in pipe.transformer.unpack().parameters())
    if weight_format == "packed":
        pipe.transformer.pack()
    pipe.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"ternary +{expected:,} in", printed)
    assert re.search(rf"^weights +{total:,}$", printed, re.MULTILINE)


def test_info_and_generate_take_a_hub_id(fake_hub, tmp_path, capsys):
    fake_hub.upload_folder("user/digits", bundled())
    assert main(["info", "user/digits"]) == 0
    assert "233,472 in 24 layers" in capsys.readouterr().out
    arguments = ["--labels", "1", "--num_inference_steps", "2", "--output", str(tmp_path / "one.png")]
    assert main(["generate", "user/digits", *arguments]) == 0
    assert main(["info", "user/nothing"]) == 1
    assert "user/nothing" in capsys.readouterr().err


def test_every_command_explains_itself(capsys):
    for command in ("generate", "convert", "info", "pack"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command, "--help"])
        assert stop.value.code == 0
        assert command in capsys.readouterr().out


def test_sizes_are_written_for_people():
    assert [human_bytes(n) for n in (5, 134_752, 1_057_000_000)] == ["5 bytes", "134.8 kB", "1.06 GB"]

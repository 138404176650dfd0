import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.checkpoints import bundled


ROOT = Path(__file__).parents[2]

pytest.importorskip("sklearn")
pytest.importorskip("peft")
sys.path.insert(0, str(ROOT / "examples"))
import train_lora  # noqa: E402


TINY = ["--rank", "2", "--max_train_steps", "4", "--train_batch_size", "4", "--num_inference_steps", "2"]


def run(folder, *flags):
    train_lora.main([*flags, *TINY, "--output_dir", str(folder)])
    return json.loads((folder / "report.json").read_text())


def snippet(folder):
    """What the card's Python leaves behind."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(code.replace("guidance_scale", "num_inference_steps=2, guidance_scale"), namespace)
    return namespace


def write_images(folder, names, size=8):
    generator = torch.Generator().manual_seed(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = torch.randint(0, 256, (size, size), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    run(folder, "--demo")
    return folder


class TestDemo:
    def test_card_loads_the_adapter_and_draws_the_new_class(self, folder):
        found = snippet(folder)
        pipe = found["pipe"]
        assert pipe.labels["mirrored three"] == 10
        assert pipe.transformer.config.num_classes == 11
        assert pipe.transformer.config.weight_format == "packed"
        assert len(found["images"]) == 1

    def test_base_stays_as_it_was(self, folder):
        before = TerDiTPipeline.from_pretrained(bundled("digits")).transformer.state_dict()
        after = snippet(folder)["pipe"].transformer.state_dict()
        after = {name.replace(".base_layer", ""): tensor for name, tensor in after.items()}
        for name, tensor in before.items():
            if name.startswith("transformer_blocks"):
                assert torch.equal(after[name], tensor), name

    def test_adapter_holds_two_matrices_per_ternary_layer_and_one_row(self, folder):
        tensors = load_file(folder / "pytorch_lora_weights.safetensors")
        rows = [tensor for name, tensor in tensors.items() if "class_embed" in name]
        assert [tuple(row.shape) for row in rows] == [(1, 64)]
        assert len(tensors) == 2 * 8 * 3 + 1
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}

    def test_report_and_pictures(self, folder):
        report = json.loads((folder / "report.json").read_text())
        assert report["before"] == report["after, adapter disabled"]
        assert report["loss"] > 0
        for name in ("before.png", "after.png"):
            with Image.open(folder / name) as made, Image.open(ROOT / "docs" / "images" / f"lora-{name}") as shown:
                assert made.size == shown.size

    def test_two_runs_end_in_the_same_bits(self, folder, tmp_path):
        run(tmp_path, "--demo")
        one, two = (load_file(path / "pytorch_lora_weights.safetensors") for path in (folder, tmp_path))
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


class TestFolders:
    def test_known_names_keep_their_label_and_others_become_classes(self, tmp_path):
        write_images(tmp_path / "data", ["ant", "seven", "zebra"])
        pipe = TerDiTPipeline.from_pretrained(bundled("digits"))
        args = train_lora.parse_args(["--train_data_dir", str(tmp_path / "data")])
        samples = train_lora.open_samples(args, pipe)
        assert samples.id2label == {10: "ant", 7: "seven", 11: "zebra"}
        assert sorted(samples.labels) == [7] * 3 + [10] * 3 + [11] * 3

    def test_a_new_look_of_an_old_class_needs_no_new_row(self, tmp_path):
        write_images(tmp_path / "data", ["seven"])
        run(tmp_path / "out", "--train_data_dir", str(tmp_path / "data"), "--gradient_checkpointing")
        assert "add_classes" not in (tmp_path / "out" / "README.md").read_text()
        assert snippet(tmp_path / "out")["pipe"].transformer.config.num_classes == 10
        assert not any("class_embed" in n for n in load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"))

    def test_new_classes_of_a_flow_model(self, tmp_path):
        write_images(tmp_path / "data", ["ghost", "a new face"], size=32)
        report = run(tmp_path / "out", "--model", "emoji", "--train_data_dir", str(tmp_path / "data"))
        assert report["loss"] > 0
        assert snippet(tmp_path / "out")["pipe"].labels["a new face"] == 130

    def test_pictures_of_a_latent_model_pass_its_vae(self, tiny_pipeline, tmp_path):
        tiny_pipeline(True, weight_format="packed").save_pretrained(tmp_path / "model")
        write_images(tmp_path / "data", ["two", "twelve"], size=16)
        flags = ("--model", str(tmp_path / "model"), "--train_data_dir", str(tmp_path / "data"))
        assert run(tmp_path / "out", *flags)["loss"] > 0
        pipe = snippet(tmp_path / "out")["pipe"]
        assert (pipe.labels["two"], pipe.labels["twelve"]) == (2, 10)


class TestMemory:
    @pytest.mark.parametrize("weights", train_lora.MEMORY)
    def test_every_row_can_be_measured(self, monkeypatch, capsys, weights):
        digits = {
            "sample_size": 8,
            "num_layers": 1,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_classes": 3,
        }
        preset = train_lora.TerDiTTransformer2DModel.from_preset
        small = {**digits, "ffn_dim": 32}
        monkeypatch.setattr(
            train_lora.TerDiTTransformer2DModel,
            "from_preset",
            lambda name, **options: preset(name, **small, **options),
        )
        train_lora.main(["--memory", weights])
        assert float(capsys.readouterr().out) > 0.1

    @pytest.mark.slow
    def test_packed_weights_take_a_fraction_of_the_memory(self):
        table = train_lora.memory_table("terdit-600m-256")
        peaks = {name: float(peak) for name, peak in re.findall(r"^\| (.+?) \| ([\d.]+) \|$", table, re.MULTILINE)}
        base = peaks.pop("none: the imports alone")
        assert peaks["packed float32"] - base < 0.3 * (peaks["float float32"] - base)
        assert peaks["packed bfloat16"] - base < 0.6 * (peaks["dense bfloat16"] - base)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--demo, --train_data_dir, --memory"),
        (["--demo", "--train_data_dir", "x"], "pass one of"),
        (["--memory", "packed int8"], "knows"),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, message):
    with pytest.raises(SystemExit):
        train_lora.main(flags)
    assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="step"):
        run(tmp_path, "--demo", "--learning_rate", "1e30")


@pytest.mark.slow
def test_the_demo_learns_its_class_and_keeps_the_others(tmp_path):
    train_lora.main(["--demo", "--output_dir", str(tmp_path)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"]["new"] < 0.3
    assert report["after"]["new"] > 0.9
    assert report["after"]["old"] > 0.95

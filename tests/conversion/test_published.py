"""Ternary models of diffusers' classes that were published as dense tensors: packed without loss, or refused."""

import json
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel, Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file

from diffusers_terdit.cli import main
from diffusers_terdit.conversion import convert_ternary_checkpoint
from tiny import make_ternary, ternary_layers
from tiny_flux2 import tiny_flux2_pipeline


FILE = "diffusion_pytorch_model.safetensors"
BIAS = "pos_embed.proj.bias"
SETTINGS = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}
ENCODER = {"text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 16}


def picture(folder):
    pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe(prompt="a cat", generator=torch.Generator().manual_seed(0), **SETTINGS, **ENCODER).images


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def size(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class TestPipeline:
    @pytest.fixture
    def published(self, tmp_path):
        """A pipeline folder as published: dense float16 weights that are ternary in groups of 32."""
        pipe = tiny_flux2_pipeline()
        make_ternary(pipe.transformer.float(), 32).half()
        pipe.save_pretrained(tmp_path / "published", max_shard_size="100kB")
        return tmp_path / "published"

    def test_it_draws_the_same_also_without_its_text_encoder(self, published, tmp_path):
        convert_ternary_checkpoint(published, tmp_path / "packed", max_shard_size=50_000)
        assert len(list((tmp_path / "packed" / "transformer").glob("*.safetensors"))) > 1
        assert not list(tmp_path.glob("*.partial"))
        _, expected = picture(published)
        packed, found = picture(tmp_path / "packed")
        assert len(ternary_layers(packed.transformer)) == 12 + 2 * 2
        assert packed.transformer.config.quantization_config.scale_granularity == 32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert size(tmp_path / "packed" / "transformer") < 0.5 * size(published / "transformer")
        embeds, _ = packed.encode_prompt("a cat", **ENCODER)
        packed.text_encoder = None
        images = packed(prompt_embeds=embeds, generator=torch.Generator().manual_seed(0), **SETTINGS).images
        assert torch.equal(images, found)

    def test_the_command_line(self, published, tmp_path, capsys):
        assert main(["convert", str(published), str(tmp_path / "packed")]) == 0
        assert "one scale per 32 inputs" in capsys.readouterr().out
        assert main(["convert", str(published), str(tmp_path / "other"), "--scale_granularity", "16"]) == 0
        model = Flux2Transformer2DModel.from_pretrained(tmp_path / "other" / "transformer")
        assert {layer.scale_granularity for layer in ternary_layers(model).values()} == {16}

    def test_export_is_import(self, published, tmp_path):
        folder = convert_ternary_checkpoint(published, tmp_path / "first") / "transformer"
        model = Flux2Transformer2DModel.from_pretrained(folder)
        model.dequantize().half().save_pretrained(tmp_path / "dense")
        again = convert_ternary_checkpoint(tmp_path / "dense", tmp_path / "second", scale_granularity=32)
        first, second = (load_file(path / FILE) for path in (folder, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_what_is_not_ternary_or_not_finite_is_refused_and_nothing_is_left(self, published, tmp_path):
        name = "single_transformer_blocks.1.attn.to_out.weight"
        index = json.loads((published / "transformer" / f"{FILE}.index.json").read_text())["weight_map"]
        file = published / "transformer" / index[name]
        for value, message in ((0.25, rf"{name} is not ternary: row 5, group 1"), (float("nan"), "NaN or infinity")):
            change_tensors(file, lambda tensors, value=value: tensors[name][5, 40:41].fill_(value))
            with pytest.raises(ValueError, match=message) as error:
                convert_ternary_checkpoint(published, tmp_path / "packed")
            assert value == 0.25 or file.name in str(error.value)
            assert not (tmp_path / "packed").exists()
            assert not list(tmp_path.glob("*.partial"))

    @pytest.mark.parametrize(
        "name", ["tokenizer/vocab.json", "tokenizer", "scheduler/scheduler_config.json", "README.md"]
    )
    def test_nothing_is_copied_through_a_link(self, published, tmp_path, name):
        (tmp_path / "private").mkdir()
        (tmp_path / "private" / "vocab.json").write_text("secret")
        path = published / name
        path.rename(tmp_path / "away") if path.exists() else None
        path.symlink_to(tmp_path / "private" if name == "tokenizer" else tmp_path / "private" / "vocab.json")
        with pytest.raises(OSError, match=f"{name} is a link"):
            convert_ternary_checkpoint(published, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()

    def test_what_belongs_to_no_component_stays(self, published, tmp_path):
        (published / "notes.txt").symlink_to("/etc/passwd")
        (published / ".git").mkdir()
        (published / ".git" / "config").write_text("token")
        (published / "LICENSE").write_text("free")
        (published / "tokenizer" / ".ipynb_checkpoints").mkdir()
        (published / "tokenizer" / ".env").write_text("token")
        convert_ternary_checkpoint(published, tmp_path / "packed")
        found = {path.name for path in (tmp_path / "packed").iterdir()}
        parts = {path.name for path in published.iterdir()}
        assert found == parts - {"notes.txt", ".git"}
        assert "tokenizer" in found
        assert not list((tmp_path / "packed" / "tokenizer").glob(".*"))

    def test_an_output_that_is_not_empty_is_kept(self, published, tmp_path):
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed" / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError):
            convert_ternary_checkpoint(published, tmp_path / "packed")
        assert (tmp_path / "packed" / "thesis.txt").read_text() == "years of work"


class TestModel:
    @pytest.fixture
    def dense(self, tmp_path):
        """A folder of diffusers' DiT whose weights are ternary per matrix."""
        model = DiTTransformer2DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8,
            num_embeds_ada_norm=10, norm_type="ada_norm_zero",
        )  # fmt: skip
        make_ternary(model, "tensor").save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    def test_the_granularity_is_found(self, dense, tmp_path):
        packed = DiTTransformer2DModel.from_pretrained(convert_ternary_checkpoint(dense, tmp_path / "packed"))
        for name, layer in ternary_layers(packed).items():
            assert layer.scale_granularity == "tensor"
            assert torch.equal(layer.dequantize(), load_file(dense / FILE)[f"{name}.weight"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.update({BIAS: torch.ones(3)}), "`pos_embed.proj.bias` is .3., torch.float32"),
            (lambda t: t.update({BIAS: t[BIAS].long()}), "torch.int64"),
            (lambda t: t.pop(BIAS), "has no pos_embed.proj.bias"),
            (lambda t: t.update({"a.weight_packed": torch.zeros(1)}), "holds ternary layers already"),
        ],
    )
    def test_tensors_that_do_not_fit_the_config_are_refused(self, dense, tmp_path, change, message):
        change_tensors(dense / FILE, change)
        with pytest.raises(ValueError, match=message) as error:
            convert_ternary_checkpoint(dense, tmp_path / "packed")
        assert str(tmp_path) in str(error.value)
        assert not (tmp_path / "packed").exists()

    def test_a_digest_is_checked(self, dense, tmp_path):
        save_file(load_file(dense / FILE), dense / FILE, metadata={"format": "pt", "terdit.sha256": "0" * 64})
        with pytest.raises(ValueError, match=rf"{FILE}: .* do not match the digest"):
            convert_ternary_checkpoint(dense, tmp_path / "packed")

    def test_a_config_of_a_petabyte_or_other_types_is_refused_before_anything_is_allocated(self, dense, tmp_path):
        path = dense / "config.json"
        config = json.loads(path.read_text())
        for change in (
            *({"num_layers": 10**9}, {"attention_head_dim": 2**40}, {"sample_size": 2**30}),
            *({"num_layers": "a"}, {"num_layers": None}),
        ):
            path.write_text(json.dumps(config | change))
            with pytest.raises(ValueError, match=re.escape(str(dense))):
                convert_ternary_checkpoint(dense, tmp_path / "packed")

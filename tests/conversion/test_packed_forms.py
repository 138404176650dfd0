"""Ternary models as MLX and gemlite store them: the dense model bit for bit, or refused by layer and group."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file

from diffusers_terdit.cli import main
from diffusers_terdit.conversion import convert_ternary_checkpoint, gemlite, mlx
from diffusers_terdit.ops import dequantize
from published_forms import EXTRA, FILE, GROUP, in_gemlite, in_mlx, write
from tiny import make_ternary, ternary_layers
from tiny_flux2 import tiny_flux2_pipeline


FORMS_DATA = Path(__file__).parents[1] / "data" / "forms"
LAYER = "single_transformer_blocks.1.attn.to_out"
FORMS = {
    "mlx": ("transformer-packed-mflux", in_mlx, torch.bfloat16, FILE),
    "gemlite": ("transformer-gemlite-int2", in_gemlite, torch.float16, "state_dict.pt"),
}


@pytest.fixture
def dense(tmp_path):
    """A pipeline whose transformer is ternary in groups; its values are those that bfloat16 and float16 hold."""
    pipe = tiny_flux2_pipeline()
    for parameter in pipe.transformer.parameters():
        parameter.data = parameter.data.half().bfloat16().float()
    make_ternary(pipe.transformer, GROUP, torch.bfloat16)
    pipe.save_pretrained(tmp_path / "dense")
    return pipe


@pytest.fixture(params=FORMS)
def published(request, dense, tmp_path):
    """A repository without a model_index.json, as published, and its model's folder."""
    name, pack, dtype, file = FORMS[request.param]
    folder = write(tmp_path / "published" / name, dense.transformer, pack, dtype, file)
    (tmp_path / "published" / "text_encoder-mlx-4bit").mkdir()
    (tmp_path / "published" / "LICENSE").write_text("free")
    return folder


def edit(folder, change):
    """Change the tensors of a published model."""
    if (folder / FILE).is_file():
        tensors = load_file(folder / FILE)
        change(tensors)
        save_file(tensors, folder / FILE)
    else:
        tensors = torch.load(folder / "state_dict.pt")
        change(tensors)
        torch.save(tensors, folder / "state_dict.pt")


def set_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def inputs(model):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(1, 16, model.config.in_channels, generator=generator)
    text = torch.randn(1, 4, model.config.joint_attention_dim, generator=generator)
    return {
        "hidden_states": noise, "encoder_hidden_states": text, "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(1, 16, 4), "txt_ids": torch.zeros(1, 4, 4), "return_dict": False,
    }  # fmt: skip


class TestFilesOfTheLibraries:
    """Layers written by MLX 0.32.4 and gemlite 0.6.0.post2 themselves, with what they stand for."""

    @pytest.mark.parametrize("layer", ["groups_of_32", "groups_of_64"])
    def test_mlx(self, layer):
        tensors = load_file(FORMS_DATA / "mlx.safetensors")
        parts = {key: tensors[f"{layer}.{key}"] for key in mlx.TENSORS}
        found = dequantize(*mlx.decode(parts, layer))
        assert torch.equal(found, tensors[f"{layer}.dense"].float())

    @pytest.mark.parametrize("layer", ["groups", "words", "shifted", "one_zero", "rows"])
    def test_gemlite(self, layer):
        tensors = torch.load(FORMS_DATA / "gemlite.pt")
        parts = {key: tensors[f"{layer}.{key}"] for key in gemlite.TENSORS}
        ternary, scale = gemlite.decode(parts, layer)
        assert torch.equal(ternary + 1, tensors[f"{layer}.codes"].to(torch.int8))
        assert torch.equal(scale, tensors[f"{layer}.scale"].float())


class TestModel:
    def test_the_forward_is_that_of_the_dense_model(self, dense, published, tmp_path):
        folder = convert_ternary_checkpoint(published.parent, tmp_path / "packed")
        model = Flux2Transformer2DModel.from_pretrained(folder)
        layers = ternary_layers(model)
        assert len(layers) == 12 + 2 * 2
        for name, layer in layers.items():
            assert layer.scale_granularity == GROUP
            assert torch.equal(layer.dequantize(), dense.transformer.get_submodule(name).weight)
        with torch.no_grad():
            found, expected = (module(**inputs(module))[0] for module in (model, dense.transformer))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert (folder / "LICENSE").read_text() == "free"
        assert EXTRA.keys().isdisjoint(json.loads((folder / "config.json").read_text()))

    def test_all_forms_give_the_same_bytes_also_through_the_dense_one(self, dense, published, tmp_path):
        first = convert_ternary_checkpoint(published, tmp_path / "first")
        again = convert_ternary_checkpoint(tmp_path / "dense", tmp_path / "second", scale_granularity=GROUP)
        model = Flux2Transformer2DModel.from_pretrained(first)
        model.dequantize().save_pretrained(tmp_path / "third")
        third = convert_ternary_checkpoint(tmp_path / "third", tmp_path / "fourth", scale_granularity=GROUP)
        tensors = [load_file(folder / FILE) for folder in (first, again / "transformer", third)]
        packed = [{name: t for name, t in found.items() if ".weight_" in name} for found in tensors]
        assert len(packed[0]) == 2 * 16
        for other in packed[1:]:
            assert packed[0].keys() == other.keys()
            assert all(torch.equal(packed[0][name], other[name]) for name in other)

    @pytest.mark.parametrize(("bits", "zeros"), [(8, "each"), (8, "added"), (32, "one"), (32, "each")])
    def test_gemlite_in_its_other_layouts(self, dense, tmp_path, bits, zeros):
        def pack(codes, scale):
            return in_gemlite(codes, scale, bits, zeros)

        folder = write(tmp_path / "transformer-gemlite", dense.transformer, pack, torch.float32, "state_dict.pt")
        model = Flux2Transformer2DModel.from_pretrained(convert_ternary_checkpoint(folder, tmp_path / "packed"))
        layer = model.get_submodule(LAYER)
        assert torch.equal(layer.dequantize(), dense.transformer.get_submodule(LAYER).weight)

    def test_a_layer_outside_the_blocks_that_is_packed(self, dense, tmp_path):
        """The saved config names the layers where they are not those that would be chosen."""
        folder = write(tmp_path / "transformer-mlx", dense.transformer, in_mlx, torch.float32)

        def unpack(tensors):
            for key in ("weight", "scales", "biases"):
                tensors.pop(f"{LAYER}.{key}")
            tensors[f"{LAYER}.weight"] = dense.transformer.get_submodule(LAYER).weight.data

        edit(folder, unpack)
        model = Flux2Transformer2DModel.from_pretrained(convert_ternary_checkpoint(folder, tmp_path / "packed"))
        assert LAYER not in ternary_layers(model)
        assert len(ternary_layers(model)) == 15


class TestRefused:
    def refuses(self, published, tmp_path, *parts, error=ValueError):
        with pytest.raises(error) as raised:
            convert_ternary_checkpoint(published, tmp_path / "packed")
        assert all(part in str(raised.value) for part in (str(published), *parts)), raised.value
        assert not (tmp_path / "packed").exists()
        assert not list(tmp_path.glob("*.partial"))

    def test_code_3_by_layer_and_group(self, published, tmp_path):
        def change(tensors):
            if f"{LAYER}.W_q" in tensors:
                tensors[f"{LAYER}.W_q"][9, 5] |= 3  # inputs 36 to 39: group 1
            else:
                tensors[f"{LAYER}.weight"].view(torch.uint8)[5, 9] |= 3

        edit(published, change)
        self.refuses(published, tmp_path, f"{LAYER} is not ternary", "row 5, group 1 holds code 3")

    def test_a_group_with_another_middle(self, published, tmp_path):
        def change(tensors):
            if f"{LAYER}.W_q" in tensors:
                zeros = torch.ones_like(tensors[f"{LAYER}.scales"])
                zeros[1, 5] = 2
                tensors[f"{LAYER}.zeros"] = zeros
            else:
                tensors[f"{LAYER}.biases"][5, 1] *= 2

        edit(published, change)
        self.refuses(published, tmp_path, f"{LAYER} is not ternary", "row 5, group 1 holds values that are not -scale")

    def test_four_bits(self, published, tmp_path):
        set_json(published / "quantization_config.json", bits=4)
        self.refuses(published, tmp_path, "4 bits per weight", "Take the ternary repository.")

    @pytest.mark.parametrize("file", ["config.json", "quantization_config.json"])
    def test_a_transform_that_is_not_known(self, published, tmp_path, file):
        set_json(published / file, rotation="hadamard")
        self.refuses(published, tmp_path, "rotation='hadamard'", "which")

    def test_another_group_in_one_layer(self, published, tmp_path):
        def change(tensors):
            for key in ("scales", "biases"):
                if f"{LAYER}.{key}" in tensors:
                    dim = 0 if f"{LAYER}.W_q" in tensors else 1
                    tensors[f"{LAYER}.{key}"] = tensors[f"{LAYER}.{key}"].repeat_interleave(2, dim)

        edit(published, change)
        self.refuses(published, tmp_path, LAYER, "[64, 16] scales", "[64, 8]", "Download both again.")

    def test_a_tensor_that_is_missing_too_many_or_of_another_shape(self, published, tmp_path):
        for change, message in (
            (lambda t: t.pop(f"{LAYER}.scales"), "has no `scales`"),
            (lambda t: t.pop("proj_out.weight"), "has no proj_out.weight"),
            (lambda t: t.update({"time_sign_embed.weight": torch.zeros(1)}), "such as time_sign_embed.weight"),
            (lambda t: t.update({"proj_out.weight": torch.zeros(3)}), "`proj_out.weight` is [3]"),
        ):
            copy = shutil.copytree(published, tmp_path / message.replace(" ", "-") / published.name)
            edit(copy, change)
            self.refuses(copy, tmp_path, message)

    def test_scales_for_no_inputs(self, published, tmp_path):
        def change(tensors):
            for key in ("scales", "biases", "zeros"):
                if f"{LAYER}.{key}" in tensors and tensors[f"{LAYER}.{key}"].dim() == 2:
                    tensors[f"{LAYER}.{key}"] = tensors[f"{LAYER}.{key}"].new_empty(
                        (0, 64) if f"{LAYER}.W_q" in tensors else (64, 0)
                    )

        edit(published, change)
        self.refuses(published, tmp_path, LAYER, "again")

    def test_damaged_and_truncated_files(self, published, tmp_path):
        file = next(path for path in published.iterdir() if path.suffix != ".json")
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
        self.refuses(published, tmp_path, error=OSError)
        file.write_bytes(b"")
        self.refuses(published, tmp_path, error=OSError)

    def test_no_code_from_a_file_runs(self, dense, tmp_path):
        class Attack:
            def __reduce__(self):
                return (exec, (f"open({str(tmp_path / 'canary')!r}, 'w')",))

        folder = write(tmp_path / "t", dense.transformer, in_gemlite, torch.float16, "state_dict.pt")
        edit(folder, lambda tensors: tensors.update({"x": Attack()}))
        self.refuses(folder, tmp_path, "nothing in it was run")
        assert not (tmp_path / "canary").exists()

    def test_settings_that_the_file_has_already(self, published, tmp_path):
        with pytest.raises(ValueError, match="Leave out `scale_granularity`"):
            convert_ternary_checkpoint(published, tmp_path / "packed", scale_granularity=GROUP)

    def test_several_models_of_one_repository(self, dense, published, tmp_path):
        write(published.parent / "transformer-other", dense.transformer, in_mlx, torch.float16)
        self.refuses(published.parent, tmp_path, published.name, "transformer-other", "as `component`")
        convert_ternary_checkpoint(published.parent, tmp_path / "packed", component="transformer-other")


class TestCommand:
    def test_the_model_alone_and_in_a_pipeline(self, dense, published, tmp_path, fake_hub, capsys):
        """Of the repository the model alone is downloaded; what belongs to it comes from where the user says."""
        fake_hub.upload_folder("prism-ml/bonsai", published.parent)
        fake_hub.upload_folder("prism-ml/unpacked", tmp_path / "dense")
        assert main(["convert", "prism-ml/bonsai", str(tmp_path / "alone")]) == 0
        out = capsys.readouterr().out
        assert "one scale per 32 inputs" in out
        assert "It is a Flux2Transformer2DModel alone." in out
        assert "text encoders in two-bit repositories are in other forms, which are not read" in out
        assert {name.split("/")[0] for name, _ in fake_hub.downloads} == {published.name, "LICENSE"}
        fake_hub.downloads.clear()
        assert main(["convert", "prism-ml/bonsai", str(tmp_path / "pipe"), "--pipeline", "prism-ml/unpacked"]) == 0
        assert not any(name.startswith("transformer/") for name, _ in fake_hub.downloads)
        pipe = Flux2KleinPipeline.from_pretrained(tmp_path / "pipe", dtype=torch.float32)
        assert len(ternary_layers(pipe.transformer)) == 16
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}
        settings |= {"text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 16, "prompt": "a cat"}
        for each in (pipe, dense):
            each.set_progress_bar_config(disable=True)
        found, expected = (
            each(generator=torch.Generator().manual_seed(0), **settings).images for each in (pipe, dense)
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def test_a_pipeline_of_another_class(self, published, tmp_path, tiny_pipeline, capsys):
        tiny_pipeline().save_pretrained(tmp_path / "other")
        assert main(["convert", str(published), str(tmp_path / "out"), "--pipeline", str(tmp_path / "other")]) == 1
        assert "Pass the pipeline that this model was made for." in capsys.readouterr().err

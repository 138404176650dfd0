"""`TernaryConfig` on diffusers' own models: ternarize, import, save, load, dequantize, and what is refused."""

import copy
import gc
import json
import pickle
import re
import shutil
import warnings
import weakref

import pytest
import torch
from diffusers import (
    AutoModel,
    DiffusionPipeline,
    DiTTransformer2DModel,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    PipelineQuantizationConfig,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_terdit import TerDiTTransformer2DModel, TernaryConfig, TernaryLinear
from diffusers_terdit.cli import main
from diffusers_terdit.conversion import convert_dense_checkpoint, swap_bitnet_order
from diffusers_terdit.ops import dequantize, pack_ternary, reference, unpack_ternary
from diffusers_terdit.quantization import pack, select_layers
from tiny_flux2 import tiny_flux2_pipeline


def dit():
    model = DiTTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    inputs = {"hidden_states": (2, 4, 8, 8)}
    return model, inputs, {"timestep": torch.tensor([10, 500]), "class_labels": torch.tensor([1, 2])}


def pixart():
    model = PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8,
        cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 24)}
    return model, inputs, {"timestep": torch.tensor([10, 500])}


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
    )  # fmt: skip
    inputs = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 16)}
    return model, inputs, {"timestep": torch.tensor([10.0, 500.0])}


def flux2():
    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8), timestep_guidance_channels=32,
    )  # fmt: skip
    ids = torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4, 1)])
    inputs = {"hidden_states": (1, 16, 16), "encoder_hidden_states": (1, 6, 64)}
    fixed = {"img_ids": ids, "txt_ids": torch.arange(24).reshape(6, 4), "timestep": torch.tensor([0.5])}
    return model, inputs, {**fixed, "guidance": torch.tensor([1.0])}


MODELS = {"DiT": dit, "PixArt": pixart, "SD3": sd3, "Flux2": flux2}
LAYERS = {"DiT": 2 * 9, "PixArt": 2 * 10, "SD3": 14 + 11, "Flux2": 12 + 2 * 2}  # linear layers of the blocks


TO_Q = "transformer_blocks.0.attn.to_q"
DIT_Q = "transformer_blocks.0.attn1.to_q"


def new(name, seed=0):
    """A model with random weights, none of them zero, and a function that runs it."""
    torch.manual_seed(seed)
    model, shapes, fixed = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.05)
    generator = torch.Generator().manual_seed(1)
    inputs = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()} | fixed

    def run(model):
        with torch.no_grad():
            return model.eval()(**inputs, return_dict=False)[0]

    return model.eval(), run


def make_ternary(model, granularity=16, dtype=torch.float16, include="blocks"):
    """Dense weights that are `scale * {-1, 0, +1}`, scales as `dtype` holds them."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and include in name:
                ternary = reference.round_to_ternary(module.weight, granularity)
                scale = reference.least_squares_scale(module.weight, ternary, granularity).to(dtype).float()
                module.weight.copy_(dequantize(ternary, scale))
    return model


def ternary_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_ternarize_while_loading_save_and_load(self, name, tmp_path):
        model, run = new(name)
        model.save_pretrained(tmp_path / "dense")
        config = TernaryConfig(scale_granularity="row")
        packed = type(model).from_pretrained(tmp_path / "dense", quantization_config=config)
        layers = ternary_layers(packed)
        assert len(layers) == LAYERS[name]
        assert all(layer.weight_format == "packed" and layer.scale_granularity == "row" for layer in layers.values())
        # the same as rounding each weight by hand
        for layer_name, layer in layers.items():
            weight = model.get_submodule(layer_name).weight.detach()
            ternary = reference.round_to_ternary(weight, "row")
            assert torch.equal(layer.ternary_weight(), ternary)
            assert torch.equal(layer.weight_scale, reference.least_squares_scale(weight, ternary, "row"))
        expected = run(packed)
        packed.save_pretrained(tmp_path / "packed")
        for again in (
            type(model).from_pretrained(tmp_path / "packed"),
            AutoModel.from_pretrained(str(tmp_path / "packed")),
        ):
            assert torch.equal(run(again), expected)

    @pytest.mark.parametrize("granularity", ["tensor", "row", 16])
    def test_import_is_exact(self, name, granularity, tmp_path):
        model, run = new(name)
        make_ternary(model, granularity)
        expected = run(model)
        model.save_pretrained(tmp_path)
        packed = type(model).from_pretrained(
            tmp_path, quantization_config=TernaryConfig(lossless=True, scale_granularity=granularity)
        )
        for layer_name, layer in ternary_layers(packed).items():
            assert torch.equal(layer.dequantize(), model.get_submodule(layer_name).weight)
        torch.testing.assert_close(run(packed), expected, rtol=1e-5, atol=1e-6)

    def test_dequantize_gives_the_dense_model_back(self, name, tmp_path):
        model, run = new(name)
        expected = run(make_ternary(model))
        before = copy.deepcopy(model.state_dict())
        TernaryConfig(lossless=True, scale_granularity=16).quantize(model)
        assert len(ternary_layers(model)) == LAYERS[name]
        model.dequantize()
        assert not ternary_layers(model)
        assert "quantization_config" not in model.config
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        model.save_pretrained(tmp_path)
        assert torch.equal(run(type(model).from_pretrained(tmp_path)), expected)

    def test_float_layers_train_and_pack(self, name, tmp_path):
        model, run = new(name)
        config = TernaryConfig(weight_format="float")
        model.save_pretrained(tmp_path / "dense")
        training = type(model).from_pretrained(tmp_path / "dense", quantization_config=config).train()
        layers = ternary_layers(training)
        optimizer = torch.optim.SGD([layer.weight for layer in layers.values()], lr=0.1)
        _, shapes, fixed = MODELS[name]()
        inputs = {key: torch.randn(shape) for key, shape in shapes.items()} | fixed
        training(**inputs, return_dict=False)[0].square().mean().backward()
        assert all(layer.weight.grad is not None for layer in layers.values() if layer.weight.requires_grad)
        optimizer.step()
        trained = run(training)
        training.save_pretrained(tmp_path / "float")
        again = type(model).from_pretrained(tmp_path / "float")
        assert torch.equal(run(again), trained)
        assert all(layer.weight_format == "float" for layer in ternary_layers(again).values())
        pack(again).save_pretrained(tmp_path / "packed")
        packed = type(model).from_pretrained(tmp_path / "packed")
        assert all(layer.weight_format == "packed" for layer in ternary_layers(packed).values())
        torch.testing.assert_close(run(packed), trained)


class TestLoading:
    @pytest.fixture
    def saved(self, tmp_path):
        """A packed Flux2 folder with groups of 16, its model, and how to run it."""
        model, run = new("Flux2")
        TernaryConfig(lossless=True, scale_granularity=16).quantize(make_ternary(model))
        model.save_pretrained(tmp_path / "saved")
        return tmp_path / "saved", model, run

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision_the_scales_stay(self, saved, dtype):
        folder, model, _ = saved
        half = Flux2Transformer2DModel.from_pretrained(folder, dtype=dtype)
        assert half.dtype == dtype
        for name, layer in ternary_layers(half).items():
            assert torch.equal(layer.weight_scale, model.get_submodule(name).weight_scale)
        assert half.to(torch.float32).proj_out.weight.dtype == torch.float32

    def test_scales_take_two_bytes_where_they_fit(self, saved):
        folder, _, _ = saved
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        scales = [tensor for name, tensor in tensors.items() if name.endswith("weight_scale")]
        assert scales
        assert all(scale.dtype == torch.float16 for scale in scales)
        with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as file:
            assert file.metadata()["terdit.packing"] == "row-chunk-2bit"

    def test_scales_that_do_not_fit_stay_in_float32(self, tmp_path):
        model, run = new("SD3")
        TernaryConfig(scale_granularity="row").quantize(model)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        assert all(t.dtype == torch.float32 for name, t in tensors.items() if name.endswith("weight_scale"))
        assert torch.equal(run(SD3Transformer2DModel.from_pretrained(tmp_path)), run(model))

    def test_shards(self, saved, tmp_path):
        _, model, run = saved
        model.save_pretrained(tmp_path / "shards", max_shard_size="40kB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        torch.testing.assert_close(run(Flux2Transformer2DModel.from_pretrained(tmp_path / "shards")), run(model))

    def test_dense_shards_while_loading(self, tmp_path):
        model, run = new("Flux2")
        model.save_pretrained(tmp_path / "one")
        model.save_pretrained(tmp_path / "many", max_shard_size="100kB")
        config = TernaryConfig(scale_granularity=16)
        one, many = (
            Flux2Transformer2DModel.from_pretrained(tmp_path / name, quantization_config=config)
            for name in ("one", "many")
        )
        torch.testing.assert_close(run(one), run(many))

    def test_no_warning_about_weights_that_were_not_used(self, tmp_path, caplog):
        model, _ = new("DiT")
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())
        assert "not used" not in caplog.text
        assert "newly initialized" not in caplog.text

    @pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
    def test_device_map(self, saved, device_map):
        folder, model, run = saved
        placed = Flux2Transformer2DModel.from_pretrained(folder, device_map=device_map)
        torch.testing.assert_close(run(placed), run(model))

    def test_device_map_to_disk_keeps_the_scales(self, saved, tmp_path):
        folder, model, run = saved
        places = {name: "cpu" for name, _ in model.named_children()} | {"single_transformer_blocks": "disk"}
        placed = Flux2Transformer2DModel.from_pretrained(folder, device_map=places, offload_folder=tmp_path / "disk")
        torch.testing.assert_close(run(placed), run(model))

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda t: t.pop(f"{TO_Q}.weight_packed"), f"1 missing tensor.*{TO_Q}.weight_packed"),
            (lambda t: t.pop(f"{TO_Q}.weight_scale"), f"1 missing tensor.*{TO_Q}.weight_scale"),
            (lambda t: t[f"{TO_Q}.weight_packed"].fill_(255), "holds code 3"),
            (
                lambda t: t.update({f"{TO_Q}.weight_packed": torch.zeros(4, 4, dtype=torch.uint8)}),
                r"weight_packed` has shape \[4, 4\]",
            ),
            (
                lambda t: t.update({f"{TO_Q}.weight_packed": torch.zeros(16, 64)}),
                r"weight_packed` is stored as F32, expected U8",
            ),
        ],
    )
    def test_damaged_files(self, saved, damage, message):
        folder, _, _ = saved
        file = folder / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            Flux2Transformer2DModel.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            ({"terdit.version": "2"}, "format version '2'"),
            ({"terdit.version": "1", "terdit.packing": "other"}, "packed as 'other'"),
        ],
    )
    def test_files_of_another_format(self, saved, metadata, message):
        folder, _, _ = saved
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt", **metadata})
        with pytest.raises(ValueError, match=message):
            Flux2Transformer2DModel.from_pretrained(folder)

    def test_a_tensor_that_the_class_does_not_have_is_left_to_diffusers(self, saved, caplog):
        folder, model, run = saved
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file) | {"of.another.release": torch.ones(1)}, file, metadata={"format": "pt"})
        assert torch.equal(run(Flux2Transformer2DModel.from_pretrained(folder)), run(model))

    def test_a_packed_tensor_in_a_float_model_says_so(self, saved):
        folder, _, _ = saved
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= {"weight_format": "float", "lossless": False}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"holds packed weights, but the config says weight_format='float'"):
            Flux2Transformer2DModel.from_pretrained(folder)

    def test_a_config_of_a_later_version(self, saved):
        folder, _, _ = saved
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["version"] = "2"
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="format version '2'"):
            Flux2Transformer2DModel.from_pretrained(folder)

    def test_pipeline_quantization_config(self, tmp_path):
        tiny_flux2_pipeline().save_pretrained(tmp_path)
        config = PipelineQuantizationConfig(quant_mapping={"transformer": TernaryConfig(scale_granularity=16)})
        pipe = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
        assert ternary_layers(pipe.transformer)
        assert not ternary_layers(pipe.text_encoder)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda t: t[f"{DIT_Q}.weight_scale"].fill_(float("nan")), f"`{DIT_Q}.weight_scale` holds NaN"),
            (lambda t: t["pos_embed.proj.bias"].fill_(float("inf")), "`pos_embed.proj.bias` holds NaN or infinity"),
            (
                lambda t: t.update({f"{DIT_Q}.weight_packed": t[f"{DIT_Q}.weight_packed"].bool()}),
                "stored as BOOL, expected U8",
            ),
            (
                lambda t: t.update({"proj_out_2.bias": t["proj_out_2.bias"].long()}),
                "`proj_out_2.bias` is stored as I64, expected floating point",
            ),
            (lambda t: t.pop("proj_out_2.bias"), "1 missing tensor.*`proj_out_2.bias`"),
        ],
    )
    def test_what_a_model_cannot_hold_is_an_error_that_names_the_file(self, tmp_path, damage, message):
        TernaryConfig().quantize(dit()[0]).save_pretrained(tmp_path)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        damage(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as error:
            DiTTransformer2DModel.from_pretrained(tmp_path)
        assert str(file) in str(error.value)

    def test_pickles_are_neither_written_nor_read(self, tmp_path):
        model = TernaryConfig().quantize(dit()[0])
        with pytest.raises(ValueError, match="saved as safetensors only, got safe_serialization=False"):
            model.save_pretrained(tmp_path, safe_serialization=False)
        assert not list(tmp_path.glob("*.bin"))
        model.save_config(tmp_path)
        torch.save(model.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
        with pytest.raises(OSError, match=r"diffusion_pytorch_model\.bin is not a readable safetensors file"):
            DiTTransformer2DModel.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        "change",
        [
            {"include": 3},
            {"modules_to_not_convert": 0.5},
            {"lossless": "a"},
            {"scale_granularity": []},
            {"version": "2"},
        ],
    )
    def test_settings_of_other_types_are_an_error_that_says_where_they_stand(self, tmp_path, change):
        TernaryConfig().quantize(dit()[0]).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
        with pytest.raises(ValueError, match=r"The `quantization_config` in config\.json: "):
            DiTTransformer2DModel.from_pretrained(tmp_path)


class TestChoice:
    def test_patterns(self):
        model, _ = new("Flux2")
        TernaryConfig(include=["transformer_blocks.*", "proj_out"], modules_to_not_convert="*.ff_context.*").quantize(
            model
        )
        names = set(ternary_layers(model))
        assert "proj_out" in names
        assert "transformer_blocks.0.ff.linear_in" in names
        assert not any("ff_context" in name or "single" in name for name in names)

    @pytest.mark.parametrize(
        ("left", "kept"),
        [
            ("ff", lambda name: ".ff." in name),
            ("attn.to_q", lambda name: name.endswith("attn.to_q")),
            ("single_transformer_blocks.0", lambda name: name.startswith("single_transformer_blocks.0.")),
            (f"{TO_Q}", lambda name: name == TO_Q),
            (["to_q", "*.to_k"], lambda name: name.endswith(("to_q", "to_k"))),
        ],
    )
    def test_names_mean_the_modules_of_that_name_wherever_they_are(self, left, kept):
        model, _ = new("Flux2")
        everything = select_layers(model, TernaryConfig())
        found = select_layers(model, TernaryConfig(modules_to_not_convert=left))
        assert found.keys() == {name for name in everything if not kept(name)}
        assert len(found) < len(everything)

    def test_parts_of_names_do_not_count(self):
        with pytest.raises(ValueError, match="modules_to_not_convert: 'o_q' matches no linear layer"):
            TernaryConfig(modules_to_not_convert="o_q").quantize(new("DiT")[0])

    @pytest.mark.parametrize("option", ["include", "modules_to_not_convert"])
    def test_a_pattern_that_matches_nothing(self, option):
        model, _ = new("DiT")
        with pytest.raises(
            ValueError, match=rf"{option}: 'blocks.\*' matches no linear layer of DiTTransformer2DModel"
        ):
            TernaryConfig(**{option: "blocks.*"}).quantize(model)

    def test_nothing_left(self):
        model, _ = new("DiT")
        with pytest.raises(ValueError, match="No linear layer of DiTTransformer2DModel is chosen"):
            TernaryConfig(modules_to_not_convert="*").quantize(model)

    def test_outputs_that_four_does_not_divide(self):
        model, _ = new("DiT")
        model.transformer_blocks[0].ff.net[2] = nn.Linear(128, 30)
        with pytest.raises(
            ValueError, match=r"transformer_blocks.0.ff.net.2 cannot be ternary: .* multiples of 4.*30"
        ):
            TernaryConfig().quantize(model)
        TernaryConfig(weight_format="float").quantize(model)

    def test_inputs_that_the_group_does_not_divide(self):
        model, _ = new("DiT")
        with pytest.raises(
            ValueError, match=r"cannot be ternary: .*groups of 24.*Name it in `modules_to_not_convert`"
        ):
            TernaryConfig(scale_granularity=24).quantize(model)

    def test_tied_weights(self):
        model, _ = new("DiT")
        blocks = model.transformer_blocks
        blocks[1].attn1.to_q.weight = blocks[0].attn1.to_q.weight
        with pytest.raises(ValueError, match=r"blocks.0.attn1.to_q.weight is tied to transformer_blocks.1.attn1.to_q"):
            TernaryConfig().quantize(model)
        TernaryConfig(modules_to_not_convert="*.attn1.to_q").quantize(model)

    def test_a_layer_used_twice(self):
        model, _ = new("DiT")
        model.transformer_blocks[1].attn1.to_q = model.transformer_blocks[0].attn1.to_q
        with pytest.raises(ValueError, match="are one layer, used twice"):
            TernaryConfig().quantize(model)

    def test_a_refused_model_stays_as_it_was(self):
        model, run = new("DiT")
        expected = run(model)
        with torch.no_grad():
            model.transformer_blocks[1].ff.net[2].weight[0, 0] = float("nan")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"transformer_blocks.1.ff.net.2.weight holds NaN"):
            TernaryConfig().quantize(model)
        assert not ternary_layers(model)
        assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())
        assert expected.shape == run(model).shape

    def test_a_model_that_is_quantized_already(self, tmp_path):
        model, _ = new("DiT")
        TernaryConfig().quantize(model)
        with pytest.raises(ValueError, match=r"is quantized already \(ternary\)"):
            TernaryConfig().quantize(model)

    def test_packing_what_cannot_be_packed(self):
        model, _ = new("DiT")
        with pytest.raises(ValueError, match="was not quantized with a TernaryConfig"):
            pack(model)
        model.transformer_blocks[0].ff.net[2] = nn.Linear(128, 30)
        TernaryConfig(weight_format="float").quantize(model)
        with pytest.raises(ValueError, match=r"transformer_blocks.0.ff.net.2: .*multiple of 4"):
            pack(model)
        assert all(layer.weight_format == "float" for layer in ternary_layers(model).values())

    def test_a_terdit_needs_none(self, tmp_path, tiny_model):
        model = tiny_model("packed")
        with pytest.raises(ValueError, match="has ternary layers already"):
            TernaryConfig().quantize(model)
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="has ternary layers already"):
            TerDiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())


class TestConfig:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"scale_granularity": "column"}, "scale_granularity"),
            ({"scale_granularity": 0}, "scale_granularity"),
            ({"weight_format": "int4"}, 'must be "packed" or "float", got \'int4\''),
            ({"lossless": True, "weight_format": "float"}, "takes over ternary codes"),
            ({"include": [3]}, "`include` must be names or patterns"),
            ({"bits": 2}, "TernaryConfig has no bits"),
            ({"granularity": 16}, r"has no granularity \(now `scale_granularity`\)"),
            ({"exact": True}, r"has no exact \(now `lossless`\)"),
            ({"exclude": "*.to_q"}, r"has no exclude \(now `modules_to_not_convert`\)"),
        ],
    )
    def test_wrong_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            TernaryConfig(**settings)

    def test_there_and_back(self):
        config = TernaryConfig(scale_granularity=128, lossless=True, modules_to_not_convert="*.to_out.*")
        again = TernaryConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again.to_dict() == config.to_dict()
        assert "128" in repr(config)

    def test_names_of_the_first_models_in_a_config_json(self):
        found = TernaryConfig.from_dict(
            {"quant_method": "ternary", "version": "1", "granularity": 16, "exact": True, "exclude": ["*.norm1.*"]}
        )
        assert found.to_dict() == TernaryConfig(16, lossless=True, modules_to_not_convert="*.norm1.*").to_dict()
        assert set(found.to_dict()) == {
            "quant_method", "version", "scale_granularity", "weight_format", "lossless", "include",
            "modules_to_not_convert",
        }  # fmt: skip

    def test_a_name_that_a_first_model_excludes_is_that_of_one_layer(self):
        model, _ = new("Flux2")
        model.proj_out.proj_out = nn.Linear(4, 4)  # "proj_out" as a name would be this one, too
        old = {"granularity": "tensor", "exact": False, "include": ["*proj_out*"], "exclude": ["proj_out"]}
        again = TernaryConfig.from_dict(TernaryConfig.from_dict(old).to_dict())
        assert list(select_layers(model, again)) == ["proj_out.proj_out"]


class TestConvertDense:
    @pytest.fixture
    def published(self, tmp_path):
        """A pipeline folder as published: dense float16 weights that are ternary in groups of 16."""
        pipe = tiny_flux2_pipeline()
        make_ternary(pipe.transformer.float(), 32).half()
        pipe.save_pretrained(tmp_path / "published", max_shard_size="100kB")
        return tmp_path / "published"

    def picture(self, folder):
        pipe = Flux2KleinPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "text_encoder_out_layers": (1, 2, 3)}
        settings |= {"max_sequence_length": 16, "output_type": "pt", "guidance_scale": 1.0}
        return pipe, pipe(prompt="a cat", generator=torch.Generator().manual_seed(0), **settings).images

    def test_a_pipeline(self, published, tmp_path):
        convert_dense_checkpoint(published, tmp_path / "packed", max_shard_size=50_000)
        assert len(list((tmp_path / "packed" / "transformer").glob("*.safetensors"))) > 1
        assert not list(tmp_path.glob("*.partial"))
        _, expected = self.picture(published)
        packed, found = self.picture(tmp_path / "packed")
        assert len(ternary_layers(packed.transformer)) == 12 + 2 * 2
        assert packed.transformer.config.quantization_config.scale_granularity == 32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        size = sum(path.stat().st_size for path in (tmp_path / "packed" / "transformer").glob("*.safetensors"))
        dense_size = sum(path.stat().st_size for path in (published / "transformer").glob("*.safetensors"))
        assert size < 0.5 * dense_size

    def test_the_text_encoder_can_go(self, published, tmp_path):
        pipe, expected = self.picture(convert_dense_checkpoint(published, tmp_path / "packed"))
        embeds, _ = pipe.encode_prompt("a cat", max_sequence_length=16, text_encoder_out_layers=(1, 2, 3))
        pipe.text_encoder = None
        settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}
        generator = torch.Generator().manual_seed(0)
        images = pipe(prompt_embeds=embeds, generator=generator, **settings).images
        assert torch.equal(images, expected)

    def test_the_command_line(self, published, tmp_path, capsys):
        assert main(["convert", str(published), str(tmp_path / "packed")]) == 0
        assert "one scale per 32 inputs" in capsys.readouterr().out
        self.picture(tmp_path / "packed")
        assert main(["convert", str(published), str(tmp_path / "other"), "--scale_granularity", "16"]) == 0
        assert main(["convert", str(published), str(tmp_path / "more"), "--vae", "auto"]) == 1
        assert "--vae is for the files of TerDiT's authors" in capsys.readouterr().err
        (tmp_path / "empty").mkdir()
        assert main(["convert", str(tmp_path / "empty"), str(tmp_path / "more"), "--scale_granularity", "row"]) == 1
        assert "--scale_granularity is for diffusers models" in capsys.readouterr().err

    def test_export_is_import(self, published, tmp_path):
        folder = convert_dense_checkpoint(published, tmp_path / "first") / "transformer"
        model = Flux2Transformer2DModel.from_pretrained(folder)
        model.dequantize().half().save_pretrained(tmp_path / "dense")
        again = convert_dense_checkpoint(tmp_path / "dense", tmp_path / "second", scale_granularity=32)
        first, second = (load_file(path / "diffusion_pytorch_model.safetensors") for path in (folder, again))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_what_is_not_ternary_is_refused_and_nothing_is_left(self, published, tmp_path):
        file = sorted((published / "transformer").glob("*.safetensors"))[0]
        for file in sorted((published / "transformer").glob("*.safetensors")):
            tensors = load_file(file)
            if "single_transformer_blocks.1.attn.to_out.weight" in tensors:
                tensors["single_transformer_blocks.1.attn.to_out.weight"][5, 40] += 0.25
                save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=r"single_transformer_blocks.1.attn.to_out.weight is not ternary: row 5, group 1"
        ):
            convert_dense_checkpoint(published, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()
        assert not list(tmp_path.glob("*.partial"))

    @pytest.mark.parametrize(
        ("names", "message"),
        [(["to_q.scales", "to_q.biases"], "quantized for Apple's MLX"), (["to_q.W_q"], "packed for gemlite")],
    )
    def test_other_layouts_are_refused_with_the_reason(self, published, tmp_path, names, message):
        file = sorted((published / "transformer").glob("*.safetensors"))[0]
        save_file(load_file(file) | {f"blocks.0.{name}": torch.zeros(2) for name in names}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=f"(?s){message}.*-unpacked"):
            convert_dense_checkpoint(published, tmp_path / "packed")

    def test_a_folder_that_is_quantized_already(self, published, tmp_path):
        folder = convert_dense_checkpoint(published, tmp_path / "packed")
        with pytest.raises(ValueError, match=r"is quantized already \(ternary\)"):
            convert_dense_checkpoint(folder, tmp_path / "again")

    @pytest.mark.parametrize(
        ("break_it", "error", "message"),
        [
            (lambda folder: shutil.rmtree(folder), OSError, "has no config.json"),
            (
                lambda folder: (folder / "config.json").write_text('{"_class_name": "Nothing"}'),
                ValueError,
                "names the class 'Nothing'",
            ),
            (
                lambda folder: next(folder.glob("*.safetensors")).write_bytes(b"x" * 100),
                OSError,
                "is not a readable safetensors file",
            ),
            (lambda folder: next(folder.glob("*.safetensors")).unlink(), OSError, "which is not there"),
        ],
    )
    def test_folders_that_cannot_be_read(self, published, tmp_path, break_it, error, message):
        break_it(published / "transformer")
        with pytest.raises(error, match=message):
            convert_dense_checkpoint(published, tmp_path / "packed")
        assert not (tmp_path / "packed").exists()

    def test_an_output_that_is_not_empty(self, published, tmp_path):
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed" / "thesis.txt").write_text("years of work")
        with pytest.raises(FileExistsError, match="is not an empty folder"):
            convert_dense_checkpoint(published, tmp_path / "packed")
        assert (tmp_path / "packed" / "thesis.txt").read_text() == "years of work"

    def test_numbers_that_are_not_finite_are_refused(self, published, tmp_path):
        for file in sorted((published / "transformer").glob("*.safetensors")):
            tensors = load_file(file)
            name = sorted(tensors)[0]
            tensors[name].view(-1)[1] = float("nan")
            save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="holds NaN or infinity") as error:
            convert_dense_checkpoint(published, tmp_path / "packed")
        assert "diffusion_pytorch_model-00001" in str(error.value)

    def test_a_digest_is_checked(self, tmp_path):
        dit()[0].save_pretrained(tmp_path / "dense")
        file = tmp_path / "dense" / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file), file, metadata={"format": "pt", "terdit.sha256": "0" * 64})
        with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors: .* do not match the digest"):
            convert_dense_checkpoint(tmp_path / "dense", tmp_path / "packed")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda t: t.update({"pos_embed.proj.bias": torch.ones(3)}),
                "`pos_embed.proj.bias` is .3., torch.float32",
            ),
            (lambda t: t.update({"pos_embed.proj.bias": t["pos_embed.proj.bias"].long()}), "torch.int64"),
            (lambda t: t.pop("pos_embed.proj.bias"), "has no pos_embed.proj.bias"),
            (lambda t: t.update({"a.weight_packed": torch.zeros(1)}), "holds ternary layers already"),
        ],
    )
    def test_tensors_that_do_not_fit_the_config_are_refused(self, tmp_path, change, message):
        TernaryConfig().quantize(dit()[0]).dequantize().save_pretrained(tmp_path / "dense")
        file = tmp_path / "dense" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message) as error:
            convert_dense_checkpoint(tmp_path / "dense", tmp_path / "packed")
        assert str(tmp_path) in str(error.value)
        assert not (tmp_path / "packed").exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"num_layers": 10**9},
            {"attention_head_dim": 2**40},
            {"sample_size": 2**30},
            {"num_layers": "a"},
            {"num_layers": None},
        ],
        ids=str,
    )
    def test_a_config_of_a_petabyte_or_other_types_is_refused_before_anything_is_allocated(self, tmp_path, change):
        dit()[0].save_pretrained(tmp_path / "dense")
        path = tmp_path / "dense" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "dense"))):
            convert_dense_checkpoint(tmp_path / "dense", tmp_path / "packed")


class TestBitNet:
    def test_the_order_of_transformers(self):
        from transformers.integrations.bitnet import pack_weights, unpack_weights

        ternary = torch.randint(-1, 2, (24, 10))
        theirs = pack_weights(ternary.clone().float())
        assert torch.equal(swap_bitnet_order(theirs), pack_ternary(ternary))
        assert torch.equal(unpack_weights(swap_bitnet_order(pack_ternary(ternary)), torch.float32), ternary.float())
        assert torch.equal(swap_bitnet_order(swap_bitnet_order(theirs)), theirs)
        assert torch.equal(unpack_ternary(swap_bitnet_order(theirs)), ternary.float())

    @pytest.mark.parametrize("weight", [torch.zeros(4, 4), torch.zeros(4, dtype=torch.uint8)])
    def test_something_else(self, weight):
        with pytest.raises(ValueError, match="are a uint8 matrix"):
            swap_bitnet_order(weight)

    def test_a_code_that_is_not_ternary(self):
        with pytest.raises(ValueError, match="code 3"):
            swap_bitnet_order(torch.full((2, 2), 3, dtype=torch.uint8))


def test_a_pipeline_whose_export_was_interrupted_is_refused(tmp_path):
    model, _ = new("SD3")
    TernaryConfig(scale_granularity="row").quantize(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "pipeline.saving").write_text("1")
    with pytest.raises(OSError, match=r"was interrupted, or is under way.* Save the pipeline there again"):
        type(model).from_pretrained(tmp_path)


def test_a_single_file_is_refused(tmp_path):
    from diffusers_terdit.quantization import TernaryQuantizer

    with pytest.raises(ValueError, match="works with `from_pretrained` only"):
        TernaryQuantizer(TernaryConfig()).maybe_update_state_dict({})


@pytest.mark.parametrize("granularity", ["tensor", 16])
def test_compile(granularity):
    model, run = new("SD3")
    TernaryConfig(scale_granularity=granularity).quantize(model)
    expected = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type):
    model, run = new("SD3")
    TernaryConfig(scale_granularity=16).quantize(model)
    expected = run(model)
    device = torch.device("cpu")
    options = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(device, device, offload_type=offload_type, **options)
    torch.testing.assert_close(run(model), expected)


class TestLora:
    TARGETS = ["to_q", "to_v"]

    @pytest.mark.parametrize("name", ["SD3", "Flux2"])  # diffusers gives the others no adapters
    def test_train_save_load_switch_and_unload(self, name, tmp_path):
        pytest.importorskip("peft")
        from peft import LoraConfig

        model, run = new(name)
        TernaryConfig(scale_granularity=16).quantize(model)
        expected = run(model)
        model.add_adapter(LoraConfig(r=2, target_modules=self.TARGETS, init_lora_weights=False))
        assert isinstance(model, MODELS[name]()[0].__class__)
        adapted = run(model)
        assert not torch.allclose(adapted, expected)
        _, shapes, fixed = MODELS[name]()
        inputs = {key: torch.randn(shape) for key, shape in shapes.items()} | fixed
        model(**inputs, return_dict=False)[0].square().mean().backward()
        grads = {key for key, p in model.named_parameters() if p.grad is not None}
        assert grads
        assert all("lora_" in key for key in grads)
        model.save_lora_adapter(tmp_path)
        model.disable_adapters()
        torch.testing.assert_close(run(model), expected)
        model.enable_adapters()
        model.unload_lora()
        torch.testing.assert_close(run(model), expected)
        model.load_lora_adapter(tmp_path, prefix=None)
        torch.testing.assert_close(run(model), adapted)

    def test_a_pipelines_adapter(self, tmp_path):
        pytest.importorskip("peft")
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        pipe = tiny_flux2_pipeline()
        TernaryConfig(scale_granularity=16).quantize(pipe.transformer)
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=self.TARGETS, init_lora_weights=False))
        layers = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
        pipe.transformer.unload_lora()
        pipe.load_lora_weights(tmp_path)
        again = get_peft_model_state_dict(pipe.transformer, adapter_name=pipe.transformer.active_adapters()[0])
        assert layers.keys() == again.keys()
        assert all(torch.equal(layers[key], again[key]) for key in layers)
        with pytest.raises(ValueError, match="cannot take in an adapter"):
            pipe.fuse_lora(components=["transformer"])

    def test_what_reads_the_dense_weight_is_refused(self):
        pytest.importorskip("peft")
        from peft import LoraConfig

        model, _ = new("SD3")
        TernaryConfig().quantize(model)
        with pytest.raises(ValueError, match="use_dora"):
            model.add_adapter(LoraConfig(r=2, target_modules=self.TARGETS, use_dora=True))

    def test_the_model_keeps_its_class(self):
        model, _ = new("SD3")
        before = set(vars(model))
        assert type(TernaryConfig().quantize(model)) is SD3Transformer2DModel
        model.dequantize()
        assert type(model) is SD3Transformer2DModel
        assert set(vars(model)) == before | {"is_quantized"}  # which diffusers sets

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_and_pickles_take_adapters_for_themselves(self, again):
        pytest.importorskip("peft")
        from peft import LoraConfig

        model, run = new("SD3")
        TernaryConfig().quantize(model)
        expected = run(model)
        other = again(model)
        other.add_adapter(LoraConfig(r=2, target_modules=self.TARGETS, init_lora_weights=False))
        assert not torch.equal(run(other), expected)
        assert torch.equal(run(model), expected)
        assert not hasattr(model, "peft_config")

    def test_a_model_is_freed_with_its_last_reference(self):
        model, _ = new("SD3")
        alive = weakref.ref(TernaryConfig().quantize(model))
        gc.collect()
        gc.disable()
        try:
            del model
            assert alive() is None
        finally:
            gc.enable()

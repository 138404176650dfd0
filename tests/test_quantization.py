"""`TernaryConfig` on diffusers' own models: ternarize, import, save, load, dequantize, and what is refused."""

import copy
import gc
import json
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from diffusers import (
    AutoModel,
    DiffusionPipeline,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    ModularPipeline,
    PipelineQuantizationConfig,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.modular_pipelines import ComponentSpec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import QuantoConfig, TorchAoConfig

from diffusers_terdit import TernaryConfig
from diffusers_terdit.ops import reference
from diffusers_terdit.quantization import pack, select_layers
from diffusers_terdit.storage.inspection import inspect_weights
from tiny import make_ternary, ternary_layers
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


def flux2(in_channels=16):
    model = Flux2Transformer2DModel(
        in_channels=in_channels, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=(8, 8, 8, 8), timestep_guidance_channels=32,
    )  # fmt: skip
    ids = torch.cartesian_prod(*[torch.arange(n) for n in (1, 4, 4, 1)])
    inputs = {"hidden_states": (1, 16, in_channels), "encoder_hidden_states": (1, 6, 64)}
    fixed = {"img_ids": ids, "txt_ids": torch.arange(24).reshape(6, 4), "timestep": torch.tensor([0.5])}
    return model, inputs, {**fixed, "guidance": torch.tensor([1.0])}


MODELS = {"DiT": dit, "PixArt": pixart, "SD3": sd3, "Flux2": flux2}
LAYERS = {"DiT": 2 * 9, "PixArt": 2 * 10, "SD3": 14 + 11, "Flux2": 12 + 2 * 2}  # linear layers of the blocks

TO_Q = "transformer_blocks.0.attn.to_q"
DIT_Q = "transformer_blocks.0.attn1.to_q"


def in_own_memory(model):
    """The model with tensors that are no part of a mapped file: a dense product's last bits depend on the address."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


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
            return in_own_memory(model).eval()(**inputs, return_dict=False)[0]

    return model.eval(), run


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

    def test_import_and_export_are_exact(self, name, tmp_path):
        for granularity in ("tensor", "row", 16):
            model, run = new(name)
            expected = run(make_ternary(model, granularity))
            before = copy.deepcopy(model.state_dict())
            model.save_pretrained(tmp_path)
            config = TernaryConfig(lossless=True, scale_granularity=granularity)
            packed = type(model).from_pretrained(tmp_path, quantization_config=config)
            for layer_name, layer in ternary_layers(packed).items():
                assert torch.equal(layer.dequantize(), before[f"{layer_name}.weight"])
            torch.testing.assert_close(run(packed), expected, rtol=1e-5, atol=1e-6)
        config.quantize(model)
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

    def test_scales_take_two_bytes_where_they_fit_and_stay_in_half_precision(self, saved):
        folder, model, _ = saved
        with safe_open(folder / "diffusion_pytorch_model.safetensors", framework="pt") as file:
            assert file.metadata()["terdit.packing"] == "row-chunk-2bit"
            scales = [file.get_tensor(name) for name in file.keys() if name.endswith("weight_scale")]  # noqa: SIM118
        assert {scale.dtype for scale in scales} == {torch.float16}
        half = Flux2Transformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16
        for name, layer in ternary_layers(half).items():
            assert torch.equal(layer.weight_scale, model.get_submodule(name).weight_scale)
        assert half.to(torch.float32).proj_out.weight.dtype == torch.float32

    def test_scales_that_do_not_fit_stay_in_float32(self, tmp_path):
        model, run = new("SD3")
        TernaryConfig(scale_granularity="row").quantize(model)
        model.save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
        assert all(t.dtype == torch.float32 for name, t in tensors.items() if name.endswith("weight_scale"))
        assert torch.equal(run(SD3Transformer2DModel.from_pretrained(tmp_path)), run(model))

    def test_shards_packed_and_dense(self, saved, tmp_path):
        _, model, run = saved
        model.save_pretrained(tmp_path / "shards", max_shard_size="40kB")
        assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
        torch.testing.assert_close(run(Flux2Transformer2DModel.from_pretrained(tmp_path / "shards")), run(model))
        new("Flux2")[0].save_pretrained(tmp_path / "dense", max_shard_size="100kB")
        config = TernaryConfig(scale_granularity=16)
        packed = Flux2Transformer2DModel.from_pretrained(tmp_path / "dense", quantization_config=config)
        torch.testing.assert_close(run(packed), run(config.quantize(new("Flux2")[0])))

    @pytest.mark.parametrize("save", [{}, {"max_shard_size": "20KB"}], ids=["single", "sharded"])
    def test_a_flipped_bit_is_found(self, tmp_path, save):
        TernaryConfig().quantize(new("DiT")[0]).save_pretrained(tmp_path, **save)
        files = sorted(tmp_path.glob("*.safetensors"))
        assert len(files) > bool(save)
        assert inspect_weights(tmp_path).has_digest
        random = np.random.default_rng(0)
        for number in range(10 * len(files)):
            data = (path := files[number % len(files)]).read_bytes()
            damaged, start = bytearray(data), 8 + int.from_bytes(data[:8], "little")
            damaged[random.integers(start, len(data))] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"do not match the digest|code 3|NaN or infinity"):
                DiTTransformer2DModel.from_pretrained(tmp_path)
            path.write_bytes(data)
        DiTTransformer2DModel.from_pretrained(tmp_path)

    def test_no_warning_about_weights_that_were_not_used(self, tmp_path, caplog):
        model, _ = new("DiT")
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())
        assert "not used" not in caplog.text
        assert "newly initialized" not in caplog.text

    def test_device_maps_keep_the_scales(self, saved, tmp_path):
        folder, model, run = saved
        to_disk = {name: "cpu" for name, _ in model.named_children()} | {"single_transformer_blocks": "disk"}
        for places in ("auto", {"": "cpu"}, to_disk):
            options = {"device_map": places, "offload_folder": tmp_path / "disk"}
            torch.testing.assert_close(run(Flux2Transformer2DModel.from_pretrained(folder, **options)), run(model))

    def test_a_tensor_that_the_class_does_not_have_is_left_to_diffusers(self, saved, caplog):
        folder, model, run = saved
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file(load_file(file) | {"of.another.release": torch.ones(1)}, file, metadata={"format": "pt"})
        assert torch.equal(run(Flux2Transformer2DModel.from_pretrained(folder)), run(model))

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda t: t[f"{DIT_Q}.weight_scale"].fill_(float("nan")), f"`{DIT_Q}.weight_scale` holds NaN"),
            (lambda t: t["pos_embed.proj.bias"].fill_(float("inf")), "`pos_embed.proj.bias` holds NaN or infinity"),
            (
                lambda t: t.update({"proj_out_2.bias": t["proj_out_2.bias"].long()}),
                "`proj_out_2.bias` is stored as I64",
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

    def test_settings_of_other_types_are_an_error_that_says_where_they_are(self, tmp_path):
        TernaryConfig().quantize(dit()[0]).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        for change in (
            *({"include": 3}, {"modules_to_not_convert": 0.5}, {"lossless": "a"}, {"scale_granularity": []}),
            *({"version": "2"}, {"weight_format": "float"}),
        ):
            path.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
            with pytest.raises(ValueError, match=r"`quantization_config` in config\.json: |holds packed weights, but"):
                DiTTransformer2DModel.from_pretrained(tmp_path)


def picture(pipe):
    options = {"text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 16, "height": 32, "width": 32}
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            in_own_memory(component)
    generator = torch.Generator().manual_seed(0)
    options |= {"num_inference_steps": 1, "generator": generator, "output_type": "np"}
    if isinstance(pipe, ModularPipeline):
        return pipe(prompt="a cat", output="images", **options)
    return pipe(prompt="a cat", guidance_scale=1.0, **options).images


class TestPipelines:
    """One config for the models of a pipeline, in both kinds of diffusers' pipelines."""

    @pytest.fixture
    def dense(self, tmp_path):
        tiny_flux2_pipeline().save_pretrained(tmp_path / "dense")
        return tmp_path / "dense"

    @pytest.mark.parametrize(
        "options",
        [
            {"quant_mapping": {"transformer": TernaryConfig(scale_granularity=16)}},
            {
                "quant_backend": "ternary",
                "quant_kwargs": {"scale_granularity": 16},
                "components_to_quantize": ["transformer"],
            },
        ],
        ids=["mapping", "backend"],
    )
    def test_load_save_and_load_again(self, dense, tmp_path, options):
        config = PipelineQuantizationConfig(**options)
        pipe = DiffusionPipeline.from_pretrained(dense, quantization_config=config)
        assert {layer.scale_granularity for layer in ternary_layers(pipe.transformer).values()} == {16}
        assert not ternary_layers(pipe.text_encoder)
        pipe.save_pretrained(tmp_path / "packed")
        again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
        assert ternary_layers(again.transformer).keys() == ternary_layers(pipe.transformer).keys()
        assert np.array_equal(picture(again), picture(pipe))

    def test_beside_torchao_load_save_and_load_again(self, dense, tmp_path):
        torchao = pytest.importorskip("torchao.quantization")
        others = {"text_encoder": TorchAoConfig(torchao.Int8WeightOnlyConfig())}
        config = PipelineQuantizationConfig(quant_mapping={"transformer": TernaryConfig(16), **others})
        pipe = DiffusionPipeline.from_pretrained(dense, quantization_config=config)
        pipe.save_pretrained(tmp_path / "packed")
        again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
        for one in (pipe, again):
            assert ternary_layers(one.transformer)
            assert type(one.text_encoder.model.layers[0].mlp.up_proj.weight).__name__ == "Int8Tensor"
        assert np.array_equal(picture(again), picture(pipe))

    def test_beside_quanto_which_transformers_does_not_save(self, dense, tmp_path):
        quanto = pytest.importorskip("optimum.quanto")
        others = {"text_encoder": QuantoConfig(weights="int8")}
        config = PipelineQuantizationConfig(quant_mapping={"transformer": TernaryConfig(16), **others})
        pipe = DiffusionPipeline.from_pretrained(dense, quantization_config=config)
        assert ternary_layers(pipe.transformer)
        assert isinstance(pipe.text_encoder.model.layers[0].mlp.up_proj, quanto.QLinear)
        assert np.isfinite(picture(pipe)).all()

    def test_a_modular_pipeline_load_save_and_load_again(self, dense, tmp_path):
        pipe = ModularPipeline.from_pretrained(str(dense))
        pipe.load_components(quantization_config={"transformer": TernaryConfig(scale_granularity=16)})
        assert {layer.scale_granularity for layer in ternary_layers(pipe.transformer).values()} == {16}
        assert not ternary_layers(pipe.text_encoder)
        packed = str(tmp_path / "packed")
        pipe.save_pretrained(packed, overwrite_modular_index=True)
        again = ModularPipeline.from_pretrained(packed)
        again.load_components()
        assert ternary_layers(again.transformer).keys() == ternary_layers(pipe.transformer).keys()
        assert np.array_equal(picture(again), picture(pipe))

    def test_a_component_without_a_class_is_quantized_too(self, dense):
        spec = ComponentSpec("transformer", pretrained_model_name_or_path=str(dense), subfolder="transformer")
        assert ternary_layers(spec.load(quantization_config=TernaryConfig(scale_granularity=16)))


class TestChoice:
    @pytest.mark.parametrize(
        ("left", "kept"),
        [
            ("ff", lambda name: ".ff." in name),
            ("single_transformer_blocks.0", lambda name: name.startswith("single_transformer_blocks.0.")),
            (TO_Q, lambda name: name == TO_Q),
            (["to_q", "*.to_k"], lambda name: name.endswith(("to_q", "to_k"))),
            ("*.ff_context.*", lambda name: ".ff_context." in name),
        ],
    )
    def test_names_mean_the_modules_of_that_name_wherever_they_are(self, left, kept):
        model, _ = new("Flux2")
        for include in (None, ["transformer_blocks.*", "single_transformer_blocks.*", "proj_out"]):
            everything = select_layers(model, TernaryConfig(include=include))
            found = select_layers(model, TernaryConfig(include=include, modules_to_not_convert=left))
            assert ("proj_out" in found) == (include is not None)
            assert found.keys() == {name for name in everything if not kept(name)}
            assert len(found) < len(everything)

    @pytest.mark.parametrize("options", [{"strict": True}, {"lossless": True}])
    def test_a_layer_that_is_refused_can_be_named_or_kept_in_floats(self, options):
        model, _ = new("DiT")
        model.transformer_blocks[0].ff.net[2] = nn.Linear(128, 30)
        with pytest.raises(
            ValueError, match=r"transformer_blocks.0.ff.net.2 cannot be ternary: .* multiples of 4.*30"
        ):
            TernaryConfig(**options).quantize(model)
        assert not ternary_layers(model)
        TernaryConfig(weight_format="float", strict=True).quantize(model)
        with pytest.raises(ValueError, match=r"transformer_blocks.0.ff.net.2: .*multiple of 4"):
            pack(model)
        assert all(layer.weight_format == "float" for layer in ternary_layers(model).values())
        tied, _ = new("DiT")
        blocks = tied.transformer_blocks
        blocks[1].attn1.to_q.weight = blocks[0].attn1.to_q.weight
        for config in (TernaryConfig(), TernaryConfig(scale_granularity=24)):
            with pytest.raises(ValueError, match="modules_to_not_convert"):
                config.quantize(tied)
        TernaryConfig(modules_to_not_convert="*.attn1.to_q").quantize(tied)

    @pytest.mark.parametrize(
        ("granularity", "dense", "reason"),
        [
            ("row", ["proj_out"], "proj_out: a packed layer needs outputs in multiples of 4, this one has 18."),
            (32, ["x_embedder", "proj_out"], "x_embedder: `in_features` must be a multiple of the scale group, got"),
        ],
    )
    def test_what_does_not_fit_stays_dense_and_one_line_says_so(self, tmp_path, caplog, granularity, dense, reason):
        cls, (model, _, _) = Flux2Transformer2DModel, flux2(in_channels=18)
        model.save_pretrained(tmp_path / "dense")
        config = TernaryConfig(granularity, include=["single_transformer_blocks.*", *reversed(dense)])
        loaded = cls.from_pretrained(tmp_path / "dense", quantization_config=config)
        in_memory = config.quantize(cls.from_pretrained(tmp_path / "dense"))
        lines = [record for record in caplog.records if "stay dense" in record.getMessage()]
        assert [line.levelname for line in lines] == ["WARNING", "WARNING"]
        for line in lines:
            start = f"{len(dense)} of {4 + len(dense)} chosen layers stay dense: {', '.join(dense)}. {reason}"
            assert line.getMessage().startswith(start)
        caplog.clear()
        for number, one in enumerate((loaded, in_memory)):
            assert len(ternary_layers(one)) == 4
            one.save_pretrained(tmp_path / str(number))
            again = cls.from_pretrained(tmp_path / str(number))
            assert ternary_layers(again).keys() == ternary_layers(one).keys()
            assert all(torch.equal(value, again.state_dict()[key]) for key, value in one.state_dict().items())
        assert not caplog.text
        strict = TernaryConfig(**{**config.to_dict(), "strict": True})
        with pytest.raises(ValueError, match=f"{dense[0]} cannot be ternary"):
            cls.from_pretrained(tmp_path / "dense", quantization_config=strict)

    def test_where_nothing_fits_it_is_an_error(self):
        with pytest.raises(ValueError, match="groups of 24"):
            TernaryConfig(scale_granularity=24).quantize(new("DiT")[0])

    def test_a_saved_granularity_that_no_longer_fits_is_an_error(self, tmp_path):
        TernaryConfig(scale_granularity=16).quantize(new("DiT")[0]).save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(path.read_text().replace('"scale_granularity": 16', '"scale_granularity": 64'))
        with pytest.raises(ValueError, match=r"has shape|missing tensor"):
            DiTTransformer2DModel.from_pretrained(tmp_path)

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


class TestConfig:
    def test_there_and_back(self):
        config = TernaryConfig(128, lossless=True, modules_to_not_convert="*.to_out.*", strict=True)
        assert config.to_dict()["strict"]
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
            "modules_to_not_convert", "strict",
        }  # fmt: skip

    def test_a_name_that_a_first_model_excludes_is_that_of_one_layer(self):
        model, _ = new("Flux2")
        model.proj_out.proj_out = nn.Linear(4, 4)  # "proj_out" as a name would be this one, too
        old = {"granularity": "tensor", "exact": False, "include": ["*proj_out*"], "exclude": ["proj_out"]}
        again = TernaryConfig.from_dict(TernaryConfig.from_dict(old).to_dict())
        assert list(select_layers(model, again)) == ["proj_out.proj_out"]


def test_compile():
    model, run = new("DiT")
    model.transformer_blocks = model.transformer_blocks[:1]
    TernaryConfig(scale_granularity=16).quantize(model)
    expected = run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), expected)
    torch._dynamo.reset()


def test_group_offload():
    model, run = new("SD3")
    TernaryConfig(scale_granularity=16).quantize(model)
    expected = run(model)
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    torch.testing.assert_close(run(model), expected)


class TestLora:
    @pytest.fixture
    def adapter(self):
        peft = pytest.importorskip("peft")
        return peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)

    @pytest.mark.parametrize("name", ["SD3", "Flux2"])  # diffusers gives the others no adapters
    def test_train_save_load_switch_and_unload(self, name, adapter, tmp_path):
        model, run = new(name)
        TernaryConfig(scale_granularity=16).quantize(model)
        expected = run(model)
        model.add_adapter(adapter)
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

    def test_a_pipelines_adapter(self, adapter, tmp_path):
        from peft.utils import get_peft_model_state_dict

        pipe = tiny_flux2_pipeline()
        TernaryConfig(scale_granularity=16).quantize(pipe.transformer)
        pipe.transformer.add_adapter(adapter)
        layers = get_peft_model_state_dict(pipe.transformer)
        pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers)
        pipe.transformer.unload_lora()
        pipe.load_lora_weights(tmp_path)
        again = get_peft_model_state_dict(pipe.transformer, adapter_name=pipe.transformer.active_adapters()[0])
        assert layers.keys() == again.keys()
        assert all(torch.equal(layers[key], again[key]) for key in layers)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_and_pickles_take_adapters_for_themselves(self, again, adapter):
        model, run = new("SD3")
        TernaryConfig().quantize(model)
        expected = run(model)
        other = again(model)
        other.add_adapter(adapter)
        assert not torch.equal(run(other), expected)
        assert torch.equal(run(model), expected)
        assert not hasattr(model, "peft_config")

    def test_a_model_keeps_its_class_and_is_freed_with_its_last_reference(self):
        model, _ = new("SD3")
        before = set(vars(model))
        assert type(TernaryConfig().quantize(model)) is SD3Transformer2DModel
        model.dequantize()
        assert set(vars(model)) == before | {"is_quantized"}  # which diffusers sets
        alive = weakref.ref(TernaryConfig().quantize(model))
        gc.collect()
        gc.disable()
        try:
            del model
            assert alive() is None
        finally:
            gc.enable()

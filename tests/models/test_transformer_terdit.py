import copy
import math
import pickle
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoModel, ModelMixin
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from torch import nn

from diffusers_terdit import TerDiTTransformer2DModel
from diffusers_terdit.models.transformer_terdit import TerDiTAttnProcessor, TerDiTRMSNorm, rotate, sincos_2d


VARIANTS = {"float": {}, "packed": {"weight_format": "packed"}, "dense": {"ternary": False}}
SHARDED = {"max_shard_size": "20KB"}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(tiny_model, request):
    return tiny_model(**request.param)


@torch.no_grad()
def predict(model, inputs):
    return model(**inputs).sample


def equal_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def plain_network(state_dict, hidden_states, timestep, class_labels, heads=4, patch=2):
    """The network written out, one token and one complex rotation at a time, from the weights of a dense model.

    Sources: TerDiT Figure 2 (https://arxiv.org/abs/2405.14854), DiT (https://arxiv.org/abs/2212.09748), rotary
    positions (https://arxiv.org/abs/2104.09864).
    """

    def linear(name, x):
        return x @ state_dict[f"{name}.weight"].T + state_dict.get(f"{name}.bias", 0)

    def rms_norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state_dict[f"{name}.weight"]

    def layer_norm(x, eps, gain=1, bias=0):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain + bias

    def silu(x):
        return x * torch.sigmoid(x)

    batch, _, height, width = hidden_states.shape
    corners = [(y, x) for y in range(0, height, patch) for x in range(0, width, patch)]
    patches = [hidden_states[:, :, y : y + patch, x : x + patch].flatten(1) for y, x in corners]
    x = linear("proj_in", torch.stack(patches, dim=1))

    angles = timestep[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    temb = linear("time_embed.linear_1", torch.cat([angles.cos(), angles.sin()], dim=1))
    temb = linear("time_embed.linear_2", silu(temb)) + state_dict["class_embed.weight"][class_labels]

    dim = x.shape[-1] // heads
    angles = torch.arange(len(corners))[:, None] * 10000.0 ** -(torch.arange(dim // 2) / (dim // 2))
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]  # (L, 1, D/2H)
    block = "transformer_blocks.0"
    while f"{block}.norm1.weight" in state_dict:
        modulation = rms_norm(f"{block}.adaln.norm", linear(f"{block}.adaln.linear", silu(temb)))
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation[:, None].chunk(6, dim=-1)

        y = rms_norm(f"{block}.norm1", x) * (1 + scale_1) + shift_1
        rotated = []
        for letter in "qk":
            gain, bias = (state_dict[f"{block}.attn.norm_{letter}.{part}"] for part in ("weight", "bias"))
            z = layer_norm(linear(f"{block}.attn.to_{letter}", y), 1e-5, gain, bias)
            z = torch.view_as_complex(z.reshape(batch, -1, heads, dim // 2, 2)) * rotation
            rotated.append(torch.view_as_real(z).flatten(-2))
        scores = torch.einsum("bqhd,bkhd->bhqk", *rotated) / math.sqrt(dim)
        value = linear(f"{block}.attn.to_v", y).unflatten(-1, (heads, dim))
        y = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2)
        x = x + gate_1 * linear(f"{block}.attn.to_out.0", y)

        y = rms_norm(f"{block}.norm2", x) * (1 + scale_2) + shift_2
        y = silu(linear(f"{block}.ff.gate_proj", y)) * linear(f"{block}.ff.up_proj", y)
        x = x + gate_2 * linear(f"{block}.ff.down_proj", y)
        block = f"transformer_blocks.{int(block.split('.')[1]) + 1}"

    shift, scale = linear("norm_out.linear", silu(temb))[:, None].chunk(2, dim=-1)
    x = linear("proj_out", layer_norm(x, 1e-6) * (1 + scale) + shift)
    sample = torch.empty(batch, x.shape[-1] // patch**2, height, width)
    for (row, column), token in zip(corners, x.unbind(1), strict=True):
        sample[:, :, row : row + patch, column : column + patch] = token.unflatten(1, (patch, patch, -1)).movedim(3, 1)
    return sample


class TestForward:
    @pytest.mark.parametrize(
        ("size", "patch_size"), [((8, 8), 2), ((4, 10), 2), ((2, 2), 2), ((8, 12), 4), ((3, 2), 1)], ids=str
    )
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_network_is_the_one_the_papers_draw(self, tiny_model, tiny_inputs, variant, size, patch_size):
        model, inputs = tiny_model(**VARIANTS[variant], patch_size=patch_size), tiny_inputs(2, *size)
        dense = model.dequantize() if model.config.ternary else model
        sample = predict(model, inputs)
        assert (sample.shape, sample.dtype) == ((2, 8, *size), torch.float32)
        expected = plain_network(dense.state_dict(), **inputs, patch=patch_size)
        torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-5)

    def test_tuple_second_call_and_train_mode_give_the_same_bits(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        with torch.no_grad():
            (sample,) = model(**tiny_inputs(), return_dict=False)
        assert torch.equal(sample, expected)
        assert torch.equal(predict(model.train(), tiny_inputs()), expected)

    @pytest.mark.parametrize("argument", ["hidden_states", "timestep", "class_labels"])
    def test_every_argument_matters_to_its_own_image_only(self, model, tiny_inputs, argument):
        inputs = tiny_inputs()
        before = predict(model, inputs)
        inputs[argument][1] = inputs[argument][1] + 1
        after = predict(model, inputs)
        assert torch.equal(after[0], before[0])
        assert (after[1] - before[1]).abs().max() > 1e-3

    def test_an_image_does_not_depend_on_its_batch(self, model, tiny_inputs):
        inputs = tiny_inputs(4)
        whole = predict(model, inputs)
        alone = torch.cat([predict(model, {k: v[i : i + 1] for k, v in inputs.items()}) for i in range(4)])
        torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-5)

    def test_timestep_may_be_a_scalar_or_float(self, tiny_model, tiny_inputs):
        model, inputs = tiny_model("packed"), tiny_inputs() | {"timestep": torch.tensor([7, 7])}
        expected = predict(model, inputs)
        for timestep in (torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
            assert torch.equal(predict(model, inputs | {"timestep": timestep}), expected)

    def test_null_label_has_a_row_of_its_own(self, tiny_model, tiny_inputs):
        model, inputs = tiny_model("packed"), tiny_inputs()
        samples = [predict(model, inputs | {"class_labels": torch.full((2,), label)}) for label in range(11)]
        assert len({sample.sum().item() for sample in samples}) == 11

    def test_sincos_embedding_gives_half_the_width_to_the_column_and_half_to_the_row(self):
        # Frozen: models trained with it keep their meaning only while every number stays.
        embedding = sincos_2d(2, 3, 8, torch.empty(0))
        for row in range(2):
            for column in range(3):
                angles = [column, column / 100, row, row / 100]
                sines, cosines = list(map(math.sin, angles)), list(map(math.cos, angles))
                expected = [*sines[:2], *cosines[:2], *sines[2:], *cosines[2:]]
                torch.testing.assert_close(embedding[3 * row + column], torch.tensor(expected))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_sincos_embedding_is_computed_in_float32(self, dtype):
        exact = sincos_2d(32, 32, 64, torch.empty(0))
        assert torch.equal(sincos_2d(32, 32, 64, torch.empty(0, dtype=dtype)), exact.to(dtype))

    def test_grouped_query_attention_equals_repeated_heads(self, tiny_model, tiny_inputs):
        grouped = tiny_model(ternary=False, num_key_value_heads=2, qk_norm=False)
        full = tiny_model(ternary=False, qk_norm=False)
        state_dict = grouped.state_dict()
        for name in [n for n in state_dict if "to_k" in n or "to_v" in n]:
            state_dict[name] = state_dict[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
        full.load_state_dict(state_dict)
        torch.testing.assert_close(predict(grouped, tiny_inputs()), predict(full, tiny_inputs()), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "option",
        [{"qk_norm": False}, {"adaln_norm": False}, {"norm_eps": 1e-2}, {"pos_embed_type": "rope+sincos2d"}],
        ids=str,
    )
    def test_every_option_changes_the_output(self, tiny_model, tiny_inputs, option):
        changed, plain = tiny_model("packed", **option), tiny_model("packed")
        for size in ((8, 8), (4, 12)):
            assert (predict(changed, tiny_inputs(2, *size)) - predict(plain, tiny_inputs(2, *size))).abs().max() > 1e-4

    def test_without_learned_variance_there_is_noise_only(self, tiny_model, tiny_inputs):
        assert predict(tiny_model("packed", learn_sigma=False), tiny_inputs()).shape == (2, 4, 8, 8)

    def test_wrong_latents_are_refused(self, tiny_model, tiny_inputs):
        for shape in ((2, 3, 8, 8), (2, 4, 8, 9), (4, 8, 8), (2, 4, 0, 8), (2, 4, 8, 8, 1)):
            with pytest.raises(ValueError, match=r"\(batch, 4, height, width\).*divide by 2"):
                tiny_model()(**tiny_inputs() | {"hidden_states": torch.zeros(shape)})

    @pytest.mark.parametrize(
        "options", [{}, {"weight_format": "packed"}, {"ternary": False}, {"adaln_norm": False}], ids=str
    )
    def test_modulations_given_to_forward_are_those_it_would_compute(self, tiny_model, tiny_inputs, options):
        model, inputs = tiny_model(**options), tiny_inputs(batch=4)
        expected = model(**inputs).sample
        modulation = model.modulations(inputs["timestep"], inputs["class_labels"])
        assert modulation.shape == (2, 4, 6 * 32)
        assert torch.equal(model(**inputs, modulation=modulation).sample, expected)
        assert not torch.allclose(model(**inputs, modulation=modulation * 1.1).sample, expected)
        model.enable_gradient_checkpointing()
        model.train()
        model(**inputs, modulation=modulation).sample.sum().backward()
        model(**inputs).sample.sum().backward()


class TestWeightFormats:
    @pytest.mark.parametrize("scale_granularity", ["tensor", "row", 8])
    def test_pack_and_unpack_change_no_output_bit(self, tiny_model, tiny_inputs, scale_granularity):
        model = tiny_model(scale_granularity=scale_granularity)
        expected = predict(model, tiny_inputs())
        assert model.pack() is model
        assert model.config.weight_format == "packed"
        assert torch.equal(predict(model, tiny_inputs()), expected)
        before = copy.deepcopy(model)
        assert torch.equal(predict(model.unpack(), tiny_inputs()), expected)
        assert model.config.weight_format == "float"
        assert equal_state(model.pack(), before)

    def test_failed_pack_names_the_layer_and_leaves_every_layer_as_it_was(self, tiny_model, tiny_inputs):
        model = tiny_model(ffn_dim=66)
        before = predict(model, tiny_inputs())
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\.ff\.gate_proj: .*multiple of 4, got 66"):
            model.pack()
        assert model.config.weight_format == "float"
        assert {layer.weight_format for layer in model.ternary_layers().values()} == {"float"}
        assert torch.equal(predict(model, tiny_inputs()), before)

    @pytest.mark.parametrize("options", [{}, {"weight_format": "packed", "pos_embed_type": "rope+sincos2d"}], ids=str)
    def test_dequantize_copies_to_full_precision(self, tiny_model, tiny_inputs, options):
        model = tiny_model(**options)
        before = copy.deepcopy(model)
        dense, layers = model.dequantize(), model.ternary_layers()
        assert not dense.config.ternary
        assert not dense.ternary_layers()
        torch.testing.assert_close(predict(dense, tiny_inputs()), predict(model, tiny_inputs()), rtol=1e-5, atol=1e-5)
        assert all(torch.equal(dense.get_submodule(n).weight, layer.dequantize()) for n, layer in layers.items())
        others = {name for name in dense.state_dict() if name.removesuffix(".weight") not in layers}
        assert all(torch.equal(dense.state_dict()[name], model.state_dict()[name]) for name in others)
        assert equal_state(model, before)

    @pytest.mark.parametrize("training", [True, False])
    def test_dequantized_model_keeps_dtype_and_mode(self, tiny_model, training):
        dense = tiny_model("packed").to(torch.bfloat16).train(training).dequantize()
        assert (dense.dtype, dense.training) == (torch.bfloat16, training)

    def test_ternary_layers_are_the_documented_ones(self, tiny_model):
        model = tiny_model("packed")
        inside = ["adaln.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        inside += ["ff.gate_proj", "ff.up_proj", "ff.down_proj"]
        assert set(model.ternary_layers()) == {f"transformer_blocks.{i}.{name}" for i in range(2) for name in inside}
        outside = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert outside == {
            "proj_in", "time_embed.linear_1", "time_embed.linear_2", "norm_out.linear", "proj_out"
        }  # fmt: skip

        # never buffers, which the host's disk and stream offloading forget
        assert not list(model.buffers())

    def test_number_of_parameters_counts_weights_packed_or_not(self, tiny_model):
        model, floats = tiny_model("packed"), tiny_model()
        assert model.num_parameters() == floats.num_parameters() == sum(p.numel() for p in floats.parameters())
        assert model.num_parameters(exclude_embeddings=True) == floats.num_parameters(exclude_embeddings=True)
        assert model.num_parameters(only_trainable=True) < floats.num_parameters(only_trainable=True)
        assert model.get_memory_footprint() == sum(tensor.nbytes for tensor in model.state_dict().values())
        assert repr(model).count("weight=2-bit packed") == 8  # equal blocks are printed once


class TestInitialization:
    def fresh(self, initialization, **init_arguments):
        torch.manual_seed(0)
        config = {"sample_size": 8, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32}
        return TerDiTTransformer2DModel(**config, num_classes=10, initialization=initialization, **init_arguments)

    @pytest.mark.parametrize("initialization", ["small_gain", "reference"])
    def test_baseline_in_full_precision_differs_by_the_scales_only(self, tiny_inputs, initialization):
        ternary, dense = self.fresh(initialization), self.fresh(initialization, ternary=False)
        assert "initialization" not in ternary.to_json_string()
        names = {name for name in ternary.state_dict() if not name.endswith("weight_scale")}
        assert set(dense.state_dict()) == names
        for name in names:
            a, b = ternary.state_dict()[name], dense.state_dict()[name]
            assert a.shape == b.shape
            assert a.float().std().item() == pytest.approx(b.float().std().item(), rel=0.1, abs=1e-6), name
        for model in (ternary, dense):  # both predict zero, as DiT does
            assert not predict(model, tiny_inputs()).any()
            without_norm = self.fresh(initialization, ternary=model is ternary, adaln_norm=False)
            assert not any(block.adaln.linear.weight.any() for block in without_norm.transformer_blocks)

    def test_small_gain_keeps_the_variance_and_starts_adaln_with_a_tenth(self):
        model = self.fresh("small_gain")
        for name, layer in model.ternary_layers().items():
            assert layer.weight_scale.item() > 0
            gain = (layer.dequantize().square().sum(1).mean()).item()  # output variance per input variance
            assert gain == pytest.approx(1, rel=0.1), name
        for block in model.transformer_blocks:
            assert torch.equal(block.adaln.norm.weight, torch.full((6 * 128,), 0.1))
            assert block.adaln.linear.weight.any()
            assert not block.adaln.linear.bias.any()
            weight = block.ff.up_proj.weight  # Xavier-uniform
            assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(weight.shape)), rel=0.01)

    def test_reference_scales_are_normal_and_adaln_weights_zero(self):
        model = self.fresh("reference")
        scales = torch.stack([layer.weight_scale.detach() for layer in model.ternary_layers().values()])
        assert abs(scales.mean().item()) < 0.5
        assert scales.std().item() == pytest.approx(1, rel=0.5)
        for block in model.transformer_blocks:
            assert not block.adaln.linear.weight.any()
            assert torch.equal(block.adaln.norm.weight, torch.ones(6 * 128))


@pytest.mark.parametrize(("size", "billions"), [("600m", 0.60), ("4.2b", 4.23)])
def test_presets_have_the_published_number_of_ternary_weights_in_two_bits_each(size, billions):
    for pixels in (256, 512):
        with torch.device("meta"):
            model = TerDiTTransformer2DModel.from_preset(f"terdit-{size}-{pixels}", weight_format="packed")
            other = TerDiTTransformer2DModel.from_preset(f"terdit-{size}-{pixels}", num_classes=3, num_layers=1)
        assert model.config.sample_size == pixels // 8
        assert (other.class_embed.num_embeddings, len(other.transformer_blocks)) == (4, 1)
    state_dict = model.to(torch.bfloat16).state_dict()
    packed = sum(tensor.nbytes for name, tensor in state_dict.items() if name.endswith("weight_packed"))
    left = sum(tensor.numel() for name, tensor in state_dict.items() if not name.endswith("weight_packed"))
    assert round(4 * packed / 1e9, 2) == billions
    assert sum(tensor.nbytes for tensor in state_dict.values()) <= 1.02 * (packed + 2 * left)


@pytest.mark.parametrize(("heads", "ffn_dim"), [(4, 256), (24, 512), (26, 768), (192, 4096)])
def test_default_feed_forward_is_eight_thirds_of_the_width_rounded_up_to_256(heads, ffn_dim):
    with torch.device("meta"):
        model = TerDiTTransformer2DModel(num_layers=1, num_attention_heads=heads, attention_head_dim=8)
    assert model.transformer_blocks[0].ff.up_proj.out_features == ffn_dim


class TestSaving:
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("save", [{}, SHARDED, {**SHARDED, "variant": "fp16"}], ids=str)
    def test_loaded_model_is_bit_equal_in_every_dtype(self, model, tiny_inputs, tmp_path, save, low_cpu_mem_usage):
        # Bit-equal outputs: nothing that the forward computes depends on the dtype the model was built in.
        model.save_pretrained(tmp_path, **save)
        options = {"low_cpu_mem_usage": low_cpu_mem_usage, "variant": save.get("variant")}
        for dtype in (torch.float32, torch.bfloat16):
            loaded = TerDiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype, **options)
            assert equal_state(loaded, model.to(dtype))
            assert torch.equal(predict(loaded, tiny_inputs(dtype=dtype)), predict(model, tiny_inputs(dtype=dtype)))
            assert not loaded.training
            assert torch.get_default_dtype() == torch.float32

    def test_files_are_named_as_the_hosts_and_little_more_than_their_tensors(self, tiny_model, tmp_path):
        def names(save_pretrained, **save):
            shutil.rmtree(tmp_path)
            save_pretrained(tiny_model("packed"), tmp_path, **save)
            return {path.name for path in tmp_path.iterdir()}

        for save in (SHARDED, {"variant": "ema"}, SHARDED | {"variant": "ema"}, {}):
            theirs = names(ModelMixin.save_pretrained, **save)
            assert names(TerDiTTransformer2DModel.save_pretrained, **save) == theirs
        state_dict = tiny_model("packed").state_dict()
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert size < sum(tensor.nbytes for tensor in state_dict.values()) + 200 * len(state_dict)

    def test_half_precision_file_loads_as_it_is_and_as_float32(self, tiny_model, tmp_path):
        model = tiny_model("packed").to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        assert equal_state(TerDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16), model)
        assert equal_state(TerDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float32), model.float())

    @pytest.mark.parametrize(
        "options",
        [
            *({"scale_granularity": "row"}, {"scale_granularity": 8}, {"learn_sigma": False}),
            *({"num_key_value_heads": 2}, {"adaln_norm": False}, {"pos_embed_type": "rope+sincos2d"}),
        ],
        ids=str,
    )
    def test_options_survive_saving(self, tiny_model, tiny_inputs, tmp_path, options):
        model = tiny_model("packed", **options)
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(str(tmp_path))
        assert type(loaded) is TerDiTTransformer2DModel
        assert torch.equal(predict(loaded, tiny_inputs()), predict(model, tiny_inputs()))

    @pytest.mark.parametrize("save", [{}, SHARDED], ids=str)
    def test_a_device_map_changes_no_output_bit(self, model, tiny_inputs, tmp_path, save):
        model.save_pretrained(tmp_path / "saved", **save)
        expected = predict(model, tiny_inputs())
        to_disk = {name: "cpu" for name, _ in model.named_children()} | {"proj_in": "disk"}
        del to_disk["transformer_blocks"]
        to_disk |= {"transformer_blocks.0": "disk", "transformer_blocks.1": "cpu"}
        for device_map in ("auto", {"": "cpu"}, to_disk):
            loaded = TerDiTTransformer2DModel.from_pretrained(
                tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
            )
            assert torch.equal(predict(loaded, tiny_inputs()), expected)
        assert {p.device.type for p in loaded.transformer_blocks[0].parameters()} == {"meta"}

    def test_fine_tuning_may_start_with_another_number_of_classes(self, tiny_model, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded = TerDiTTransformer2DModel.from_pretrained(
            tmp_path, num_classes=3, ignore_mismatched_sizes=True, low_cpu_mem_usage=False
        )
        assert loaded.class_embed.weight.shape == (4, 32)
        assert torch.equal(loaded.proj_out.weight, model.proj_out.weight)
        changes = {"sample_size": 16, "class_dropout_prob": 0.2}  # what is not in the file
        config = TerDiTTransformer2DModel.from_pretrained(tmp_path, **changes).config
        assert {name: config[name] for name in changes} == changes


class TestCopies:
    def test_copies_and_pickles_are_equal_and_independent(self, model, tiny_inputs):
        before = predict(model, tiny_inputs())
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(predict(again, tiny_inputs()), before)
            assert again.config == model.config
            with torch.no_grad():
                again.proj_out.weight.zero_()
        assert torch.equal(predict(model, tiny_inputs()), before)

    @pytest.mark.parametrize("context", [lambda: torch.device("meta"), init_empty_weights])
    def test_meta_model_takes_a_state_dict_by_assignment(self, model, tiny_inputs, context):
        with context():
            empty = TerDiTTransformer2DModel.from_config(model.config)
        assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
        empty.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(predict(empty.eval(), tiny_inputs()), predict(model, tiny_inputs()))


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


class TestDtypes:
    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
    def test_default_dtype_at_call_time_changes_no_output_bit(self, model, tiny_inputs, default, default_dtype):
        inputs = tiny_inputs()
        expected = predict(model, inputs)
        default_dtype(default)
        assert torch.equal(predict(model, inputs), expected)

    def test_default_dtype_at_construction_equals_a_cast(self, model, tiny_inputs, default_dtype):
        default_dtype(torch.bfloat16)
        built = TerDiTTransformer2DModel.from_config(model.config)
        default_dtype(torch.float32)
        model = model.to(torch.bfloat16)
        built.load_state_dict(model.state_dict())
        assert equal_state(built, model)
        inputs = tiny_inputs(dtype=torch.bfloat16)
        assert torch.equal(predict(built, inputs), predict(model, inputs))

    def test_autocast_stays_close_and_trains_every_parameter_in_float32(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        with torch.autocast("cpu", torch.bfloat16):
            sample = model.train()(**tiny_inputs()).sample
        torch.testing.assert_close(sample.float(), expected, rtol=0, atol=0.1)
        sample.float().square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name

    def test_position_and_time_are_computed_in_float32(self, tiny_model, tiny_inputs):
        # Angles in bfloat16 would be off by half a radian at position 200, and time steps 4 apart would be one.
        model = tiny_model("packed").to(torch.bfloat16)
        inputs = tiny_inputs(dtype=torch.bfloat16)
        near = predict(model, inputs | {"timestep": torch.tensor([996, 997])})
        same = predict(model, inputs | {"timestep": torch.tensor([997, 997])})
        assert not torch.equal(near[0], same[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [2, 6, 16, 96])
def test_positions_and_norms_are_the_hosts_within_rounding(dtype, head_dim):
    x = torch.randn(2, 9, 3, head_dim).to(dtype)
    angles = get_1d_rotary_pos_embed(head_dim, torch.arange(9), use_real=True)
    norm = TerDiTRMSNorm(head_dim, eps=1e-5).requires_grad_(False).to(dtype)
    norm.weight.copy_(torch.rand(head_dim))
    for found, expected in (
        (rotate(x, angles), apply_rotary_emb(x.float(), angles, sequence_dim=1)),
        (norm(x), nn.functional.rms_norm(x.float(), (head_dim,), norm.weight.float(), norm.eps)),
    ):
        assert (found.dtype, found.shape) == (dtype, x.shape)
        torch.testing.assert_close(found, expected.to(dtype), rtol=max(1e-6, 2 * torch.finfo(dtype).eps), atol=1e-6)


class TestTraining:
    def gradients(self, model, inputs):
        model.zero_grad()
        sample = model(**inputs).sample
        sample.square().mean().backward()
        return sample.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    def test_gradient_checkpointing_computes_every_block_twice_and_changes_nothing(self, model, tiny_inputs):
        sample, gradients = self.gradients(model.train(), tiny_inputs())
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
        calls = []
        for block in model.transformer_blocks:
            block.attn.register_forward_hook(lambda *_: calls.append(1))
        again, checkpointed = self.gradients(model, tiny_inputs())
        assert len(calls) == 2 * len(model.transformer_blocks)
        assert torch.equal(sample, again)
        for name, gradient in gradients.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing


class CountingProcessor(TerDiTAttnProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


class TestAttention:
    @pytest.fixture(autouse=True)
    def _native_backend(self, tiny_model):
        yield
        tiny_model().set_attention_backend("native")  # the host makes the last backend of any model everyone's default

    @pytest.mark.parametrize("backend", ["native", "_native_math"])
    def test_attention_backends_agree(self, model, tiny_model, tiny_inputs, backend):
        def backends(model):
            return {processor._attention_backend for processor in model.attn_processors.values()}

        expected, other = predict(model, tiny_inputs()), tiny_model()
        model.set_attention_backend(backend)
        assert backends(model) == {backend}
        assert backends(other) == {None}
        torch.testing.assert_close(predict(model, tiny_inputs()), expected, rtol=1e-5, atol=1e-5)
        model.reset_attention_backend()
        assert backends(model) == {None}

    def test_every_attention_takes_a_processor_and_no_projection_is_fused(self, model, tiny_inputs):
        before, expected = copy.deepcopy(model), predict(model, tiny_inputs())
        assert set(model.attn_processors) == {f"transformer_blocks.{i}.attn.processor" for i in range(2)}
        processor = CountingProcessor()
        model.set_attn_processor(processor)
        assert torch.equal(predict(model, tiny_inputs()), expected)
        assert processor.calls == 2
        model.fuse_qkv_projections()
        assert torch.equal(predict(model, tiny_inputs()), expected)
        model.unfuse_qkv_projections()
        assert equal_state(model, before)

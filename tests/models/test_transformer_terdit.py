import copy
import math
import pickle
import shutil

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, init_empty_weights
from diffusers import AutoModel, FirstBlockCacheConfig, ModelMixin
from torch import nn

from diffusers_terdit import TerDiTTransformer2DModel, TernaryLinear
from diffusers_terdit.models.transformer_terdit import TerDiTAttnProcessor, sincos_2d


VARIANTS = {"float": {}, "packed": {"weight_format": "packed"}, "dense": {"ternary": False}}
SHARDED = {"max_shard_size": "20KB"}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def model(tiny_model, variant):
    return tiny_model(**variant)


@torch.no_grad()
def predict(model, inputs):
    return model(**inputs).sample


def dtypes(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


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
    @pytest.mark.parametrize("size", [(8, 8), (4, 10)], ids=str)
    def test_network_is_the_one_the_papers_draw(self, model, tiny_inputs, size):
        inputs = tiny_inputs(2, *size)
        dense = model.dequantize() if model.config.ternary else model
        expected = plain_network(dense.state_dict(), **inputs)
        torch.testing.assert_close(predict(model, inputs), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("size", [(8, 8), (2, 2), (4, 16), (12, 6)], ids=str)
    def test_output_has_the_size_of_the_input_and_twice_its_channels(self, model, tiny_inputs, size):
        sample = predict(model, tiny_inputs(3, *size))
        assert sample.shape == (3, 8, *size)
        assert sample.dtype == torch.float32
        assert sample.isfinite().all()

    @pytest.mark.parametrize("patch_size", [1, 4])
    def test_other_patch_sizes_work(self, tiny_model, tiny_inputs, patch_size):
        assert predict(tiny_model(patch_size=patch_size), tiny_inputs()).shape == (2, 8, 8, 8)

    def test_two_calls_give_the_same_bits(self, model, tiny_inputs):
        assert torch.equal(predict(model, tiny_inputs()), predict(model, tiny_inputs()))

    def test_tuple_is_the_same_as_the_output_object(self, model, tiny_inputs):
        with torch.no_grad():
            (sample,) = model(**tiny_inputs(), return_dict=False)
        assert torch.equal(sample, predict(model, tiny_inputs()))

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

    @pytest.mark.parametrize(
        "timestep", [torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0]), torch.tensor([7, 7])], ids=repr
    )
    def test_timestep_may_be_a_scalar_or_float(self, model, tiny_inputs, timestep):
        inputs = tiny_inputs() | {"timestep": torch.tensor([7, 7])}
        assert torch.equal(predict(model, inputs | {"timestep": timestep}), predict(model, inputs))

    def test_null_label_has_a_row_of_its_own(self, model, tiny_inputs):
        inputs = tiny_inputs()
        samples = [predict(model, inputs | {"class_labels": torch.full((2,), label)}) for label in range(11)]
        assert len({sample.sum().item() for sample in samples}) == 11

    def test_tokens_know_their_position(self, model, tiny_inputs):
        # The same patch everywhere and permuted: without positions the output would be permuted alike.
        inputs = tiny_inputs()
        flipped = inputs | {"hidden_states": inputs["hidden_states"].roll(2, dims=3)}
        rolled = predict(model, flipped).roll(-2, dims=3)
        assert (rolled - predict(model, inputs)).abs().max() > 1e-3

    @pytest.mark.parametrize("position", ["rope", "rope+sincos2d"])
    def test_every_position_embedding_works_at_every_size(self, tiny_model, tiny_inputs, position):
        model = tiny_model(pos_embed_type=position)
        assert predict(model, tiny_inputs(2, 4, 12)).isfinite().all()
        other = tiny_model(pos_embed_type="rope")
        assert torch.equal(predict(model, tiny_inputs()), predict(other, tiny_inputs())) == (position == "rope")

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

    def test_fewer_key_value_heads_shrink_only_keys_and_values(self, tiny_model, tiny_inputs, variant):
        model = tiny_model(**variant, num_key_value_heads=2)
        attn = model.transformer_blocks[0].attn
        assert (attn.to_q.out_features, attn.to_k.out_features, attn.to_v.out_features) == (32, 16, 16)
        assert predict(model, tiny_inputs()).isfinite().all()

    def test_grouped_query_attention_equals_repeated_heads(self, tiny_model, tiny_inputs):
        grouped = tiny_model(ternary=False, num_key_value_heads=2, qk_norm=False)
        full = tiny_model(ternary=False, qk_norm=False)
        state_dict = grouped.state_dict()
        for name in [n for n in state_dict if "to_k" in n or "to_v" in n]:
            state_dict[name] = state_dict[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
        full.load_state_dict(state_dict)
        torch.testing.assert_close(predict(grouped, tiny_inputs()), predict(full, tiny_inputs()), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("option", [{"qk_norm": False}, {"adaln_norm": False}, {"norm_eps": 1e-2}], ids=str)
    def test_every_option_changes_the_output(self, tiny_model, tiny_inputs, variant, option):
        changed, plain = tiny_model(**variant, **option), tiny_model(**variant)
        assert (predict(changed, tiny_inputs()) - predict(plain, tiny_inputs())).abs().max() > 1e-4

    def test_without_learned_variance_there_is_noise_only(self, tiny_model, tiny_inputs, variant):
        assert predict(tiny_model(**variant, learn_sigma=False), tiny_inputs()).shape == (2, 4, 8, 8)

    def test_model_runs_in_train_mode_as_in_eval_mode(self, model, tiny_inputs):
        before = predict(model, tiny_inputs())
        assert torch.equal(predict(model.train(), tiny_inputs()), before)


class TestRefusals:
    @pytest.mark.parametrize(
        "shape", [(2, 3, 8, 8), (2, 4, 7, 8), (2, 4, 8, 9), (4, 8, 8), (2, 4, 0, 8), (2, 4, 8, 8, 1)], ids=str
    )
    def test_wrong_latents_are_refused_with_their_shape(self, tiny_model, tiny_inputs, shape):
        with pytest.raises(ValueError, match=rf"\(batch, 4, height, width\).*divide by 2.*{shape[0]}, {shape[1]}"):
            tiny_model()(**tiny_inputs() | {"hidden_states": torch.zeros(shape)})

    @pytest.mark.parametrize(
        ("init_arguments", "message"),
        [
            ({"attention_head_dim": 7}, "even `attention_head_dim`, got 7"),
            ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
            ({"sample_size": 9}, "sample_size=9 must be a multiple of patch_size=2"),
            ({"pos_embed_type": "learned"}, "pos_embed_type.*'learned'"),
            (
                {"pos_embed_type": "rope+sincos2d", "num_attention_heads": 1, "attention_head_dim": 6},
                "divisible by 4, got 6",
            ),
            ({"ternary": False, "weight_format": "packed"}, "ternary=False has no packed weights"),
            ({"initialization": "zeros"}, "initialization.*'zeros'"),
            ({"weight_format": "latent"}, "weight_format.*'latent'"),
            ({"scale_granularity": "column"}, "scale_granularity.*'column'"),
            ({"scale_granularity": 5}, "in_features=32 and groups of 5"),
            ({"weight_format": "packed", "ffn_dim": 66}, "multiple of 4, got 66"),
        ],
        ids=str,
    )
    def test_impossible_configurations_are_refused_by_value(self, tiny_config, init_arguments, message):
        with pytest.raises(ValueError, match=message):
            TerDiTTransformer2DModel(**tiny_config | init_arguments)

    def test_unknown_preset_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"'terdit-9b'.*'terdit-600m-256'"):
            TerDiTTransformer2DModel.from_preset("terdit-9b")

    @pytest.mark.parametrize("method", ["pack", "unpack"])
    def test_full_precision_model_has_nothing_to_pack(self, tiny_model, method):
        with pytest.raises(ValueError, match="ternary=False"):
            getattr(tiny_model(ternary=False), method)()

    def test_failed_pack_names_the_layer_and_leaves_every_layer_as_it_was(self, tiny_model, tiny_inputs):
        model = tiny_model(ffn_dim=66)
        before = predict(model, tiny_inputs())
        with pytest.raises(ValueError, match=r"transformer_blocks\.0\.ff\.gate_proj: .*multiple of 4, got 66"):
            model.pack()
        assert model.config.weight_format == "float"
        assert {layer.weight_format for layer in model.ternary_layers().values()} == {"float"}
        assert torch.equal(predict(model, tiny_inputs()), before)


class TestWeightFormats:
    @pytest.mark.parametrize("scale_granularity", ["tensor", "row", 8])
    def test_pack_changes_no_output_bit(self, tiny_model, tiny_inputs, scale_granularity):
        model = tiny_model(scale_granularity=scale_granularity)
        before = predict(model, tiny_inputs())
        assert model.pack() is model
        assert model.config.weight_format == "packed"
        assert torch.equal(predict(model, tiny_inputs()), before)

    def test_unpack_then_pack_changes_no_tensor(self, tiny_model, tiny_inputs):
        model = tiny_model("packed")
        before, sample = copy.deepcopy(model), predict(model, tiny_inputs())
        assert torch.equal(predict(model.unpack(), tiny_inputs()), sample)
        assert model.config.weight_format == "float"
        assert equal_state(model.pack(), before)

    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_dequantize_gives_the_full_precision_twin(self, tiny_model, tiny_inputs, weight_format):
        model = tiny_model(weight_format)
        before = copy.deepcopy(model)
        dense = model.dequantize()
        assert not dense.config.ternary
        assert not dense.ternary_layers()
        torch.testing.assert_close(predict(dense, tiny_inputs()), predict(model, tiny_inputs()), rtol=1e-5, atol=1e-5)
        assert equal_state(model, before)

    @pytest.mark.parametrize("pos_embed_type", ["rope", "rope+sincos2d"])
    def test_dequantize_copies_and_draws_nothing(self, tiny_model, pos_embed_type):
        model = tiny_model("packed", pos_embed_type=pos_embed_type)
        before = torch.get_rng_state()
        dense = model.dequantize()
        assert torch.equal(torch.get_rng_state(), before)
        layers = model.ternary_layers()
        assert all(torch.equal(dense.get_submodule(name).weight, layer.dequantize()) for name, layer in layers.items())
        others = {name for name in dense.state_dict() if name.removesuffix(".weight") not in layers}
        assert all(torch.equal(dense.state_dict()[name], model.state_dict()[name]) for name in others)

    @pytest.mark.parametrize("training", [True, False])
    def test_dequantized_model_keeps_dtype_and_mode(self, tiny_model, training):
        dense = tiny_model("packed").to(torch.bfloat16).train(training).dequantize()
        assert (dense.dtype, dense.training) == (torch.bfloat16, training)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_packed_codes_and_scales_are_the_same_in_half_precision(self, tiny_model, dtype):
        model = tiny_model("packed")
        before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("weight_packed", "weight_scale"))}
        state_dict = model.to(dtype).state_dict()
        assert all(torch.equal(state_dict[n], t) and state_dict[n].dtype == t.dtype for n, t in before.items())
        assert model.dtype == dtype
        assert {t.dtype for n, t in state_dict.items() if n not in before} == {dtype}

    # Not the float format: its weights ternarize differently in half precision, and a warning says so.
    @pytest.mark.parametrize("variant", [VARIANTS["packed"], VARIANTS["dense"]], ids=["packed", "dense"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_stays_close(self, tiny_model, tiny_inputs, variant, dtype):
        expected = predict(tiny_model(**variant), tiny_inputs())
        sample = predict(tiny_model(**variant).to(dtype), tiny_inputs(dtype=dtype))
        assert sample.dtype == dtype
        torch.testing.assert_close(sample.float(), expected, rtol=0, atol=0.05)

    def test_ternary_layers_are_the_documented_ones(self, tiny_model):
        model = tiny_model("packed")
        inside = ["adaln.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        inside += ["ff.gate_proj", "ff.up_proj", "ff.down_proj"]
        assert set(model.ternary_layers()) == {f"transformer_blocks.{i}.{name}" for i in range(2) for name in inside}
        outside = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert outside == {
            "proj_in", "time_embed.linear_1", "time_embed.linear_2", "norm_out.linear", "proj_out"
        }  # fmt: skip

    def test_packed_parameters_are_never_buffers(self, tiny_model):
        # The host's disk and stream offloading forget buffers.
        assert not list(tiny_model("packed").buffers())


class TestInitialization:
    def fresh(self, initialization, **init_arguments):
        torch.manual_seed(0)
        config = {"sample_size": 8, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32}
        return TerDiTTransformer2DModel(**config, num_classes=10, initialization=initialization, **init_arguments)

    @pytest.mark.parametrize("initialization", ["small_gain", "reference"])
    @pytest.mark.parametrize("ternary", [True, False])
    def test_fresh_model_predicts_zero_as_dit_does(self, tiny_inputs, initialization, ternary):
        assert not predict(self.fresh(initialization, ternary=ternary), tiny_inputs()).any()

    def test_small_gain_scales_are_positive_and_keep_the_variance(self):
        for name, layer in self.fresh("small_gain").ternary_layers().items():
            assert layer.weight_scale.item() > 0
            gain = (layer.dequantize().square().sum(1).mean()).item()  # output variance per input variance
            assert gain == pytest.approx(1, rel=0.1), name

    def test_small_gain_starts_adaln_with_a_tenth_of_the_gain(self):
        for block in self.fresh("small_gain").transformer_blocks:
            assert torch.equal(block.adaln.norm.weight, torch.full((6 * 128,), 0.1))
            assert block.adaln.linear.weight.any()
            assert not block.adaln.linear.bias.any()

    def test_reference_scales_are_normal_and_adaln_weights_zero(self):
        model = self.fresh("reference")
        scales = torch.stack([layer.weight_scale.detach() for layer in model.ternary_layers().values()])
        assert abs(scales.mean().item()) < 0.5
        assert scales.std().item() == pytest.approx(1, rel=0.5)
        assert scales.min() < 0 < scales.max()
        for block in model.transformer_blocks:
            assert not block.adaln.linear.weight.any()
            assert torch.equal(block.adaln.norm.weight, torch.ones(6 * 128))

    @pytest.mark.parametrize("initialization", ["small_gain", "reference"])
    @pytest.mark.parametrize("ternary", [True, False])
    def test_without_a_norm_adaln_weights_start_at_zero(self, initialization, ternary):
        model = self.fresh(initialization, ternary=ternary, adaln_norm=False)
        assert not any(block.adaln.linear.weight.any() for block in model.transformer_blocks)

    @pytest.mark.parametrize("initialization", ["small_gain", "reference"])
    def test_full_precision_twin_differs_by_the_scales_only(self, initialization):
        ternary, dense = self.fresh(initialization), self.fresh(initialization, ternary=False)
        names = {name for name in ternary.state_dict() if not name.endswith("weight_scale")}
        assert set(dense.state_dict()) == names
        for name in names:
            a, b = ternary.state_dict()[name], dense.state_dict()[name]
            assert a.shape == b.shape
            assert a.float().std().item() == pytest.approx(b.float().std().item(), rel=0.1, abs=1e-6), name

    def test_linear_weights_are_xavier_uniform(self):
        weight = self.fresh("small_gain").transformer_blocks[0].ff.up_proj.weight
        assert weight.abs().max().item() == pytest.approx(math.sqrt(6 / sum(weight.shape)), rel=0.01)

    def test_initialization_is_not_stored(self):
        model = self.fresh("reference")
        assert "initialization" not in model.config
        assert "initialization" not in model.to_json_string()


class TestPresets:
    @pytest.mark.parametrize(
        ("name", "billions", "sample_size"),
        [
            ("terdit-600m-256", 0.60, 32),
            ("terdit-600m-512", 0.60, 64),
            ("terdit-4.2b-256", 4.23, 32),
            ("terdit-4.2b-512", 4.23, 64),
        ],
    )
    def test_preset_has_the_published_number_of_ternary_weights(self, name, billions, sample_size):
        with torch.device("meta"):
            model = TerDiTTransformer2DModel.from_preset(name, weight_format="packed")
        weights = sum(4 * layer.weight_packed.numel() for layer in model.ternary_layers().values())
        assert round(weights / 1e9, 2) == billions
        assert model.config.sample_size == sample_size

    def test_preset_counts_the_same_in_float_format(self):
        with init_empty_weights():
            model = TerDiTTransformer2DModel.from_preset("terdit-600m-256")
        assert round(sum(layer.weight.numel() for layer in model.ternary_layers().values()) / 1e9, 2) == 0.60

    @pytest.mark.parametrize(("heads", "ffn_dim"), [(4, 256), (24, 512), (26, 768), (192, 4096)])
    def test_default_feed_forward_is_eight_thirds_of_the_width_rounded_up_to_256(self, heads, ffn_dim):
        with torch.device("meta"):
            model = TerDiTTransformer2DModel(num_layers=1, num_attention_heads=heads, attention_head_dim=8)
        assert model.transformer_blocks[0].ff.up_proj.out_features == ffn_dim

    def test_overrides_win_over_the_preset(self):
        with torch.device("meta"):
            model = TerDiTTransformer2DModel.from_preset("terdit-600m-256", num_classes=3, num_layers=1)
        assert (model.class_embed.num_embeddings, len(model.transformer_blocks)) == (4, 1)

    def test_packed_600m_folder_is_two_bits_per_weight(self):
        with torch.device("meta"):
            model = TerDiTTransformer2DModel.from_preset("terdit-600m-256", weight_format="packed").to(torch.bfloat16)
        size = sum(t.nbytes for n, t in model.state_dict().items() if not n.endswith("weight_scale"))
        weights = sum(4 * layer.weight_packed.numel() for layer in model.ternary_layers().values())
        others = sum(
            t.numel() for n, t in model.state_dict().items() if not n.endswith(("weight_scale", "weight_packed"))
        )
        assert size <= 1.02 * (weights / 4 + 2 * others)
        assert size < 165e6

    @pytest.mark.slow
    def test_packed_600m_folder_on_disk_is_two_bits_per_weight(self, tmp_path):
        model = TerDiTTransformer2DModel.from_preset("terdit-600m-256", weight_format="packed").to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        weights = sum(4 * layer.weight_packed.numel() for layer in model.ternary_layers().values())
        others = sum(t.numel() for n, t in model.state_dict().items() if not n.endswith("weight_packed"))
        size = sum(path.stat().st_size for path in tmp_path.iterdir())
        shutil.rmtree(tmp_path)
        assert size <= 1.02 * (weights / 4 + 2 * others)

    def test_file_is_little_more_than_its_tensors(self, tiny_model, tmp_path):
        model = tiny_model("packed").to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        tensors = sum(tensor.nbytes for tensor in model.state_dict().values())
        header = 200 * len(model.state_dict())
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) < tensors + header


class TestSaving:
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("save", [{}, SHARDED, {"variant": "fp16"}], ids=str)
    def test_loaded_model_is_bit_equal(self, model, tiny_inputs, tmp_path, save, low_cpu_mem_usage):
        model.save_pretrained(tmp_path, **save)
        kwargs = {"variant": save["variant"]} if "variant" in save else {}
        loaded = TerDiTTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        assert equal_state(loaded, model)
        assert torch.equal(predict(loaded, tiny_inputs()), predict(model, tiny_inputs()))
        assert not loaded.training

    def test_sharded_variant_loads_bit_equal(self, model, tmp_path):
        model.save_pretrained(tmp_path, variant="fp16", **SHARDED)
        names = {path.name for path in tmp_path.iterdir()}
        assert "diffusion_pytorch_model.safetensors.index.fp16.json" in names
        assert equal_state(TerDiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16"), model)

    def test_file_names_are_the_hosts(self, tiny_model, tmp_path):
        def names(**save):
            folder = tmp_path / str(len(list(tmp_path.iterdir())))
            TerDiTTransformer2DModel.save_pretrained(tiny_model(), folder, **save)
            ours = {path.name for path in folder.iterdir()}
            shutil.rmtree(folder)
            ModelMixin.save_pretrained(tiny_model(), folder, **save)
            return ours, {path.name for path in folder.iterdir()}

        for save in ({}, SHARDED, {"variant": "ema"}, SHARDED | {"variant": "ema"}):
            ours, theirs = names(**save)
            assert ours == theirs

    @pytest.mark.parametrize("save", [{}, SHARDED], ids=str)
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_loading_in_half_precision_equals_casting(
        self, model, tiny_inputs, tmp_path, dtype, low_cpu_mem_usage, save
    ):
        # Bit-equal outputs: nothing that the forward computes depends on the dtype the model was built in.
        model.save_pretrained(tmp_path, **save)
        loaded = TerDiTTransformer2DModel.from_pretrained(tmp_path, dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
        assert equal_state(loaded, model.to(dtype))
        assert torch.equal(predict(loaded, tiny_inputs(dtype=dtype)), predict(model, tiny_inputs(dtype=dtype)))
        assert torch.get_default_dtype() == torch.float32

    def test_half_precision_file_loads_as_it_is_and_as_float32(self, tiny_model, tmp_path):
        model = tiny_model("packed").to(torch.bfloat16)
        model.save_pretrained(tmp_path)
        assert equal_state(TerDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16), model)
        assert equal_state(TerDiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.float32), model.float())

    @pytest.mark.parametrize("scale_granularity", ["tensor", "row", 8])
    @pytest.mark.parametrize("weight_format", ["float", "packed"])
    def test_scale_granularity_survives_saving(
        self, tiny_model, tiny_inputs, tmp_path, weight_format, scale_granularity
    ):
        model = tiny_model(weight_format, scale_granularity=scale_granularity)
        model.save_pretrained(tmp_path)
        loaded = TerDiTTransformer2DModel.from_pretrained(tmp_path)
        assert loaded.config.scale_granularity == scale_granularity
        assert torch.equal(predict(loaded, tiny_inputs()), predict(model, tiny_inputs()))

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("learn_sigma", False),
            ("num_key_value_heads", 2),
            ("adaln_norm", False),
            ("pos_embed_type", "rope+sincos2d"),
        ],
    )
    def test_options_survive_saving(self, tiny_model, tiny_inputs, tmp_path, variant, option, value):
        model = tiny_model(**variant, **{option: value})
        model.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(str(tmp_path))
        assert type(loaded) is TerDiTTransformer2DModel
        assert torch.equal(predict(loaded, tiny_inputs()), predict(model, tiny_inputs()))

    @pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
    @pytest.mark.parametrize("save", [{}, SHARDED], ids=str)
    def test_device_map_changes_no_output_bit(self, model, tiny_inputs, tmp_path, save, device_map):
        model.save_pretrained(tmp_path, **save)
        loaded = TerDiTTransformer2DModel.from_pretrained(tmp_path, device_map=device_map)
        assert torch.equal(predict(loaded, tiny_inputs()), predict(model, tiny_inputs()))

    @pytest.mark.parametrize("save", [{}, SHARDED], ids=str)
    def test_weights_offloaded_to_disk_change_no_output_bit(self, model, tiny_inputs, tmp_path, save):
        model.save_pretrained(tmp_path, **save)
        device_map = {name: "cpu" for name, _ in model.named_children()}
        del device_map["transformer_blocks"]
        device_map |= {"transformer_blocks.0": "disk", "transformer_blocks.1": "cpu", "proj_in": "disk"}
        loaded = TerDiTTransformer2DModel.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert {p.device.type for p in loaded.transformer_blocks[0].parameters()} == {"meta"}
        assert torch.equal(predict(loaded, tiny_inputs()), predict(model, tiny_inputs()))

    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    def test_overrides_may_change_what_is_not_in_the_file(self, tiny_model, tmp_path, low_cpu_mem_usage):
        tiny_model("packed").save_pretrained(tmp_path)
        loaded = TerDiTTransformer2DModel.from_pretrained(
            tmp_path, sample_size=16, class_dropout_prob=0.2, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert (loaded.config.sample_size, loaded.config.class_dropout_prob) == (16, 0.2)

    def test_fine_tuning_may_start_with_another_number_of_classes(self, tiny_model, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path)
        loaded = TerDiTTransformer2DModel.from_pretrained(
            tmp_path, num_classes=3, ignore_mismatched_sizes=True, low_cpu_mem_usage=False
        )
        assert loaded.class_embed.weight.shape == (4, 32)
        assert torch.equal(loaded.proj_out.weight, model.proj_out.weight)


class TestCopies:
    def test_deepcopy_is_equal_and_independent(self, model, tiny_inputs):
        before = predict(model, tiny_inputs())
        copied = copy.deepcopy(model)
        assert torch.equal(predict(copied, tiny_inputs()), before)
        with torch.no_grad():
            copied.proj_out.weight.zero_()
        assert torch.equal(predict(model, tiny_inputs()), before)

    def test_pickle_gives_an_equal_model(self, model, tiny_inputs):
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(predict(again, tiny_inputs()), predict(model, tiny_inputs()))
        assert again.config == model.config

    def test_from_config_builds_the_same_structure(self, model):
        again = TerDiTTransformer2DModel.from_config(model.config)
        assert {n: (t.shape, t.dtype) for n, t in again.state_dict().items()} == {
            n: (t.shape, t.dtype) for n, t in model.state_dict().items()
        }

    @pytest.mark.parametrize("context", [lambda: torch.device("meta"), init_empty_weights])
    def test_meta_model_takes_a_state_dict_by_assignment(self, model, tiny_inputs, context):
        with context():
            empty = TerDiTTransformer2DModel.from_config(model.config)
        assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
        empty.load_state_dict(model.state_dict(), assign=True)
        assert torch.equal(predict(empty.eval(), tiny_inputs()), predict(model, tiny_inputs()))

    def test_print_shows_every_ternary_layer(self, tiny_model):
        assert repr(tiny_model("packed")).count("weight=2-bit packed") == 8  # equal blocks are printed once


class TestDtypes:
    @pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
    def test_default_dtype_at_call_time_changes_no_output_bit(self, model, tiny_inputs, default):
        inputs = tiny_inputs()
        expected = predict(model, inputs)
        torch.set_default_dtype(default)
        try:
            sample = predict(model, inputs)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(sample, expected)

    def test_default_dtype_at_construction_equals_a_cast(self, model, tiny_inputs, variant):
        torch.set_default_dtype(torch.bfloat16)
        try:
            built = TerDiTTransformer2DModel.from_config(model.config)
        finally:
            torch.set_default_dtype(torch.float32)
        model = model.to(torch.bfloat16)
        assert dtypes(built) == dtypes(model)
        built.load_state_dict(model.state_dict())
        inputs = tiny_inputs(dtype=torch.bfloat16)
        assert torch.equal(predict(built, inputs), predict(model, inputs))

    def test_autocast_trains_every_parameter_in_float32(self, model, tiny_inputs):
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**tiny_inputs()).sample.float().square().mean()
        loss.backward()
        assert loss.isfinite()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad.dtype == torch.float32, name
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name

    def test_autocast_stays_close_to_float32(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        with torch.autocast("cpu", torch.bfloat16):
            sample = predict(model, tiny_inputs())
        torch.testing.assert_close(sample.float(), expected, rtol=0, atol=0.1)

    def test_position_and_time_are_computed_in_float32(self, tiny_model, tiny_inputs):
        # Angles in bfloat16 would be off by half a radian at position 200, and time steps 4 apart would be one.
        model = tiny_model("packed").to(torch.bfloat16)
        inputs = tiny_inputs(dtype=torch.bfloat16)
        near = predict(model, inputs | {"timestep": torch.tensor([996, 997])})
        same = predict(model, inputs | {"timestep": torch.tensor([997, 997])})
        assert not torch.equal(near[0], same[0])

    @pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16], ids=str)
    def test_layerwise_casting_leaves_codes_and_scales_alone(self, model, tiny_inputs, storage):
        before = {n: t.clone() for n, t in model.state_dict().items() if n.endswith(("weight_packed", "weight_scale"))}
        expected = predict(model, tiny_inputs())
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        state_dict = model.state_dict()
        assert all(torch.equal(state_dict[n], t) for n, t in before.items())
        cast = {name for name, tensor in state_dict.items() if tensor.dtype == storage}
        assert bool(cast) == (not model.config.ternary)
        torch.testing.assert_close(predict(model, tiny_inputs()), expected, rtol=0, atol=0.2)


class TestOffloading:
    """From CPU to CPU: the hooks run, the copies between devices do not."""

    @pytest.mark.parametrize("to_disk", [False, True])
    @pytest.mark.parametrize(
        "group", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=str
    )
    def test_group_offloading_changes_no_output_bit(self, model, tiny_inputs, tmp_path, group, to_disk):
        expected = predict(model, tiny_inputs())
        disk = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **group, **disk)
        for _ in range(2):
            assert torch.equal(predict(model, tiny_inputs()), expected)

    def test_group_offloading_leaves_no_block_out(self, model):
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
        hooked = {name for name, module in model.named_modules() if hasattr(module, "_diffusers_hook")}
        holders = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
        assert holders <= hooked

    def test_sequential_offloading_empties_every_layer(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        for _ in range(2):
            assert torch.equal(predict(model, tiny_inputs()), expected)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}

    def test_model_offloading_changes_no_output_bit(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        model, hook = cpu_offload_with_hook(model, torch.device("cpu"))
        assert torch.equal(predict(model, tiny_inputs()), expected)
        hook.offload()
        assert torch.equal(predict(model, tiny_inputs()), expected)

    def test_disk_offloading_changes_no_output_bit(self, model, tiny_inputs, tmp_path):
        expected = predict(model, tiny_inputs())
        model = disk_offload(model, tmp_path, torch.device("cpu"))
        assert torch.equal(predict(model, tiny_inputs()), expected)


class TestTraining:
    def gradients(self, model, inputs):
        model.zero_grad()
        sample = model(**inputs).sample
        sample.square().mean().backward()
        return sample.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    def test_every_parameter_gets_a_gradient(self, model, tiny_inputs):
        _, gradients = self.gradients(model.train(), tiny_inputs())
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())

    def test_gradient_checkpointing_changes_neither_output_nor_gradient(self, model, tiny_inputs):
        sample, gradients = self.gradients(model.train(), tiny_inputs())
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
        again, checkpointed = self.gradients(model, tiny_inputs())
        assert torch.equal(sample, again)
        for name, gradient in gradients.items():
            torch.testing.assert_close(checkpointed[name], gradient, msg=name)
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing

    def test_gradient_checkpointing_computes_every_block_twice(self, model, tiny_inputs):
        calls = []
        for block in model.train().transformer_blocks:
            block.attn.register_forward_hook(lambda *_: calls.append(1))
        model.enable_gradient_checkpointing()
        self.gradients(model, tiny_inputs())
        assert len(calls) == 2 * len(model.transformer_blocks)

    @pytest.mark.parametrize("variant", [VARIANTS["float"], VARIANTS["dense"]], ids=["float", "dense"])
    def test_twenty_steps_overfit_one_batch(self, tiny_model, tiny_inputs, variant):
        model, inputs = tiny_model(**variant).train(), tiny_inputs()
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(20):
            loss = (model(**inputs).sample[:, :4] - inputs["hidden_states"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    def test_backward_reaches_the_input_of_a_frozen_packed_model(self, tiny_model, tiny_inputs):
        inputs = tiny_inputs()
        inputs["hidden_states"].requires_grad_()
        tiny_model("packed").requires_grad_(False)(**inputs).sample.sum().backward()
        assert inputs["hidden_states"].grad.any()


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
    def test_attention_backends_agree(self, model, tiny_inputs, backend):
        expected = predict(model, tiny_inputs())
        model.set_attention_backend(backend)
        assert {processor._attention_backend for processor in model.attn_processors.values()} == {backend}
        torch.testing.assert_close(predict(model, tiny_inputs()), expected, rtol=1e-5, atol=1e-5)
        model.reset_attention_backend()
        assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}

    def test_backend_of_one_model_is_not_that_of_another(self, tiny_model):
        first, second = tiny_model(), tiny_model()
        first.set_attention_backend("_native_math")
        assert {processor._attention_backend for processor in second.attn_processors.values()} == {None}

    def test_every_attention_takes_a_processor(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        assert set(model.attn_processors) == {f"transformer_blocks.{i}.attn.processor" for i in range(2)}
        processor = CountingProcessor()
        model.set_attn_processor(processor)
        assert torch.equal(predict(model, tiny_inputs()), expected)
        assert processor.calls == 2

    def test_fusing_projections_leaves_ternary_weights_alone(self, model, tiny_inputs):
        before, expected = copy.deepcopy(model), predict(model, tiny_inputs())
        model.fuse_qkv_projections()
        assert torch.equal(predict(model, tiny_inputs()), expected)
        model.unfuse_qkv_projections()
        assert equal_state(model, before)


class TestHostFeatures:
    def test_step_cache_skips_blocks_and_is_removable(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        calls = []
        model.transformer_blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
        model.enable_cache(FirstBlockCacheConfig(threshold=1.0))
        with model.cache_context("cond_uncond"):
            torch.testing.assert_close(predict(model, tiny_inputs()), expected)
            predict(model, tiny_inputs())
        assert len(calls) == 1
        model.disable_cache()
        assert torch.equal(predict(model, tiny_inputs()), expected)

    def test_layers_of_the_model_are_models_of_their_own(self, tiny_model, tmp_path):
        layer = tiny_model("packed").transformer_blocks[0].attn.to_q
        layer.save_pretrained(tmp_path)
        loaded = TernaryLinear.from_pretrained(tmp_path)
        hidden_states = torch.randn(2, 32)
        assert torch.equal(loaded(hidden_states), layer(hidden_states))

    def test_number_of_parameters_counts_what_is_stored(self, tiny_model):
        model = tiny_model("packed")
        assert model.num_parameters() == sum(tensor.numel() for tensor in model.state_dict().values())
        assert model.get_memory_footprint() == sum(tensor.nbytes for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    "options", [{}, {"weight_format": "packed"}, {"ternary": False}, {"adaln_norm": False}], ids=str
)
def test_modulations_given_to_forward_are_those_it_would_compute(tiny_model, tiny_inputs, options):
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

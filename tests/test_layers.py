import copy
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import ConfigMixin, ModelMixin
from safetensors import safe_open
from torch import nn

from diffusers_terdit import TernaryLinear, ternarize
from diffusers_terdit.modeling import warn_half_precision_codes
from diffusers_terdit.ops import has_integer_kernel, reference, ternary_linear


GRANULARITIES = ["tensor", "row", 8]
FORMATS = ["float", "packed"]
CASTS = {
    "to": lambda layer, dtype: layer.to(dtype),
    "to device and dtype": lambda layer, dtype: layer.to("cpu", dtype),
    "to like": lambda layer, dtype: layer.to(torch.empty(0, dtype=dtype)),
    "type": lambda layer, dtype: layer.type(dtype),
    "named": lambda layer, dtype: {
        torch.float16: layer.half, torch.bfloat16: layer.bfloat16, torch.float64: layer.double
    }[dtype](),
    "inside a parent": lambda layer, dtype: nn.Sequential(layer).to(dtype)[0],
}  # fmt: skip


def make(weight_format="float", in_features=24, out_features=16, bias=True, scale_granularity="tensor", seed=0):
    torch.manual_seed(seed)
    layer = TernaryLinear(in_features, out_features, bias, scale_granularity=scale_granularity)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer.pack() if weight_format == "packed" else layer


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


class TestMeaning:
    @pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24), (0, 24)], ids=str)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_equals_a_dense_linear_of_the_dequantized_weight(self, weight_format, scale_granularity, bias, shape):
        layer = make(weight_format, bias=bias, scale_granularity=scale_granularity)
        input = torch.randn(shape)
        expected = F.linear(input, layer.dequantize(), layer.bias)
        torch.testing.assert_close(layer(input), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_dequantize_is_the_scale_times_ternary_values(self, weight_format, scale_granularity):
        layer = make(weight_format, scale_granularity=scale_granularity)
        ternary = layer.ternary_weight()
        assert ternary.unique().tolist() == [-1, 0, 1]
        group = {"tensor": 24, "row": 24, 8: 8}[scale_granularity]
        scale = layer.weight_scale.detach().reshape(-1, 24 // group).repeat_interleave(group, dim=1)
        assert torch.equal(layer.dequantize(), ternary * scale)
        assert layer.dequantize().dtype == torch.float32

    def test_float_format_ternarizes_its_weight(self):
        layer = make(scale_granularity="row")
        assert torch.equal(layer.ternary_weight(), ternarize(layer.weight.detach(), "row"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_output_has_the_dtype_of_the_input(self, weight_format, dtype):
        layer = make(weight_format)
        input = torch.randn(5, 24, dtype=dtype)
        output = layer(input)
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), layer(input.float()), rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_autocast_decides_the_output_dtype(self, weight_format):
        layer = make(weight_format)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(5, 24)).dtype == torch.bfloat16

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_nan_in_one_row_of_the_input_stays_in_that_row(self, weight_format):
        input = torch.randn(3, 24)
        input[1, 5] = float("nan")
        output = make(weight_format)(input)
        assert output[1].isnan().all()
        assert output[[0, 2]].isfinite().all()

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_wrong_number_of_features_is_refused_with_both_numbers(self, weight_format):
        with pytest.raises(ValueError, match=r"24 features.*\(5, 23\)"):
            make(weight_format)(torch.randn(5, 23))


class TestPacking:
    @pytest.mark.parametrize("rows", [1, 5, 256])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    def test_pack_changes_no_output_bit(self, scale_granularity, bias, rows):
        layer = make(bias=bias, scale_granularity=scale_granularity)
        input = torch.randn(rows, 24)
        before = layer(input)
        assert layer.pack() is layer
        assert torch.equal(layer(input), before)

    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    def test_unpack_then_pack_changes_no_code_and_no_scale(self, scale_granularity):
        layer = make("packed", scale_granularity=scale_granularity)
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.unpack()
        assert layer.weight.requires_grad
        layer.pack()
        assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())

    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    def test_unpack_changes_no_output_bit(self, scale_granularity):
        layer = make("packed", scale_granularity=scale_granularity)
        input = torch.randn(5, 24)
        before = layer(input)
        assert torch.equal(layer.unpack()(input), before)

    def test_unpacked_weight_is_as_large_as_a_fresh_one(self):
        fresh = TernaryLinear(256, 128).weight.std().item()
        weight = make("packed", 256, 128).unpack().weight
        assert weight.abs().max().item() == pytest.approx(fresh, rel=0.02)
        assert len(weight.unique()) == 3

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_changes_no_packed_code_through_unpack_and_pack(self, dtype, bias):
        layer = make("packed", bias=bias)
        codes = layer.weight_packed.clone()
        layer.to(dtype).unpack().pack()
        assert torch.equal(layer.weight_packed, codes)

    @pytest.mark.parametrize("bias", [True, False])
    def test_unpacked_weight_is_float32_for_training(self, bias):
        assert make("packed", bias=bias).bfloat16().unpack().weight.dtype == torch.float32

    def test_pack_and_unpack_are_idempotent(self):
        layer = make()
        weight = layer.weight
        assert layer.unpack().weight is weight
        packed = layer.pack().weight_packed
        assert layer.pack().weight_packed is packed

    @pytest.mark.parametrize("bias", [True, False])
    def test_packing_in_place_gives_the_parameter_order_of_construction(self, bias):
        # Shards are cut, and optimizer states are kept, in this order.
        layer = make(bias=bias)
        assert list(layer.pack().state_dict()) == list(TernaryLinear(24, 16, bias, "packed").state_dict())
        assert list(layer.unpack().state_dict()) == list(TernaryLinear(24, 16, bias).state_dict())

    def test_fresh_packed_layer_holds_zeros(self):
        layer = TernaryLinear(24, 16, weight_format="packed")
        assert (layer.weight_packed == 0b01010101).all()
        assert not layer.ternary_weight().any()
        assert not layer(torch.randn(5, 24)).any()

    def test_outputs_not_a_multiple_of_four_work_in_float_format_only(self):
        layer = make(out_features=6)
        input = torch.randn(5, 24)
        before = layer(input)
        with pytest.raises(ValueError, match=r"multiple of 4, got 6\."):
            layer.pack()
        assert layer.weight_format == "float"
        assert torch.equal(layer(input), before)
        with pytest.raises(ValueError, match=r"multiple of 4, got 6\."):
            TernaryLinear(24, 6, weight_format="packed")

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_weight_that_is_not_finite_is_not_packed(self, bad):
        layer = make()
        with torch.no_grad():
            layer.weight[3, 4] = bad
        with pytest.raises(ValueError, match=r"-1, 0, \+1"):
            layer.pack()
        assert layer.weight_format == "float"
        assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}

    def test_groups_must_divide_the_inputs(self):
        with pytest.raises(ValueError, match="in_features=24 and groups of 7"):
            TernaryLinear(24, 16, scale_granularity=7)

    @pytest.mark.parametrize("granularity", ["column", 0, -8, True, 8.0, None])
    def test_unknown_scale_granularity_is_refused_by_value(self, granularity):
        with pytest.raises(ValueError, match=f"`scale_granularity` must be .*{granularity!r}"):
            TernaryLinear(24, 16, scale_granularity=granularity)

    @pytest.mark.parametrize("weight_format", ["latent", None, "Packed"])
    def test_unknown_weight_format_is_refused_by_value(self, weight_format):
        with pytest.raises(ValueError, match=f"`weight_format` must be .*{weight_format!r}"):
            TernaryLinear(24, 16, weight_format=weight_format)

    @pytest.mark.parametrize("shape", [(0, 16), (24, 0), (-4, 16)])
    def test_empty_layer_is_refused(self, shape):
        with pytest.raises(ValueError, match="at least one input and output"):
            TernaryLinear(*shape)


class TestCasting:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_scale_and_codes_survive_every_cast(self, weight_format, cast, dtype):
        layer = make(weight_format)
        layer(torch.randn(5, 24)).sum().backward()
        scale, before, grad = layer.weight_scale, bits(layer.weight_scale), layer.weight_scale.grad.clone()
        codes = layer.ternary_weight()
        cast(layer, dtype)
        assert layer.weight_scale is scale
        assert scale.dtype == scale.grad.dtype == torch.float32
        assert bits(scale) == before
        assert torch.equal(scale.grad, grad)
        assert layer.bias.dtype == layer.bias.grad.dtype == dtype
        if weight_format == "packed":
            assert layer.weight_packed.dtype == torch.uint8
            assert torch.equal(layer.ternary_weight(), codes)
        else:
            assert layer.weight.dtype == dtype
        assert layer(torch.randn(5, 24, dtype=dtype)).dtype == dtype

    def test_float_undoes_half_without_losing_the_scale(self):
        layer = make("packed")
        before = bits(layer.weight_scale)
        assert bits(layer.half().float().weight_scale) == before
        assert layer.bias.dtype == torch.float32

    def test_packed_layer_computes_the_same_after_a_round_trip_of_casts(self):
        layer = make("packed", bias=False)
        input = torch.randn(5, 24)
        before = layer(input)
        assert torch.equal(layer.bfloat16().half().double().float()(input), before)

    def test_half_precision_float_weights_warn_once_to_pack_first(self, caplog):
        warn_half_precision_codes.cache_clear()
        nn.Sequential(make(), make()).bfloat16()
        messages = [record.getMessage() for record in caplog.records if "`pack()`" in record.getMessage()]
        assert len(messages) == 1

    def test_casting_packed_weights_warns_of_nothing(self, caplog):
        warn_half_precision_codes.cache_clear()
        make("packed").bfloat16()
        assert not [r for r in caplog.records if "`pack()`" in r.getMessage()]

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_default_dtype_does_not_reach_the_scale(self, weight_format):
        torch.set_default_dtype(torch.bfloat16)
        try:
            layer = TernaryLinear(24, 16, weight_format=weight_format)
        finally:
            torch.set_default_dtype(torch.float32)
        assert layer.weight_scale.dtype == torch.float32
        assert bits(layer.weight_scale) == bits(TernaryLinear(24, 16).weight_scale)
        assert layer.bias.dtype == torch.bfloat16

    def test_freezing_a_packed_layer_works(self):
        layer = make("packed").requires_grad_(False)
        assert not layer(torch.randn(5, 24)).requires_grad


class TestTraining:
    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    def test_gradients_are_those_of_the_dense_linear_passed_straight_through(self, scale_granularity):
        layer = make(scale_granularity=scale_granularity)
        ternary = layer.ternary_weight()
        scale = layer.weight_scale.detach().clone().requires_grad_()
        group = 8 if scale_granularity == 8 else 24
        expanded = scale.reshape(-1, 24 // group).repeat_interleave(group, dim=1).expand(16, 24)
        dense = (expanded * ternary).detach().requires_grad_()
        bias = layer.bias.detach().clone().requires_grad_()
        inputs = [torch.randn(2, 5, 24).requires_grad_() for _ in range(2)]
        inputs[1].data.copy_(inputs[0].data)
        target = torch.randn(2, 5, 16)

        F.mse_loss(layer(inputs[0]), target).backward()
        F.mse_loss(F.linear(inputs[1], dense, bias), target).backward()

        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(layer.bias.grad, bias.grad)
        torch.testing.assert_close(layer.weight.grad, dense.grad * expanded.detach())
        (expanded * ternary * dense.grad).sum().backward()
        torch.testing.assert_close(layer.weight_scale.grad, scale.grad)

    @pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24)], ids=str)
    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    def test_packed_format_gives_the_gradients_of_float_format(self, scale_granularity, shape):
        layer = make(scale_granularity=scale_granularity)
        packed = copy.deepcopy(layer).pack()
        inputs = [torch.ones(shape).mul_(0.3).requires_grad_() for _ in range(2)]
        layer(inputs[0]).square().sum().backward()
        packed(inputs[1]).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(layer.weight_scale.grad, packed.weight_scale.grad)
        torch.testing.assert_close(layer.bias.grad, packed.bias.grad)
        assert packed.weight_packed.grad is None
        assert not packed.weight_packed.requires_grad

    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    def test_training_changes_codes_and_lowers_the_loss(self, scale_granularity):
        layer = make(scale_granularity=scale_granularity)
        before = layer.ternary_weight()
        input, target = torch.randn(64, 24), torch.randn(64, 16)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            loss = F.mse_loss(layer(input), target)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert not torch.equal(layer.ternary_weight(), before)
        assert layer.ternary_weight().unique().tolist() == [-1, 0, 1]
        assert losses[-1] < 0.9 * losses[0]

    def test_training_goes_on_after_unpack(self):
        layer = make("packed").unpack()
        before = layer.ternary_weight()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
        input, target = torch.randn(64, 24), torch.randn(64, 16)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(layer(input), target).backward()
            optimizer.step()
        assert not torch.equal(layer.ternary_weight(), before)

    def test_fresh_layer_keeps_the_variance_of_its_input(self):
        output = TernaryLinear(512, 512)(torch.randn(256, 512))
        assert output.var().item() == pytest.approx(1, rel=0.15)

    def test_gradient_reaches_the_input_of_a_frozen_packed_layer(self):
        input = torch.randn(5, 24, requires_grad=True)
        make("packed").requires_grad_(False)(input).sum().backward()
        assert input.grad.abs().sum() > 0


class TestHostClass:
    def test_is_a_model_with_a_config_of_its_own(self):
        layer = make("packed")
        assert isinstance(layer, ModelMixin)
        assert isinstance(layer, ConfigMixin)
        arguments = inspect.signature(TernaryLinear.__init__).parameters
        assert {key for key in layer.config if not key.startswith("_")} == set(arguments) - {"self"}

    @pytest.mark.parametrize(
        ("weight_format", "names"),
        [("float", ["weight", "weight_scale", "bias"]), ("packed", ["weight_scale", "bias", "weight_packed"])],
    )
    def test_state_dict_names_are_the_contract(self, weight_format, names):
        assert sorted(make(weight_format).state_dict()) == sorted(names)
        assert not list(make(weight_format).buffers())

    @pytest.mark.parametrize(("granularity", "shape"), [("tensor", (1,)), ("row", (16, 1)), (8, (16, 3))])
    def test_scale_shape_follows_the_granularity(self, granularity, shape):
        assert make(scale_granularity=granularity).weight_scale.shape == shape

    def test_packed_and_plain_tensors_have_the_documented_shapes(self):
        layer = make("packed")
        assert (layer.weight_packed.shape, layer.weight_packed.dtype) == ((4, 24), torch.uint8)
        assert layer.unpack().weight.shape == (16, 24)
        assert layer.bias.shape == (16,)
        assert make(bias=False).bias is None

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_positional_construction_survives_from_config(self, weight_format):
        layer = TernaryLinear(24, 16, False, weight_format, 8)
        again = TernaryLinear.from_config(layer.config)
        assert {n: t.shape for n, t in again.state_dict().items()} == {
            n: t.shape for n, t in layer.state_dict().items()
        }
        assert (again.weight_format, again.scale_granularity, again.bias) == (weight_format, 8, None)

    def test_config_follows_pack_and_unpack(self):
        layer = make()
        assert TernaryLinear.from_config(layer.pack().config).weight_format == "packed"
        assert TernaryLinear.from_config(layer.unpack().config).weight_format == "float"

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_deepcopy_is_equal_and_independent(self, weight_format):
        layer = make(weight_format)
        input = torch.randn(5, 24)
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(input), layer(input))
        copied.unpack() if weight_format == "packed" else copied.pack()
        assert layer.weight_format == layer.config["weight_format"] == weight_format

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_pickle_gives_an_equal_layer(self, weight_format):
        layer = make(weight_format)
        input = torch.randn(5, 24)
        again = pickle.loads(pickle.dumps(layer))
        assert torch.equal(again(input), layer(input))
        assert again.config == layer.config

    @pytest.mark.parametrize("context", [lambda: torch.device("meta"), init_empty_weights])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_meta_device_makes_the_same_names_shapes_and_dtypes(self, weight_format, context):
        with context():
            layer = TernaryLinear(24, 16, weight_format=weight_format)
        real = TernaryLinear(24, 16, weight_format=weight_format)
        assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
        assert {n: (t.shape, t.dtype, t.requires_grad) for n, t in layer.named_parameters()} == {
            n: (t.shape, t.dtype, t.requires_grad) for n, t in real.named_parameters()
        }
        assert layer(torch.empty(5, 24, device="meta")).shape == (5, 16)

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_moving_to_meta_and_back_keeps_dtypes(self, weight_format):
        layer = make(weight_format).to("meta").to_empty(device="cpu")
        assert layer.weight_scale.dtype == torch.float32
        assert getattr(layer, "weight" if weight_format == "float" else "weight_packed").device.type == "cpu"

    @pytest.mark.parametrize(("weight_format", "word"), [("float", "weight=float"), ("packed", "weight=2-bit packed")])
    def test_print_shows_sizes_format_and_scale(self, weight_format, word):
        text = repr(make(weight_format, scale_granularity=8))
        assert "in_features=24, out_features=16, bias=True" in text
        assert word in text
        assert "scale=8" in text

    def test_strict_load_state_dict_refuses_the_other_format(self):
        with pytest.raises(RuntimeError, match="weight_packed"):
            make().load_state_dict(make("packed").state_dict())


class TestFiles:
    @pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
    @pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_loading_casts_all_but_scale_and_codes(self, tmp_path, weight_format, bias, dtype, low_cpu_mem_usage):
        layer = make(weight_format, bias=bias)
        layer.save_pretrained(tmp_path)
        kwargs = {} if dtype is None else {"dtype": dtype}
        loaded = TernaryLinear.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
        expected = copy.deepcopy(layer).to(dtype or torch.float32)
        assert {n: t.dtype for n, t in loaded.state_dict().items()} == {
            n: t.dtype for n, t in expected.state_dict().items()
        }
        assert all(torch.equal(tensor, expected.state_dict()[n]) for n, tensor in loaded.state_dict().items())
        assert torch.get_default_dtype() == torch.float32

    @pytest.mark.parametrize("device_map", ["auto", "cpu"])
    def test_device_map_places_a_layer_on_its_own(self, tmp_path, device_map):
        layer = make("packed")
        layer.save_pretrained(tmp_path)
        input = torch.randn(5, 24)
        assert torch.equal(TernaryLinear.from_pretrained(tmp_path, device_map=device_map)(input), layer(input))

    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_saved_layer_computes_the_same(self, tmp_path, weight_format, scale_granularity):
        layer = make(weight_format, scale_granularity=scale_granularity)
        layer.save_pretrained(tmp_path)
        input = torch.randn(5, 24)
        assert torch.equal(TernaryLinear.from_pretrained(tmp_path)(input), layer(input))

    def test_config_on_disk_is_the_layers_and_nothing_more(self, tmp_path):
        make("packed", scale_granularity=8).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert {key: value for key, value in config.items() if not key.startswith("_")} == {
            "in_features": 24,
            "out_features": 16,
            "bias": True,
            "weight_format": "packed",
            "activation_bits": None,
            "scale_granularity": 8,
        }
        assert config["_class_name"] == "TernaryLinear"

    def test_packed_file_says_how_it_is_packed(self, tmp_path):
        make("packed").save_pretrained(tmp_path)
        with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["terdit.packing"] == "row-chunk-2bit"
        assert metadata["terdit.version"] == "1"
        assert len(metadata["terdit.sha256"]) == 64

    @pytest.mark.parametrize("method", ["save_pretrained", "push_to_hub"])
    def test_saving_and_pushing_take_what_the_hosts_take(self, method):
        ours = inspect.signature(getattr(TernaryLinear, method)).parameters
        theirs = inspect.signature(getattr(ModelMixin, method)).parameters
        shown = {name: (parameter.kind, parameter.default) for name, parameter in ours.items()}
        for name, parameter in theirs.items():
            if name == "use_flashpack":  # goes through `**kwargs`
                continue
            assert shown[name][0] == parameter.kind
            assert shown[name][1] == parameter.default or name == "save_function"


class TestIntegerActivations:
    """`activation_bits=8`: the meaning of a layer that was trained with it."""

    def make(self, weight_format="float", **options):
        torch.manual_seed(0)
        layer = TernaryLinear(24, 16, activation_bits=8, **options)
        nn.init.normal_(layer.bias)
        return layer.pack() if weight_format == "packed" else layer

    def test_output_is_that_of_the_rounded_input(self):
        layer, x = self.make(), torch.randn(5, 24)
        step = x.abs().amax(1, keepdim=True) / 127
        rounded = (x / step).round() * step
        torch.testing.assert_close(layer(x), F.linear(rounded, layer.dequantize(), layer.bias))
        assert not torch.allclose(layer(x), F.linear(x, layer.dequantize(), layer.bias))

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_packing_changes_no_bit(self, granularity):
        layer, x = self.make(scale_granularity=granularity), torch.randn(5, 24)
        before = layer(x)
        assert torch.equal(layer.pack()(x), before)

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_float16_does_not_overflow_before_the_step_is_applied(self, granularity, autocast):
        # A sum of codes is 127 * 1024 here; the largest float16 is 65504.
        layer = TernaryLinear(1024, 8, activation_bits=8, scale_granularity=granularity)
        nn.init.ones_(layer.weight)
        nn.init.ones_(layer.weight_scale)
        for value in (1e-3, 1.0, 60.0):
            x = torch.full((2, 1024), value)
            with torch.autocast("cpu", torch.float16, enabled=autocast):
                output = layer(x if autocast else x.half())
            torch.testing.assert_close(output.float(), torch.full((2, 8), 1024 * value), rtol=2e-3, atol=0)

    def test_gradients_pass_straight_through_the_rounding(self):
        layer, x = self.make(), torch.randn(5, 24, requires_grad=True)
        grad = torch.randn(5, 16)
        layer(x).backward(grad)
        torch.testing.assert_close(x.grad, grad @ layer.dequantize())
        step = x.detach().abs().amax(1, keepdim=True) / 127
        rounded = (x.detach() / step).round() * step
        torch.testing.assert_close(layer.weight.grad, grad.T @ rounded * layer.weight_scale.detach())

    def test_each_token_has_its_own_step(self):
        layer, x = self.make("packed"), torch.randn(5, 24)
        louder = x.clone()
        louder[0] *= 1000
        assert torch.equal(layer(louder)[1:], layer(x)[1:])

    def test_zeros_stay_zeros(self):
        layer = self.make("packed")
        assert torch.equal(layer(torch.zeros(2, 24)), layer.bias.detach().expand(2, 16))

    def test_saved_as_the_meaning_of_the_model(self, tmp_path, tiny_model, tiny_inputs):
        model = tiny_model("packed", activation_bits=8)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.config.activation_bits == 8
        assert torch.equal(again(**tiny_inputs()).sample, model(**tiny_inputs()).sample)
        plain = type(model).from_pretrained(tmp_path, activation_bits=None)
        assert not torch.equal(plain(**tiny_inputs()).sample, model(**tiny_inputs()).sample)

    def test_other_widths_and_dense_forms_are_refused(self, tiny_model):
        with pytest.raises(ValueError, match="must be None or 8, got 4"):
            TernaryLinear(24, 16, activation_bits=4)
        with pytest.raises(ValueError, match="activation_bits=8"):
            tiny_model(ternary=False, activation_bits=8)
        with pytest.raises(ValueError, match="8-bit activations"):
            tiny_model(activation_bits=8).dequantize()


needs_kernel = pytest.mark.skipif(not has_integer_kernel("cpu"), reason="no AVX2 or no numba")


class TestSetActivationBits:
    """`set_activation_bits`: the caller's choice of speed, never the layer's meaning."""

    def new_layer(self, **options):
        torch.manual_seed(0)
        return TernaryLinear(24, 16, **options).pack().requires_grad_(False)

    @needs_kernel
    def test_the_bits_are_those_asked_for(self):
        layer, x = self.new_layer(), torch.randn(5, 24)
        exact = layer(x)
        for bits in (16, 8):
            layer.set_activation_bits(bits)
            expected = reference.integer_linear(x, layer.weight_packed, layer.weight_scale, layer.bias, bits)
            assert torch.equal(layer(x), expected)
            assert not torch.equal(expected, exact)
            assert f"computes with {bits} bits" in repr(layer)
        for bits in (None, "auto"):
            layer.set_activation_bits(bits)
            assert torch.equal(layer(x), exact)
            assert "computes" not in repr(layer)

    @needs_kernel
    def test_bfloat16_uses_16_bits_unless_told_otherwise(self):
        layer, x = self.new_layer().to(torch.bfloat16), torch.randn(5, 24).bfloat16()
        arguments = layer.weight_packed, layer.weight_scale, layer.bias
        integer = reference.integer_linear(x, *arguments, 16)
        assert torch.equal(layer(x), integer)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x.float()), integer)
        layer.set_activation_bits(None)
        assert torch.equal(layer(x), ternary_linear(x, *arguments))
        exact = reference.ternary_linear(x.double(), *arguments[:2], arguments[2].double())
        assert (integer - exact).abs().max() <= (layer(x) - exact).abs().max() * 1.01

    @needs_kernel
    def test_nothing_of_it_is_saved(self, tmp_path):
        layer = self.new_layer()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.set_activation_bits(8)
        layer(torch.randn(3, 24))
        after = layer.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        layer.save_pretrained(tmp_path)
        again = TernaryLinear.from_pretrained(tmp_path)
        assert again.config["activation_bits"] is None
        assert "computes" not in repr(again)

    @needs_kernel
    def test_layers_that_the_kernel_does_not_take_compute_exactly(self):
        for options in ({"scale_granularity": 8}, {}):
            layer, x = self.new_layer(**options), torch.randn(5, 24)
            layer = layer if options else layer.unpack()
            exact = layer(x)
            layer.set_activation_bits(8)
            assert torch.equal(layer(x), exact)

    @needs_kernel
    @pytest.mark.parametrize("granularity", ["tensor", "row"])
    def test_a_layer_trained_with_8_bits_computes_the_same_by_either_way(self, granularity, request):
        layer, x = self.new_layer(activation_bits=8, scale_granularity=granularity), torch.randn(2, 5, 24)
        layer.set_activation_bits(8)
        for bits in (16, None):
            with pytest.raises(ValueError, match="trained with 8-bit"):
                layer.set_activation_bits(bits)
        with_kernel = layer(x)
        assert torch.equal(copy.deepcopy(layer).unpack()(x), with_kernel)
        request.getfixturevalue("no_integer_kernels")
        assert torch.equal(layer(x), with_kernel)

    @needs_kernel
    def test_the_model_keeps_the_gated_layers_at_16_bits(self, tiny_model):
        model = tiny_model("packed")
        model.set_activation_bits(8)
        bits = {name: layer._requested_bits for name, layer in model.ternary_layers().items()}
        assert {name.rsplit(".", 1)[-1] for name, value in bits.items() if value == 16} == {"down_proj"}
        assert sum(value == 8 for value in bits.values()) == len(bits) * 7 // 8
        model.transformer_blocks[0].ff.down_proj.set_activation_bits(8)
        model.set_activation_bits(None)
        assert {layer._requested_bits for layer in model.ternary_layers().values()} == {None}
        trained = tiny_model("packed", activation_bits=8)
        trained.set_activation_bits(8)
        with pytest.raises(ValueError, match="full precision"):
            tiny_model(ternary=False).set_activation_bits(8)

    @pytest.mark.parametrize("bits", [4, "16", True, 0])
    def test_other_values_are_refused(self, bits):
        with pytest.raises(ValueError, match='None, 8, 16 or "auto"'):
            self.new_layer().set_activation_bits(bits)

    def test_without_numba_one_line_says_what_to_install(self, no_integer_kernels, caplog):
        layer = self.new_layer()
        for bits in (8, 16):
            with pytest.raises(
                ImportError, match=r"^Integer activations .* numba: pip install 'diffusers-terdit\[cpu\]'$"
            ):
                layer.set_activation_bits(bits)
        layer, x = layer.to(torch.bfloat16), torch.randn(5, 24).bfloat16()
        for _ in range(2):
            assert torch.equal(layer(x), ternary_linear(x, layer.weight_packed, layer.weight_scale, layer.bias))
        lines = [record.getMessage() for record in caplog.records if "numba" in record.getMessage()]
        assert lines == [
            "bfloat16 on this CPU would be faster and more accurate with numba: pip install 'diffusers-terdit[cpu]'"
        ]

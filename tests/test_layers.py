import copy
import inspect
import json

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ConfigMixin, ModelMixin
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from peft import LoraConfig
from torch import nn

from diffusers_terdit import TernaryLinear, layers, ternarize
from diffusers_terdit.layers import call_all
from diffusers_terdit.modeling import warn_half_precision_codes
from diffusers_terdit.ops import choose_kernel, has_integer_kernel, linears, reference, ternary_linear, torch_ops
from tiny import randomize


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


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_it_is_a_dense_linear_of_scale_times_ternary_values(weight_format, scale_granularity):
    for bias in (True, False):
        layer = make(weight_format, bias=bias, scale_granularity=scale_granularity)
        ternary = layer.ternary_weight()
        assert ternary.unique().tolist() == [-1, 0, 1]
        group = {"tensor": 24, "row": 24, 8: 8}[scale_granularity]
        scale = layer.weight_scale.detach().reshape(-1, 24 // group).repeat_interleave(group, dim=1)
        assert torch.equal(layer.dequantize(), ternary * scale)
        assert layer.dequantize().dtype == torch.float32
        for shape in ((24,), (2, 3, 24), (0, 24)):
            input = torch.randn(shape)
            expected = F.linear(input, ternary * scale, layer.bias)
            torch.testing.assert_close(layer(input), expected, rtol=1e-5, atol=1e-6)
    if weight_format == "float":
        assert torch.equal(ternary, ternarize(layer.weight.detach(), scale_granularity))


class TestPacking:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scale_granularity", GRANULARITIES)
    def test_pack_and_unpack_change_no_output_bit_no_code_and_no_scale(self, scale_granularity, bias):
        layer = make(bias=bias, scale_granularity=scale_granularity)
        weight, inputs = layer.weight, [torch.randn(rows, 24) for rows in (1, 5, 256)]
        before = [layer(input) for input in inputs]
        assert layer.unpack().weight is weight
        assert layer.pack() is layer
        packed, state = layer.weight_packed, {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        assert layer.pack().weight_packed is packed
        assert all(torch.equal(layer(input), output) for input, output in zip(inputs, before, strict=True))
        assert layer.unpack().weight.requires_grad
        assert all(torch.equal(layer(input), output) for input, output in zip(inputs, before, strict=True))
        layer.pack()
        assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())

    def test_unpacked_weight_is_as_large_as_a_fresh_one(self):
        fresh = TernaryLinear(256, 128).weight.std().item()
        weight = make("packed", 256, 128).unpack().weight
        assert weight.abs().max().item() == pytest.approx(fresh, rel=0.02)
        assert len(weight.unique()) == 3

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_changes_no_code_through_unpack_to_float32_and_pack(self, dtype, bias):
        layer = make("packed", bias=bias)
        codes = layer.weight_packed.clone()
        assert layer.to(dtype).unpack().weight.dtype == torch.float32
        assert torch.equal(layer.pack().weight_packed, codes)

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

    def test_a_layer_that_cannot_be_packed_stays_as_it_was(self):
        odd, infinite = make(out_features=6), make()
        with torch.no_grad():
            infinite.weight[3, 4] = float("inf")
        for layer, message in ((odd, r"multiple of 4, got 6\."), (infinite, r"-1, 0, \+1")):
            before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
            with pytest.raises(ValueError, match=message):
                layer.pack()
            assert layer.weight_format == "float"
            assert before.keys() == layer.state_dict().keys()
            assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


class TestCasting:
    @pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_scale_and_codes_survive_every_cast(self, weight_format, cast):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
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

    def test_packed_layer_computes_the_same_after_a_round_trip_of_casts(self):
        layer = make("packed", bias=False)
        input = torch.randn(5, 24)
        before = layer(input)
        assert torch.equal(layer.bfloat16().half().double().float()(input), before)

    def test_half_precision_float_weights_warn_once_to_pack_first(self, caplog):
        def warnings():
            return [record.getMessage() for record in caplog.records if "`pack()`" in record.getMessage()]

        warn_half_precision_codes.cache_clear()
        make("packed").bfloat16()
        assert not warnings()
        nn.Sequential(make(), make()).bfloat16()
        assert len(warnings()) == 1

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


class TestTraining:
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_it_changes_codes_and_lowers_the_loss_also_after_unpack(self, weight_format):
        layer = make(weight_format, scale_granularity="row").unpack()
        before = layer.ternary_weight()
        input, target = torch.randn(64, 24), torch.randn(64, 16)
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
        losses = []
        for _ in range(30):
            losses.append(F.mse_loss(layer(input), target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert not torch.equal(layer.ternary_weight(), before)
        assert losses[-1] < 0.9 * losses[0]

    def test_codes_take_no_gradient_and_a_frozen_layer_gives_one_to_its_input(self):
        layer, input = make("packed"), torch.randn(5, 24, requires_grad=True)
        assert not layer.weight_packed.requires_grad
        layer.requires_grad_(False)(input).sum().backward()
        assert input.grad.abs().sum() > 0

    def test_fresh_layer_keeps_the_variance_of_its_input_or_gives_zeros(self):
        output = TernaryLinear(512, 512)(torch.randn(256, 512))
        assert output.var().item() == pytest.approx(1, rel=0.15)
        layer = TernaryLinear(24, 16, weight_format="packed")
        assert (layer.weight_packed == 0b01010101).all()
        assert not layer(torch.randn(5, 24)).any()


class TestHostClass:
    def test_is_a_model_with_a_config_of_its_own(self):
        layer = make("packed")
        assert isinstance(layer, ModelMixin)
        assert isinstance(layer, ConfigMixin)
        arguments = inspect.signature(TernaryLinear.__init__).parameters
        assert {key for key in layer.config if not key.startswith("_")} == set(arguments) - {"self"}

    def test_tensors_have_the_names_and_shapes_of_the_contract(self):
        def shapes(layer):
            assert not list(layer.buffers())
            return {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}

        for granularity, shape in (("tensor", (1,)), ("row", (16, 1)), (8, (16, 3))):
            layer = make(scale_granularity=granularity)
            assert shapes(layer) == {"weight": (16, 24), "weight_scale": shape, "bias": (16,)}
            assert shapes(layer.pack()) == {"weight_packed": (4, 24), "weight_scale": shape, "bias": (16,)}
            assert layer.weight_packed.dtype == torch.uint8
        assert make(bias=False).bias is None

    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_config_gives_the_same_layer_after_pack_and_unpack(self, weight_format):
        layer = TernaryLinear(24, 16, False, weight_format, 8)
        for _ in range(2):
            again = TernaryLinear.from_config(layer.config)
            assert {n: t.shape for n, t in again.state_dict().items()} == {
                n: t.shape for n, t in layer.state_dict().items()
            }
            assert (again.weight_format, again.scale_granularity, again.bias) == (layer.weight_format, 8, None)
            layer.unpack() if weight_format == "packed" else layer.pack()

    def test_print_shows_sizes_format_and_scale(self):
        for weight_format, word in (("float", "weight=float"), ("packed", "weight=2-bit packed")):
            text = repr(make(weight_format, scale_granularity=8))
            assert f"in_features=24, out_features=16, bias=True, {word}, scale=8" in text


class TestFiles:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("weight_format", FORMATS)
    def test_loading_casts_all_but_scale_and_codes(self, tmp_path, weight_format, bias):
        layer = make(weight_format, bias=bias)
        layer.save_pretrained(tmp_path)
        for options in ({}, {"device_map": "auto"}, {"dtype": torch.bfloat16}, {"low_cpu_mem_usage": False}):
            loaded = TernaryLinear.from_pretrained(tmp_path, **options)
            expected = copy.deepcopy(layer).to(options.get("dtype", torch.float32)).state_dict()
            assert {n: t.dtype for n, t in loaded.state_dict().items()} == {n: t.dtype for n, t in expected.items()}
            assert all(torch.equal(tensor, expected[n]) for n, tensor in loaded.state_dict().items())
            assert torch.get_default_dtype() == torch.float32

    def test_config_on_disk_is_the_layers_and_nothing_more(self, tmp_path):
        make("packed", scale_granularity=8).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config.pop("_class_name") == "TernaryLinear"
        assert {key: value for key, value in config.items() if not key.startswith("_")} == {
            "in_features": 24, "out_features": 16, "bias": True, "weight_format": "packed", "activation_bits": None,
            "scale_granularity": 8,
        }  # fmt: skip

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

    def make(self, **options):
        layer = TernaryLinear(24, 16, activation_bits=8, **options)
        nn.init.normal_(layer.bias)
        return layer

    def test_output_is_that_of_the_rounded_input(self):
        layer, x = self.make(), torch.randn(5, 24)
        step = x.abs().amax(1, keepdim=True) / 127
        rounded = (x / step).round() * step
        torch.testing.assert_close(layer(x), F.linear(rounded, layer.dequantize(), layer.bias))
        assert not torch.allclose(layer(x), F.linear(x, layer.dequantize(), layer.bias))

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

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_each_token_has_its_own_step_and_packing_changes_no_bit(self, granularity):
        layer, x = self.make(scale_granularity=granularity), torch.randn(5, 24)
        before, louder = layer(x), x.clone()
        assert torch.equal(layer.pack()(x), before)
        louder[0] *= 1000
        assert torch.equal(layer(louder)[1:], before[1:])
        assert torch.equal(layer(torch.zeros(2, 24)), layer.bias.detach().expand(2, 16))

    def test_saved_as_the_meaning_of_the_model(self, tmp_path, tiny_model, tiny_inputs):
        model = tiny_model("packed", activation_bits=8)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.config.activation_bits == 8
        assert torch.equal(again(**tiny_inputs()).sample, model(**tiny_inputs()).sample)
        plain = type(model).from_pretrained(tmp_path, activation_bits=None)
        assert not torch.equal(plain(**tiny_inputs()).sample, model(**tiny_inputs()).sample)


@torch.no_grad()
def test_fp8_on_a_cpu_is_exact_and_says_so_once(caplog):
    torch_ops.warn_once.cache_clear()
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = make("packed").to(dtype), torch.randn(5, 24).to(dtype)
        layer.set_activation_bits(None)
        exact = layer(x)
        layer.set_activation_bits("fp8")
        assert torch.equal(layer(x), exact)
        assert layer.computes_exactly(dtype)
        assert "computes in fp8" in repr(layer)
    (line,) = [record.getMessage() for record in caplog.records if "exactly" in record.getMessage()]
    assert "Ternary layers compute exactly on this cpu device: fp8 needs a GPU of compute capability 8.9" in line
    with pytest.raises(ValueError, match="trained with 8-bit inputs"):
        TernaryLinear(8, 8, activation_bits=8).set_activation_bits("fp8")


needs_kernel = pytest.mark.skipif(not has_integer_kernel("cpu"), reason="no AVX2 or no numba")


class TestCallAll:
    def two(self, **options):
        return [make("packed", bias=bias, seed=seed, **options) for seed, bias in enumerate((True, False))]

    @pytest.fixture
    def together(self, monkeypatch):
        """How many layers were computed by one call."""
        found = []
        monkeypatch.setattr(layers, "linears", lambda *args: found.append(len(args[1])) or linears(*args))
        return found

    @pytest.mark.parametrize("bits", [None, 8, 16])
    @torch.no_grad()
    def test_plain_layers_are_one_call_with_the_same_bits(self, together, bits):
        found, x = self.two(), torch.randn(5, 24)
        if bits is None or has_integer_kernel("cpu"):
            for layer in found:
                layer.set_activation_bits(bits)
        expected = [layer(x) for layer in found]
        assert all(map(torch.equal, call_all(found, x), expected))
        assert together == [2]

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.unpack(),
            lambda layer: layer.register_forward_hook(lambda *_: None),
            lambda layer: layer.register_forward_pre_hook(lambda *_: None),
            lambda layer: layer.register_full_backward_hook(lambda *_: None),
            lambda layer: add_hook_to_module(layer, ModelHook()),
            lambda layer: HookRegistry.check_if_exists_or_initialize(layer).register_hook(DiffusersHook(), "some"),
            lambda layer: layer.compile(backend="eager"),
            lambda layer: layer.set_activation_bits(None),
            lambda layer: setattr(layer, "__class__", type("Wrapped", (TernaryLinear,), {})),
        ],
        ids=["float", "forward", "forward_pre", "backward", "accelerate", "diffusers", "compile", "bits", "class"],
    )
    @torch.no_grad()
    def test_a_layer_that_somebody_watches_is_called_as_a_module(self, together, change):
        found, x = self.two(), torch.randn(5, 24)
        expected = [layer(x) for layer in found]
        change(found[1])
        assert all(map(torch.allclose, call_all(found, x), expected))
        assert together == []

    @torch.no_grad()
    def test_a_hook_on_all_modules_sees_each(self, together):
        found, seen = self.two(), []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
        call_all([*found, nn.Identity()], torch.randn(5, 24))
        handle.remove()
        assert len(seen) == 3
        assert together == []


class TestSetDecodedBudget:
    """`set_decoded_budget`: layers that are decoded once compute the same, and nothing is saved of them."""

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_layer_computes_what_it_did(self, dtype, granularity):
        layer = randomize(TernaryLinear(64, 32, scale_granularity=granularity)).pack().to(dtype)
        layer.requires_grad_(False).set_activation_bits(None)
        x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
        expected = layer(x)
        (gradient,) = torch.autograd.grad(expected.float().square().sum(), x)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        layer.hold_decoded(dtype)
        assert layer.decoded.shape == (32, 64)
        assert layer.decoded.dtype == dtype
        layer.weight_packed.data.fill_(reference.ZERO_BYTE)  # is not read
        output = layer(x)
        tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)
        (found,) = torch.autograd.grad(output.float().square().sum(), x)
        torch.testing.assert_close(found, gradient, rtol=20 * tolerance, atol=20 * tolerance)
        assert layer.state_dict().keys() == state.keys()
        layer.load_state_dict(state)
        assert layer.decoded is None
        assert torch.equal(layer(x), expected)

    def test_it_follows_casts_and_leaves_what_is_not_exact_or_in_another_dtype(self):
        layer = randomize(TernaryLinear(64, 32)).pack().half().requires_grad_(False)
        layer.hold_decoded(torch.float16)
        inside = layer.decoded.abs().max()
        assert inside < 1  # a power of two of the scale
        layer.to(torch.float32)
        assert layer.decoded.dtype == torch.float32
        assert layer.decoded.abs().max() == 1
        x, plain = torch.randn(5, 64), copy.deepcopy(layer)
        plain.hold_decoded(None)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-6, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), plain(x))  # not the float32 matrix
        for either in (layer, plain):
            either._requested_bits = 8
        assert torch.equal(layer(x), plain(x))
        layer.unpack()
        assert layer.decoded is None

    def test_as_many_layers_as_fit(self, tiny_model, tiny_inputs, tmp_path):
        model = tiny_model("packed")
        layers = model.ternary_layers()
        with torch.no_grad():
            expected = model(**tiny_inputs()).sample
        sizes = {name: 4 * layer.out_features * layer.in_features for name, layer in layers.items()}
        assert model.set_decoded_budget(sum(sizes.values()) // 2) < len(layers)
        held = [name for name, layer in layers.items() if layer.decoded is not None]
        assert sum(sizes[name] for name in held) <= sum(sizes.values()) // 2
        assert "transformer_blocks.0.attn.to_q" in held
        assert not any("adaln" in name for name in held)
        assert model.set_decoded_budget("1GB") == len(layers)
        with torch.no_grad():
            torch.testing.assert_close(model(**tiny_inputs()).sample, expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert again.state_dict().keys() == model.state_dict().keys()
        for none in (None, 0):
            model.set_decoded_budget("1GB")
            assert model.set_decoded_budget(none) == 0
            assert all(layer.decoded is None for layer in layers.values())
        with torch.no_grad():
            assert torch.equal(model(**tiny_inputs()).sample, expected)
        model.set_decoded_budget("1GB")
        model.unpack().pack()
        assert all(layer.decoded is None for layer in layers.values())

    def test_an_adapter_adds_to_layers_that_are_held(self, tiny_model, tiny_inputs):
        model = tiny_model("packed")
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        with torch.no_grad():
            expected = model(**tiny_inputs()).sample
            assert model.set_decoded_budget("1GB") == len(model.ternary_layers())
            torch.testing.assert_close(model(**tiny_inputs()).sample, expected, rtol=1e-4, atol=1e-5)


class TestSetActivationBits:
    """`set_activation_bits`: the caller's choice of speed, never the layer's meaning."""

    def new_layer(self, **options):
        return TernaryLinear(24, 16, **options).pack().requires_grad_(False)

    @needs_kernel
    def test_the_bits_are_those_asked_for_and_never_saved(self, tmp_path):
        layer, x = self.new_layer(), torch.randn(5, 24)
        exact, before = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        for bits in (16, 8):
            layer.set_activation_bits(bits)
            expected = reference.integer_linear(x, layer.weight_packed, layer.weight_scale, layer.bias, bits)
            assert not torch.equal(expected, exact)
            rounds = choose_kernel(x.device, x.dtype, layer.out_features, 24, requested_bits=bits).bits == bits
            assert torch.equal(layer(x), expected if rounds else exact)
            assert f"computes with {bits} bits" in repr(layer)
        layer.save_pretrained(tmp_path)
        again = TernaryLinear.from_pretrained(tmp_path)
        assert again.config["activation_bits"] is None
        assert "computes" not in repr(again)
        assert all(torch.equal(before[name], tensor) for name, tensor in again.state_dict().items())
        for bits in (None, "auto"):
            layer.set_activation_bits(bits)
            assert torch.equal(layer(x), exact)
            assert "computes" not in repr(layer)

    @needs_kernel
    def test_bfloat16_is_computed_as_the_processor_does_it_best_unless_told_otherwise(self):
        layer, x = self.new_layer().to(torch.bfloat16), torch.randn(5, 24).bfloat16()
        arguments = layer.weight_packed, layer.weight_scale, layer.bias
        rounds = choose_kernel(x.device, x.dtype, layer.out_features, 24).bits == 16
        expected = reference.integer_linear(x, *arguments, 16) if rounds else ternary_linear(x, *arguments)
        assert torch.equal(layer(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x.float()), expected)
        layer.set_activation_bits(None)
        assert torch.equal(layer(x), ternary_linear(x, *arguments))
        exact = reference.ternary_linear(x.double(), *arguments[:2], arguments[2].double())
        assert (expected - exact).abs().max() <= (layer(x) - exact).abs().max() * 1.01

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
        tiny_model("packed", activation_bits=8).set_activation_bits(8)

    def test_without_numba_one_line_says_what_to_install(self, no_integer_kernels, caplog):
        layer = self.new_layer()
        for bits in (8, 16):
            with pytest.raises(ImportError):
                layer.set_activation_bits(bits)
        layer, x = layer.to(torch.bfloat16), torch.randn(5, 24).bfloat16()
        for _ in range(2):
            assert torch.equal(layer(x), ternary_linear(x, layer.weight_packed, layer.weight_scale, layer.bias))
        lines = [record.getMessage() for record in caplog.records if "numba" in record.getMessage()]
        assert lines == ["bfloat16 on this CPU would be faster and more accurate with numba: pip install numba"]

"""The registered op: torch's own checks, compilation, gradients against dense float64, autocast, refusals."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from weights import TOLERANCE, new_weight, relative_error

from diffusers_terdit import ops
from diffusers_terdit.ops import (
    choose_kernel,
    dequantize,
    float_linear,
    integer_linear,
    pack_ternary,
    reference,
    ternarize,
    ternary_linear,
    torch_ops,
)


N, K, GROUP = 12, 8, 4
GRANULARITIES = ["tensor", "row", GROUP]
LINEAR = torch.ops.diffusers_terdit.linear.default
BACKWARD = torch.ops.diffusers_terdit.linear_backward.default
INTEGER_LINEAR = torch.ops.diffusers_terdit.integer_linear.default

INPUTS = {
    "1-D": lambda: torch.randn(K),
    "2-D": lambda: torch.randn(5, K),
    "3-D": lambda: torch.randn(2, 3, K),
    "empty batch": lambda: torch.randn(0, K),
    "transposed": lambda: torch.randn(2, K, 3).transpose(1, 2),
    "expanded": lambda: torch.randn(1, 1, K).expand(2, 3, K),
    "bfloat16": lambda: torch.randn(5, K).bfloat16(),
    "float16": lambda: torch.randn(5, K).half(),
    "float64": lambda: torch.randn(5, K).double(),
}


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def new_layer(scale_granularity, bias=True, out_features=N, in_features=K):
    """Float weight, its packed codes, a scale and a bias."""
    weight = torch.randn(out_features, in_features)
    scale = torch.rand(reference.scale_shape(out_features, in_features, scale_granularity)) + 0.5
    packed = pack_ternary(ternarize(weight, scale_granularity)) if out_features % 4 == 0 else None
    return weight, packed, scale, torch.randn(out_features) if bias else None


def leaf(tensor):
    return None if tensor is None else tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_the_op_passes_torchs_checks(scale_granularity, inputs):
    _, packed, scale, bias = new_layer(scale_granularity)
    torch.library.opcheck(LINEAR, (INPUTS[inputs]().detach().requires_grad_(), packed, leaf(scale), leaf(bias)))


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_the_op_passes_torchs_checks_without_a_bias_and_with_a_float_weight(scale_granularity):
    _, packed, scale, _ = new_layer(scale_granularity, out_features=20)
    weight, _, scale_of_9, _ = new_layer(scale_granularity, out_features=9)  # 9 outputs could not be packed
    for either, its_scale in ((packed, scale), (leaf(weight), scale_of_9)):
        torch.library.opcheck(LINEAR, (torch.randn(5, K, requires_grad=True), either, leaf(its_scale), None))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_the_backward_op_passes_torchs_checks(scale_granularity, inputs):
    weight, packed, scale, _ = new_layer(scale_granularity)
    input = INPUTS[inputs]()
    grad = input.new_ones(1).expand(*input.shape[:-1], N)  # the gradient of a sum
    for either in (packed, weight):
        for kept_input, need_input_grad in [(input, True), (input, False), (None, True)]:
            arguments = (grad, kept_input, either, scale, need_input_grad)
            torch.library.opcheck(BACKWARD, arguments, test_utils=["test_schema", "test_faketensor"])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("linear", [ternary_linear, float_linear])
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_compiles_to_one_graph_with_gradients(scale_granularity, linear, dynamic, fresh_compiler):
    weight, packed, scale, bias = new_layer(scale_granularity)
    weight = packed if linear is ternary_linear else leaf(weight)
    scale, bias = leaf(scale), leaf(bias)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    input = torch.randn(5, K, requires_grad=True)
    wanted = [tensor for tensor in (input, weight, scale, bias) if tensor.requires_grad]
    grad = torch.randn(5, N)
    output, expected = compiled(input, weight, scale, bias), linear(input, weight, scale, bias)
    assert torch.equal(output, expected)
    grads, expected_grads = (torch.autograd.grad(y, wanted, grad) for y in (output, expected))
    assert all(torch.equal(got, right) for got, right in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("linear", [ternary_linear, float_linear])
def test_one_dynamic_graph_serves_every_batch_size(linear, fresh_compiler):
    weight, packed, scale, bias = new_layer("tensor")
    weight = packed if linear is ternary_linear else weight
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear, fullgraph=True, backend=backend, dynamic=True)
    for rows in (2, 7, 64):
        input = torch.randn(rows, K)
        assert torch.equal(compiled(input, weight, scale, bias), linear(input, weight, scale, bias))
    assert backend.frame_count == 1


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_the_op_equals_the_reference(scale_granularity, bias):
    weight, packed, scale, bias = new_layer(scale_granularity, bias)
    input = torch.randn(2, 3, K)
    expected = reference.ternary_linear(input, packed, scale, bias)
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        torch.testing.assert_close(linear(input, either, scale, bias), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_the_float_weight_computes_what_the_packed_weight_computes(scale_granularity, bias, dtype):
    weight, packed, scale, bias = new_layer(scale_granularity, bias, out_features=36, in_features=60)
    input = torch.randn(7, 60, dtype=dtype)
    packed_output = ternary_linear(input, packed, scale, bias)
    assert packed_output.dtype == dtype
    assert torch.equal(float_linear(input, weight, scale, bias), packed_output)


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_gradients_equal_those_of_the_dense_layer_in_float64(scale_granularity, bias, shape):
    weight, packed, scale, bias = new_layer(scale_granularity, bias)
    input, grad = torch.randn(shape), torch.randn(*shape[:-1], N)

    dense_input, dense_scale = leaf(input.double()), leaf(scale.double())
    dense_bias = None if bias is None else leaf(bias.double())
    spread = np.ones((1, K // scale.shape[1] if scale.dim() == 2 else K))
    dense_ternary = leaf(ternarize(weight, scale_granularity).double())
    dense_weight = dense_ternary * torch.kron(dense_scale.reshape(-1, scale.shape[-1]), torch.from_numpy(spread))
    dense_output = torch.nn.functional.linear(dense_input, dense_weight, dense_bias)
    dense_output.backward(grad.double())

    for linear, either in ((ternary_linear, packed), (float_linear, leaf(weight))):
        leaves = leaf(input), leaf(scale), leaf(bias)
        output = linear(leaves[0], either, *leaves[1:])
        output.backward(grad)
        pairs = [(output, dense_output), (leaves[0].grad, dense_input.grad), (leaves[1].grad, dense_scale.grad)]
        pairs += [] if bias is None else [(leaves[2].grad, dense_bias.grad)]
        pairs += [(either.grad, dense_ternary.grad)] if linear is float_linear else []  # straight through
        for got, right in pairs:
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_the_weight_gradient_is_the_output_gradient_times_input_times_scale(scale_granularity):
    weight, _, scale, _ = new_layer(scale_granularity)
    weight = leaf(weight * 100)  # far outside [-1, 1]: nothing is clipped
    input, grad = torch.randn(5, K), torch.randn(5, N)
    float_linear(input, weight, scale).backward(grad)
    scale_of_each = dequantize(torch.ones(N, K), scale)
    torch.testing.assert_close(weight.grad, grad.T @ input * scale_of_each)


@pytest.mark.parametrize("wanted", ["input", "weight", "scale", "bias"])
def test_a_gradient_that_is_asked_for_alone_is_the_same(wanted):
    weight, _, scale, bias = new_layer(GROUP)
    tensors = {"input": torch.randn(5, K), "weight": weight, "scale": scale, "bias": bias}
    every, alone = {n: leaf(t) for n, t in tensors.items()}, {**tensors, wanted: leaf(tensors[wanted])}
    for arguments in (every, alone):
        float_linear(*arguments.values()).square().sum().backward()
    assert torch.equal(alone[wanted].grad, every[wanted].grad)
    assert all(tensor.grad is None for name, tensor in alone.items() if name != wanted)


def test_the_codes_get_no_gradient():
    _, packed, scale, bias = new_layer("tensor")
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    ternary_linear(torch.randn(5, K, requires_grad=True), parameter, leaf(scale), leaf(bias)).sum().backward()
    assert parameter.grad is None
    with pytest.raises(RuntimeError, match="floating point"):
        parameter.requires_grad_()


@pytest.mark.parametrize("linear", [ternary_linear, float_linear])
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_backward_keeps_its_arguments_and_no_decoded_matrix(scale_granularity, linear):
    weight, packed, scale, bias = new_layer(scale_granularity)
    weight = packed if linear is ternary_linear else leaf(weight)
    arguments = [torch.randn(5, K, requires_grad=True), weight, leaf(scale), leaf(bias)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = linear(*arguments)
    assert kept
    assert {tensor.data_ptr() for tensor in kept} <= {argument.data_ptr() for argument in arguments}
    output.sum().backward()


def test_an_adapter_on_a_frozen_layer_keeps_no_input():
    _, packed, scale, bias = new_layer("tensor")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ternary_linear(torch.randn(5, K, requires_grad=True), packed, scale, bias)
    assert sorted(tensor.shape for tensor in kept) == sorted([packed.shape, scale.shape])


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [None, "auto", 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_is_the_op_that_was_chosen(dtype, bits, scale_granularity):
    weight, packed, scale, bias = new_layer(scale_granularity)
    x = torch.randn(5, K).to(dtype)
    chosen = choose_kernel(x.device, dtype, N, K, scale_granularity, requested_bits=bits).bits
    expected = (
        ternary_linear(x, packed, scale, bias) if chosen is None else integer_linear(x, packed, scale, bias, chosen)
    )
    assert torch.equal(ops.linear(x, packed, scale, bias, bits), expected)
    assert torch.equal(ops.linear(x, weight, scale, bias, bits), float_linear(x, weight, scale, bias))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch does
@pytest.mark.parametrize(
    "chosen",
    [
        ops.linear,
        lambda *layer: ops.linear(*layer, requested_bits=8),
        lambda *layer: ops.linear(*layer, trained_bits=8),
    ],
    ids=["auto", "8 bits", "trained with 8 bits"],
)
def test_linear_compiles_to_one_dynamic_graph_with_gradients(chosen, fresh_compiler):
    weight, packed, scale, bias = new_layer("row")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chosen, fullgraph=True, backend=backend, dynamic=True)
    for either in (packed, leaf(weight)):
        for rows in (2, 7, 64):
            grads, x = [], torch.randn(rows, K)
            for function in (compiled, chosen):
                leaves = leaf(x), either, leaf(scale), leaf(bias)
                output = function(*leaves)
                output.square().sum().backward()
                grads.append([output, *(tensor.grad for tensor in leaves if tensor.is_floating_point())])
            assert all(torch.equal(got, right) for got, right in zip(*grads, strict=True))
    assert backend.frame_count == 2  # one for each format


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_autocast_gives_its_dtype_and_float32_gradients(scale_granularity, dtype):
    weight, packed, scale, bias = new_layer(scale_granularity)
    input = torch.randn(5, K)
    for linear, either in ((ternary_linear, packed), (float_linear, leaf(weight))):
        leaves = [leaf(input), either, leaf(scale), leaf(bias)]
        with torch.autocast("cpu", dtype):
            output = linear(*leaves)
        assert output.dtype == dtype
        assert torch.equal(
            output, linear(input.to(dtype), either, scale, bias)
        )  # autocast casts the input, and nothing else
        output.float().square().sum().backward()
        assert all(tensor.grad.dtype == torch.float32 for tensor in leaves if tensor is not packed)


def test_autocast_leaves_float64_alone():
    _, packed, scale, bias = new_layer("tensor")
    x = torch.randn(5, K).double()
    expected = ternary_linear(x, packed, scale, bias)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (ternary_linear, ops.linear):
            output = function(x, packed, scale, bias)
            assert output.dtype == torch.float64
            assert torch.equal(output, expected)


def test_autocast_does_not_reach_the_arithmetic_inside_the_op():
    # 4096 inputs of 100 sum to 2.8e5 along a row of T, beyond float16, before the scale brings them back to 280.
    weight, packed, _, _ = new_layer("tensor", in_features=4096)
    input = 100 * ternarize(weight)[:1].sign()
    scale = torch.tensor([1e-3])
    expected = ternary_linear(input, packed, scale)
    assert expected.max() > 200
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        with torch.autocast("cpu", torch.float16):
            torch.testing.assert_close(linear(input, either, scale).float(), expected, rtol=1e-3, atol=1e-2)


def test_autocast_does_not_reach_the_arithmetic_of_backward():
    weight, _, scale, _ = new_layer("tensor", out_features=64, in_features=64)
    input, grad = torch.randn(9, 64).half(), torch.randn(9, 64).half()

    def gradients():
        leaves = leaf(input), leaf(weight), leaf(scale)
        return torch.autograd.grad(float_linear(*leaves), leaves, grad)

    outside = gradients()
    with torch.autocast("cpu", torch.float16):
        inside = gradients()
    assert all(torch.equal(got, right) for got, right in zip(inside, outside, strict=True))


def test_autocast_ternarizes_the_weight_from_its_own_dtype():
    weight, packed, scale, _ = new_layer("tensor", out_features=64, in_features=256)
    assert not torch.equal(pack_ternary(ternarize(weight.bfloat16())), packed)  # bfloat16 codes would show
    input = torch.randn(3, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(float_linear(input, weight, scale), ternary_linear(input, packed, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scale_and_bias_are_applied_in_float32_to_half_precision(dtype):
    # Sums of up to 32 ones are exact in either dtype, so that what is left is one rounding of scale * sum + bias.
    weight, packed, scale, bias = new_layer("row", out_features=256, in_features=32)
    input = torch.randint(-1, 2, (3, 32)).to(dtype)
    sums = input.float() @ ternarize(weight, "row").T
    expected = (sums * scale.reshape(-1) + bias).to(dtype)
    assert torch.equal(ternary_linear(input, packed, scale, bias), expected)


def test_an_inference_tensor_gives_the_same():
    weight, packed, scale, bias = new_layer(GROUP)
    input = torch.randn(5, K)
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        expected = linear(input, either, scale, bias)
        with torch.inference_mode():
            assert torch.equal(linear(input.clone(), either, scale, bias), expected)


BAD_CALLS = {
    "too many features": {"input": torch.randn(5, K + 1)},
    "0-D input": {"input": torch.tensor(1.0)},
    "integer input": {"input": torch.ones(5, K, dtype=torch.long)},
    "two scales": {"weight_scale": torch.ones(2)},
    "0-D scale": {"weight_scale": torch.tensor(1.0)},
    "scales of other rows": {"weight_scale": torch.ones(N - 1, 1)},
    "transposed scale": {"weight_scale": torch.ones(1, N)},
    "groups that do not divide": {"weight_scale": torch.ones(N, 3)},
    "no groups": {"weight_scale": torch.ones(N, 0)},
    "3-D scale": {"weight_scale": torch.ones(N, 1, 1)},
    "integer scale": {"weight_scale": torch.ones(1, dtype=torch.long)},
    "short bias": {"bias": torch.ones(N - 1)},
    "one bias": {"bias": torch.ones(1)},
    "2-D bias": {"bias": torch.ones(1, N)},
    "integer bias": {"bias": torch.ones(N, dtype=torch.long)},
    "flat weight": {"weight": torch.ones(K)},
    "3-D weight": {"weight": torch.ones(N, 2, K)},
}


@pytest.mark.parametrize("linear", [ternary_linear, float_linear])
@pytest.mark.parametrize("bad", BAD_CALLS)
def test_what_does_not_fit_is_a_value_error(bad, linear):
    weight, packed, scale, bias = new_layer("tensor")
    good = {"input": torch.randn(5, K), "weight": weight, "weight_scale": scale, "bias": bias}
    call = {**good, **BAD_CALLS[bad]}
    if linear is ternary_linear:
        call["weight"] = call["weight"].byte() if "weight" in BAD_CALLS[bad] else packed
    with pytest.raises(ValueError, match="must be"):
        linear(*call.values())


def test_the_two_weight_formats_are_not_mistaken_for_each_other():
    weight, packed, scale, bias = new_layer("tensor")
    for wrong in (weight, packed.to(torch.int8), packed.long()):
        with pytest.raises(ValueError, match="must be uint8"):
            ternary_linear(torch.randn(5, K), wrong, scale, bias)
    for wrong in (packed, weight.long()):
        with pytest.raises(ValueError, match="must be floating point"):
            float_linear(torch.randn(5, K), wrong, scale, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_the_integer_op_passes_torchs_checks(bits, dtype):
    for granularity in ("tensor", "row"):
        _, packed, scale, bias = new_layer(granularity)
        input = torch.randn(2, 5, K).to(dtype).requires_grad_()
        torch.library.opcheck(INTEGER_LINEAR, (input, packed, leaf(scale), leaf(bias), bits))


def test_the_gradient_of_the_integer_op_is_that_of_the_exact_one():
    _, packed, scale, bias = new_layer("row")
    grad, gradients = torch.randn(5, N), []
    x = torch.randn(5, K)
    for function in (ternary_linear, integer_linear):
        inputs = leaf(x), packed, leaf(scale), leaf(bias)
        function(*inputs).backward(grad)
        gradients.append([inputs[0].grad, inputs[2].grad, inputs[3].grad])
    for exact, integer in zip(*gradients, strict=True):
        assert torch.equal(exact, integer)


def test_one_dynamic_graph_serves_every_batch_of_integers(fresh_compiler):
    _, packed, scale, bias = new_layer("tensor")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(integer_linear, fullgraph=True, backend=backend, dynamic=True)
    for rows in (2, 7, 64):
        x = torch.randn(rows, K)
        assert torch.equal(compiled(x, packed, scale, bias), integer_linear(x, packed, scale, bias))
    assert backend.frame_count == 1


def test_autocast_casts_the_input_of_the_integer_op():
    _, packed, scale, bias = new_layer("tensor")
    x = torch.randn(5, K)
    with torch.autocast("cpu", torch.bfloat16):
        output = integer_linear(x, packed, scale, bias)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, integer_linear(x.bfloat16(), packed, scale, bias))


def test_what_integers_do_not_take_is_a_value_error():
    _, packed, scale, _ = new_layer("tensor")
    x = torch.randn(5, K)
    for arguments in (
        (x, packed, scale, None, 4),
        (x, packed, torch.ones(N, 2), None, 16),
        (x, packed.float(), scale),
        (x[:, 1:], packed, scale),
        (torch.randn(1, 65540), torch.zeros(1, 65540, dtype=torch.uint8), scale, None, 16),
    ):
        with pytest.raises(ValueError, match=r"bits=4|\(12, 2\)|uint8|8 features|65540"):
            integer_linear(*arguments)
    with pytest.raises(ValueError, match="8 or 16, got 5"):
        reference.quantize_activations(x, 5)


class TestWhatTheCompilerSees:
    """On a GPU; here the tensors lie on the CPU."""

    @pytest.fixture(autouse=True)
    def _as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch_ops, "_is_fused", lambda input: torch.compiler.is_compiling())
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def compiled(self, function, *inputs):
        """What the compiled function gives, and the operations of its one graph."""
        record = AotEagerAndRecordGraphs()
        output = torch.compile(function, backend=record, fullgraph=True)(*inputs)
        (graph,) = record.fw_graphs
        return output, [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_the_scale_stands_beside_the_product(self, granularity, dtype):
        packed, scale, bias = new_weight(36, 72, granularity)
        x = torch.randn(5, 72, dtype=dtype)
        output, nodes = self.compiled(ternary_linear, x, packed, scale, bias)
        assert nodes.count("diffusers_terdit.product.default") == 1
        assert "diffusers_terdit.linear.default" not in nodes
        assert any(node.startswith("aten.add") for node in nodes)
        assert any(node.startswith("aten.mul") for node in nodes) == (granularity != 8)
        expected = reference.ternary_linear(x.double(), packed, scale, bias)
        assert relative_error(output, expected) < TOLERANCE[dtype]

    @pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function")
    def test_a_scale_that_is_trained_takes_the_whole_op(self):
        packed, scale, _ = new_weight(36, 72)
        output, nodes = self.compiled(ternary_linear, torch.randn(5, 72), packed, scale.requires_grad_())
        assert "diffusers_terdit.linear.default" in nodes
        output.sum().backward()
        assert scale.grad is not None

    @torch.no_grad()
    @pytest.mark.parametrize("bits", [16, 8])
    def test_the_rounding_of_activations_stands_beside_the_product(self, bits):
        packed, scale, bias = new_weight(32, 64)
        x = torch.randn(40, 64)
        output, nodes = self.compiled(lambda x: integer_linear(x, packed, scale, bias, bits), x)
        assert nodes.count("diffusers_terdit.integer_product.default") == 1
        assert any(node.startswith("aten.round") for node in nodes)
        assert torch.equal(output, reference.integer_linear(x, packed, scale, bias, bits))

    def test_the_whole_network_is_one_graph(self, tiny_model, tiny_inputs):
        model = tiny_model("packed")
        inputs = tiny_inputs()
        for bits, op in ((None, "product"), (16, "integer_product")):
            model.set_activation_bits(bits)
            with torch.no_grad():
                expected = model(**inputs).sample
                output, nodes = self.compiled(lambda *x: model(*x, return_dict=False)[0], *inputs.values())
            assert nodes.count(f"diffusers_terdit.{op}.default") == len(model.ternary_layers())
            assert relative_error(output, expected.double()) < 1e-3

    def test_gradients_to_the_input(self, tiny_model, tiny_inputs):
        model = tiny_model("packed").requires_grad_(False)
        inputs = {**tiny_inputs(), "hidden_states": tiny_inputs()["hidden_states"].requires_grad_()}
        grads = []
        for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            function(**inputs).sample.square().sum().backward()
            grads.append(inputs["hidden_states"].grad.clone())
            inputs["hidden_states"].grad = None
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


class TestProduct:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_torchs_checks(self, granularity, dtype):
        packed, scale, _ = new_weight(36, 72, granularity)
        x = torch.randn(5, 72, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.diffusers_terdit.product.default, (x, packed, scale))

    def test_torchs_checks_of_the_integer_product(self):
        packed, _, _ = new_weight(32, 64)
        rows = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
        torch.library.opcheck(torch.ops.diffusers_terdit.integer_product.default, (rows, packed))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_with_the_scale_beside_it_is_the_linear(self, granularity, dtype):
        packed, scale, bias = new_weight(36, 72, granularity)
        grads, outputs = [], []
        for fused in (False, True):
            x = torch.randn(5, 72, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            if fused:
                _, outer = reference.split_scale(scale, dtype)
                product = torch.ops.diffusers_terdit.product(x, packed, scale)
                output = reference.scale_and_shift(product, outer, bias).to(dtype)
            else:
                output = ternary_linear(x, packed, scale, bias)
            output.float().square().sum().backward()
            outputs.append(output.detach())
            grads.append(x.grad)
        tolerance = {"rtol": 3e-3, "atol": 3e-3} if dtype == torch.float16 else {}
        torch.testing.assert_close(*outputs, **tolerance)
        torch.testing.assert_close(*grads, **tolerance)

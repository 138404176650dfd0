"""The registered ops: torch's own checks, compilation, gradients against dense float64, autocast, refusals."""

import contextlib
import os
import sys
import warnings
from itertools import cycle

import numpy as np
import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from weights import TOLERANCE, new_weight, relative_error

from diffusers_terdit import ops
from diffusers_terdit.ops import (
    choose_kernel,
    float_linear,
    has_integer_kernel,
    held_codes,
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


def new_layer(granularity, bias=True, out_features=N, in_features=K):
    """Float weight, its packed codes, a scale and a bias."""
    weight = 100 * torch.randn(out_features, in_features)  # far outside [-1, 1], where a gradient might be clipped
    scale = torch.rand(reference.scale_shape(out_features, in_features, granularity)) + 0.5
    packed = pack_ternary(ternarize(weight, granularity)) if out_features % 4 == 0 else None
    return weight, packed, scale, torch.randn(out_features) if bias else None


def both_formats(weight, packed):
    return (ternary_linear, packed), (float_linear, weight)


def leaf(tensor):
    return None if tensor is None else tensor.detach().clone().requires_grad_()


class TestTorchsChecks:
    """`opcheck`: schema, fake tensors, autograd and what `torch.compile` makes of the op."""

    @pytest.mark.parametrize(("inputs", "granularity"), [*zip(INPUTS, cycle(GRANULARITIES), strict=False)])
    def test_linear_and_its_backward(self, inputs, granularity):
        weight, packed, scale, bias = new_layer(granularity)
        input = INPUTS[inputs]().detach()
        torch.library.opcheck(LINEAR, (input.requires_grad_(), packed, leaf(scale), leaf(bias), None))
        input = input.detach()
        grad = input.new_ones(1).expand(*input.shape[:-1], N)  # the gradient of a sum
        for either in (packed, weight):
            for kept_input, need_input_grad in [(input, True), (input, False), (None, True)]:
                arguments = (grad, kept_input, either, scale, need_input_grad)
                torch.library.opcheck(BACKWARD, arguments, test_utils=["test_schema", "test_faketensor"])

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_linear_of_a_float_weight_without_a_bias(self, granularity):
        weight, _, scale, _ = new_layer(granularity, out_features=9)  # 9 outputs could not be packed
        torch.library.opcheck(LINEAR, (torch.randn(5, K, requires_grad=True), leaf(weight), leaf(scale), None, None))

    @pytest.mark.parametrize("bits", [None, 16])
    def test_linears(self, bits):
        layers = [new_layer(granularity)[1:] for granularity in GRANULARITIES]
        lists = [list(parts) for parts in zip(*layers, strict=True)]
        lists[2][0] = None  # no bias
        x = torch.randn(2, 5, K)
        torch.library.opcheck(torch.ops.diffusers_terdit.linears.default, (x, *lists, bits))

        def together(x):
            return torch_ops.linears(x, [*zip(*lists, strict=True)], bits)

        assert all(map(torch.equal, torch.vmap(together, 1, 1)(x), together(x)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated, and sizes become constants
            traced = torch.jit.trace(together, x)
        assert all(map(torch.equal, traced(x), together(x)))

    @pytest.mark.parametrize(
        ("bits", "granularity", "dtype"), [(8, "tensor", torch.float32), (16, "row", torch.bfloat16)], ids=str
    )
    def test_integer_linear(self, bits, granularity, dtype):
        _, packed, scale, bias = new_layer(granularity)
        input = torch.randn(2, 5, K).to(dtype).requires_grad_()
        torch.library.opcheck(INTEGER_LINEAR, (input, packed, leaf(scale), leaf(bias), bits))

    @pytest.mark.parametrize(
        ("granularity", "dtype"), [("tensor", torch.float32), ("row", torch.float16), (8, torch.float16)], ids=str
    )
    def test_product(self, granularity, dtype):
        packed, scale, _ = new_weight(36, 72, granularity)
        x = torch.randn(5, 72, dtype=dtype, requires_grad=True)
        inner, _ = reference.split_scale(scale, dtype)
        weight = torch.randn(36, 72, requires_grad=True)
        torch.library.opcheck(torch.ops.diffusers_terdit.product.default, (x, packed, inner, weight))
        for kept, need_input_grad in [(x.detach(), True), (x.detach(), False), (None, True)]:
            arguments = (torch.randn(5, 36, dtype=dtype), kept, packed, inner, need_input_grad)
            torch.library.opcheck(
                torch.ops.diffusers_terdit.product_backward.default,
                arguments,
                test_utils=["test_schema", "test_faketensor"],
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_products(self, dtype):
        layers = [new_weight(36, 72, "row"), new_weight(8, 72), new_weight(8, 72, 8)]
        factors = [reference.split_scale(scale, dtype)[0] for _, scale, _ in layers]
        arguments = torch.randn(2, 5, 72, dtype=dtype), [packed for packed, _, _ in layers], factors
        torch.library.opcheck(torch.ops.diffusers_terdit.products.default, arguments)

    def test_pack(self):
        weight, _, scale, _ = new_layer("row")
        torch.library.opcheck(torch.ops.diffusers_terdit.pack.default, (weight, scale))

    def test_integer_product(self):
        packed, _, _ = new_weight(32, 64)
        rows = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
        torch.library.opcheck(torch.ops.diffusers_terdit.integer_product.default, (rows, packed))

    def test_fp8_product(self):
        packed, scale, _ = new_weight(32, 64, "row")
        rows = reference.round_to_fp8(torch.randn(5, 64))
        utils = "test_faketensor"  # the schema's check needs a product of fp8 numbers, which a CPU lacks
        torch.library.opcheck(torch.ops.diffusers_terdit.fp8_product.default, (*rows, packed, scale), test_utils=utils)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_round_to_bytes(self, bits):
        x = torch.randn(5, 64, dtype=torch.bfloat16)
        torch.library.opcheck(torch.ops.diffusers_terdit.round_to_bytes.default, (x, bits))


def test_a_call_passes_no_layer_of_torch_that_it_can_do_without():
    """torch's `custom_op` checks for aliases, and entering autocast takes as long as the launch of a kernel."""
    _, packed, scale, _ = new_layer("tensor")
    x, files = torch.randn(5, K), set()

    def look(frame, event, _):
        files.add(os.path.basename(frame.f_code.co_filename))

    with torch.no_grad():
        ternary_linear(x, packed, scale)
        sys.setprofile(look)
        try:
            ternary_linear(x, packed, scale)
        finally:
            sys.setprofile(None)
    assert "torch_ops.py" in files
    assert not {"custom_ops.py", "autocast_mode.py"} & files


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch does
@pytest.mark.parametrize(
    ("chosen", "granularity"),
    [
        (lambda *layer: (float_linear if layer[1].is_floating_point() else ternary_linear)(*layer), GROUP),
        (ops.linear, "row"),
        (lambda *layer: ops.linear(*layer, requested_bits=8), "row"),
        (lambda *layer: ops.linear(*layer, trained_bits=8), "tensor"),
    ],
    ids=["exact", "auto", "8 bits", "trained with 8 bits"],
)
def test_linear_compiles_to_one_dynamic_graph_with_gradients(chosen, granularity):
    torch._dynamo.reset()
    weight, packed, scale, bias = new_layer(granularity)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(chosen, fullgraph=True, backend=backend, dynamic=True)
    for either in (packed, leaf(weight)):
        for rows in (5, 7, 64):  # no other size is the same
            grads, x = [], torch.randn(rows, K)
            for function in (compiled, chosen):
                leaves = leaf(x), either, leaf(scale), leaf(bias)
                output = function(*leaves)
                output.square().sum().backward()
                grads.append([output, *(tensor.grad for tensor in leaves if tensor.is_floating_point())])
            assert all(torch.equal(got, right) for got, right in zip(*grads, strict=True))
    assert backend.frame_count == 2  # one for each format
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_float_weight_computes_what_the_packed_weight_computes(granularity, dtype):
    weight, packed, scale, bias = new_layer(granularity, out_features=36, in_features=60)
    input = torch.randn(7, 60, dtype=dtype)
    for shift in (bias, None):
        output = ternary_linear(input, packed, scale, shift)
        assert output.dtype == dtype
        assert torch.equal(float_linear(input, weight, scale, shift), output)


@pytest.mark.parametrize("shape", [(K,), (2, 3, K), (0, K)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_equal_those_of_the_dense_layer_in_float64(granularity, bias, shape):
    weight, packed, scale, bias = new_layer(granularity, bias)
    input, grad = torch.randn(shape), torch.randn(*shape[:-1], N)

    dense_input, dense_scale = leaf(input.double()), leaf(scale.double())
    dense_bias = None if bias is None else leaf(bias.double())
    spread = np.ones((1, K // scale.shape[1] if scale.dim() == 2 else K))
    dense_ternary = leaf(ternarize(weight, granularity).double())
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


@pytest.mark.parametrize("wanted", ["input", "weight", "scale", "bias"])
def test_a_gradient_that_is_asked_for_alone_is_the_same(wanted):
    weight, _, scale, bias = new_layer(GROUP)
    tensors = {"input": torch.randn(5, K), "weight": weight, "scale": scale, "bias": bias}
    every, alone = {n: leaf(t) for n, t in tensors.items()}, {**tensors, wanted: leaf(tensors[wanted])}
    for arguments in (every, alone):
        float_linear(*arguments.values()).square().sum().backward()
    assert torch.equal(alone[wanted].grad, every[wanted].grad)
    assert all(tensor.grad is None for name, tensor in alone.items() if name != wanted)


def test_backward_keeps_its_arguments_alone_and_no_input_of_a_frozen_layer():
    weight, packed, scale, bias = new_layer("row")
    for linear, either, trained in ((ternary_linear, packed, True), (float_linear, leaf(weight), True),
                                    (ternary_linear, packed, False)):  # fmt: skip
        arguments = [torch.randn(5, K, requires_grad=True), either, leaf(scale) if trained else scale, leaf(bias)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            output = linear(*arguments)
        expected = (
            [packed, scale] if not trained else [arguments[0], scale, packed if linear is ternary_linear else either]
        )
        packs = linear is float_linear and packed.dtype in {tensor.dtype for tensor in kept}  # keeps the codes instead
        expected = [arguments[0], scale, packed] if packs else expected
        kept = sorted(kept, key=lambda tensor: tensor.nbytes)
        expected = sorted(expected, key=lambda tensor: tensor.nbytes)
        assert all(torch.equal(*pair) for pair in zip(kept, expected, strict=True))
        output.sum().backward()


@pytest.mark.parametrize("bits", [None, "auto", 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_is_the_op_that_was_chosen(dtype, bits):
    for granularity in GRANULARITIES:
        weight, packed, scale, bias = new_layer(granularity)
        x = torch.randn(5, K).to(dtype)
        chosen = choose_kernel(x.device, dtype, N, K, granularity, requested_bits=bits).bits
        expected = integer_linear(x, packed, scale, bias, chosen) if chosen else ternary_linear(x, packed, scale, bias)
        assert torch.equal(ops.linear(x, packed, scale, bias, bits), expected)
        assert torch.equal(ops.linear(x, weight, scale, bias, bits), float_linear(x, weight, scale, bias))


class TestManyWeightsOfOneInput:
    def weights(self, *granularities):
        layers = [new_layer(granularity, bias) for granularity in granularities for bias in (True, False)]
        return [(packed, scale, bias) for _, packed, scale, bias in layers]

    @pytest.mark.parametrize("granularities", [["tensor"], ["tensor", "row"], GRANULARITIES], ids=str)
    @pytest.mark.parametrize("bits", [None, "auto", 8, 16])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_each_is_what_it_is_alone(self, dtype, bits, granularities):
        x, weights = torch.randn(2, 3, K).to(dtype), self.weights(*granularities)
        for trained in (None, 8) if bits in ("auto", 8) else (None,):
            for found, weight in zip(torch_ops.linears(x, weights, bits, trained), weights, strict=True):
                assert torch.equal(found, torch_ops.linear(x, *weight, bits, trained))
                assert found.dtype == dtype
        with torch.autocast("cpu"):
            assert torch.equal(torch_ops.linears(x, weights, bits)[0], torch_ops.linear(x, *weights[0], bits))

    @pytest.mark.skipif(not has_integer_kernel("cpu"), reason="needs AVX2 and numba")
    @pytest.mark.parametrize("bits", [None, 8])
    def test_they_are_one_op_but_where_gradients_are_wanted(self, monkeypatch, bits):
        x, weights, calls, op = torch.randn(3, K), self.weights("tensor"), [], torch_ops._linears
        monkeypatch.setattr(torch_ops, "_linears", lambda *given: calls.append(len(given[1])) or op(*given))
        torch_ops.linears(x, weights, bits)
        assert calls == [2]
        outputs = torch_ops.linears(x.requires_grad_(), weights, bits)
        assert calls == [2]
        (gradient,) = torch.autograd.grad(sum(output.sum() for output in outputs), x)
        alone = torch.autograd.grad(sum(torch_ops.linear(x, *weight, bits).sum() for weight in weights), x)
        assert torch.equal(gradient, alone[0])

    def test_fp8_rounds_the_input_once_and_not_where_gradients_are_wanted(self, monkeypatch):
        monkeypatch.setattr(torch_ops, "choose_kernel", lambda *case: torch_ops.Choice("", "fp8", ""))
        x, weights, roundings = torch.randn(2, 3, K).bfloat16(), self.weights("tensor", "row"), []
        rounded = reference.round_to_fp8(x.reshape(6, K))
        monkeypatch.setattr(reference, "round_to_fp8", lambda given: roundings.append(given.shape) or rounded)
        found = torch_ops.linears(x, weights, "fp8")
        assert roundings == [(6, K)]
        for output, (packed, scale, bias) in zip(found, weights, strict=True):
            shift = 0 if bias is None else bias
            expected = (reference.fp8_product(*rounded, packed, scale).float() + shift).bfloat16()
            assert torch.equal(output, expected.reshape(2, 3, N))
            assert torch.equal(output, torch_ops.linear(x, packed, scale, bias, "fp8"))
            exact = torch_ops.linear(x.requires_grad_(), packed, scale, bias, "fp8")
            assert torch.equal(exact, ternary_linear(x, packed, scale, bias))
            x = x.detach()

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_exact_ones_are_multiplied_together_as_far_as_they_fit(self, dtype, granularity, monkeypatch):
        """As on a GPU; here the tensors are on the CPU."""
        x, weights, calls = torch.randn(2, 3, K).to(dtype), self.weights(granularity, "tensor"), []
        products = torch_ops._products
        monkeypatch.setattr(torch_ops, "_has_products", lambda device_type: True)
        monkeypatch.setattr(torch_ops, "_products", lambda *given: calls.append(len(given[1])) or products(*given))
        for most, groups in ((4 * N * K, [4]), (3 * N * K, [3, 1]), (2 * N * K - 1, [1] * 4), (0, [1] * 4)):
            monkeypatch.setattr(torch_ops, "MULTIPLIED_TOGETHER", most)
            calls.clear()
            with torch.no_grad():
                found = torch_ops.linears(x, weights, None)
            assert calls == groups
            for output, (packed, scale, bias) in zip(found, weights, strict=True):
                expected = reference.ternary_linear(x.double(), packed, scale.double(), bias)
                assert output.dtype == dtype
                assert relative_error(output, expected) < TOLERANCE[dtype]
        calls.clear()
        torch_ops.linears(x.requires_grad_(), weights, None)[0].sum().backward()
        torch_ops.linears(x.detach(), weights, None, trained_bits=8)
        assert calls == []
        assert x.grad is not None

    def test_whatever_does_not_fit_is_a_value_error(self):
        with pytest.raises(ValueError, match="features in its last dimension"):
            torch_ops.linears(torch.randn(3, K + 1), self.weights("tensor"), 8)


class TestHeldCodes:
    """Codes of a float weight are made once for several passes, where that changes no bit."""

    @pytest.fixture(autouse=True)
    def packed(self, monkeypatch):
        """Count the weights that are packed."""
        packed, pack = [], torch_ops._pack
        monkeypatch.setattr(torch_ops, "_packs_first", lambda *given: True)
        monkeypatch.setattr(torch_ops, "_pack", lambda *given: packed.append(given) or pack(*given))
        return packed

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_passes_share_them_and_give_the_same_bits(self, granularity, packed):
        weight, _, scale, bias = new_layer(granularity)
        parts, found = torch.randn(3, 5, K), []
        for context, times in ((contextlib.nullcontext(), 3), (held_codes(), 1)):
            leaves = leaf(weight), leaf(scale), leaf(bias)
            packed.clear()
            with context:
                outputs = [float_linear(part, *leaves) for part in parts]
                for output in outputs:
                    output.square().sum().backward()
            assert len(packed) == times
            found.append([*outputs, *(tensor.grad for tensor in leaves)])
        assert all(map(torch.equal, *found))

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_weight_that_changes_is_packed_again(self, fused, packed):
        weight, _, scale, _ = new_layer("tensor")
        weight = leaf(weight)
        optimizer = torch.optim.SGD([weight], lr=1e3, fused=fused)
        with held_codes():
            before = float_linear(torch.ones(K), weight, scale)
            before.square().sum().backward()
            optimizer.step()
            after = float_linear(torch.ones(K), weight, scale)
        assert len(packed) == 2
        assert not torch.equal(before, after)
        assert torch.equal(after, float_linear(torch.ones(K), weight, scale))

    def test_another_granularity_takes_its_own(self, packed):
        weight, *_ = new_layer("tensor")
        weight, rows = leaf(weight), torch.ones(N, 1)
        with held_codes():
            float_linear(torch.ones(K), weight, torch.ones(1))
            by_row = float_linear(torch.ones(K), weight, rows)
        assert len(packed) == 2
        assert torch.equal(by_row, float_linear(torch.ones(K), weight, rows))

    def test_they_go_with_the_weight_and_at_the_end(self, packed):
        weight, _, scale, _ = new_layer("tensor")
        with held_codes():
            for _ in range(2):
                float_linear(torch.ones(K), leaf(weight), scale)
            assert len(torch_ops._held_codes[-1]) == 0  # those weights are gone
            kept = leaf(weight)
            float_linear(torch.ones(K), kept, scale)
            with held_codes():
                float_linear(torch.ones(K), kept, scale)
            assert len(torch_ops._held_codes[-1]) == 1
        assert torch_ops._held_codes == []
        assert len(packed) == 4

    def test_those_of_inference_are_not_kept_for_training(self, packed):
        weight, _, scale, _ = new_layer("tensor")
        weight = leaf(weight)
        with held_codes():
            with torch.inference_mode():
                float_linear(torch.ones(K), weight, scale)
                float_linear(torch.ones(K), torch.ones(N, K, requires_grad=True), scale)
            float_linear(torch.ones(K), weight, scale).sum().backward()
        assert weight.grad is not None
        assert len(packed) == 3

    def test_contexts_that_overlap_all_end(self):
        first, second = held_codes(), held_codes()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert torch_ops._held_codes == []


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_it_casts_the_input_and_nothing_else(self, granularity, dtype):
        # Of so wide a weight in bfloat16 other codes would show.
        weight, packed, scale, bias = new_layer(granularity, out_features=64, in_features=256)
        input = torch.randn(5, 256)
        for linear, either in ((ternary_linear, packed), (float_linear, leaf(weight))):
            leaves = [leaf(input), either, leaf(scale), leaf(bias)]
            with torch.autocast("cpu", dtype):
                output = linear(*leaves)
            assert output.dtype == dtype
            assert torch.equal(output, ternary_linear(input.to(dtype), packed, scale, bias))
            output.float().square().sum().backward()
            assert all(tensor.grad.dtype == torch.float32 for tensor in leaves if tensor is not packed)
        if granularity != GROUP:
            with torch.autocast("cpu", dtype):
                output = integer_linear(input, packed, scale, bias)
            assert torch.equal(output, integer_linear(input.to(dtype), packed, scale, bias))

    def test_it_leaves_float64_alone(self):
        _, packed, scale, bias = new_layer("tensor")
        x = torch.randn(5, K).double()
        expected = ternary_linear(x, packed, scale, bias)
        with torch.autocast("cpu", torch.bfloat16):
            for function in (ternary_linear, ops.linear):
                output = function(x, packed, scale, bias)
                assert output.dtype == torch.float64
                assert torch.equal(output, expected)

    def test_it_does_not_reach_the_arithmetic_inside_the_op(self):
        # 4096 inputs of 100 sum to 2.8e5 along a row of T, beyond float16, before the scale brings them back to 280.
        weight, packed, _, _ = new_layer("tensor", in_features=4096)
        input = 100 * ternarize(weight)[:1].sign()
        scale = torch.tensor([1e-3])
        expected = ternary_linear(input, packed, scale)
        assert expected.max() > 200
        for linear, either in both_formats(weight, packed):
            with torch.autocast("cpu", torch.float16):
                torch.testing.assert_close(linear(input, either, scale).float(), expected, rtol=1e-3, atol=1e-2)

    def test_it_does_not_reach_the_arithmetic_of_backward(self):
        weight, _, scale, _ = new_layer("tensor", out_features=64, in_features=64)
        input, grad = torch.randn(9, 64).half(), torch.randn(9, 64).half()

        def gradients():
            leaves = leaf(input), leaf(weight), leaf(scale)
            return torch.autograd.grad(float_linear(*leaves), leaves, grad)

        outside = gradients()
        with torch.autocast("cpu", torch.float16):
            inside = gradients()
        assert all(torch.equal(got, right) for got, right in zip(inside, outside, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scale_and_bias_are_applied_in_float32_to_half_precision(dtype):
    # Sums of up to 32 ones are exact in either dtype, so that what is left is one rounding of scale * sum + bias.
    weight, packed, scale, bias = new_layer("row", out_features=256, in_features=32)
    input = torch.randint(-1, 2, (3, 32)).to(dtype)
    sums = input.float() @ ternarize(weight, "row").T
    expected = (sums * scale.reshape(-1) + bias).to(dtype)
    assert torch.equal(ternary_linear(input, packed, scale, bias), expected)


def test_the_gradient_of_the_integer_op_is_that_of_the_exact_one():
    _, packed, scale, bias = new_layer("row")
    x, grad, gradients = torch.randn(5, K), torch.randn(5, N), []
    for function in (ternary_linear, integer_linear):
        inputs = leaf(x), packed, leaf(scale), leaf(bias)
        function(*inputs).backward(grad)
        gradients.append([inputs[0].grad, inputs[2].grad, inputs[3].grad])
    assert all(torch.equal(exact, integer) for exact, integer in zip(*gradients, strict=True))


def test_whatever_does_not_fit_is_a_value_error():
    """Each way to fail a check; the table of messages has one for each."""
    weight, packed, scale, bias = new_layer("tensor")
    x, ones, ints = torch.randn(5, K), torch.ones, {"dtype": torch.long}
    bad = [
        *({"input": value} for value in (torch.tensor(1.0), ones(5, K, **ints))),
        *({"weight_scale": ones(shape)} for shape in ((), (N - 1, 1), (1, N), (N, 3), (N, 0), (N, 1, 1))),
        *({"weight_scale": ones(1, **ints)}, {"bias": ones(N, **ints)}, {"bias": ones(1)}, {"bias": ones(1, N)}),
        {"weight": ones(N, 2, K)},
    ]
    for linear, either in both_formats(weight, packed):
        for change in bad:
            call = {"input": x, "weight": either, "weight_scale": scale, "bias": bias, **change}
            with pytest.raises(ValueError, match="must be"):
                linear(*call.values())
    wide = torch.randn(1, 65540), torch.zeros(1, 65540, dtype=torch.uint8), scale
    with pytest.raises(ValueError, match="65540"):
        integer_linear(*wide, None, 16)


class TestWhatTheCompilerSees:
    """What it sees on a GPU; here the tensors are on the CPU."""

    @pytest.fixture(autouse=True)
    def _as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch_ops, "is_fused", lambda input: torch.compiler.is_compiling())
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def compiled(self, function, *inputs):
        """What the compiled function gives, and the operations of its one graph."""
        record = AotEagerAndRecordGraphs()
        output = torch.compile(function, backend=record, fullgraph=True)(*inputs)
        (graph,) = record.fw_graphs
        return output, [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

    @pytest.mark.parametrize(
        ("granularity", "dtype"), [("tensor", torch.bfloat16), ("row", torch.float16), (8, torch.float32)], ids=str
    )
    def test_the_scale_is_outside_the_product(self, granularity, dtype):
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
    @pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch does
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("granularity", ["tensor", "row"])
    def test_training_keeps_the_scale_outside_and_the_codes_for_backward(self, granularity, dtype, monkeypatch):
        monkeypatch.setattr(torch_ops, "_packs_first", lambda *given: True)
        weight, _, scale, bias = new_layer(granularity, out_features=36, in_features=72)
        weight, scale = weight / 100, scale / 10
        x, grad, found = torch.randn(5, 72).to(dtype), torch.randn(5, 36).to(dtype), []
        for compiled in (True, False):
            leaves = leaf(x), leaf(weight), leaf(scale), leaf(bias)
            output, nodes = self.compiled(float_linear, *leaves) if compiled else (float_linear(*leaves), None)
            if compiled:
                assert nodes.count("diffusers_terdit.pack.default") == 1
                assert nodes.count("diffusers_terdit.product.default") == 1
                assert "diffusers_terdit.linear.default" not in nodes
                assert "aten.mul.Tensor" in nodes
            output.backward(grad)
            found.append([output.detach(), *(tensor.grad for tensor in leaves)])
        for got, right in zip(*found, strict=True):
            assert got.dtype == right.dtype
            assert relative_error(got, right.double()) < {torch.float32: 1e-6}.get(dtype, 1e-2)

    @pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function")
    def test_scales_of_groups_that_are_trained_take_the_whole_op(self):
        packed, scale, _ = new_weight(36, 72, 8)
        output, nodes = self.compiled(ternary_linear, torch.randn(5, 72), packed, scale.requires_grad_())
        assert "diffusers_terdit.linear.default" in nodes
        output.sum().backward()
        assert scale.grad is not None

    @torch.no_grad()
    @pytest.mark.parametrize("bits", [16, 8])
    def test_activations_are_rounded_outside_the_product(self, bits):
        packed, scale, bias = new_weight(32, 64)
        x = torch.randn(40, 64)
        output, nodes = self.compiled(lambda x: integer_linear(x, packed, scale, bias, bits), x)
        assert nodes.count("diffusers_terdit.round_to_bytes.default") == 1
        assert nodes.count("diffusers_terdit.integer_product.default") == 1
        assert any(node.startswith("aten.mul") for node in nodes)
        assert torch.equal(output, reference.integer_linear(x, packed, scale, bias, bits))

    @torch.no_grad()
    @pytest.mark.skipif(not has_integer_kernel("cpu"), reason="needs AVX2 and numba")
    def test_layers_of_one_input_share_its_rounding(self, tiny_model, tiny_inputs):
        model, inputs = tiny_model("packed", num_layers=1, activation_bits=8), tiny_inputs()
        expected = model(**inputs).sample
        output, nodes = self.compiled(lambda *x: model(*x, return_dict=False)[0], *inputs.values())
        assert nodes.count("diffusers_terdit.integer_product.default") == 8
        assert nodes.count("diffusers_terdit.round_to_bytes.default") == 5  # q, k and v; gate and up; three more
        assert relative_error(output, expected.double()) < 1e-2

    def test_the_whole_network_is_one_graph(self, tiny_model, tiny_inputs):
        model, inputs = tiny_model("packed", num_layers=1), tiny_inputs()
        with torch.no_grad():
            expected = model(**inputs).sample
            output, nodes = self.compiled(lambda *x: model(*x, return_dict=False)[0], *inputs.values())
        assert nodes.count("diffusers_terdit.product.default") == len(model.ternary_layers())
        assert relative_error(output, expected.double()) < 1e-3

    @torch.no_grad()
    def test_exact_layers_of_one_input_are_one_product(self, tiny_model, tiny_inputs, monkeypatch):
        monkeypatch.setattr(torch_ops, "_has_products", lambda device_type: True)
        model, inputs = tiny_model("packed", num_layers=1), tiny_inputs()
        expected = model(**inputs).sample
        output, nodes = self.compiled(lambda *x: model(*x, return_dict=False)[0], *inputs.values())
        assert nodes.count("diffusers_terdit.products.default") == 2  # q, k and v; gate and up
        assert nodes.count("diffusers_terdit.product.default") == 3
        assert relative_error(output, expected.double()) < 1e-3

    @pytest.mark.parametrize(
        ("granularity", "dtype"), [("tensor", torch.float32), ("row", torch.float16), (8, torch.float16)], ids=str
    )
    def test_output_and_gradient_are_those_of_the_whole_op(self, granularity, dtype):
        packed, scale, bias = new_weight(36, 72, granularity)
        inner, outer = reference.split_scale(scale, dtype)

        def fused(x, *layer):
            product = torch.ops.diffusers_terdit.product(x, packed, inner, None)
            return reference.scale_and_shift(product, outer, bias).to(dtype)

        outputs, grads = [], []
        for function in (ternary_linear, fused):
            x = torch.randn(5, 72, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            outputs.append(function(x, packed, scale, bias))
            outputs[-1].float().square().sum().backward()
            grads.append(x.grad)
        tolerance = {"rtol": 3e-3, "atol": 3e-3} if dtype == torch.float16 else {}
        torch.testing.assert_close(*outputs, **tolerance)
        torch.testing.assert_close(*grads, **tolerance)

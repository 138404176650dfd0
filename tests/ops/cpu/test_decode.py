"""The exact CPU kernels: the reference's numbers."""

import pytest
import torch

from diffusers_terdit.ops import float_linear, pack_ternary, reference, ternarize, ternary_linear
from diffusers_terdit.ops.cpu import decode


SHAPES = [(1, 4, 1), (3, 8, 5), (7, 20, 33), (64, 12, 129), (5, 260, 64), (130, 100, 31)]  # (M, N, K)
GRANULARITIES = ["tensor", "row", "group"]


def new_case(rows, out_features, in_features, scale_granularity="tensor", seed=0, dtype=torch.float32):
    """Input (M, K), packed codes, scale, bias, and the float weight of the codes.

    The inputs are small integers and the scales powers of two, so every sum is exact in float32 whatever its order.
    """
    generator = torch.Generator().manual_seed(seed)
    group = next(size for size in (4, 3, 1) if in_features % size == 0)
    granularity = group if scale_granularity == "group" else scale_granularity
    weight = torch.randn(out_features, in_features, generator=generator)
    input = torch.randint(-8, 9, (rows, in_features), generator=generator).to(dtype)
    shape = reference.scale_shape(out_features, in_features, granularity)
    scale = 2.0 ** torch.randint(-3, 2, shape, generator=generator)
    bias = torch.randint(-8, 9, (out_features,), generator=generator) / 4
    return input, pack_ternary(ternarize(weight, granularity)), scale, bias, weight


def test_new_memory_is_garbage_in_these_tests():
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_the_reference(shape, scale_granularity):
    input, packed, scale, bias, weight = new_case(*shape, scale_granularity)
    for offset in (bias, None):
        expected = reference.ternary_linear(input, packed, scale, offset)
        assert torch.equal(decode.linear(input, packed, scale, offset), expected)
        assert torch.equal(decode.linear(input, weight, scale, offset), expected)


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backward_kernel_equals_the_reference(shape, scale_granularity):
    input, packed, scale, _, weight = new_case(*shape, scale_granularity)
    grad = torch.randint(-8, 9, shape[:2]).float()
    expected = reference.linear_backward(grad, input, reference.unpack_ternary(packed), scale, True)
    for either in (packed, weight):
        for got, right in zip(decode.linear_backward(grad, input, either, scale, True), expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_differs_from_the_reference_by_the_order_of_a_sum_at_most(shape, scale_granularity):
    _, packed, scale, _, weight = new_case(*shape, scale_granularity)
    input, scale, bias = torch.randn(shape[0], shape[2]), scale * 1.1, torch.randn(shape[1])
    output = decode.linear(input, packed, scale, bias)
    dense = reference.dequantize(reference.unpack_ternary(packed), scale).double()
    bound = 2.0**-23 * (shape[2] + 2) * (input.double().abs() @ dense.abs().T + bias.abs())
    assert ((output - (input.double() @ dense.T + bias)).abs() <= bound).all()
    assert torch.equal(decode.linear(input, weight, scale, bias), output)  # pack() changes no bit


def test_a_result_outlives_the_next_call():
    for scale_granularity in GRANULARITIES:
        first, second = (new_case(5, 16, 12, scale_granularity, seed) for seed in (0, 1))
        output = ternary_linear(*first[:4])
        before = output.clone()
        ternary_linear(*second[:4])
        assert torch.equal(output, before)


@pytest.mark.parametrize("scale_granularity", ["tensor", "row"])
def test_float16_does_not_overflow_before_the_scale_is_applied(scale_granularity):
    # A row's sum is 1000 times its non-zero weights, about 350000; the largest float16 is 65504.
    _, packed, scale, _, weight = new_case(1, 8, 512, scale_granularity)
    input = (1000 * reference.unpack_ternary(packed)).half()
    scale = torch.full_like(scale, 1e-3)
    sums = reference.unpack_ternary(packed).abs().sum(1)
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        output = linear(input, either, scale)
        assert output.isfinite().all()
        torch.testing.assert_close(output.diagonal().float(), sums, rtol=1e-3, atol=0)


def test_float16_gradients_do_not_overflow_before_the_scale_is_applied():
    _, packed, _, _, weight = new_case(1, 512, 8)
    scale = torch.tensor([1e-3])
    input = torch.full((1, 8), 1.0, dtype=torch.float16, requires_grad=True)
    grad = (1000 * reference.unpack_ternary(packed)[:, :1].T).half()
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        (input_grad,) = torch.autograd.grad(linear(input, either, scale), input, grad)
        assert input_grad.isfinite().all()
        expected = reference.unpack_ternary(packed)[:, 0].abs().sum()
        torch.testing.assert_close(input_grad[0, 0].float(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_other_dtypes_agree_with_float32_to_their_precision(scale_granularity, dtype):
    input, packed, scale, bias, _ = new_case(7, 20, 33, scale_granularity, dtype=dtype)
    expected = reference.ternary_linear(input.float(), packed, scale, bias)
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    error = (ternary_linear(input, packed, scale, bias).float() - expected).abs().max()
    assert error <= 4 * precision * expected.abs().max()


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_float64_is_not_rounded_on_the_way(scale_granularity):
    input, packed, scale, bias, weight = new_case(7, 20, 33, scale_granularity, dtype=torch.float64)
    input, scale = input + torch.rand_like(input), 1.1 * scale  # which float32 does not hold
    dense = reference.dequantize(reference.unpack_ternary(packed), scale).double()
    expected = input @ dense.T + bias
    for output in (
        ternary_linear(input, packed, scale, bias),
        float_linear(input, weight, scale, bias),
        reference.ternary_linear(input, packed, scale, bias),
    ):
        torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn(7, 20, dtype=torch.float64)
    found, *_ = decode.linear_backward(grad, None, packed, scale, True)
    torch.testing.assert_close(found, grad @ dense, rtol=1e-13, atol=1e-13)


def test_an_empty_batch_gives_an_empty_output():
    _, packed, scale, bias, weight = new_case(1, 16, 12)
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        assert linear(torch.randn(0, 12), either, scale, bias).shape == (0, 16)
        assert linear(torch.randn(2, 0, 12), either, scale, bias).shape == (2, 0, 16)

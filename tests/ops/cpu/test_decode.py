"""The exact CPU kernels: the reference's numbers."""

import pytest
import torch
from weights import exact_case

from diffusers_terdit.ops import float_linear, reference, ternary_linear
from diffusers_terdit.ops.cpu import decode


SHAPES = [(1, 4, 1), (3, 8, 5), (7, 20, 33), (64, 12, 129), (5, 260, 64), (130, 100, 31)]  # (M, N, K)
GRANULARITIES = ["tensor", "row", "group"]


def test_new_memory_is_garbage_in_these_tests():
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_equal_the_reference(shape, granularity):
    input, packed, scale, bias, weight = exact_case(*shape, granularity)
    for shift in (bias, None):
        expected = reference.ternary_linear(input, packed, scale, shift)
        assert torch.equal(decode.linear(input, packed, scale, shift), expected)
        assert torch.equal(decode.linear(input, weight, scale, shift), expected)
    grad = torch.randint(-8, 9, shape[:2]).float()
    expected = reference.linear_backward(grad, input, reference.unpack_ternary(packed), scale, True)
    for either in (packed, weight):
        for got, right in zip(decode.linear_backward(grad, input, either, scale, True), expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_differs_from_the_reference_by_the_order_of_a_sum_at_most(shape, granularity):
    _, packed, scale, _, weight = exact_case(*shape, granularity)
    input, scale, bias = torch.randn(shape[0], shape[2]), scale * 1.1, torch.randn(shape[1])
    output = decode.linear(input, packed, scale, bias)
    dense = reference.dequantize(reference.unpack_ternary(packed), scale).double()
    bound = 2.0**-23 * (shape[2] + 2) * (input.double().abs() @ dense.abs().T + bias.abs())
    assert ((output - (input.double() @ dense.T + bias)).abs() <= bound).all()
    assert torch.equal(decode.linear(input, weight, scale, bias), output)  # pack() changes no bit


@pytest.mark.parametrize("granularity", ["tensor", "row", 26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "blocks"), [(276, 1), (1108, 4)])
def test_both_formats_are_multiplied_in_the_same_memory(rows, blocks, granularity, dtype):
    """A quarter of 277 rows of 442 does not end at a multiple of 64 bytes: where a product's last bits may change."""
    weight, scale = torch.randn(rows, 442), torch.ones(reference.scale_shape(rows, 442, granularity))
    assert len(list(decode.decode_blocks(weight, scale, dtype))) == blocks
    packed = reference.pack_ternary(reference.round_to_ternary(weight, granularity))
    for half, whole in zip(*(decode.decode_blocks(w, scale, dtype) for w in (packed, weight)), strict=True):
        assert half[0] == whole[0]
        assert (half[1].data_ptr(), half[1].dtype) == (whole[1].data_ptr(), dtype)
        assert torch.equal(whole[1], reference.unpack_ternary(packed)[whole[0]].to(dtype))


def test_a_result_outlives_the_next_call():
    for granularity in GRANULARITIES:
        first, second = (exact_case(5, 16, 12, granularity, seed) for seed in (0, 1))
        output = ternary_linear(*first[:4])
        before = output.clone()
        ternary_linear(*second[:4])
        assert torch.equal(output, before)


@pytest.mark.parametrize("granularity", ["tensor", "row"])
def test_float16_does_not_overflow_before_the_scale_is_applied(granularity):
    # A row's sum is 1000 times its non-zero weights, about 350000; the largest float16 is 65504.
    _, packed, scale, _, weight = exact_case(1, 8, 512, granularity)
    ternary, scale = reference.unpack_ternary(packed), torch.full_like(scale, 1e-3)
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        input = (1000 * ternary).half().requires_grad_()
        output = linear(input, either, scale)
        assert output.isfinite().all()
        torch.testing.assert_close(output.diagonal().float(), ternary.abs().sum(1), rtol=1e-3, atol=0)


def test_float16_gradients_do_not_overflow_before_the_scale_is_applied():
    _, packed, _, _, weight = exact_case(1, 512, 8)
    input = torch.full((1, 8), 1.0, dtype=torch.float16, requires_grad=True)
    grad = (1000 * reference.unpack_ternary(packed)[:, :1].T).half()
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        (input_grad,) = torch.autograd.grad(linear(input, either, torch.tensor([1e-3])), input, grad)
        assert input_grad.isfinite().all()
        expected = reference.unpack_ternary(packed)[:, 0].abs().sum()
        torch.testing.assert_close(input_grad[0, 0].float(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_other_dtypes_agree_with_float32_to_their_precision(granularity, dtype):
    input, packed, scale, bias, _ = exact_case(7, 20, 33, granularity, dtype=dtype)
    expected = reference.ternary_linear(input.float(), packed, scale, bias)
    precision = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    error = (ternary_linear(input, packed, scale, bias).float() - expected).abs().max()
    assert error <= 4 * precision * expected.abs().max()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float64_is_not_rounded_on_the_way(granularity):
    input, packed, scale, bias, weight = exact_case(7, 20, 33, granularity, dtype=torch.float64)
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
    _, packed, scale, bias, weight = exact_case(1, 16, 12)
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        assert linear(torch.randn(2, 0, 12), either, scale, bias).shape == (2, 0, 16)

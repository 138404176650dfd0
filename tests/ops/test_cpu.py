"""The CPU kernels: the reference's numbers from buffers that belong to one thread each."""

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusers_terdit.ops import cpu, float_linear, gpu, pack_ternary, reference, ternarize, ternary_linear


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


def buffers():
    return list(vars(cpu._buffers).values())


def test_new_memory_is_garbage_in_these_tests():
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.uint8).tolist() == [255] * 3


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_equals_the_reference(shape, scale_granularity):
    input, packed, scale, bias, weight = new_case(*shape, scale_granularity)
    for offset in (bias, None):
        expected = reference.ternary_linear(input, packed, scale, offset)
        assert torch.equal(cpu.linear(input, packed, scale, offset), expected)
        assert torch.equal(cpu.linear(input, weight, scale, offset), expected)


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backward_kernel_equals_the_reference(shape, scale_granularity):
    input, packed, scale, _, weight = new_case(*shape, scale_granularity)
    grad = torch.randint(-8, 9, shape[:2]).float()
    expected = reference.linear_backward(grad, input, reference.unpack_ternary(packed), scale, True)
    for either in (packed, weight):
        for got, right in zip(cpu.linear_backward(grad, input, either, scale, True), expected, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounding_differs_from_the_reference_by_the_order_of_a_sum_at_most(shape, scale_granularity):
    _, packed, scale, _, weight = new_case(*shape, scale_granularity)
    input, scale, bias = torch.randn(shape[0], shape[2]), scale * 1.1, torch.randn(shape[1])
    output = cpu.linear(input, packed, scale, bias)
    dense = reference.dequantize(reference.unpack_ternary(packed), scale).double()
    bound = 2.0**-23 * (shape[2] + 2) * (input.double().abs() @ dense.abs().T + bias.abs())
    assert ((output - (input.double() @ dense.T + bias)).abs() <= bound).all()
    assert torch.equal(cpu.linear(input, weight, scale, bias), output)  # pack() changes no bit


def test_only_what_was_just_written_is_read_from_the_buffers():
    for out_features in (64, 8, 32, 4, 128, 16):  # large and small in turn
        input, packed, scale, bias, weight = new_case(3, out_features, 24, seed=out_features)
        expected = reference.ternary_linear(input, packed, scale, bias)
        for linear, either in ((ternary_linear, packed), (float_linear, weight)):
            assert torch.equal(linear(input, either, scale, bias), expected)
            for buffer in buffers():
                buffer.fill_(float("nan") if buffer.is_floating_point() else 255)


def test_the_buffers_of_the_largest_layer_serve_the_smaller_ones():
    seen = []
    for out_features in (8, 64, 16, 32):
        for linear, position in ((ternary_linear, 1), (float_linear, 4)):
            case = new_case(2, out_features, 12)
            linear(case[0], case[position], case[2])
        seen.append([(buffer.data_ptr(), buffer.numel()) for buffer in buffers()])
    assert seen[0] != seen[1]
    assert seen[1] == seen[2] == seen[3]


def test_a_packed_forward_buffers_a_quarter_of_the_dense_weight():
    ternary_linear(*new_case(2, 64, 48)[:4])
    dense = 64 * 48 * 4
    assert dense / 4 <= sum(buffer.nbytes for buffer in buffers()) <= dense / 3


def test_a_result_outlives_the_next_call():
    for scale_granularity in GRANULARITIES:
        first, second = (new_case(5, 16, 12, scale_granularity, seed) for seed in (0, 1))
        output = ternary_linear(*first[:4])
        before = output.clone()
        ternary_linear(*second[:4])
        assert torch.equal(output, before)


def test_a_change_of_dtype_gets_a_buffer_of_that_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        input, packed, scale, bias, _ = new_case(5, 16, 12, dtype=dtype)
        output = ternary_linear(input, packed, scale, bias)
        assert output.dtype == dtype
        expected = reference.ternary_linear(input.float(), packed, scale, bias)
        torch.testing.assert_close(output.float(), expected, rtol=2**-7, atol=0)  # two roundings to bfloat16


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_many_threads_at_once_each_read_their_own_weights(scale_granularity):
    cases = [new_case(2, 512, 256, scale_granularity, seed) for seed in range(8)]
    expected = [reference.ternary_linear(*case[:4]) for case in cases]
    start = threading.Barrier(4)

    def work(worker):
        start.wait(timeout=60)
        for turn in range(40):
            which = (worker * 3 + turn) % len(cases)
            input, packed, scale, bias, weight = cases[which]
            if not torch.equal(ternary_linear(input, packed, scale, bias), expected[which]):
                return f"packed layer {which} in turn {turn}"
            if not torch.equal(float_linear(input, weight, scale, bias), expected[which]):
                return f"float layer {which} in turn {turn}"
        return None

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4


def test_a_buffer_born_in_inference_mode_serves_training():
    input, packed, scale, bias, weight = new_case(5, 16, 12)
    expected = reference.ternary_linear(input, packed, scale, bias)
    with torch.inference_mode():
        ternary_linear(input, packed, scale, bias)
        float_linear(input, weight, scale, bias)
    for linear, either in ((ternary_linear, packed), (float_linear, weight.requires_grad_())):
        inputs = input.clone().requires_grad_()
        output = linear(inputs, either, scale, bias)
        assert torch.equal(output, expected)
        output.sum().backward()
        assert inputs.grad is not None
    with torch.inference_mode():
        assert torch.equal(ternary_linear(input, packed, scale, bias), expected)


def _send_result(connection, case):
    torch.set_num_threads(1)  # as the workers of a DataLoader do: OpenMP's threads do not survive a fork
    connection.send(ternary_linear(*case).tolist())
    connection.close()


@pytest.mark.skipif(sys.platform != "linux", reason="fork is safe on Linux only")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_buffer_works_in_a_forked_process():
    case, other = new_case(5, 16, 12)[:4], new_case(5, 16, 12, seed=1)[:4]
    expected = ternary_linear(*case)
    ternary_linear(*other)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, case))
    process.start()
    sender.close()
    assert receiver.poll(60)
    assert receiver.recv() == expected.tolist()
    process.join(60)
    assert process.exitcode == 0
    assert torch.equal(ternary_linear(*case), expected)  # and the parent's buffer is still its own


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
        gpu.linear(input, packed, scale, bias),
    ):
        torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    grad = torch.randn(7, 20, dtype=torch.float64)
    found, *_ = cpu.linear_backward(grad, None, packed, scale, True)
    torch.testing.assert_close(found, grad @ dense, rtol=1e-13, atol=1e-13)


def test_an_empty_batch_gives_an_empty_output():
    _, packed, scale, bias, weight = new_case(1, 16, 12)
    for linear, either in ((ternary_linear, packed), (float_linear, weight)):
        assert linear(torch.randn(0, 12), either, scale, bias).shape == (0, 16)
        assert linear(torch.randn(2, 0, 12), either, scale, bias).shape == (2, 0, 16)

"""The buffers of the CPU kernels: one set per thread, reused, and never read before they are written."""

import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from weights import exact_case

from diffusers_terdit.ops import float_linear, reference, ternary_linear
from diffusers_terdit.ops.cpu import decode, scratch


def buffers():
    return list(vars(scratch.buffers).values())


def test_only_what_was_just_written_is_read_from_the_buffers():
    for out_features in (64, 8, 32, 4, 128, 16):  # large and small in turn
        input, packed, scale, bias, weight = exact_case(3, out_features, 24, seed=out_features)
        expected = reference.ternary_linear(input, packed, scale, bias)
        for linear, either in ((ternary_linear, packed), (float_linear, weight)):
            assert torch.equal(linear(input, either, scale, bias), expected)
            for buffer in buffers():
                buffer.fill_(float("nan") if buffer.is_floating_point() else 255)


def test_the_buffers_of_the_largest_layer_serve_the_smaller_ones():
    seen = []
    for out_features in (8, 64, 16, 32):
        for linear, position in ((ternary_linear, 1), (float_linear, 4)):
            case = exact_case(9, out_features, 12)
            linear(case[0], case[position], case[2])
        seen.append([(buffer.data_ptr(), buffer.numel()) for buffer in buffers()])
    assert seen[0] != seen[1]
    assert seen[1] == seen[2] == seen[3]


def test_a_packed_forward_buffers_a_quarter_of_the_dense_weight():
    decode.linear(*exact_case(2, 1024, 512)[:4])
    dense = 1024 * 512 * 4
    assert dense / 4 <= sum(buffer.nbytes for buffer in buffers()) <= dense / 3


def test_lookups_buffer_as_much_as_the_packed_weight_and_a_few_tables():
    pytest.importorskip("numba")
    input, packed, scale, bias, _ = exact_case(9, 2048, 1024)
    ternary_linear(input, packed, scale, bias)
    assert packed.nbytes <= sum(buffer.nbytes for buffer in buffers()) <= packed.nbytes + 2**18


def test_a_change_of_dtype_gets_a_buffer_of_that_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        input, packed, scale, bias, _ = exact_case(5, 16, 12, dtype=dtype)
        output = ternary_linear(input, packed, scale, bias)
        assert output.dtype == dtype
        expected = reference.ternary_linear(input.float(), packed, scale, bias)
        torch.testing.assert_close(output.float(), expected, rtol=2**-7, atol=0)  # two roundings to bfloat16


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_many_threads_at_once_each_read_their_own_weights(granularity):
    cases = [exact_case(2, 512, 256, granularity, seed) for seed in range(8)]
    expected = [reference.ternary_linear(*case[:4]) for case in cases]
    start = threading.Barrier(4)

    def work(worker):
        start.wait(timeout=60)
        for turn in range(20):
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
    input, packed, scale, bias, weight = exact_case(5, 16, 12)
    expected = reference.ternary_linear(input, packed, scale, bias)
    with torch.inference_mode():
        for linear, either in ((ternary_linear, packed), (float_linear, weight)):
            assert torch.equal(linear(input.clone(), either, scale, bias), expected)
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
    case, other = exact_case(5, 16, 12)[:4], exact_case(5, 16, 12, seed=1)[:4]
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

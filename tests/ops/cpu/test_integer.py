"""Integer activations: the kernels give the reference's bits, whatever the instructions, threads or process."""

import ctypes
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
import torch
from processes import before_a_wall, in_a_fork, multi_threaded, needs_a_wall, needs_fork

from diffusers_terdit.ops import has_integer_kernel, integer_linear, pack_ternary, reference, ternary_linear
from diffusers_terdit.ops.cpu import threads as threads_of_kernels


numba = pytest.importorskip("numba")
ir = pytest.importorskip("llvmlite.ir")
integer = pytest.importorskip("diffusers_terdit.ops.cpu.integer")
integer_amx = pytest.importorskip("diffusers_terdit.ops.cpu.integer_amx")
integer_lookup = pytest.importorskip("diffusers_terdit.ops.cpu.integer_lookup")
instructions = pytest.importorskip("diffusers_terdit.ops.cpu.instructions")
pointer = instructions.pointer
pytestmark = pytest.mark.skipif(not has_integer_kernel("cpu"), reason="this processor has no AVX2")
TABLE = {kernel.name: kernel for kernel in (integer_amx.KERNEL, integer_lookup.KERNEL, *integer.KERNELS)}
KERNELS = {  # those whose instructions this processor has, also where another one is faster
    name: partial(integer.linear, kernel)
    for name, kernel in TABLE.items()
    if kernel._replace(processors=()).runs_on(instructions.processor())
}

SHAPES = [  # (M, N, K)
    *[(1, 4, 1), (3, 8, 5), (17, 20, 33), (64, 12, 129), (5, 260, 64), (130, 100, 31), (8, 196, 2050), (2, 384, 64)],
    *[(257, 772, 66), (512, 192, 1024), (700, 388, 96), (2048, 24, 40), (300, 1804, 570)],
]
GROUPED = [  # (M, N, K, g): of half a vector, not of whole words, of several blocks, of one and a half
    *[(3, 8, 10, 5), (17, 20, 33, 11), (5, 260, 96, 3), (20, 132, 72, 36), (130, 196, 512, 32), (64, 132, 1152, 128)],
    *[(257, 68, 1280, 256), (9, 64, 8192, 4096), (30, 100, 3600, 1800), (40, 24, 192, 64)],
]
KINDS = {
    "Gaussian": lambda x: x,
    "gated": lambda x: torch.nn.functional.silu(x) * torch.randn_like(x),
    "outliers": lambda x: torch.where(torch.rand_like(x) < 1e-3, 20 * x, x),
}


def new_case(rows, out_features, in_features, dtype=torch.float32, granularity="tensor"):
    """Input, packed codes, scale, bias."""
    packed = pack_ternary(torch.randint(-1, 2, (out_features, in_features)))
    scale = torch.rand(reference.scale_shape(out_features, in_features, granularity)) + 0.1
    return torch.randn(rows, in_features).to(dtype), packed, scale, torch.randn(out_features)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_give_the_references_bits(shape, dtype, bits):
    for granularity, biased in (("tensor", True), ("row", False), ("row", True)):
        input, packed, scale, bias = new_case(*shape, dtype, granularity)
        expected = reference.integer_linear(input, packed, scale, bias if biased else None, bits)
        for name, kernel in KERNELS.items():
            output = kernel(input, packed, scale, bias if biased else None, bits)
            assert output.dtype == dtype
            assert torch.equal(output, expected), name


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GROUPED, ids=str)
def test_groups_give_the_references_bits(shape, dtype, bits):
    input, packed, scale, bias = new_case(*shape[:3], dtype, shape[3])
    scale[::2] *= -1
    for shift in (bias, None):
        expected = reference.integer_linear(input, packed, scale, shift, bits)
        for name, kernel in KERNELS.items():
            assert torch.equal(kernel(input, packed, scale, shift, bits), expected), name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bits", [8, 16])
def test_the_sums_are_those_of_integers(bits, kernel):
    top = reference.LARGEST_CODE[bits]
    ternary = torch.randint(-1, 2, (132, 620))
    codes = torch.randint(-top, top + 1, (37, 620))
    codes[0], ternary[0], ternary[1] = top, 1, -1  # the largest sums
    codes[1], codes[2] = -128 if bits == 16 else -127, 127  # of low bytes
    codes[3] = -top
    codes[:, 0] = top  # then the step is 1
    sums = codes @ ternary.T  # int64
    output = KERNELS[kernel](codes.float(), pack_ternary(ternary), torch.ones(1), None, bits)
    assert torch.equal(output, sums.float())
    assert sums.abs().max() == 620 * top


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_several_weights_share_the_rounded_input(kernel, bits, monkeypatch):
    input, *first = new_case(130, 260, 66, torch.bfloat16)
    weights = [tuple(first), (*new_case(1, 1028, 66, granularity="row")[1:3], None), tuple(new_case(1, 4, 66)[1:])]
    weights += [tuple(new_case(1, 64, 66, granularity=22)[1:]), tuple(new_case(1, 20, 66, granularity=22)[1:])]
    expected = [reference.integer_linear(input, *weight, bits) for weight in weights]
    runs, run = [], integer.run
    monkeypatch.setattr(integer, "run", lambda *args: (runs.append(args[0]), run(*args)))
    outputs = integer.linears(TABLE[kernel], input, weights, bits)
    assert all(torch.equal(output, right) for output, right in zip(outputs, expected, strict=True))
    assert [runs.count(function) for function in dict.fromkeys(runs)] == [2, 5]


def dot_written_out(module, lanes):
    """What `vpdpbusd` does, in instructions that every processor has."""
    ints, bytes_ = ir.VectorType(ir.IntType(32), lanes), ir.VectorType(ir.IntType(8), 4 * lanes)
    name = f"dot_written_out_{lanes}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ints, [ints, ints, ints]), name)
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    total, unsigned, signed = function.args
    wide = ir.VectorType(ir.IntType(32), 4 * lanes)
    products = builder.mul(
        builder.zext(builder.bitcast(unsigned, bytes_), wide), builder.sext(builder.bitcast(signed, bytes_), wide)
    )
    for place in range(4):
        which = ir.Constant(ints, [4 * lane + place for lane in range(lanes)])
        total = builder.add(total, builder.shuffle_vector(products, products, which))
    builder.ret(total)
    return function


def permute_written_out(module):
    """What `vpermw` does."""
    shorts, i32 = ir.VectorType(ir.IntType(16), 32), ir.IntType(32)
    if "permute_written_out" in module.globals:
        return module.globals["permute_written_out"]
    function = ir.Function(module, ir.FunctionType(shorts, [shorts, shorts]), "permute_written_out")
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    table, indices = function.args
    indices = builder.and_(indices, ir.Constant(shorts, [31] * 32))
    found = ir.Constant(shorts, ir.Undefined)
    for lane in range(32):
        index = builder.zext(builder.extract_element(indices, i32(lane)), i32)
        found = builder.insert_element(found, builder.extract_element(table, index), i32(lane))
    builder.ret(found)
    return function


@numba.njit
def tiles_written_out(tables, x, codes, apart, steps, sums, first):
    """What `tile` does with AMX."""
    tiles = steps // 16
    inputs = numba.carray(pointer(x, "int8"), (tiles, 16, 16, 4))
    totals = numba.carray(pointer(sums, "int32"), (16, 4, 16))
    if first:
        totals[:] = 0
    for quarter in range(4):
        weights = numba.carray(pointer(codes + quarter * apart, "int8"), (tiles, 16, 16, 4))
        for tile in range(tiles):
            for row in range(16):
                for output in range(16):
                    for step in range(16):
                        for place in range(4):
                            product = numba.int32(inputs[tile, row, step, place]) * weights[tile, step, output, place]
                            totals[row, quarter, output] += product


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in KERNELS)) for name in TABLE if name != "avx2"]
)
@pytest.mark.parametrize("bits", [8, 16])
def test_loops_of_processors_that_this_one_is_not(name, bits, monkeypatch):
    """All but the one instruction, or two: shapes, registers, order of the integers, what comes after the sums."""
    for module in (integer, integer_lookup):
        monkeypatch.setattr(module, "dot", dot_written_out)
    monkeypatch.setattr(integer_lookup, "permute", permute_written_out)
    kernel = TABLE[name]
    if name == "amx_int8":
        kernel = kernel._replace(hooks=integer.Hooks(kernel.hooks.cut, tiles_written_out))
    compile_once = cache(partial(integer.compile_functions, cached=False))
    monkeypatch.setattr(integer, "compiled", compile_once)
    for shape in ((1, 4, 1), (17, 20, 33), (8, 196, 2050), (257, 772, 66), (40, 388, 1100)):
        for granularity in ("row", shape[2] // (2 if shape[2] % 2 == 0 else 1)):
            input, packed, scale, bias = new_case(*shape, granularity=granularity)
            expected = reference.integer_linear(input, packed, scale, bias, bits)
            assert torch.equal(integer.linear(kernel, input, packed, scale, bias, bits), expected)


def test_the_sums_of_the_most_inputs_stay_in_int32():
    inputs = reference.MOST_INPUTS[16]
    ternary = torch.tensor([[1], [-1], [1], [0]]).expand(4, inputs)
    for kernel in KERNELS.values():
        output = kernel(torch.ones(1, inputs), pack_ternary(ternary), torch.ones(1), None, 16)
        torch.testing.assert_close(output, torch.tensor([[1.0, -1, 1, 0]]) * inputs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_are_zero_tiny_or_not_finite(kernel):
    input, packed, scale, bias = new_case(7, 8, 12)
    for row, value in enumerate((0.0, 1e-42, 1e-13, float("nan"), float("inf"), -float("inf"))):
        input[row] *= 0 if row < 3 else 1
        input[row, 3] = value
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (8, 16):
            output = KERNELS[kernel](input.to(dtype), packed, scale, bias, bits)
            expected = reference.integer_linear(input.to(dtype), packed, scale, bias, bits)
            assert torch.equal(output.nan_to_num(77), expected.nan_to_num(77))
            assert output.isnan().all(1).tolist() == [False, False, False, True, True, True, False]


@pytest.mark.parametrize("bits", [8, 16])
def test_quotients_next_to_a_half(bits):
    top, generator = reference.LARGEST_CODE[bits], torch.Generator().manual_seed(0)
    largest = torch.exp(torch.linspace(-27, 88, 200).unsqueeze(1)) * (1 + torch.rand(200, 1, generator=generator))
    halves = torch.randint(-top, top, (200, 999), generator=generator) + 0.5
    input = (halves.double() * (largest / top).double()).float()
    for direction in (torch.inf, -torch.inf):
        nearby = torch.where(torch.rand(input.shape, generator=generator) < 0.3, direction, input)
        input = torch.nextafter(input, nearby)
    input = torch.cat([largest, input], dim=1)  # (200, 1000)
    packed = pack_ternary(torch.eye(1000, dtype=torch.int8))
    expected = reference.integer_linear(input, packed, torch.ones(1), None, bits)
    assert torch.equal(next(iter(KERNELS.values()))(input, packed, torch.ones(1), None, bits), expected)


def test_any_memory_layout_and_no_rows():
    _, packed, scale, bias = new_case(1, 64, 40)
    apart = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape)  # not on a multiple of 4
    apart.copy_(packed)
    across = torch.empty(packed.shape[::-1], dtype=torch.uint8).T
    across.copy_(packed)
    input = torch.randn(2, 40, 3).transpose(1, 2)
    expected = reference.integer_linear(input, packed, scale, bias, 16)
    for weight in (packed, apart, across):
        assert torch.equal(integer_linear(input, weight, scale, bias), expected)
    assert integer_linear(torch.randn(0, 40), packed, scale, bias).shape == (0, 64)
    assert integer_linear(torch.randn(40), packed, scale, bias).shape == (64,)


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_the_number_of_threads_changes_nothing(monkeypatch, set_num_threads, threads, openmp):
    if not openmp:
        monkeypatch.setattr(threads_of_kernels, "openmp", lambda: None)
    input, packed, scale, bias = new_case(300, 1024, 512)
    expected = reference.integer_linear(input, packed, scale, bias, 16)
    set_num_threads(threads)
    for _ in range(3):
        assert torch.equal(integer_linear(input, packed, scale, bias), expected)


def test_all_threads_take_part(monkeypatch, set_num_threads):
    """Each thread that comes to a job counts itself."""
    if threads_of_kernels.openmp() is None:
        pytest.skip("torch has no OpenMP here")
    input, packed, scale, bias = new_case(300, 1024, 512)
    seen, run = [], integer.run

    def spy(kernel, job, units, threads):
        run(kernel, job, units, threads)
        seen.append(int(job[integer.JOB.thread]))

    set_num_threads(3)
    monkeypatch.setattr(integer, "run", spy)
    integer_linear(input, packed, scale, bias)
    assert seen[-1] == 3


def test_several_python_threads_at_once():
    cases = [new_case(50, 128 * (i % 3 + 1), 256) for i in range(12)]
    expected = [reference.integer_linear(*case, 16) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            outputs = list(pool.map(lambda case: integer_linear(*case), cases))
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_default_dtype_changes_nothing(bits, bias):
    """A load in another thread sets it for the whole process; buffers of two bytes would be written past their end."""
    input, packed, scale, shift = new_case(300, 64, 40)
    shift = shift if bias else None
    expected = reference.integer_linear(input, packed, scale, shift, bits)
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(integer_linear(input, packed, scale, shift, bits), expected)
    finally:
        torch.set_default_dtype(before)


@needs_fork
@multi_threaded
def test_after_a_fork(set_num_threads):
    case = new_case(300, 1024, 512)
    set_num_threads(2)
    expected = integer_linear(*case).numpy()
    for threads in (1, 2):
        set_num_threads(threads)
        assert in_a_fork(lambda: (integer_linear(*case).numpy() == expected).all()) == 0


@needs_fork
@multi_threaded
@needs_a_wall
def test_nothing_is_read_beyond_the_arrays(set_num_threads):
    """They end where a page begins that may not be read: a signal ends a process that does."""
    set_num_threads(1)
    expected = []
    for *shape, granularity in ((5, 256, 1024, "row"), (9, 40, 72, "row"), (3, 192, 300, 100), (17, 260, 1156, "row")):
        case = [before_a_wall(tensor) for tensor in new_case(*shape, granularity=granularity)]
        expected += [((*case, bits), reference.integer_linear(*case, bits)) for bits in (8, 16)]
    for kernel in KERNELS.values():
        assert in_a_fork(lambda run=kernel: all(torch.equal(run(*case), output) for case, output in expected)) == 0
    wall = before_a_wall(torch.ones(8))
    assert in_a_fork(lambda: ctypes.string_at(wall.data_ptr(), wall.nbytes + 1)) == -signal.SIGSEGV


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_against_float64(kind):
    input, packed, _, _ = new_case(128, 256, 1024)
    input = KINDS[kind](input)
    exact = input.double() @ reference.unpack_ternary(packed, torch.float64).T

    def error(output):
        return float((output.double() - exact).norm() / exact.norm())

    one = torch.ones(1)
    assert error(integer_linear(input, packed, one, None, 16)) < 5e-4
    assert error(integer_linear(input, packed, one, None, 8)) < 8e-2
    assert error(integer_linear(input, packed, one, None, 8)) > 5e-3  # it is eight bits that were measured
    assert error(ternary_linear(input, packed, one)) < 1e-6


@pytest.mark.parametrize("bits", [8, 16])
def test_an_outlier_of_one_group_does_not_coarsen_the_others(bits):
    input, packed, _, _ = new_case(128, 256, 1024)
    input[:, 7] *= 100
    exact = input.double() @ reference.unpack_ternary(packed, torch.float64).T
    errors = [
        float((integer_linear(input, packed, torch.ones(256, groups), None, bits) - exact).norm()) for groups in (1, 8)
    ]
    assert errors[1] < errors[0] / 2

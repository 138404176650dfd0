"""Compiled exact products: float64's numbers to float32's precision, and the same bits however they are computed."""

import ctypes
import signal

import pytest
import torch
from processes import before_a_wall, in_a_fork, multi_threaded, needs_a_wall, needs_fork
from weights import exact_case

from diffusers_terdit.ops import float_linear, pack_ternary, reference, ternarize, ternary_linear
from diffusers_terdit.ops.cpu import choose
from diffusers_terdit.ops.cpu import threads as threads_of_kernels


numba = pytest.importorskip("numba")
from diffusers_terdit.ops.cpu import exact_amx, instructions, lookup, pack, scale_gradient  # noqa: E402 - after the skip


SHAPES = [  # (M, N, K)
    *[(1, 4, 1), (2, 8, 5), (3, 8, 5), (17, 20, 33), (64, 12, 129), (5, 260, 64), (130, 100, 31), (8, 196, 2050)],
    *[(4, 384, 64), (257, 772, 66), (100, 192, 1024), (40, 388, 96), (33, 1804, 570), (9, 64, 1056), (16, 24, 288)],
    (530, 1100, 544),
    (2070, 20, 40),
]
GRANULARITIES = ["tensor", "row", "group", 32]
HERE = instructions.processor()
PROCESSORS = {  # for which products differ, of those whose instructions this one has
    name: features
    for name, features in {
        "amx": exact_amx.FEATURES | {"+bmi", "+avx2", "+avx512f"},
        "avx512": {"+bmi", "+avx2", "+avx512f"},
        "avx2": {"+bmi", "+avx2"},
        "any": set(),
    }.items()
    if features <= HERE.features
}


def new_case(rows, out_features, in_features, granularity="tensor", seed=0):
    """Input (M, K), packed codes, scale, bias, T."""
    if granularity == "group":
        granularity = next(size for size in (48, 33, 10, 4, 3, 1) if in_features % size == 0)
    if isinstance(granularity, int) and in_features % granularity:
        pytest.skip("no such groups")
    generator = torch.Generator().manual_seed(seed)
    ternary = torch.randint(-1, 2, (out_features, in_features), generator=generator)
    shape = reference.scale_shape(out_features, in_features, granularity)
    scale, bias = 0.5 + torch.rand(shape, generator=generator), torch.randn(out_features, generator=generator)
    input = torch.randn(rows, in_features, generator=generator)
    return input, pack_ternary(ternary), scale, bias, ternary


def lookup_in_order(x, codes):
    """Sums (M, N) of each chunk of (M, K) inputs and (N, K) codes, in the order that `lookup` says."""
    for chunk in (x[:, None] * codes.float()).split(lookup.CHUNK, 2):
        four = torch.nn.functional.pad(chunk, (0, lookup.CHUNK - chunk.shape[2])).unflatten(2, (-1, lookup.INPUTS))
        sums = (four[..., 0] + four[..., 1]) + (four[..., 2] + four[..., 3])
        while sums.shape[2] > 1:
            sums = sums[..., ::2] + sums[..., 1::2]
        yield sums[..., 0]


def amx_in_order(x, codes):
    """The same as tdpbf16ps sums: inputs at even places, those at odd ones, both."""
    for inputs, weights in zip(x.split(exact_amx.CHUNK, 1), codes.split(exact_amx.CHUNK, 1), strict=True):
        products = inputs[:, None] * weights.float()
        even, odd = torch.zeros(len(x), len(codes)), torch.zeros(len(x), len(codes))
        for place in range(products.shape[2]):
            (odd if place % 2 else even).add_(products[..., place])
        yield even + odd


def in_order(input, ternary, scale, bias, name):
    grouped = reference.is_grouped(scale)
    groups = scale.shape[1] if grouped else 1
    chunks_in_order = amx_in_order if name == "amx" else lookup_in_order
    total = torch.zeros(len(input), len(ternary))
    for group, (x, codes) in enumerate(zip(input.chunk(groups, 1), ternary.chunk(groups, 1), strict=True)):
        if name == "amx" and grouped:  # a group's chunks are summed first
            total = total + sum(chunks_in_order(x, codes)) * scale[:, group]
            continue
        for chunk in chunks_in_order(x, codes):
            total = total + (chunk * scale[:, group] if grouped else chunk)
    return (total if grouped else total * scale.reshape(-1)) + bias


@pytest.fixture(autouse=True)
def _small_layers_are_looked_up_too(monkeypatch):
    monkeypatch.setattr(choose, "FEWEST_OUTPUTS", 0)


@pytest.fixture(params=PROCESSORS)
def processor(request, monkeypatch):
    """Every kind of processor whose instructions this one has."""
    features = frozenset(HERE.features - set().union(*PROCESSORS.values()) | PROCESSORS[request.param])
    for module in (lookup, instructions):
        monkeypatch.setattr(module, "processor", lambda: HERE._replace(features=features))
    return request.param


def test_the_product_of_a_processor(processor, monkeypatch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        amx = processor == "amx" and dtype == torch.bfloat16
        assert choose.exact_products(dtype, 4)[1] is (exact_amx.products if amx else lookup.products)
        with monkeypatch.context() as patch:
            patch.setattr(choose, "FEWEST_OUTPUTS", 8)
            assert (choose.exact_products(dtype, 4) is None) == (not amx)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sums_and_their_order(processor, shape, granularity):
    input, packed, scale, bias, ternary = new_case(*shape, granularity)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = input.to(dtype)
        order = "amx" if processor == "amx" and dtype == torch.bfloat16 else "lookup"
        right = in_order(given.float(), ternary, scale, bias, order)
        output = choose.linear(given, packed, scale, bias)
        assert torch.equal(output, right.to(dtype))
        exact = given.double() @ reference.dequantize(ternary, scale).double().T + bias
        assert (right - exact).norm() <= 3e-7 * exact.norm()
        for rows in (1, 2, 3, 6, 8):  # in any batch
            assert torch.equal(choose.linear(given[:rows], packed, scale, bias), output[:rows])


@pytest.mark.parametrize("rows", [0, 2, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_one_input_share_what_is_made_of_it(processor, monkeypatch, rows, dtype):
    names, compiled = [], lookup.compiled
    monkeypatch.setattr(lookup, "compiled", lambda name, *rest: names.append(name) or compiled(name, *rest))
    monkeypatch.setattr(lookup, "MOST_OUTPUTS", 100)  # of units, whose ends are not those of layers
    input = torch.randn(rows, 96).to(dtype)
    sizes = ((260, "tensor"), (4, "row"), (44, "tensor"), (36, 32), (128, 32), (20, 16), (8, "tensor"))
    layers = [new_case(rows, size, 96, granularity, seed)[1:4] for seed, (size, granularity) in enumerate(sizes)]
    layers[2] = (*layers[2][:2], None)
    shared = choose.linears(input, *map(list, zip(*layers, strict=True)), None)
    made = [name for name in names if name in ("tile", "spread")]
    assert len(made) == (0 if processor == "amx" and dtype == torch.bfloat16 else 4)
    for output, layer in zip(shared, layers, strict=True):
        assert torch.equal(output, choose.linear(input, *layer))
        assert output.is_contiguous()


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_gradients_equal_the_reference_and_the_formats_each_other(processor, shape, granularity):
    input, packed, scale, bias, weight = exact_case(*shape, granularity)
    grad = torch.randint(-8, 9, shape[:2], generator=torch.Generator().manual_seed(1)).float()
    expected = reference.linear_backward(grad, input, reference.unpack_ternary(packed), scale, True)
    half = choose.linear_backward(grad.bfloat16(), None, packed, scale, True)[0]
    assert torch.equal(half, expected[0].bfloat16()) or granularity == "group"
    for either in (packed, weight):
        assert torch.equal(
            choose.linear(input, either, scale, bias), reference.ternary_linear(input, packed, scale, bias)
        )
        for got, right in zip(choose.linear_backward(grad, input, either, scale, True), expected, strict=True):
            assert torch.equal(got, right)
        alone = choose.linear_backward(grad, None, either, scale, True)
        assert torch.equal(alone[0], expected[0])
        assert alone[1].numel() == alone[2].numel() == 0


@pytest.mark.parametrize("granularity", ["tensor", "row", 33])
@pytest.mark.parametrize("out_features", [1, 6, 7, 21])
def test_a_float_weight_whose_rows_are_no_multiple_of_four(granularity, out_features):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, 66, generator=generator, requires_grad=True)
    scale = torch.rand(reference.scale_shape(out_features, 66, granularity), generator=generator).requires_grad_()
    bias, input = torch.randn(out_features, generator=generator), torch.randn(9, 66, generator=generator)
    input.requires_grad_()
    output = float_linear(input, weight, scale, bias)
    ternary = ternarize(weight.detach(), granularity)
    torch.testing.assert_close(output, reference.scaled_linear(input.detach(), ternary, scale.detach(), bias))
    grads = torch.autograd.grad(output, (input, weight, scale), torch.ones_like(output))
    right = reference.linear_backward(torch.ones_like(output), input.detach(), ternary, scale.detach(), True)
    for got, expected in zip(grads, right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", ["tensor", "row", 3])
def test_packing_gives_the_bytes_of_the_reference(granularity):
    for out_features, in_features in ((4, 3), (12, 300), (260, 33), (64, 1026)):
        weight = torch.randn(out_features, in_features)
        weight[:, 0] = torch.tensor([0.5, -0.5, 1.5, 0.0]).repeat(out_features // 4)  # halves, times the mean
        scale = torch.rand(reference.scale_shape(out_features, in_features, granularity))
        for given in (weight, weight.bfloat16(), weight.double(), weight.T.contiguous().T):
            for got, expected in zip(pack.pack(given, scale), reference.pack_float(given, scale), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_gives_nan(value):
    weight = torch.randn(8, 6)
    weight[5, 3] = value
    output = float_linear(torch.randn(3, 6), weight, torch.ones(1))
    assert output.isnan().all()
    output = float_linear(torch.randn(3, 6), weight, torch.ones(8, 1))
    assert output.isnan().any(0).tolist() == [row == 5 for row in range(8)]


def test_what_is_not_finite_stays_in_its_row(processor):
    for rows, dtype in ((3, torch.float32), (20, torch.float32), (20, torch.bfloat16)):
        input, packed, scale, bias, ternary = new_case(rows, 64, 40)
        input = input.to(dtype)
        expected = choose.linear(input, packed, scale, bias)
        input[1, 7], input[2, 7] = float("nan"), float("inf")
        output = choose.linear(input, packed, scale, bias)
        others = [row for row in range(rows) if row not in (1, 2)]
        assert torch.equal(output[others], expected[others])
        assert not output[1:3][:, ternary[:, 7] != 0].isfinite().any()


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 8, 60])
def test_the_number_of_threads_changes_nothing(monkeypatch, set_num_threads, rows, threads, openmp):
    if not openmp:
        monkeypatch.setattr(threads_of_kernels, "openmp", lambda: None)
    input, packed, scale, bias, _ = new_case(rows, 1024, 516, "row")
    grad, weight = torch.randn(rows, 1024), torch.randn(1024, 516)

    def compute():
        of_ternary = weight.clone()
        return (
            ternary_linear(input, packed, scale, bias),
            *choose.linears(input, [packed, packed], [scale, scale], [bias, None], None),
            choose.linear_backward(grad, None, packed, scale, True)[0],
            *pack.pack(weight, scale),
            scale_gradient.scale_gradient(of_ternary, packed, scale),
            of_ternary,
        )

    set_num_threads(1)
    expected = compute()
    set_num_threads(threads)
    for _ in range(3):
        assert all(map(torch.equal, compute(), expected))


def test_any_memory_layout_and_no_rows():
    input, packed, scale, bias, _ = new_case(6, 64, 40)
    expected = ternary_linear(input, packed, scale, bias)
    apart = torch.empty(packed.numel() + 1, dtype=torch.uint8)[1:].view(packed.shape)
    apart.copy_(packed)
    for weight in (apart, packed.T.contiguous().T):
        assert torch.equal(ternary_linear(input, weight, scale, bias), expected)
    assert torch.equal(ternary_linear(input.T.contiguous().T, packed, scale, bias), expected)
    assert ternary_linear(torch.randn(0, 40), packed, scale, bias).shape == (0, 64)
    assert ternary_linear(torch.randn(40), packed, scale, bias).shape == (64,)
    assert choose.linear_backward(torch.randn(0, 64), None, packed, scale, True)[0].shape == (0, 40)


@needs_fork
@multi_threaded
@needs_a_wall
def test_nothing_is_read_beyond_the_arrays(processor, set_num_threads):
    set_num_threads(1)
    cases = []
    shapes = ((3, 40, 72), 9), ((9, 40, 72), "row"), ((17, 260, 96), 32), ((40, 196, 1100), "tensor")
    for shape, granularity in shapes:
        input, packed, scale, bias, ternary = new_case(*shape, granularity)
        for dtype in (torch.float32, torch.bfloat16):
            grad = torch.randn(shape[:2]).to(dtype)
            cases += [(grad, input.to(dtype), weight, scale, bias) for weight in (packed, ternary.float())]

    def compute(place):
        for case in cases:
            grad, *layer = map(place, case)
            choose.linear(*layer)
            choose.linear_backward(grad, *layer[:3], True)
            if layer[1].dtype == torch.uint8:
                choose.linears(layer[0], *([one, one] for one in layer[1:]), None)
        return True

    compute(torch.clone)  # compiled before the fork
    assert in_a_fork(lambda: compute(before_a_wall)) == 0
    wall = before_a_wall(torch.ones(8))
    assert in_a_fork(lambda: ctypes.string_at(wall.data_ptr(), wall.nbytes + 1)) == -signal.SIGSEGV


def test_a_code_that_no_file_may_hold_reads_no_memory_beyond_the_tables(processor):
    for rows, dtype in ((1, torch.float32), (9, torch.float32), (9, torch.bfloat16)):
        input = torch.randn(rows, 100, dtype=dtype)
        output = choose.linear(input, torch.full((16, 100), 255, dtype=torch.uint8), torch.ones(1), None)
        assert output.shape == (rows, 64)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_the_default_dtype_changes_nothing(default, granularity):
    input, packed, scale, _, _ = new_case(9, 64, 40, granularity)
    weight, grad = torch.randn(64, 40), torch.randn(9, 64)

    def compute():
        return (
            ternary_linear(input, packed, scale),
            float_linear(input, weight, scale),
            *choose.linear_backward(grad, input, packed, scale, True),
        )

    expected, before = compute(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        assert all(map(torch.equal, compute(), expected))
    finally:
        torch.set_default_dtype(before)

"""`ternarize` against its formula, the packed bytes against two published layouts, and what both refuse."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffusers_terdit.ops import dequantize, pack_ternary, reference, ternarize, unpack_ternary


GRANULARITIES = ["tensor", "row", 4]
PROPERTY = settings(database=None, deadline=None, derandomize=True, max_examples=40)
# transformers' module compiles when it is imported, and torch warns about its own internals
torchs_warnings = pytest.mark.filterwarnings("ignore")
PACKING_PAGE = Path(__file__).parents[2] / "docs" / "packing.md"


def random_matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def float64_ternarize(weight, scale_granularity):
    """round(W / (mean|W| + 1e-6)) clamped, in float64, written on blocks of the matrix that share a mean."""
    rows, columns = weight.shape
    height = rows if scale_granularity == "tensor" else 1
    width = scale_granularity if isinstance(scale_granularity, int) else columns
    ternary = np.empty((rows, columns))
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            block = weight[row : row + height, column : column + width].astype(np.float64)
            rounded = np.rint(block / (np.abs(block).mean() + 1e-6))
            ternary[row : row + height, column : column + width] = np.clip(rounded, -1, 1)
    return ternary


def hqq_pack_2bit(codes):
    """HQQ's 2-bit layout: the first quarter of the rows in the two highest bits, the last in the two lowest.

    Source: `BitPack.pack_2bit_u8` of hqq 0.2.8 (https://github.com/mobiusml/hqq).
    """
    rows, columns = codes.shape
    packed = np.zeros((rows // 4, columns), np.uint8)
    for row in range(rows):
        quarter, place = divmod(row, rows // 4)
        packed[place] += codes[row].astype(np.uint8) * (64, 16, 4, 1)[quarter]
    return packed


def ternary_matrices(max_quarter=5, max_columns=9):
    shapes = st.tuples(st.integers(1, max_quarter).map(lambda n: 4 * n), st.integers(1, max_columns))
    return shapes.flatmap(lambda shape: hnp.arrays(np.int8, shape, elements=st.integers(-1, 1)))


def float_matrices():
    shapes = st.tuples(st.integers(1, 6), st.integers(1, 3).map(lambda n: 4 * n))
    return shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32)))


# Means: 0.825 for the matrix; 0.5 and 1.15 for its rows; 0.5, 0.5, 1.1, 1.2 for its groups of two.
HAND_WEIGHT = torch.tensor([[0.9, -0.1, 0.4, 0.6], [0.2, -2.0, 1.5, -0.9]])


@pytest.mark.parametrize(
    ("scale_granularity", "expected"),
    [
        ("tensor", [[1, 0, 0, 1], [0, -1, 1, -1]]),
        ("row", [[1, 0, 1, 1], [0, -1, 1, -1]]),
        (2, [[1, 0, 1, 1], [0, -1, 1, -1]]),
        (1, [[1, -1, 1, 1], [1, -1, 1, -1]]),
    ],
)
def test_ternarize_gives_the_values_worked_out_by_hand(scale_granularity, expected):
    assert ternarize(HAND_WEIGHT, scale_granularity).tolist() == expected


@pytest.mark.parametrize(
    ("scale_granularity", "expected"),
    [("tensor", [0.825]), ("row", [[0.5], [1.15]]), (2, [[0.5, 0.5], [1.1, 1.2]])],
)
def test_absmean_has_the_shape_of_the_scale(scale_granularity, expected):
    mean = reference.absmean(HAND_WEIGHT, scale_granularity)
    assert mean.shape == reference.scale_shape(2, 4, scale_granularity)
    torch.testing.assert_close(mean, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale_granularity", ["tensor", "row", 4, 36])
def test_ternarize_equals_the_formula_in_float64(scale_granularity):
    weight = random_matrix(52, 36) * torch.logspace(-3, 1, 52)[:, None]  # rows of different sizes
    expected = float64_ternarize(weight.numpy(), scale_granularity)
    np.testing.assert_array_equal(ternarize(weight, scale_granularity).numpy(), expected)


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_exact_halves_round_to_the_even_zero_and_zeros_stay(scale_granularity):
    weight = torch.tensor([[32.0, -32.0, 96.0, -96.0]])  # mean 64, to which 1e-6 adds nothing in float32
    assert ternarize(weight, scale_granularity).tolist() == [[0, 0, 1, -1]]
    assert ternarize(torch.zeros(4, 8), scale_granularity).tolist() == [[0] * 8] * 4


@pytest.mark.parametrize(("value", "expected"), [(9e-7, 0), (4e-6, 1)])
def test_epsilon_is_added_to_the_mean(value, expected):
    # Clamping the mean from below, at 1e-6 or at BitNet's 1e-5, would turn one of the two around.
    assert ternarize(torch.full((4, 4), value)).unique().tolist() == [expected]


@pytest.fixture
def with_threads():
    """`with_threads(count, function, argument)`: the result of `function(argument)` on that many threads."""
    before = torch.get_num_threads()

    def run(count, function, argument):
        torch.set_num_threads(count)
        return function(argument)

    yield run
    torch.set_num_threads(before)


def test_the_mean_does_not_depend_on_the_number_of_threads(with_threads):
    weight = random_matrix(4, 2**20)  # rows so long that threads share one
    assert torch.equal(with_threads(1, reference.absmean, weight), with_threads(2, reference.absmean, weight))


def test_codes_do_not_depend_on_the_number_of_threads(with_threads):
    weight = random_matrix(3072, 3072)
    edge = weight.view(-1)[::1000]
    last_bits = (torch.arange(edge.numel()) % 17 - 8) * 2.0**-25  # float32 steps of numbers in [0.25, 0.5)
    for _ in range(3):  # put 1 in 1000 weights where the last bit of the mean decides
        edge.copy_((with_threads(1, reference.absmean, weight) + reference.EPS) / 2 + last_bits)
    alone = with_threads(1, ternarize, weight)
    assert alone.view(-1)[::1000].unique().tolist() == [0, 1]  # the edge is sharp
    assert torch.equal(with_threads(2, ternarize, weight), alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_ternarize_computes_in_float32_and_keeps_the_dtype(scale_granularity, dtype):
    weight = (random_matrix(512, 512) * 1000).to(dtype)  # its sum of magnitudes overflows float16
    ternary = ternarize(weight, scale_granularity)
    assert ternary.dtype == dtype
    assert torch.equal(ternary.float(), ternarize(weight.float(), scale_granularity))


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_the_gradient_passes_straight_through_unclipped(scale_granularity):
    weight = (random_matrix(8, 12) * 50).requires_grad_()
    grad = random_matrix(8, 12, seed=1)
    ternarize(weight, scale_granularity).backward(grad)
    assert torch.equal(weight.grad, grad)


def test_whatever_does_not_fit_is_a_value_error():
    """Each way to fail a check; the table of messages has one for each."""
    ones, int8 = torch.ones(4, 8), {"dtype": torch.int8}
    for weight in (ones[None], ones[:0], ones[:, :0], ones.to(torch.int8)):
        with pytest.raises(ValueError, match="non-empty floating-point matrix"):
            ternarize(weight)
    for granularity in ("", 0, -4, 4.0, True, None, ("row",)):
        with pytest.raises(ValueError, match="scale_granularity"):
            ternarize(ones, granularity)
    for weight in (ones[0], torch.zeros(4, 4, 4), *torch.zeros(7, 8).split([1, 2, 4])[:2]):
        with pytest.raises(ValueError, match="Packing needs a matrix"):
            pack_ternary(weight)
    for value in (2, -2, -0.5, 257, 1e30, torch.tensor(2, **int8), torch.tensor(-128, **int8)):
        weight = ones.clone().to(torch.as_tensor(value).dtype)
        weight[3, 3] = value
        with pytest.raises(ValueError, match="call `ternarize`"):
            pack_ternary(weight)
    for packed in (torch.ones(2, 3, **int8), torch.ones(3).byte()):
        with pytest.raises(ValueError, match="uint8 matrix"):
            unpack_ternary(packed)
    for granularity in GRANULARITIES:
        for value in (float("nan"), float("inf"), float("-inf")):
            weight = random_matrix(4, 8)
            weight[2, 5] = value
            with pytest.raises(ValueError, match=r"values in \{-1, 0, \+1\}"):
                pack_ternary(ternarize(weight, granularity))


@PROPERTY
@given(float_matrices())
def test_ternarize_is_odd_and_monotone_and_keeps_signs(weight):
    order, weight = np.argsort(weight, axis=None), torch.from_numpy(weight)
    ternary = ternarize(weight)
    assert set(ternary.unique().tolist()) <= {-1, 0, 1}
    assert (ternary * weight >= 0).all()
    assert (np.diff(ternary.numpy().ravel()[order]) >= 0).all()
    assert torch.equal(ternarize(-weight), -ternary)


@PROPERTY
@given(float_matrices())
def test_rows_and_groups_are_ternarized_each_on_its_own(weight):
    weight = torch.from_numpy(weight)
    rows = torch.cat([ternarize(row[None]) for row in weight])
    groups = torch.cat([ternarize(part, "row") for part in weight.split(4, dim=1)], dim=1)
    assert torch.equal(ternarize(weight, "row"), rows)
    assert torch.equal(ternarize(weight, 4), groups)


@PROPERTY
@given(ternary_matrices(max_columns=3), st.floats(1e-5, 1e4), st.sampled_from(["tensor", "row", 3]))
def test_a_scaled_ternary_matrix_ternarizes_to_itself(ternary, scale, scale_granularity):
    ternary = torch.from_numpy(np.tile(ternary, (1, 3))).float()
    assert torch.equal(ternarize(ternary * scale, scale_granularity), ternary)


@PROPERTY
@given(ternary_matrices(), st.sampled_from([torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32]))
def test_pack_then_unpack_is_lossless(ternary, dtype):
    ternary = torch.from_numpy(ternary).to(dtype)
    packed = pack_ternary(ternary)
    assert packed.dtype == torch.uint8
    assert packed.shape == (ternary.shape[0] // 4, ternary.shape[1])
    assert torch.equal(unpack_ternary(packed, dtype), ternary)


def test_the_packed_bytes_are_frozen():
    # The file format: a change here breaks every packed file there is.
    quarters = [
        [[-1, 0, 1], [0, 0, 0]],
        [[1, 1, 1], [0, 1, 0]],
        [[-1, -1, -1], [1, 0, -1]],
        [[0, 1, -1], [1, 1, 1]],
    ]
    packed = [[0b00_10_00_01, 0b01_10_00_10, 0b10_10_00_00], [0b01_01_10_10, 0b01_10_01_10, 0b01_01_00_10]]
    ternary = torch.tensor(quarters).flatten(0, 1)  # (8, 3)
    assert pack_ternary(ternary).tolist() == packed
    assert unpack_ternary(torch.tensor(packed, dtype=torch.uint8), torch.int64).tolist() == ternary.tolist()


@PROPERTY
@given(ternary_matrices())
def test_packed_bytes_are_hqqs(ternary):
    packed = pack_ternary(torch.from_numpy(ternary)).numpy()
    np.testing.assert_array_equal(packed, hqq_pack_2bit(ternary + 1))


@torchs_warnings
def test_packed_bytes_are_bitnets_with_the_four_codes_reversed():
    from transformers.integrations.bitnet import pack_weights

    ternary = ternarize(random_matrix(20, 7))
    b = pack_ternary(ternary)
    reversed_codes = (b & 3) << 6 | (b >> 2 & 3) << 4 | (b >> 4 & 3) << 2 | b >> 6
    assert torch.equal(pack_weights(ternary.clone()), reversed_codes)


@torchs_warnings
def test_the_packing_page_holds_what_it_says():
    snippets = re.findall(r"^```python\n(.*?)^```", PACKING_PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert snippets
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)


def test_code_3_is_found_in_exactly_the_bytes_that_hold_it():
    packed = torch.full((3, 5), reference.ZERO_BYTE, dtype=torch.uint8)
    for byte in range(256):
        packed[1, 4] = byte
        holds_it = any(byte >> shift & 3 == 3 for shift in (0, 2, 4, 6))
        assert reference.has_invalid_code(packed) == holds_it


@pytest.mark.parametrize("scale_granularity", GRANULARITIES)
def test_ternary_linear_is_the_dense_layer_of_scale_times_ternary(scale_granularity):
    ternary = ternarize(random_matrix(12, 8))
    scale = torch.rand(reference.scale_shape(12, 8, scale_granularity))
    inputs, bias = random_matrix(5, 8, seed=1), random_matrix(1, 12, seed=2)[0]
    blocks = (12 if scale_granularity == "tensor" else 1, scale_granularity if scale_granularity == 4 else 8)
    dense = ternary.double().numpy() * np.kron(scale.reshape(12 // blocks[0], 8 // blocks[1]).numpy(), np.ones(blocks))
    np.testing.assert_allclose(dequantize(ternary, scale).numpy(), dense, rtol=1e-6)
    output = reference.ternary_linear(inputs, pack_ternary(ternary), scale, bias)
    np.testing.assert_allclose(output.numpy(), inputs.double().numpy() @ dense.T + bias.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "row", 8])
def test_the_scale_is_the_least_squares_one(granularity):
    weight = random_matrix(12, 16)
    ternary = ternarize(weight, granularity)
    scale = reference.least_squares_scale(weight, ternary, granularity)

    def error(candidate):
        return (dequantize(ternary, candidate) - weight).square().sum()

    assert all(error(scale) < error(scale * factor) for factor in (0.99, 1.01))


class TestExactCodes:
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_codes_and_scales_come_back(self, dtype, granularity):
        ternary = torch.randint(-1, 2, (12, 24))
        scale = (torch.rand(reference.scale_shape(12, 24, granularity)) + 0.1).to(dtype).float()
        codes, found = reference.exact_codes(dequantize(ternary, scale).to(dtype), granularity, "layer")
        assert torch.equal(dequantize(codes, found), dequantize(ternary, scale))
        assert codes.dtype == torch.int8

    def test_a_group_of_zeros(self):
        weight = torch.zeros(4, 16)
        weight[0, 8:] = 0.5
        codes, scale = reference.exact_codes(weight, 8, "layer")
        assert torch.equal(dequantize(codes, scale), weight)
        assert scale[0].tolist() == [0, 0.5]

    @pytest.mark.parametrize(
        ("granularity", "place"),
        [("tensor", "row 6 holds"), ("row", "row 6 holds"), (8, r"row 6, group 2 \(inputs 16 to 23\) holds")],
    )
    def test_what_is_not_ternary_is_named(self, granularity, place):
        weight = torch.ones(8, 32)
        for value, words in (
            (0.25, f"{place} 0.25 where the scale is 1"),
            (float("nan"), "row"),
            (float("inf"), "row"),
        ):
            weight[6, 17] = value
            with pytest.raises(ValueError, match=rf"transformer.layer.weight is not ternary: {words}"):
                reference.exact_codes(weight, granularity, "transformer.layer")

    @pytest.mark.parametrize("granularity", ["tensor", "row", 128, 32])
    def test_the_granularity_is_found(self, granularity):
        ternary = torch.randint(-1, 2, (8, 256))
        scale = torch.rand(reference.scale_shape(8, 256, granularity)) + 0.1
        assert reference.find_granularity(dequantize(ternary, scale), "layer") == granularity

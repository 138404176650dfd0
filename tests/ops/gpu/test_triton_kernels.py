"""The Triton kernel against the reference."""

import pytest
import torch
from weights import new_weight

from diffusers_terdit.ops import dequantize, reference


SHAPES = [(4, 1), (4, 4), (36, 65), (132, 1023), (132, 1028), (16, 1025), (8, 2048)]  # (N, K)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]


class TestUnpack:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_it_is_the_references(self, triton_kernels, shape, dtype, device):
        packed, _, _ = new_weight(*shape, device=device)
        assert torch.equal(triton_kernels.unpack(packed, dtype), reference.unpack_ternary(packed, dtype))

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @pytest.mark.parametrize(
        ("shape", "granularity"),
        [((8, 12), "tensor"), ((36, 65), "row"), ((12, 96), 32), ((8, 1100), 4), ((4, 6), 1)],
        ids=str,
    )
    def test_with_a_scale_it_is_the_dequantized_weight(self, triton_kernels, shape, granularity, dtype, device):
        packed, scale, _ = new_weight(*shape, granularity, device)
        expected = dequantize(reference.unpack_ternary(packed), scale).to(dtype)
        found = triton_kernels.unpack(packed, dtype, scale)
        if dtype == torch.bfloat16 and device == "cpu":  # Triton's interpreter cuts floats off instead of rounding
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", [*DTYPES[1:], torch.float8_e4m3fn], ids=str)
    def test_whole_words_have_the_references_bits(self, triton_kernels, dtype, device):
        packed, _, _ = new_weight(36, 1028, device=device)
        expected = reference.unpack_ternary(packed, torch.int8).to(dtype)
        assert torch.equal(triton_kernels.unpack(packed, dtype).view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(triton_kernels.unpack(packed[1:], dtype).float(), reference.unpack_ternary(packed[1:]))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_it_writes_where_it_is_told(self, triton_kernels, dtype, device):
        for shape, granularity in (((36, 1028), None), ((36, 65), None), ((36, 65), "row")):
            packed, scale, _ = new_weight(*shape, granularity or "tensor", device)
            scale = scale if granularity and dtype != torch.int8 else None
            whole = torch.full((52, shape[1]), 7, dtype=dtype, device=device)
            found = triton_kernels.unpack(packed, dtype, scale, whole[4:40])
            assert found.data_ptr() == whole[4].data_ptr()
            assert torch.equal(found, triton_kernels.unpack(packed, dtype, scale))
            assert (whole[:4] == 7).all()
            assert (whole[40:] == 7).all()

    def test_a_weight_that_is_not_contiguous(self, triton_kernels, device):
        packed, _, _ = new_weight(64, 48, device=device)
        assert torch.equal(
            triton_kernels.unpack(packed[::2, ::3], torch.float32), reference.unpack_ternary(packed[::2, ::3])
        )


class TestRoundToBytes:
    @pytest.mark.parametrize("dtype", [*DTYPES[:3], torch.float64], ids=str)
    @pytest.mark.parametrize("shape", [(1, 1), (5, 72), (3, 1025), (2, 8192), (2, 20000), (0, 64)], ids=str)
    @pytest.mark.parametrize("bits", [8, 16])
    def test_it_is_the_references(self, triton_kernels, bits, shape, dtype, device):
        x = torch.randn(shape, device=device).to(dtype)
        x[1:2], x[:1] = 0, 1e-14 * x[:1]
        for rows in (x, x.T.contiguous().T):
            found, expected = triton_kernels.round_to_bytes(rows, bits), reference.round_to_bytes(x, bits)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    @pytest.mark.parametrize("bits", [8, 16])
    def test_halves_go_to_the_even_neighbor(self, triton_kernels, bits, device):
        top = reference.LARGEST_CODE[bits]
        x = torch.tensor([[top, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, top - 0.5]], device=device)
        codes, step = triton_kernels.round_to_bytes(x, bits)
        assert step.item() == 1
        whole = codes.int()[0] if bits == 8 else 256 * codes.int()[0] + codes.int()[1]
        assert whole.tolist() == [top, 0, 2, 2, 0, -2, -2, top - 1]

    @pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # Triton's interpreter
    def test_the_step_of_a_row_that_is_not_finite_is_not(self, triton_kernels, device):
        x = torch.randn(4, 65, device=device)
        x[1, 3], x[2, 5], x[3, 5], x[3, 6] = float("nan"), float("-inf"), float("inf"), float("nan")
        _, step = triton_kernels.round_to_bytes(x, 8)
        assert torch.equal(step.cpu().isfinite().flatten(), torch.tensor([True, False, False, False]))
        assert step.cpu().isnan().flatten().tolist() == [False, True, False, True]


class TestScaleSums:
    @pytest.mark.parametrize("dtype", [*DTYPES[:3], torch.float64], ids=str)
    @pytest.mark.parametrize("biased", [True, False])
    @pytest.mark.parametrize("granularity", ["tensor", "row"])
    @pytest.mark.parametrize(("passes", "columns"), [(1, 36), (2, 1028)])
    def test_it_is_the_references(self, triton_kernels, passes, columns, granularity, biased, dtype, device):
        _, scale, bias = new_weight(columns, 8, granularity, device)
        sums = torch.randint(-(2**23), 2**23, (3 * passes, columns), dtype=torch.int32, device=device)
        given = sums, 1e-4 * torch.rand(3, 1, device=device), scale, bias.to(dtype) if biased else None, dtype
        found, expected = triton_kernels.scale_sums(*given), reference.scale_sums(*given)
        assert found.dtype == dtype
        if dtype == torch.bfloat16 and device == "cpu":  # which Triton's interpreter does not round to
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, expected)


class TestPack:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("shape", "granularity"),
        [((4, 4), "tensor"), ((132, 1028), "tensor"), ((36, 65), "row"), ((4, 17000), "row"), ((64, 640), 128)],
        ids=str,
    )
    def test_it_is_the_references(self, triton_kernels, shape, granularity, dtype, device):
        weight = torch.randn(shape, device=device).to(dtype)
        weight[0, 0] = weight.new_tensor(1e-9)
        scale = torch.empty(reference.scale_shape(*shape, granularity), device=device)
        found, expected = triton_kernels.pack(weight, scale), reference.pack_float(weight, scale)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert torch.equal(triton_kernels.pack(weight.T.contiguous().T, scale)[0], expected[0])

    @pytest.mark.parametrize("scale", [1.0, 0.37, 3e-5, 7e4])
    def test_values_beside_the_border_fall_on_the_same_side(self, triton_kernels, scale, device):
        limit = torch.tensor([scale], device=device) + reference.EPS
        near = [limit / 2]
        for _ in range(3):
            near = [near[0].nextafter(0 * limit), *near, near[-1].nextafter(limit)]
        near = torch.cat(near)
        values = torch.cat([near, -near, near[:2]]).reshape(4, 4)
        # a row that makes the mean what it is to be: `values` are about half of it
        weight = torch.cat([values, torch.full((4, 4), scale, device=device)], 1)
        weight[:, 4:] += (scale - weight.abs().mean()) * 2
        row = torch.empty(4, 1, device=device)
        found, expected = triton_kernels.pack(weight, row), reference.pack_float(weight, row)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))

    def test_a_weight_that_is_not_finite_has_a_mean_that_is_not(self, triton_kernels, device):
        for value in (float("nan"), float("inf")):
            weight = torch.randn(8, 8, device=device)
            weight[3, 3] = value
            packed, mean = triton_kernels.pack(weight, torch.empty(1, device=device))
            assert not mean.isfinite().any()
            assert not reference.has_invalid_code(packed)

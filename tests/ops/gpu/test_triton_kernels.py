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

    def test_a_weight_that_is_not_contiguous(self, triton_kernels, device):
        packed, _, _ = new_weight(64, 48, device=device)
        assert torch.equal(
            triton_kernels.unpack(packed[::2, ::3], torch.float32), reference.unpack_ternary(packed[::2, ::3])
        )


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

"""The Triton kernel against the reference."""

import pytest
import torch
from weights import new_weight

from diffusers_terdit.ops import dequantize, reference


SHAPES = [(4, 1), (36, 65), (132, 1023), (16, 1025), (8, 2048)]  # (N, K)
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

    def test_a_weight_that_is_not_contiguous(self, triton_kernels, device):
        packed, _, _ = new_weight(64, 48, device=device)
        assert torch.equal(
            triton_kernels.unpack(packed[::2, ::3], torch.float32), reference.unpack_ternary(packed[::2, ::3])
        )

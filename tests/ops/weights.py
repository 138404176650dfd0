"""Weights for the tests of the ops, and what is near enough."""

import torch

from diffusers_terdit.ops import pack_ternary, reference, ternarize


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-6}


def new_weight(out_features, in_features, granularity="tensor", device="cpu"):
    """Packed codes, their scale, and a bias."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    codes = torch.randint(-1, 2, (out_features, in_features), generator=generator)
    scale = 0.02 + 0.01 * torch.rand(
        reference.scale_shape(out_features, in_features, granularity), generator=generator
    )
    bias = torch.randn(out_features, generator=generator)
    return pack_ternary(codes).to(device), scale.to(device), bias.to(device)


def exact_case(rows, out_features, in_features, granularity="tensor", seed=0, dtype=torch.float32):
    """Input (M, K), packed codes, scale, bias, and the float weight of the codes.

    The inputs are small integers and the scales powers of two, so every sum is exact in float32 whatever its order.
    """
    generator = torch.Generator().manual_seed(seed)
    if granularity == "group":
        granularity = next(size for size in (4, 3, 1) if in_features % size == 0)
    weight = torch.randn(out_features, in_features, generator=generator)
    input = torch.randint(-8, 9, (rows, in_features), generator=generator).to(dtype)
    shape = reference.scale_shape(out_features, in_features, granularity)
    scale = 2.0 ** torch.randint(-3, 2, shape, generator=generator)
    bias = torch.randint(-8, 9, (out_features,), generator=generator) / 4
    return input, pack_ternary(ternarize(weight, granularity)), scale, bias, weight


def relative_error(output, expected):
    return float((output.double() - expected).norm() / expected.norm())

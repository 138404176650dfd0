"""Weights for the tests of the ops, and what is near enough."""

import torch

from diffusers_terdit.ops import pack_ternary, reference


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


def relative_error(output, expected):
    return float((output.double() - expected).norm() / expected.norm())

"""Exact linear ops of packed weights by a compiled product, that of `lookup` or of `exact_amx`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .decode import matmul_dtype


Product = Callable[..., Tensor]  # as `lookup.product`
ROWS = 2048  # of an input at a time, so that its copy in the order of the kernels stays small


def _in_strips(product: Product, input: Tensor, *arguments: Any) -> Tensor:
    if len(input) <= ROWS:
        return product(input, *arguments)
    return torch.cat([product(rows, *arguments) for rows in input.split(ROWS)])


def linear(
    product: Product,
    input: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    """Compute `reference.ternary_linear` of the first `out_features` rows of the weight."""
    flat = input.reshape(-1, input.shape[-1])
    grouped = reference.is_grouped(weight_scale)
    scale, group_scale = (None, weight_scale) if grouped else (weight_scale, None)
    output = _in_strips(product, flat, weight_packed, False, group_scale, scale, bias, input.dtype)
    if output.shape[1] != out_features:  # the packed weight has more rows
        output = output[:, :out_features].contiguous()
    return output.to(input.dtype).reshape(*input.shape[:-1], out_features)


def linear_backward(
    product: Product,
    grad: Tensor,
    input: Tensor | None,
    weight_packed: Tensor,
    weight_scale: Tensor,
    need_input_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.linear_backward` for one scale per matrix or row, of as many rows as `grad` has."""
    flat, per_row = grad.reshape(-1, grad.shape[-1]), weight_scale.dim() == 2
    input_grad = grad.new_empty(0)
    if need_input_grad:
        rows = flat.float() * weight_scale.reshape(-1) if per_row else flat
        if 4 * len(weight_packed) > rows.shape[1]:
            rows = torch.nn.functional.pad(rows, (0, 4 * len(weight_packed) - rows.shape[1]))
        scale = None if per_row else weight_scale
        input_grad = _in_strips(product, rows, weight_packed, True, None, scale, None, grad.dtype)
        input_grad = input_grad.to(grad.dtype).reshape(*grad.shape[:-1], weight_packed.shape[1])
    if input is None:
        return input_grad, grad.new_empty(0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    wide, dtype = input.reshape(-1, input.shape[-1]), matmul_dtype(grad.dtype)
    weight_grad = (flat.to(dtype).T @ wide.to(dtype)).float().contiguous()  # (N, K)
    from .scale_gradient import scale_gradient  # imports numba, as the product does

    scale_grad = scale_gradient(weight_grad, weight_packed, weight_scale)
    return input_grad, weight_grad, scale_grad

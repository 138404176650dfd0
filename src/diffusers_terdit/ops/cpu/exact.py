"""Exact linear ops of packed weights by compiled products, those of `lookup` or of `exact_amx`."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .decode import matmul_dtype


Products = Callable[..., list[Tensor]]  # as `lookup.products`
ROWS = 2048  # of an input at a time, so that its copy in the order of the kernels stays small


def _in_strips(products: Products, input: Tensor, *arguments: Any) -> list[Tensor]:
    rows = input.shape[0]
    if rows <= ROWS:
        return products(input, *arguments)
    outputs: list[Tensor] = []
    for first in range(0, rows, ROWS):
        for number, strip in enumerate(products(input[first : first + ROWS], *arguments)):
            if first == 0:
                outputs.append(torch.empty(rows, strip.shape[1], dtype=arguments[-1]))
            outputs[number][first : first + ROWS] = strip
    return outputs


def _groups(weight_scale: Tensor) -> int:
    return weight_scale.shape[1] if reference.is_grouped(weight_scale) else 1


def linears(
    products: Products, input: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]], out_features: list[int]
) -> list[Tensor]:
    """Compute `reference.ternary_linear` of each (weight_packed, weight_scale, bias), of so many of its first rows."""
    flat, outputs = input.reshape(-1, input.shape[-1]), []
    for groups, together in groupby(weights, lambda weight: _groups(weight[1])):
        one = groups == 1
        layers = [(w, None if one else scale, scale if one else None, bias) for w, scale, bias in together]
        outputs += _in_strips(products, flat, layers, False, input.dtype)
    for number, (output, count) in enumerate(zip(outputs, out_features, strict=True)):
        if output.shape[1] != count:  # the packed weight has more rows
            output = output[:, :count].contiguous()
        outputs[number] = output.to(input.dtype).reshape(*input.shape[:-1], count)
    return outputs


def linear_backward(
    products: Products,
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
        layer = (weight_packed, None, None if per_row else weight_scale, None)
        (input_grad,) = _in_strips(products, rows, [layer], True, grad.dtype)
        input_grad = input_grad.to(grad.dtype).reshape(*grad.shape[:-1], weight_packed.shape[1])
    if input is None:
        return input_grad, grad.new_empty(0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    wide, dtype = input.reshape(-1, input.shape[-1]), matmul_dtype(grad.dtype)
    weight_grad = (flat.to(dtype).T @ wide.to(dtype)).float().contiguous()  # (N, K)
    from .scale_gradient import scale_gradient  # imports numba, as the products do

    scale_grad = scale_gradient(weight_grad, weight_packed, weight_scale)
    return input_grad, weight_grad, scale_grad

r"""Ternary arithmetic in plain PyTorch: the truth every kernel is tested against, and the byte format.

A ternary matrix \(T \in \{-1, 0, +1\}\) of shape (N, K) is stored as uint8 of shape (N/4, K). Byte `[i, k]` holds the
codes T + 1 (0, 1 or 2; 3 never occurs) of four rows, a quarter of the matrix apart:

    bits      7 6      5 4        3 2        1 0
    row       i        i + N/4    i + N/2    i + 3N/4

which is what TerDiT's authors publish. The weight a layer computes with is `scale * T`; the scale has shape

    (1,)      one for the matrix           ("tensor", TerDiT)
    (N, 1)    one per output row           ("row")
    (N, K/g)  one per group of g inputs    (an int g)

and stays float32. With one scale per matrix or row it multiplies the result of the matmul; with groups it multiplies
the decoded weight.

Source: TerDiT (https://arxiv.org/abs/2405.14854), after BitNet b1.58 (https://arxiv.org/abs/2402.17764).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


CODES_PER_BYTE = 4
# Adding and subtracting it rounds a small float32 to the nearest int, half to even: the sum has no bits left for more.
# `torch.round` would do the same, but it starts all threads even for a block of 2,048 elements.
ROUNDING = 1.5 * 2**23
EPS = 1e-6  # added to the absmean, as the authors do
ZERO_BYTE = 0b01010101  # four codes of T = 0
# The largest code of an activation, by bits. Those of 16 bits are 256 * high + low with high and low signed bytes.
LARGEST_CODE = {8: 127, 16: 127 * 256 + 127}
LARGEST_FP8 = 448.0  # of float8_e4m3fn
MOST_INPUTS = {8: 2**23, 16: 2**16}  # for which int32 holds the sum of their products, whatever the codes


def describe(given: object) -> str:
    """Words for an argument that is not what it should be: shape and dtype of a tensor, the type of anything else."""
    return f"shape {tuple(given.shape)}, {given.dtype}" if isinstance(given, Tensor) else type(given).__name__


def check_scale_granularity(scale_granularity: str | int) -> None:
    """Raise a `ValueError` unless the granularity is "tensor", "row" or a positive int."""
    is_group = isinstance(scale_granularity, int) and not isinstance(scale_granularity, bool) and scale_granularity > 0
    if scale_granularity not in ("tensor", "row") and not is_group:
        raise ValueError(
            f'`scale_granularity` must be "tensor", "row" or a positive int (inputs per group), got'
            f" {scale_granularity!r}."
        )


def scale_shape(out_features: int, in_features: int, scale_granularity: str | int) -> tuple[int, ...]:
    """Shape of `weight_scale` for an (out_features, in_features) matrix: (1,), (N, 1) or (N, K/g)."""
    check_scale_granularity(scale_granularity)
    if scale_granularity == "tensor":
        return (1,)
    if scale_granularity == "row":
        return (out_features, 1)
    assert isinstance(scale_granularity, int)
    if in_features % scale_granularity:
        raise ValueError(
            f"`in_features` must be a multiple of the scale group, got in_features={in_features} and groups of"
            f" {scale_granularity}."
        )
    return (out_features, in_features // scale_granularity)


def granularity_of(weight_scale: Tensor, in_features: int) -> str | int:
    """Return the granularity that a scale's shape stands for: "tensor", "row", or inputs per group."""
    if weight_scale.dim() == 1:
        return "tensor"
    return "row" if weight_scale.shape[1] == 1 else in_features // weight_scale.shape[1]


def absmean(weight: Tensor, scale_granularity: str | int = "tensor") -> Tensor:
    """Mean absolute value over the matrix, each row or each group of inputs.

    Args:
        weight (`torch.Tensor`): (N, K), float.
        scale_granularity (`str` or `int`): "tensor", "row", or inputs per group.

    Returns:
        `torch.Tensor`: float32, shaped as `weight_scale`: (1,), (N, 1) or (N, K/g). The sum runs in float64 where the
        device has it, so that the number of threads changes no code.
    """
    shape = scale_shape(weight.shape[0], weight.shape[1], scale_granularity)
    groups = 1 if scale_granularity == "tensor" else shape[1]
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    sums = [  # (n, groups) each
        block.float().abs().to(wide).unflatten(1, (groups, -1)).sum(2) for block in row_blocks(weight.detach())
    ]
    return mean_of_sums(torch.cat(sums), weight, shape)


def mean_of_sums(sums: Tensor, weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the `absmean` of that shape from the sums of each row's groups, (N, groups)."""
    total = sums if len(shape) == 2 else sums.sum().reshape(1)
    return (total * (total.numel() / weight.numel())).float()


def row_blocks(weight: Tensor) -> tuple[Tensor, ...]:
    """(N, K) in blocks of rows; on a CPU small enough to stay in the cache (15 times faster)."""
    # Below torch's grain of 2**15 elements an operation is one thread's: no barrier for a busy machine to stall on.
    rows = max(1, (2**15 - 1) // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    return weight.split(rows)


def expand_scale(weight_scale: Tensor, in_features: int) -> Tensor:
    """(1,), (N, 1) or (N, K/g) -> a tensor that broadcasts against (N, K)."""
    if weight_scale.dim() == 1 or weight_scale.shape[1] == 1:
        return weight_scale
    return weight_scale.repeat_interleave(in_features // weight_scale.shape[1], dim=1)


def round_to_ternary(
    weight: Tensor, scale_granularity: str | int, out: Tensor | None = None, mean: Tensor | None = None
) -> Tensor:
    """`ternarize` without autograd or checks: (N, K) float -> (N, K) float32, into `out` when given.

    `mean` is the `absmean` of these rows, where it is known: of "tensor", that of the matrix that they belong to.
    """
    mean = absmean(weight, scale_granularity) if mean is None else mean
    threshold = expand_scale(mean, weight.shape[1]) + EPS
    out = torch.empty_like(weight, dtype=torch.float32) if out is None else out
    thresholds = row_blocks(threshold.expand(weight.shape))
    for block, limit, result in zip(row_blocks(weight), thresholds, row_blocks(out), strict=True):
        torch.div(block.float(), limit, out=result).clamp_(-1, 1).add_(ROUNDING).sub_(ROUNDING)
    return out


def ternarize(weight: Tensor, scale_granularity: str | int = "tensor") -> Tensor:
    """Round a weight to {-1, 0, +1}, without a gradient; see `ops.ternarize`, which has one.

    Raises:
        ValueError: `weight` is not a floating-point matrix, is empty, or K is not a multiple of the group.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(
            f"`ternarize` takes a non-empty floating-point matrix (out_features, in_features), got {describe(weight)}."
        )
    return round_to_ternary(weight, scale_granularity).to(weight.dtype)


def pack_ternary(ternary: Tensor) -> Tensor:
    """Pack a ternary matrix into two bits per weight; the format is described at the top of this file.

    Args:
        ternary (`torch.Tensor`): (N, K), any dtype, values in {-1, 0, +1}. N a multiple of 4.

    Returns:
        `torch.Tensor`: (N/4, K), uint8.

    Raises:
        ValueError: Not a matrix, N not a multiple of 4, or a value that is not -1, 0 or +1 (NaN included).
    """
    if not isinstance(ternary, Tensor) or ternary.dim() != 2 or ternary.shape[0] % CODES_PER_BYTE:
        raise ValueError(
            f"Packing needs a matrix with `out_features` a multiple of {CODES_PER_BYTE}, got {describe(ternary)}."
            " Keep this layer in float format, or pad its outputs."
        )
    packed = torch.zeros(len(ternary) // CODES_PER_BYTE, ternary.shape[1], dtype=torch.uint8, device=ternary.device)
    for quarter in ternary.unflatten(0, (CODES_PER_BYTE, -1)) if len(ternary) else ():  # (N/4, K), to save memory
        codes = quarter.to(torch.int8) if quarter.is_floating_point() else quarter
        fits = None if quarter.is_complex() else (codes == quarter) & (codes >= -1) & (codes <= 1)
        if fits is None or not fits.all():
            found = ternary.dtype if fits is None else f"{quarter[~fits][0].item():.6g}"
            raise ValueError(
                f"`pack_ternary` takes values in {{-1, 0, +1}}, got {found}; call `ternarize` on the weight first."
            )
        packed = packed << 2 | (codes + 1).to(torch.uint8)
    return packed


def pack_float(weight: Tensor, weight_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Ternarize a float weight as one of that scale, and pack it: (N, K) -> bytes (N/4, K), and the `absmean`."""
    granularity = granularity_of(weight_scale, weight.shape[1])
    mean = absmean(weight, granularity)
    return pack_ternary(round_to_ternary(weight, granularity, mean=mean).nan_to_num()), mean


def unpack_ternary(weight_packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inverse of `pack_ternary`.

    Args:
        weight_packed (`torch.Tensor`): (N/4, K), uint8.
        dtype (`torch.dtype`): Signed dtype of the result; `torch.int8` is the smallest.

    Returns:
        `torch.Tensor`: (N, K), `dtype`, values in {-1, 0, +1}. Code 3, which no packed file may hold,
        would decode to 2.

    Raises:
        ValueError: `weight_packed` is not a uint8 matrix.
    """
    if not isinstance(weight_packed, Tensor) or weight_packed.dtype != torch.uint8 or weight_packed.dim() != 2:
        raise ValueError(
            f"`unpack_ternary` takes a uint8 matrix (out_features / 4, in_features), got {describe(weight_packed)}."
        )
    codes = torch.cat([weight_packed >> shift & 3 for shift in (6, 4, 2, 0)])  # (N, K)
    return codes.to(torch.int8).sub_(1).to(dtype)


def has_invalid_code(weight_packed: Tensor) -> bool:
    """Whether any of the four codes of any byte is 3."""
    return bool((weight_packed & weight_packed >> 1 & ZERO_BYTE).any())


def dequantize(ternary: Tensor, weight_scale: Tensor) -> Tensor:
    """(N, K) ternary and its scale -> (N, K) float32 `scale * T`."""
    return ternary.float() * expand_scale(weight_scale.float(), ternary.shape[1])


def is_grouped(weight_scale: Tensor) -> bool:
    """Whether the scale varies along the inputs, so that it cannot be applied after the matmul."""
    return weight_scale.dim() == 2 and weight_scale.shape[1] > 1


def round_activations(input: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row to integers without checks: codes (..., K) and step (..., 1), both float32."""
    top = LARGEST_CODE[bits]
    wide = input.float()
    step = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
    return (wide / step).round_().clamp_(-top, top), step


def quantize_activations(input: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Round each row to integers, without a gradient; see `ops.quantize_activations`, which has one.

    Raises:
        ValueError: `bits` is neither 8 nor 16.
    """
    if bits not in LARGEST_CODE:
        raise ValueError(f"`bits` must be 8 or 16, got {bits!r}.")
    codes, step = round_activations(input, bits)
    return codes.to(input.dtype), step


def scaled_linear(input: Tensor, ternary: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`input @ (scale * ternary)^T + bias`, scale and bias in float32 or float64. Not for autograd: works in place.

    Args:
        input (`torch.Tensor`): (..., K), float.
        ternary (`torch.Tensor`): (N, K) in `input`'s dtype, {-1, 0, +1}. Read only.
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32.
        bias (`torch.Tensor` or `None`): (N,), float.

    Returns:
        `torch.Tensor`: (..., N), `input`'s dtype.
    """
    inner, outer = split_scale(weight_scale, input.dtype)
    return scale_and_shift(F.linear(input, times(ternary, inner)), outer, bias).to(input.dtype)


def split_scale(weight_scale: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the factors of a scale for inside the matrix, before a matmul in `dtype`, and after it; `None` for one.

    A grouped scale goes into the matrix. A scale per matrix or row multiplies the float32 result; in float16 its power
    of two goes into the matrix.
    """
    if is_grouped(weight_scale):
        return weight_scale, None
    return split_power(weight_scale, 15) if dtype == torch.float16 else (None, weight_scale)


def split_power(factor: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Split a factor of a float16 matmul's result in two: a power of two for before the matmul, the rest for after it.

    Sums of thousands of inputs would overflow before the factor makes them small. The power of two changes no bit of a
    sum that did not overflow. It is a normal number of float16, at most 2^largest.
    """
    power = torch.exp2(factor.detach().float().abs().log2().floor().clamp(-14, largest))
    return power, factor / power


def at_least_float32(tensor: Tensor) -> Tensor:
    """Float64 as it is, everything else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def scale_and_shift(output: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """`output * scale + bias` in float32 or float64, in place where `output` is; `None`: the weight has the scale."""
    output = at_least_float32(output)
    if weight_scale is not None and not is_grouped(weight_scale):
        output.mul_(weight_scale.reshape(-1))  # (..., N) * (1,) or (N,)
    return output if bias is None else output.add_(bias)


def finish(product: Tensor, outer: Tensor | None, bias: Tensor | None) -> Tensor:
    """`scale_and_shift` in the dtype of `product` (..., N), which it may change; one kernel where there is no bias."""
    if bias is not None:
        return scale_and_shift(product, outer, bias).to(product.dtype)
    return product if outer is None else product.mul_(outer.float().reshape(-1))


def scaled_linear_input_grad(grad: Tensor, ternary: Tensor, weight_scale: Tensor) -> Tensor:
    """Gradient of `scaled_linear` to its input: (..., N) -> (..., K), `grad`'s dtype."""
    if is_grouped(weight_scale):
        return grad @ dequantize(ternary, weight_scale).to(grad.dtype)
    return (at_least_float32(grad) * weight_scale.reshape(-1)).to(grad.dtype) @ ternary


def scaled_linear_weight_grads(
    grad: Tensor, input: Tensor, ternary: Tensor, weight_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `scaled_linear` to `ternary` and the scale.

    Args:
        grad (`torch.Tensor`): (..., N).
        input (`torch.Tensor`): (..., K), `grad`'s dtype.
        ternary (`torch.Tensor`): (N, K).
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32.

    Returns:
        Two `torch.Tensor`, float32, shaped as `ternary` and as `weight_scale`.
    """
    product = (grad.reshape(-1, grad.shape[-1]).T @ input.reshape(-1, input.shape[-1])).float()  # (N, K)
    if weight_scale.dim() == 1:
        scale_grad = torch.dot(product.flatten(), ternary.float().flatten()).reshape(1)
    else:
        scale_grad = (product * ternary.float()).unflatten(1, (weight_scale.shape[1], -1)).sum(2)
    return product.mul_(expand_scale(weight_scale, ternary.shape[1])), scale_grad


def ternary_linear(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`input @ (scale * T)^T + bias` from packed codes: (..., K) -> (..., N). See `scaled_linear`."""
    return scaled_linear(input, unpack_ternary(weight_packed, input.dtype), weight_scale, bias)


def float_linear(input: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """`input @ (scale * T)^T + bias` with T = ternarize(weight): (..., K) -> (..., N). See `scaled_linear`."""
    ternary = round_to_ternary(weight, granularity_of(weight_scale, weight.shape[1])).to(input.dtype)
    return scaled_linear(input, ternary, weight_scale, bias)


def integer_linear(
    input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int
) -> Tensor:
    """`ternary_linear` of the input rounded to integers: `(codes @ T^T) * scale * step + bias`, (..., K) -> (..., N).

    The integer sums are exact (float64 holds them); what follows is float32, in this order, whatever `input`'s dtype.
    With groups each has its own step in each row, and what they give is added from the first to the last.

    Args:
        input (`torch.Tensor`): (..., K), float. A row with NaN or infinity gives a row of NaN.
        weight_packed (`torch.Tensor`): (N/4, K), uint8.
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32.
        bias (`torch.Tensor` or `None`): (N,), float.
        bits (`int`): 8 or 16, see `ops.quantize_activations`.

    Returns:
        `torch.Tensor`: (..., N), `input`'s dtype.
    """
    codes, step = quantize_activations(by_group(input.float(), weight_scale), bits)
    ternary = unpack_ternary(weight_packed, torch.float64)
    output = add_groups(lambda *parts: F.linear(*parts).float(), codes.double(), ternary, weight_scale, step)
    return (output if bias is None else output + bias.float()).to(input.dtype)


def by_group(input: Tensor, weight_scale: Tensor) -> Tensor:
    """(..., K) -> (..., G, K/G), with the inputs that share a scale of a row of the weight."""
    return input.unflatten(-1, (weight_scale.shape[1] if is_grouped(weight_scale) else 1, -1))


def add_groups(
    multiply: Callable[[Tensor, Tensor], Tensor], codes: Tensor, weight: Tensor, weight_scale: Tensor, step: Tensor
) -> Tensor:
    """Add `multiply(codes, weight) * scale * step` of each group in float32, from the first to the last.

    Args:
        multiply (`Callable`): (codes (..., K/G), columns of the weight) -> sums (..., N), float32.
        codes (`torch.Tensor`): (..., G, K/G).
        weight (`torch.Tensor`): (N, K) or (N/4, K).
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, G), float32.
        step (`torch.Tensor`): (..., G, 1), float32.

    Returns:
        `torch.Tensor`: (..., N), float32.
    """
    scales = weight_scale.float().reshape(-1, codes.shape[-2]).unbind(1)
    total: Tensor | None = None
    for group, (columns, scale) in enumerate(zip(weight.chunk(len(scales), 1), scales, strict=True)):
        term = multiply(codes[..., group, :], columns) * scale * step[..., group, :]
        total = term if total is None else total + term
    assert total is not None
    return total


def product(input: Tensor, weight_packed: Tensor, factor: Tensor | None) -> Tensor:
    """`input @ (factor * T)^T`, the factor as `split_scale` gives that for inside the matrix: (..., K) -> (..., N)."""
    return F.linear(input, times(unpack_ternary(weight_packed, input.dtype), factor))


def products(input: Tensor, weights_packed: list[Tensor], factors: list[Tensor | None]) -> Tensor:
    """`product` of one input and each of several weights, next to each other: (..., K) -> (..., sum of N)."""
    pairs = zip(weights_packed, factors, strict=True)
    return torch.cat([product(input, weight_packed, factor) for weight_packed, factor in pairs], dim=-1)


def times(ternary: Tensor, factor: Tensor | None) -> Tensor:
    """`factor * T`, rounded to the dtype of `ternary` (N, K); `None` for one."""
    return ternary if factor is None else dequantize(ternary, factor).to(ternary.dtype)


def product_backward(
    grad: Tensor, input: Tensor | None, weight_packed: Tensor, factor: Tensor | None, need_input_grad: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `product` to its input (where needed) and to T (where `input` is given).

    Args:
        grad (`torch.Tensor`): (..., N).
        input (`torch.Tensor` or `None`): (..., K), `grad`'s dtype.
        weight_packed (`torch.Tensor`): (N/4, K), uint8.
        factor (`torch.Tensor` or `None`): As for `product`.
        need_input_grad (`bool`): Whether to compute the first result.

    Returns:
        Two `torch.Tensor`: (..., K) in `grad`'s dtype, (N, K) float32; empty where not asked for.
    """
    weight = times(unpack_ternary(weight_packed, grad.dtype), factor)
    input_grad = grad @ weight if need_input_grad else grad.new_empty(0)
    if input is None:
        return input_grad, grad.new_empty(0, dtype=torch.float32)
    weight_grad = (grad.reshape(-1, grad.shape[-1]).T @ input.reshape(-1, input.shape[-1])).float()
    return input_grad, times(weight_grad, factor)


def integer_product(rows: Tensor, weight_packed: Tensor) -> Tensor:
    """`rows @ T^T` in integers: (R, K) int8 -> (R, N) int32."""
    return F.linear(rows.double(), unpack_ternary(weight_packed, torch.float64)).to(torch.int32)


def round_to_bytes(input: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row as `round_activations` does, for a matmul of bytes.

    Args:
        input (`torch.Tensor`): (R, K), float. What a row with NaN or infinity has for codes does not matter: its step
            is NaN, or infinite.
        bits (`int`): 8 or 16.

    Returns:
        Two `torch.Tensor`: the codes, int8, (R, K) or, of 16 bits, (2R, K), the high bytes and then the signed low
            ones; and the step (R, 1), float32.
    """
    codes, step = round_activations(input, bits)
    if bits == 8:
        return codes.to(torch.int8), step
    whole = codes.to(torch.int32)  # 256 * high + low
    low = ((whole + 128) & 255) - 128
    return torch.cat([(whole - low) >> 8, low]).to(torch.int8), step


def scale_sums(sums: Tensor, step: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return `sums * scale * step + bias` in float32, rounded to `dtype`: what follows the matmul of bytes.

    Args:
        sums (`torch.Tensor`): (R, N) or (2R, N), int32, as `integer_product` gives them of `round_to_bytes`.
        step (`torch.Tensor`): (R, 1), float32.
        weight_scale (`torch.Tensor`): (1,) or (N, 1), float.
        bias (`torch.Tensor` or `None`): (N,), float.
        dtype (`torch.dtype`): Of the result, a float dtype.

    Returns:
        `torch.Tensor`: (R, N), `dtype`.
    """
    if sums.shape[0] != step.shape[0]:
        high, low = sums.chunk(2)
        sums = 256 * high + low
    output = sums.float() * weight_scale.float().reshape(-1) * step
    return (output if bias is None else output + bias.float()).to(dtype)


def linears(
    input: Tensor,
    weights_packed: list[Tensor],
    weight_scales: list[Tensor],
    biases: list[Tensor | None],
    bits: int | None,
) -> list[Tensor]:
    """`ternary_linear` or, with `bits`, `integer_linear` of one input and each of several packed weights."""
    layers = zip(weights_packed, weight_scales, biases, strict=True)
    if bits is None:
        return [ternary_linear(input, *layer) for layer in layers]
    return [integer_linear(input, *layer, bits) for layer in layers]


def integer_linears_by_bytes(
    input: Tensor,
    weights: list[tuple[Tensor, Tensor, Tensor | None]],
    bits: int,
    round_to_bytes: Callable[..., tuple[Tensor, Tensor]] = round_to_bytes,
    multiply: Callable[..., Tensor] = integer_product,
    scale_sums: Callable[..., Tensor] = scale_sums,
) -> list[Tensor]:
    """`integer_linear` of one input and several weights, to the bit, from matmuls of bytes: the input is rounded once.

    `weights` are (weight_packed, weight_scale, bias), the scales (1,) or (N, 1); the functions compute what those of
    this module do.
    """
    rows, step = round_to_bytes(input.reshape(-1, input.shape[-1]), bits)
    outputs = []
    for weight_packed, weight_scale, bias in weights:
        output = scale_sums(multiply(rows, weight_packed), step, weight_scale, bias, input.dtype)
        outputs.append(output.reshape(*input.shape[:-1], output.shape[-1]))
    return outputs


def round_to_fp8(input: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to float8_e4m3fn: `input ~ codes * step`, codes (R, K) up to 448 and step (R, 1), float32."""
    wide = input.float()
    step = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST_FP8
    return (wide / step).to(torch.float8_e4m3fn), step


def fp8_product(rows: Tensor, step: Tensor, weight_packed: Tensor, weight_scale: Tensor) -> Tensor:
    """Compute `rows @ T^T * scale * step` from `round_to_fp8`: (R, K), (R, 1) -> (R, N) bfloat16.

    The scale is (1,) or (N, 1).
    """
    sums = F.linear(rows.float(), unpack_ternary(weight_packed))
    return (sums * weight_scale.float().reshape(-1) * step).bfloat16()


def linear_backward(
    grad: Tensor, input: Tensor | None, ternary: Tensor, weight_scale: Tensor, need_input_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `scaled_linear` to the input (where needed), the weight and the scale (where `input` is given).

    Args:
        grad (`torch.Tensor`): (..., N).
        input (`torch.Tensor` or `None`): (..., K).
        ternary (`torch.Tensor`): (N, K), {-1, 0, +1} in `grad`'s dtype.
        weight_scale (`torch.Tensor`): (1,), (N, 1) or (N, K/g), float32.
        need_input_grad (`bool`): Whether to compute the first result.

    Returns:
        Three `torch.Tensor`: (..., K) in `grad`'s dtype, (N, K) float32, and as `weight_scale`; empty where not
            asked for.
    """
    input_grad = scaled_linear_input_grad(grad, ternary, weight_scale) if need_input_grad else grad.new_empty(0)
    if input is None:
        return input_grad, grad.new_empty(0, dtype=torch.float32), grad.new_empty(0, dtype=torch.float32)
    return input_grad, *scaled_linear_weight_grads(grad, input, ternary, weight_scale)


def _by_scale(matrix: Tensor, scale_granularity: str | int) -> Tensor:
    """(N, K) -> (scales, values that share one)."""
    if scale_granularity == "tensor":
        return matrix.reshape(1, -1)
    return matrix if scale_granularity == "row" else matrix.reshape(-1, int(scale_granularity))


def least_squares_scale(weight: Tensor, ternary: Tensor, scale_granularity: str | int) -> Tensor:
    """The scale for which `scale * T` is nearest to the weight: as `weight_scale`, float32; 0 where T is 0."""
    shape = scale_shape(weight.shape[0], weight.shape[1], scale_granularity)
    values, codes = _by_scale(weight.float(), scale_granularity), _by_scale(ternary.float(), scale_granularity)
    # float64 where the device has it: a matrix has millions of terms
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    scale = (values * codes).sum(1, dtype=wide) / codes.abs().sum(1, dtype=wide).clamp_min(1)
    return scale.float().reshape(shape)


def exact_codes(weight: Tensor, scale_granularity: str | int, name: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of a dense weight that is exactly `scale * {-1, 0, +1}`.

    Args:
        weight (`torch.Tensor`): (N, K), float.
        scale_granularity (`str` or `int`): What one scale covers.
        name (`str`): Of the layer, for errors.

    Returns:
        Two `torch.Tensor`: T (N, K) int8 and the scale as `weight_scale`, float32: `scale * T` is the weight bit for
            bit.

    Raises:
        ValueError: A group holds two magnitudes, or a value that is not finite; with its place and values.
    """
    shape = scale_shape(weight.shape[0], weight.shape[1], scale_granularity)
    blocks = row_blocks(weight)  # float32 forms of a few rows at a time
    scales = [_by_scale(block.float().abs(), scale_granularity).amax(1) for block in blocks]
    if scale_granularity == "tensor":
        scales = [torch.stack(scales).amax(0)] * len(blocks)
    ternary = torch.empty_like(weight, dtype=torch.int8)
    row = 0
    for block, scale, out in zip(blocks, scales, row_blocks(ternary), strict=True):
        values = _by_scale(block.float(), scale_granularity)  # (scales, values that share one)
        wrong = ((values.abs() != scale[:, None]) & (values != 0)) | ~values.isfinite()
        if wrong.any():
            index, place = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"{name}.weight is not ternary: {_place(weight, values, index, place, row, scale_granularity)} holds"
                f" {values[index, place]:.6g} where the scale is {scale[index]:.6g}. Another granularity may fit;"
                " without `lossless` the weight is rounded, which changes the model."
            )
        out.copy_(values.sign().reshape(block.shape))
        row += len(block)
    return ternary, (scales[0] if scale_granularity == "tensor" else torch.cat(scales)).reshape(shape)


def _place(weight: Tensor, values: Tensor, index: int, place: int, row: int, scale_granularity: str | int) -> str:
    """Words for the place of a value that is not ternary, of a block of values that begins at a row of the weight."""
    down, column = divmod(index * values.shape[1] + place, weight.shape[1])
    if isinstance(scale_granularity, str):
        return f"row {row + down}"
    start = column - place
    return f"row {row + down}, group {start // values.shape[1]} (inputs {start} to {start + values.shape[1] - 1})"


def find_granularity(weight: Tensor, name: str) -> str | int:
    """The coarsest granularity for which a dense weight is ternary: "tensor", "row", 256, 128, 64 or 32 inputs.

    Raises:
        ValueError: There is none.
    """
    for granularity in ("tensor", "row", *(g for g in (256, 128, 64, 32) if weight.shape[1] % g == 0)):
        try:
            exact_codes(weight, granularity, name)
            return granularity
        except ValueError as error:
            reason = error
    raise ValueError(f"No granularity fits the first layer: {reason}") from reason

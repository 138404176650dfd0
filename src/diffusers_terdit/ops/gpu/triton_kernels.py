"""The one GPU kernel of this package, in Triton: two bits per weight to a matrix of any dtype.

The matmuls themselves are the vendor's (`decode.py`). Imported only where Triton is installed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


BLOCK = 1024  # bytes of a row that one program decodes: 8 per thread


@triton.jit
def _unpack(
    packed, scale, out, rows, columns, scale_stride, group,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # of the packed matrix, one of N/4
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    byte = tl.load(packed + row * columns + column, mask=inside, other=0)
    for quarter in tl.static_range(4):
        out_row = quarter * rows + row
        value = ((byte >> (6 - 2 * quarter)) & 3).to(tl.float32) - 1
        if SCALED:
            scale_row = scale + out_row * scale_stride
            if GROUPED:
                value *= tl.load(scale_row + column // group, mask=inside, other=0)
            else:
                value *= tl.load(scale_row)
        tl.store(out + out_row * columns + column, value.to(out.dtype.element_ty), mask=inside)


def unpack(weight_packed: Tensor, dtype: torch.dtype, weight_scale: Tensor | None = None) -> Tensor:
    """T, or `scale * T` computed in float32, as a new matrix.

    Args:
        weight_packed (`torch.Tensor`): (N/4, K), uint8.
        dtype (`torch.dtype`): Of the result: a float dtype, or int8 without a scale.
        weight_scale (`torch.Tensor`, *optional*): (1,), (N, 1) or (N, K/g), float.

    Returns:
        `torch.Tensor`: (N, K), `dtype`. Equal to `reference.unpack_ternary` and `reference.dequantize`.
    """
    packed = weight_packed.contiguous()
    rows, columns = packed.shape
    out = torch.empty(4 * rows, columns, dtype=dtype, device=packed.device)
    scale = packed.new_empty(0, dtype=torch.float32) if weight_scale is None else weight_scale.float().contiguous()
    groups = scale.shape[1] if scale.dim() == 2 else 1
    stride = groups if scale.dim() == 2 else 0
    grid = (rows, triton.cdiv(columns, BLOCK))
    with torch.cuda.device_of(packed):  # Triton launches on the current device
        _unpack[grid](
            packed, scale, out, rows, columns, stride, columns // groups,
            SCALED=weight_scale is not None, GROUPED=groups > 1, BLOCK=BLOCK,
        )  # fmt: skip
    return out

"""The order of bits that other programs share: four neighboring inputs of a row per byte, the first in bits 1:0."""

import torch
from torch import Tensor

from ..ops import reference


def unpack(codes: Tensor, scale: Tensor, shifted: Tensor, name: str) -> Tensor:
    """Unpack codes T + 1 of a layer.

    Args:
        codes (`torch.Tensor`): (N, K/4), uint8.
        scale (`torch.Tensor`): (N, K/g), float.
        shifted (`torch.Tensor`): (N, K/g), bool: groups whose middle value is not zero.
        name (`str`): Of the layer, for errors.

    Returns:
        `torch.Tensor`: T (N, K), int8.

    Raises:
        ValueError: The sizes do not fit, a code is 3, or a group is shifted; with its place.
    """
    rows, inputs = codes.shape[0], 4 * codes.shape[1]
    if scale.shape[0] != rows or 0 in (inputs, scale.shape[1]) or codes.shape[1] % scale.shape[1]:
        raise ValueError(
            f"{name} has codes for {rows} rows of {inputs} inputs and scales of shape {list(scale.shape)}, which do"
            " not fit together. Download the file again."
        )
    threes = codes & codes >> 1 & reference.ZERO_BYTE
    wrong = shifted | threes.view(*scale.shape, -1).any(-1)
    if wrong.any():
        row, group = (int(i) for i in wrong.nonzero()[0])
        what = "values that are not -scale, 0 and scale" if shifted[row, group] else "code 3"
        raise ValueError(
            f"{name} is not ternary: row {row}, group {group} holds {what}. Only ternary models are converted."
        )
    places = torch.arange(0, 8, 2, dtype=torch.uint8)
    return (codes[:, :, None] >> places).bitwise_and_(3).flatten(1).view(torch.int8).sub_(1)

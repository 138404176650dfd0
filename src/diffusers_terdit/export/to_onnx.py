"""ONNX: ternary layers as the operator `com.microsoft::MatMulNBits` with two bits."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ..ops import reference
from .graph import LINEAR, codes_low_first, quiet


ZERO = 2  # code of 0 where an operator is given no zero points
BLOCK = 128  # inputs that share a scale, where the layer leaves it open
SMALLEST_BLOCK = 16


def layout(scale_granularity: str | int) -> tuple[int, int]:
    """Return how a layer's inputs lie in the file: inputs that a group takes, 0 for no groups, and a block of them.

    A block has a scale, and is a power of two of at least 16 inputs. A group that no such block divides is filled up
    with zeros, in the input and in the codes.

    Args:
        scale_granularity (`str` or `int`): "tensor", "row", or inputs per group.
    """
    if isinstance(scale_granularity, str):
        return 0, BLOCK
    size = math.gcd(scale_granularity, BLOCK)
    group = scale_granularity if size >= SMALLEST_BLOCK else -(-scale_granularity // SMALLEST_BLOCK) * SMALLEST_BLOCK
    return group, math.gcd(group, BLOCK)


def write_onnx(program: ExportedProgram, path: str | os.PathLike) -> None:
    """Write a traced model as an ONNX file; weights of more than 1.5 GB go into a second file next to it.

    Args:
        program (`torch.export.ExportedProgram`): See [`trace`].
        path (`str` or `os.PathLike`): File to write, in a folder that exists.

    Raises:
        ImportError: `onnxscript` is missing, or torch is older than 2.8.
        OSError: The file cannot be written.
    """
    try:
        from onnxscript import ir
        from torch.onnx.ops import symbolic
    except ImportError as error:
        raise ImportError(
            f"Writing ONNX needs onnxscript, and torch 2.8 or newer ({error}): pip install onnxscript"
        ) from error

    def layer(input: Tensor, weight_packed: Tensor, weight_scale: Tensor, bias: Tensor | None, _: None) -> Tensor:
        rows, columns = weight_packed.shape[0] * reference.CODES_PER_BYTE, weight_packed.shape[1]
        granularity = reference.granularity_of(weight_scale, columns)
        group, size = layout(granularity)
        if isinstance(granularity, int) and group != granularity:
            parts = input.unflatten(-1, (-1, granularity))
            input = torch.nn.functional.pad(parts, (0, group - granularity)).flatten(-2)
            columns = input.shape[-1]
        output = symbolic(
            "com.microsoft::MatMulNBits",
            (input, weight_packed, weight_scale),
            {"K": columns, "N": rows, "bits": 2, "block_size": size},
            dtype=input.dtype,
            shape=(*input.shape[:-1], rows),
            version=1,
        )
        return output if bias is None else output + bias

    with torch.no_grad(), quiet():
        program = program.run_decompositions({LINEAR: layer})
        # Optimizing would join equal scales, which here are not yet what the file holds.
        options: dict[str, Any] = {"dynamo": True, "optimize": False, "verbose": False}
        written: Any = torch.onnx.export(program, output_names=["sample"], **options)
        graph = written.model.graph
        for node in graph:
            if node.op_type == "MatMulNBits":
                _put_weights(node, ir)
        written.optimize()
    for value in (*graph.inputs, *graph.outputs):
        names = ("batch", None, "height", "width")
        value.shape = ir.Shape(
            [size if isinstance(size, int) else name for size, name in zip(value.shape, names, strict=False)]
        )
    written.save(Path(path))


def _put_weights(node: Any, ir: Any) -> None:
    """Replace this package's codes and scales of a node by those that the operator reads."""
    weight, scale = (torch.from_numpy(value.const_value.numpy()) for value in node.inputs[1:3])
    columns, rows, size = (node.attributes[name].as_int() for name in ("K", "N", "block_size"))
    blocks = math.ceil(columns / size)
    if columns != weight.shape[1]:  # groups that are filled up
        parts = weight.unflatten(1, (scale.shape[1], -1))
        more = (columns - weight.shape[1]) // scale.shape[1]
        weight = torch.nn.functional.pad(parts, (0, more), value=reference.ZERO_BYTE).flatten(1)
    codes = codes_low_first(weight, ZERO, blocks * size).view(rows, blocks, size // 4)
    groups = scale.reshape(len(scale), -1)  # (1 or N, groups)
    scales = groups.repeat_interleave(blocks // groups.shape[1], dim=1).expand(rows, blocks).contiguous()
    for value, tensor in zip(node.inputs[1:3], (codes, scales), strict=True):
        value.const_value = ir.tensor(tensor.numpy(), name=value.name)
        value.shape = value.const_value.shape

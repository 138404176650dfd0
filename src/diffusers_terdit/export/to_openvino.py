"""OpenVINO: ternary layers as constants of the type `u2`, which it keeps packed, and a matmul."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from .graph import codes_low_first, quiet


ZERO = 1  # code of 0; 1 is subtracted in the graph


def write_openvino(program: ExportedProgram, path: str | os.PathLike) -> None:
    """Write a traced model as an `.xml` file for OpenVINO, with the weights in a `.bin` file next to it.

    Args:
        program (`torch.export.ExportedProgram`): See [`trace`].
        path (`str` or `os.PathLike`): The `.xml` file, in a folder that exists.

    Raises:
        ImportError: `openvino` is missing.
        OSError: The files cannot be written.
    """
    try:
        import openvino
        from openvino import opset13 as op
        from openvino.frontend import ConversionExtension
    except ImportError as error:
        raise ImportError(f"Writing for OpenVINO needs its package ({error}): pip install openvino") from error

    def layer(node: Any) -> list:
        constants = (node.get_input(i).get_node().data for i in (1, 2))
        weight, scale = (torch.from_numpy(np.array(constant)) for constant in constants)
        rows, columns = weight.shape[0] * 4, weight.shape[1]
        groups = scale.reshape(len(scale), -1).expand(rows, -1)  # (N, groups)
        many = groups.shape[1] > 1
        shape = [rows, groups.shape[1], columns // groups.shape[1]] if many else [rows, columns]
        codes = codes_low_first(weight, ZERO).numpy()
        tensor = openvino.Tensor(codes, openvino.Shape(shape), openvino.Type.u2)
        weights = op.convert(op.constant(tensor, shared_memory=False), "f32")  # `codes` do not live long enough
        ternary = op.subtract(weights, op.convert(op.constant(np.uint8(ZERO)), "f32"))
        dense = op.multiply(ternary, op.constant(groups.reshape(*shape[:-1], 1).numpy()))
        if many:
            dense = op.reshape(dense, op.constant(np.array([rows, columns])), False)
        output = op.matmul(node.get_input(0), dense, False, True)
        bias = node.get_input(3)
        if bias.get_node().get_type_name() == "Constant":
            output = op.add(output, bias)
        return output.outputs()

    with torch.no_grad(), quiet():
        extension = ConversionExtension("diffusers_terdit.linear.default", layer)
        model = openvino.convert_model(program, extension=[extension])
    model.outputs[0].get_tensor().set_names({"sample"})
    # Inputs of these layers are rounded to 8 bits only for a caller who sets the same option to another value.
    model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    openvino.save_model(model, Path(path), compress_to_fp16=False)

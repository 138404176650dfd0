"""What is exported is read with the others' own code: the same pictures, and the same codes and scales to the byte."""

import json
import os

import numpy as np
import pytest
import torch

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, pack_ternary
from diffusers_terdit.checkpoints import bundled
from diffusers_terdit.cli import main
from diffusers_terdit.export import export_pipeline, to_onnx
from diffusers_terdit.ops.reference import ZERO_BYTE


CASES = {
    "tensor, fewer key heads, K no multiple of a block": {"attention_head_dim": 12, "num_key_value_heads": 2},
    "row, sincos2d, patches of 1": {"scale_granularity": "row", "pos_embed_type": "rope+sincos2d", "patch_size": 1},
    "groups of 48, a part of which is a block": {
        "scale_granularity": 48, "attention_head_dim": 24, "ffn_dim": 96, "adaln_norm": False,
    },
    "groups of 8, filled up to a block": {"scale_granularity": 8},
    "8-bit inputs as trained": {"activation_bits": 8},
    "full precision": {"ternary": False},
}  # fmt: skip
EXACT, ROUNDED = 1e-5, 1e-2  # a code of 8 bits next to a half may fall on either side


@pytest.fixture(autouse=True)
def _openvino_reports_nothing(monkeypatch):
    monkeypatch.setenv("CI", "true")


def reader(path):
    """A function of named arrays, for either format."""
    if path.suffix == ".onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(["sample"], inputs)[0]
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: model(inputs)["sample"]


def low_first(packed, shape, zero):
    """Codes of two bits, the first in the lowest: int8 {-1, 0, +1}."""
    codes = packed.reshape(-1, 1) >> np.array([0, 2, 4, 6], np.uint8) & 3
    return torch.from_numpy(codes.reshape(shape).astype(np.int8)) - zero


def layers_of_onnx(path):
    """{name: (weight_packed, scales of blocks (N, blocks), block)}."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(path).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {}
    for node in (node for node in graph.node if node.op_type == "MatMulNBits"):
        values = {attribute.name: attribute.i for attribute in node.attribute}
        assert values["bits"] == 2
        codes = low_first(tensors[node.input[1]], (values["N"], -1), 2)
        assert not codes[:, values["K"] :].any()  # what fills the last block
        name = node.input[1].removeprefix("transformer.").removesuffix(".weight_packed")
        weight = pack_ternary(codes[:, : values["K"]].float())
        found[name] = weight, torch.from_numpy(tensors[node.input[2]].copy()), values["block_size"]
    return found


def layers_of_openvino(path):
    """[(weight_packed, scales (N, groups))], in the order of the file."""
    openvino = pytest.importorskip("openvino")

    def user(node):
        return next(iter(node.output(0).get_target_inputs())).get_node()

    model, found = openvino.Core().read_model(path), []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.u2:
            rows = node.shape[0]
            scale = np.array(user(user(user(node))).input_value(1).get_node().data)  # Convert, Subtract, Multiply
            codes = low_first(np.array(node.data).view(np.uint8), (rows, -1), 1)
            found.append((pack_ternary(codes.float()), torch.from_numpy(scale).reshape(rows, -1)))
    return found


def per_group(layer):
    """The scales of a layer, (N, groups)."""
    scale = layer.weight_scale.detach()
    return scale.reshape(len(scale), -1).expand(layer.out_features, -1)


@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("case", CASES)
def test_others_compute_the_same_and_hold_the_same_bytes(case, format, tiny_pipeline, tmp_path):
    pytest.importorskip("openvino" if format == "openvino" else "onnxscript")
    changes = {"num_layers": 1, **CASES[case]}
    pipe = tiny_pipeline(weight_format="packed" if changes.get("ternary", True) else "float", **changes)
    model = pipe.transformer
    path = export_pipeline(pipe, tmp_path / "out", format)

    run, patch = reader(path), model.config.patch_size
    for batch, rows, columns in ((2, 4, 6), (1, 8, 8), (3, 16, 2), (1, 1, 1)):
        size = (batch, model.config.in_channels, rows * patch, columns * patch)
        inputs = {
            "hidden_states": torch.randn(size),
            "timestep": torch.rand(batch) * 1000,
            "class_labels": torch.randint(0, model.config.num_classes + 1, (batch,)),
        }
        with torch.no_grad():
            expected = model(**inputs).sample
        output = torch.from_numpy(run({name: value.numpy() for name, value in inputs.items()}).copy())
        difference = (output - expected).norm() / expected.norm()
        assert difference < (ROUNDED if "activation_bits" in changes else EXACT), (size, difference)

    layers = model.ternary_layers()
    if format == "onnx":
        found = layers_of_onnx(path)
        assert found.keys() == layers.keys()
        for name, (weight, scales, block) in found.items():
            layer = layers[name]
            groups = per_group(layer)
            if weight.shape[1] != layer.in_features:
                parts = weight.unflatten(1, (groups.shape[1], -1))
                size = layer.in_features // groups.shape[1]
                assert (parts[..., size:] == ZERO_BYTE).all()
                weight = parts[..., :size].flatten(1)
            assert torch.equal(weight, layer.weight_packed)
            if groups.shape[1] > 1:
                assert layer.in_features // groups.shape[1] % block == 0 or block == 16
            assert torch.equal(scales, groups.repeat_interleave(scales.shape[1] // groups.shape[1], dim=1))
    else:
        found = layers_of_openvino(path)
        assert len(found) == len(layers)
        for name, layer in layers.items():
            wanted = layer.weight_packed, per_group(layer)
            assert any(all(map(torch.equal, wanted, pair)) for pair in found), name


def test_the_command_writes_what_a_sampler_needs(tmp_path, capsys):
    """From a bundled model's name, in its own configs; with `--overwrite` beside what is there."""
    pytest.importorskip("openvino")
    (tmp_path / "mine.txt").touch()
    assert main(["export", "digits", str(tmp_path), "--format", "openvino"]) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["export", "digits", str(tmp_path), "--format", "openvino", "--overwrite"]) == 0
    printed, errors = capsys.readouterr()
    assert f"Exported digits to {tmp_path}/transformer/openvino_model.xml" in printed
    assert not errors
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "mine.txt", "model_index.json", "scheduler/scheduler_config.json", "transformer/config.json",
        "transformer/openvino_model.xml", "transformer/openvino_model.bin",
    }  # fmt: skip
    index = json.loads((tmp_path / "model_index.json").read_text("utf-8"))
    pipe = TerDiTPipeline.from_pretrained(bundled())
    assert index["id2label"] == pipe.config.id2label
    assert index["sampling_defaults"] == pipe.config.sampling_defaults
    config = TerDiTTransformer2DModel.load_config(tmp_path / "transformer")
    assert config["num_classes"] == pipe.transformer.config.num_classes
    packed = sum(tensor.nbytes for tensor in pipe.transformer.state_dict().values())
    assert (tmp_path / "transformer" / "openvino_model.bin").stat().st_size < 1.1 * packed


def test_what_cannot_be_written_leaves_nothing(tiny_pipeline, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")

    def fill_the_disk(node, ir):
        raise OSError("No space left on device")

    monkeypatch.setattr(to_onnx, "_put_weights", fill_the_disk)
    pipe = tiny_pipeline(weight_format="packed", num_layers=1)
    with pytest.raises(OSError, match="No space left"):
        export_pipeline(pipe, tmp_path / "out", "onnx")
    assert not os.path.exists(tmp_path / "out" / "model_index.json")

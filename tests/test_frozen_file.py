"""Folders written once by version 0.1.0: they must load forever, and these numbers never change."""

import hashlib
import json
import struct
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

from diffusers_terdit import TernaryLinear


FOLDER = Path(__file__).parent / "data" / "packed-v1"
TERNARY_CONFIG = FOLDER.with_name("ternary-config-v1")
WEIGHTS = FOLDER / "diffusion_pytorch_model.safetensors"
FILE_SHA256 = "bd1a5d6809c5d5499c20589ead76b9764560ab011fd00467222bbcb84832d61b"
DIGEST = "b71a11c65200f92ba380aeb8a9886c3f39ac40c104b920eefb301ecf8042a19c"
TERNARY = [
    [0, 1, 0, -1, 0, -1],
    [-1, 1, 0, 0, 0, -1],
    [1, 1, -1, 0, -1, -1],
    [1, 1, -1, 1, -1, 0],
    [-1, 1, 1, -1, 0, 1],
    [-1, 0, 0, 0, -1, 1],
    [1, 0, 1, -1, 0, -1],
    [1, -1, 0, -1, 0, 1],
]
PACKED = [[98, 169, 74, 16, 69, 8], [34, 164, 69, 100, 65, 26]]
SCALE = [[(i + 1) / 8, (16 - i) / 16] for i in range(8)]  # (8, 2): groups of 3 inputs
BIAS = [(i - 3) / 4 for i in range(8)]
INPUT = [[1, 2, 3, 4, 5, 6], [-1, 0.5, 0, 2, -0.25, 8]]
OUTPUT = [
    [-10.5, -5.875, -9.875, -0.8125, 4.25, 0.4375, -2.0, 1.125],
    [-10.6875, -7.625, -7.21875, 1.578125, 5.6875, 6.921875, -6.375, 2.875],
]


def test_the_file_is_the_one_that_was_written():
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == FILE_SHA256


def test_it_loads_to_the_same_numbers():
    layer = TernaryLinear.from_pretrained(FOLDER)
    assert layer.weight_format == "packed"
    assert layer.scale_granularity == 3
    assert {name: tensor.tolist() for name, tensor in layer.state_dict().items()} == {
        "weight_packed": PACKED,
        "weight_scale": SCALE,
        "bias": BIAS,
    }
    assert layer.weight_packed.dtype == torch.uint8
    assert layer.ternary_weight().tolist() == TERNARY


def test_it_computes_the_same_numbers():
    layer = TernaryLinear.from_pretrained(FOLDER)
    assert layer(torch.tensor(INPUT)).tolist() == OUTPUT  # every sum is exact in float32
    assert layer.unpack()(torch.tensor(INPUT)).tolist() == OUTPUT


def test_its_digest_covers_names_dtypes_shapes_and_bytes_in_the_order_of_the_names():
    sha = hashlib.sha256()
    sha.update(b'["bias", "F32", [8]]' + struct.pack("<8f", *BIAS))
    sha.update(b'["weight_packed", "U8", [2, 6]]' + bytes(byte for row in PACKED for byte in row))
    sha.update(b'["weight_scale", "F32", [8, 2]]' + struct.pack("<16f", *(scale for row in SCALE for scale in row)))
    assert sha.hexdigest() == DIGEST


def test_saving_it_again_writes_the_same_tensors_and_metadata(tmp_path):
    TernaryLinear.from_pretrained(FOLDER).save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS.name, framework="pt") as file:
        metadata = file.metadata()
        assert {name: file.get_tensor(name).tolist() for name in file.keys()} == {  # noqa: SIM118
            "weight_packed": PACKED,
            "weight_scale": SCALE,
            "bias": BIAS,
        }
    assert json.loads(metadata.pop("terdit.config"))["weight_format"] == "packed"
    assert metadata == {
        "format": "pt",
        "terdit.version": "1",
        "terdit.packing": "row-chunk-2bit",
        "terdit.sha256": DIGEST,
    }
    old, new = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (FOLDER, tmp_path))
    assert {name: new[name] for name in old} == {**old, "_diffusers_version": new["_diffusers_version"]}


def test_a_model_saved_with_the_first_names_of_ternary_config_loads():
    """`granularity`, `exact` and `exclude` in its config.json; inputs and output as computed when it was saved."""
    vectors = load_file(TERNARY_CONFIG / "vectors.safetensors")
    expected = vectors.pop("sample")
    model = DiTTransformer2DModel.from_pretrained(TERNARY_CONFIG).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TernaryLinear)}
    assert "transformer_blocks.0.attn1.to_q" in layers
    assert not any(".norm1." in name for name in layers)
    assert {layer.scale_granularity for layer in layers.values()} == {32}
    with torch.no_grad():
        torch.testing.assert_close(model(**vectors).sample, expected)


def test_a_model_with_the_first_names_is_saved_with_those_of_today(tmp_path):
    model = DiTTransformer2DModel.from_pretrained(TERNARY_CONFIG)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "ternary",
        "version": "1",
        "scale_granularity": 32,
        "weight_format": "packed",
        "lossless": False,
        "include": None,
        "modules_to_not_convert": ["*.norm1.*"],
        "strict": False,
    }
    again = DiTTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())

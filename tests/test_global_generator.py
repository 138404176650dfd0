"""What changes, saves or converts a model draws nothing from torch's global generator, which is the user's."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DiTTransformer2DModel

from diffusers_terdit import (
    TerDiTPipeline,
    TerDiTTransformer2DModel,
    TernaryLinear,
    convert_original_checkpoint,
    export_remote_code,
    training,
)
from diffusers_terdit.conversion import convert_ternary_checkpoint
from diffusers_terdit.export import export_pipeline
from tiny import make_ternary
from tiny_training import fresh_model, optimizer_of


ORIGINAL = Path(__file__).parent / "data" / "reference"


class Made(NamedTuple):
    layer: TernaryLinear
    model: TerDiTTransformer2DModel
    packed: TerDiTTransformer2DModel
    pipe: TerDiTPipeline
    folder: Path  # with pipe/, dense/ and checkpoint-0/


ACTIONS = {
    "pack a layer": lambda made: made.layer.pack(),
    "unpack a layer": lambda made: made.layer.pack().unpack(),
    "dequantize a layer": lambda made: made.layer.dequantize(),
    "pack": lambda made: made.model.pack(),
    "unpack": lambda made: made.packed.unpack(),
    "dequantize float weights": lambda made: made.model.dequantize(),
    "dequantize packed weights": lambda made: made.packed.dequantize(),
    "save": lambda made: made.model.save_pretrained(made.folder / "out"),
    "load": lambda made: TerDiTPipeline.from_pretrained(made.folder / "pipe"),
    "load a checkpoint": lambda made: training.export.checkpoint_pipeline(made.folder / "checkpoint-0"),
    "export an average": lambda made: training.export.to_pipeline(made.model),
    "export a dense average": lambda made: training.export.to_pipeline(made.model.dequantize()),
    "export to ONNX": lambda made: export_pipeline(made.pipe, made.folder / "out", "onnx"),
    "export code": lambda made: export_remote_code(made.folder / "pipe"),
    "convert codes of the authors": lambda made: convert_original_checkpoint(ORIGINAL / "tiny-qknorm-packed"),
    "convert weights of the authors": lambda made: convert_original_checkpoint(ORIGINAL / "tiny-qknorm-float"),
    "convert dense weights": lambda made: convert_ternary_checkpoint(made.folder / "dense", made.folder / "out"),
}


@pytest.fixture
def made(tmp_path):
    packed = fresh_model(prediction_type="epsilon").pack()
    pipe = training.export.to_pipeline(fresh_model())
    pipe.save_pretrained(tmp_path / "pipe")
    dense = DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, sample_size=8)
    make_ternary(dense, "tensor").save_pretrained(tmp_path / "dense")
    model = fresh_model()
    training.checkpointing.save(tmp_path / "checkpoint-0", model, model, optimizer_of(model), {})
    return Made(TernaryLinear(16, 16), model, packed, pipe, tmp_path)


@pytest.mark.parametrize("action", ACTIONS)
def test_the_global_generator_is_left_alone(made, action):
    if action == "export to ONNX":
        pytest.importorskip("onnxscript")
    before = torch.get_rng_state()
    ACTIONS[action](made)
    assert torch.equal(torch.get_rng_state(), before)

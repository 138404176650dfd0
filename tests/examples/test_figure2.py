"""examples/figure2.py: the picture in the docs is what the model is."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from diffusers_terdit import TerDiTTransformer2DModel
from diffusers_terdit.models.transformer_terdit import SIZES


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import figure2  # noqa: E402


def test_the_picture_in_the_docs_is_that_of_the_model(tmp_path, capsys):
    figure2.main(["--output", str(tmp_path / "new" / "architecture.svg")])
    drawn = (tmp_path / "new" / "architecture.svg").read_text("utf-8")
    assert drawn == (ROOT / "docs" / "images" / "architecture.svg").read_text("utf-8")


@pytest.mark.parametrize("preset", SIZES)
def test_every_preset_can_be_drawn(preset):
    words = [element.text for element in ElementTree.fromstring(figure2.draw(preset)).iter() if element.text]
    config = SIZES[preset]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    assert f"{config['num_layers']} × TerDiTBlock" in words  # noqa: RUF001
    assert f"RMSNorm {6 * width:,}" in words
    assert f"Ternary 1,024 → {6 * width:,}" in words
    assert f"tokens ({config['sample_size'] ** 2 // 4:,}, {width:,})" in words


def test_a_module_that_is_not_drawn_is_an_error(monkeypatch):
    from_preset = TerDiTTransformer2DModel.from_preset

    def changed(change):
        def make(preset):
            model = from_preset(preset)
            change(model)
            return model

        monkeypatch.setattr(TerDiTTransformer2DModel, "from_preset", make)

    changed(lambda model: model.add_module("new_part", nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"lacks \['new_part'\]"):
        figure2.draw("terdit-600m-256")
    changed(lambda model: model.transformer_blocks[3].add_module("new_part", nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="The blocks differ"):
        figure2.draw("terdit-600m-256")


def test_shapes_are_those_of_a_real_forward(tiny_model, tiny_inputs):
    model = tiny_model()
    seen = figure2.shapes(model.to("meta"))
    model = tiny_model()
    outputs = {}
    for name in ("proj_in", "transformer_blocks.1.attn.to_k", "transformer_blocks.0.adaln", "norm_out", "proj_out"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: tuple(output.shape[1:])})
        )
    with torch.no_grad():
        model(**tiny_inputs())
    assert outputs.items() <= seen.items()
    assert list(seen).index("transformer_blocks.0.adaln") < list(seen).index("transformer_blocks.0.attn.to_q")

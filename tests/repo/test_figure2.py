"""docs/figure2.py: the picture in the docs is what the model is."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusers_terdit import TerDiTTransformer2DModel


DOCS = Path(__file__).parents[2] / "docs"
FIGURE = runpy.run_path(str(DOCS / "figure2.py"))


def test_the_picture_in_the_docs_is_that_of_the_model(tmp_path):
    FIGURE["main"](["--output", str(tmp_path / "architecture.svg")])
    drawn = (tmp_path / "architecture.svg").read_text("utf-8")
    assert drawn == (DOCS / "images" / "architecture.svg").read_text("utf-8"), "run `python docs/figure2.py`"


def test_a_module_that_is_not_drawn_is_an_error():
    with torch.device("meta"):
        model = TerDiTTransformer2DModel.from_preset("terdit-600m-256")
    model.add_module("new_part", nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"lacks .*'new_part'"):
        FIGURE["Drawing"](model).svg()
    model.transformer_blocks[3].add_module("new_part", nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match="The blocks differ"):
        FIGURE["Drawing"](model).svg()

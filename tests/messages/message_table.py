"""A row of the table of error messages, and the `World` in which it provokes its error."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryConfig, TernaryLinear
from diffusers_terdit.cli import build_parser
from diffusers_terdit.pipelines.schedulers import default_scheduler
from fake_hub import hub_in_process
from tiny import randomize, tiny_vae


ORIGINAL = Path(__file__).parents[1] / "data" / "reference" / "tiny-qknorm-packed"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PTH = "consolidated_ema_ternary.00-of-01.pth"
TINY = {
    "sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4,
    "ffn_dim": 16,
}  # fmt: skip


class Fixed(str):
    """What was given, where it can be one thing only, such as an option that needs another, or an empty list."""


@dataclass(frozen=True)
class Row:
    """One way to provoke an error, and what its message must say. `TMP` stands for the row's folder.

    Without a `way_out` the reason says what is allowed.
    """

    provoke: Callable[["World"], Any]
    given: str
    reason: str
    way_out: str = ""
    error: type[BaseException] = ValueError


class World:
    """What a row needs: an empty folder, tiny models, saved ones to damage, and a Hub."""

    def __init__(self, tmp: Path, shared: Path, stack: ExitStack):
        self.tmp, self._shared, self._stack = tmp, shared, stack

    @cached_property
    def monkeypatch(self):
        return self._stack.enter_context(pytest.MonkeyPatch.context())

    @cached_property
    def hub(self):
        return self._stack.enter_context(hub_in_process(self.monkeypatch, self.tmp))

    def model(self, weight_format: str = "float", **changes) -> TerDiTTransformer2DModel:
        torch.manual_seed(0)
        model = randomize(TerDiTTransformer2DModel(**{**TINY, **changes})).eval()
        return model.pack() if weight_format == "packed" else model

    def pipe(self, weight_format: str = "float", scheduler=None, vae=None, **changes) -> TerDiTPipeline:
        names = {"0": "cat, tabby", "1": "dog", "2": "crane", "3": "crane"}
        model = self.model(weight_format, **{"in_channels": 3, **changes})
        pipe = TerDiTPipeline(model, scheduler or default_scheduler(), vae, names)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    vae = cached_property(lambda self: tiny_vae())

    def saved(self, kind: str) -> Path:
        """A fresh copy of a saved model, `TMP/<kind>`."""
        new = {
            "pipe": lambda: self.pipe("packed"),
            "layer": lambda: TernaryLinear(8, 8, weight_format="packed"),
            "float_layer": lambda: TernaryLinear(8, 8),
            "dense": dit,
            "quantized": lambda: TernaryConfig(scale_granularity="row").quantize(dit()),
        }
        whole = ORIGINAL if kind == "original" else self._shared / kind
        if not whole.exists():
            new[kind]().save_pretrained(whole)
        return Path(shutil.copytree(whole, self.tmp / kind))


def dit():
    """diffusers' own class-conditional transformer, 17 thousand weights."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip


def terdit(*arguments) -> None:
    """Run a `terdit` command up to its error, which `main` prints as one line."""
    args = build_parser().parse_args([str(argument) for argument in arguments])
    args.run(args)


def edit(path: Path, metadata: dict | None = None, **changes) -> Path:
    """Change entries or tensors of a file, with dots in names of tensors as `__`; `None` takes one out.

    The digest of a safetensors file goes.
    """
    if path.suffix == ".json":
        entries = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
        return path
    before = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    changed = {**before, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    tensors = {name: tensor for name, tensor in changed.items() if tensor is not None}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            kept = {key: value for key, value in (file.metadata() or {}).items() if key != "terdit.sha256"}
        save_file(tensors, path, {**kept, **(metadata or {})})
    else:
        torch.save(tensors, path)
    return path


def changed(kind: str, use: Callable, file: str = "", text: str | None = None, remove: bool = False, **changes):
    """What provokes an error: `use` of a saved model, after a change of one of its files."""

    def provoke(world):
        path = world.saved(kind) / file
        if remove:
            path.unlink()
        elif text is not None:
            path.write_text(text)
        elif changes:
            edit(path, **changes)
        use(world.tmp / kind)

    return provoke

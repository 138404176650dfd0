"""What the table of error messages is made of: a row, the places that raise, and what rows have at hand."""

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryConfig, TernaryLinear
from diffusers_terdit.cli import build_parser
from diffusers_terdit.pipelines.schedulers import default_scheduler
from tiny import randomize


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
ORIGINAL = ROOT / "tests" / "data" / "reference" / "tiny-qknorm-packed"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PTH = "consolidated_ema_ternary.00-of-01.pth"
TINY = {
    "sample_size": 8, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "num_classes": 4,
    "ffn_dim": 16,
}  # fmt: skip
REASON = None  # as a way out: the reason says what is allowed


class Fixed(str):
    """What was given, where it can be one thing only, such as an option that needs another, or an empty list."""


@dataclass(frozen=True)
class Row:
    """One way to provoke an error, and what its message must say. `TMP` stands for the row's folder."""

    name: str
    provoke: Callable[["World"], Any]
    error: type[BaseException]
    given: str
    reason: str
    way_out: str | None


@dataclass(frozen=True)
class Site:
    """A statement that raises a new error with a message."""

    path: str
    first: int
    last: int
    code: str
    text: str  # what the message says in any case

    def __str__(self) -> str:
        return f"{self.path}:{self.first}: {self.code}"


def collect_sites() -> list[Site]:
    """Every `raise` of a new error, `parser.error` and `sys.exit` with a message, in src/ and examples/."""
    files = [path for folder in ("src", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [site for path in files for site in _sites_in(path)]


def _sites_in(path: Path) -> Iterator[Site]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Raise):
            new = isinstance(node.exc, ast.Call) and bool(node.exc.args)  # not `raise`, not `raise update`
        else:
            called = node.func if isinstance(node, ast.Call) else None
            name = ast.unparse(called) if isinstance(called, ast.Attribute) else ""
            new = name == "parser.error" or (
                name == "sys.exit" and isinstance(node.args[0], (ast.Constant, ast.JoinedStr))
            )
        if new:
            values = (inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant))
            text = " ".join(value for value in values if isinstance(value, str))
            yield Site(path.relative_to(ROOT).as_posix(), node.lineno, node.end_lineno, ast.unparse(node), text)


def chain_of(error: BaseException, message: str) -> Iterator[BaseException]:
    """The error, and those it came from whose words it repeats."""
    while error is not None:
        if str(error) in message or isinstance(error, SystemExit):
            yield error
        error = error.__cause__ or error.__context__


def place_of(error: BaseException) -> tuple[str, int] | None:
    """File and line of src/ or examples/ that raised an error."""
    found, traceback = None, error.__traceback__
    while traceback is not None:
        path = Path(traceback.tb_frame.f_code.co_filename)
        if path.is_relative_to(ROOT / "src") or path.is_relative_to(EXAMPLES):
            found = path.relative_to(ROOT).as_posix(), traceback.tb_lineno
        traceback = traceback.tb_next
    return found


class World:
    """What a row needs: a folder of its own, tiny models, saved ones to damage, and programs to run."""

    def __init__(self, request, tmp: Path, shared: Path):
        self._request, self.tmp, self._shared = request, tmp, shared
        self.errors = io.StringIO()

    @cached_property
    def monkeypatch(self):
        return self._request.getfixturevalue("monkeypatch")

    @cached_property
    def hub(self):
        return self._request.getfixturevalue("fake_hub")

    def model(self, weight_format: str = "float", **changes) -> TerDiTTransformer2DModel:
        torch.manual_seed(0)
        model = randomize(TerDiTTransformer2DModel(**{**TINY, **changes})).eval()
        return model.pack() if weight_format == "packed" else model

    def pipe(self, weight_format: str = "float", scheduler=None, vae=None, **changes) -> TerDiTPipeline:
        names = {"0": "cat, tabby", "1": "dog", "2": "crane", "3": "crane"}
        pipe = TerDiTPipeline(
            self.model(weight_format, **{"in_channels": 3, **changes}), scheduler or default_scheduler(), vae, names
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @property
    def vae(self):
        return self._request.getfixturevalue("tiny_vae")

    def saved(self, kind: str) -> Path:
        """A fresh copy of a saved model, `TMP/<kind>`."""
        whole = self._shared / kind
        if not whole.exists():
            if kind == "original":
                shutil.copytree(ORIGINAL, whole)
            else:
                getattr(self, f"_new_{kind}")().save_pretrained(whole)
        return Path(shutil.copytree(whole, self.tmp / kind))

    def _new_pipe(self):
        return self.pipe("packed")

    def _new_latent_pipe(self):
        return self.pipe("packed", vae=self.vae, in_channels=4)

    def _new_layer(self):
        return TernaryLinear(8, 8, weight_format="packed")

    def _new_float_layer(self):
        return TernaryLinear(8, 8)

    def _new_dense(self):
        return dit()

    def _new_quantized(self):
        return TernaryConfig(scale_granularity="row").quantize(dit())

    def terdit(self, *arguments) -> None:
        """A `terdit` command up to its error, which `main` prints as one line."""
        args = build_parser().parse_args([str(argument) for argument in arguments])
        args.run(args)

    def trained(self, train, *options) -> Path:
        """A fresh copy of a folder that a script has left, `TMP/text`."""
        whole = self._shared / "text"
        if not whole.exists():
            train(self, *options, "--output_dir", whole)
        return Path(shutil.copytree(whole, self.tmp / "text"))

    def script(self, name: str):
        """A module of examples/."""
        for folder in (EXAMPLES, EXAMPLES / "experiments"):
            if str(folder) not in sys.path:
                self.monkeypatch.syspath_prepend(folder)
        return __import__(name)

    def run(self, name: str, *arguments) -> None:
        """A script's `main`, in this process."""
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        module, arguments = self.script(name), [str(argument) for argument in arguments]
        with redirect_stderr(self.errors):
            module.main(arguments)

    def benchmark(self, *arguments) -> None:
        """`benchmark.py`, whose `main` takes the command line."""
        module = self.script("benchmark")
        self.monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
        with redirect_stderr(self.errors):
            module.main()


def dit():
    """diffusers' own class-conditional transformer, 17 thousand weights."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, sample_size=8,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    ).eval()  # fmt: skip


def edit_json(path: Path, **changes) -> Path:
    """Change entries of a JSON file; `None` takes one out."""
    entries = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))
    return path


def edit_tensors(path: Path, metadata: dict | None = None, **changes) -> Path:
    """Change tensors of a safetensors file, dots in names as `__`, and its metadata; the digest goes."""
    with safe_open(path, "pt") as file:
        kept = {key: value for key, value in (file.metadata() or {}).items() if key != "terdit.sha256"}
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in {**load_file(path), **changes}.items() if tensor is not None}
    save_file(tensors, path, {**kept, **(metadata or {})})
    return path


def edit_pth(folder: Path, **changes) -> Path:
    """Change tensors of the authors' file, dots in names as `__`; `None` takes one out."""
    path = folder / PTH
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {**torch.load(path, weights_only=True), **changes}
    torch.save({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return folder

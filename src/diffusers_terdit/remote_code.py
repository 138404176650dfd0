"""Export this package's code for repositories that bring their own.

diffusers runs a repository's code after `trust_remote_code=True`, and takes one file per component. Such a file is a
preamble over diffusers' own mixins, then files of this package without their imports, in a fixed order. A file of
arithmetic becomes a function that returns its names, as a module would; the others stay at module level.
Locks, strict checks, the Hub, adapters and the integer kernels stay in the package.
"""

import ast
import hashlib
import inspect
import os
import re
from importlib.metadata import version
from pathlib import Path
from textwrap import indent

from . import ops
from ._diffusers import _GROUP_OFFLOADING, is_offloaded
from .layers import TernaryLinear
from .models.transformer_terdit import TerDiTTransformer2DModel
from .pipelines.pipeline_terdit import TerDiTPipeline
from .storage.saving import new_file, write_json
from .storage.weights import read_json


ARITHMETIC = ("ops/reference.py", "ops/torch_ops.py", "ops/cpu/scratch.py", "ops/cpu/decode.py")
LAYER = (*ARITHMETIC, "layers.py")
TRANSFORMER = (*LAYER, "ops/gpu/graphs.py", "models/transformer_terdit.py")
# File of `ops` that defines a name.
OPS = {name: getattr(value, "__module__", "").rpartition(".")[2] for name, value in vars(ops).items()}
PIPELINE = ("pipelines/schedulers.py", "pipelines/finite.py", "pipelines/pipeline_terdit.py")

_NO_CODE = (
    "which this package does not have the code of. Pass the folder of a TerDiTPipeline, TerDiTTransformer2DModel or"
    " TernaryLinear."
)

_HEADER = """\
# Written by export_remote_code of diffusers-terdit {version}, from these files of it: {files}.
# Apache-2.0, as the package. Do not edit: export again.
#
# It computes what the package computes, in plain PyTorch. The package's strict checks of files, its adapters, its
# uploads and its kernels (numba on a CPU, Triton on a GPU) are not in here: `pip install diffusers-terdit` and
# `import diffusers_terdit` load the main revision without this code.
"""

_MODEL_PREAMBLE = '''\
# diffusers runs this file in one module for every model that it loads. The end of the file puts the classes of the
# first run back, so that models loaded earlier and later are of one class; the ops of a later run are not used.
_FIRST_RUN = globals().get("_FIRST_RUN")
_RUNS = (f"terdit_{hashlib.sha256(__name__.encode()).hexdigest()[:12]}_{number}" for number in itertools.count())
_NAMESPACE = next(name for name in _RUNS if not hasattr(getattr(torch.ops, name), "linear"))


def Library(name, kind):
    """torch's, in a namespace of this run."""
    return torch.library.Library(_NAMESPACE, kind)


class TernaryModelMixin(ModelMixin, ConfigMixin):
    """diffusers' mixins, with scales that stay float32 and attributes that are parameters first."""

    __getattr__ = torch.nn.Module.__getattr__  # ModelMixin's finds the init argument `bias` before the parameter
    _supports_param_buffer_assignment = False  # it would forget `dtype=`: the first tensor of a packed layer is uint8

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        left_out = ("_use_default_values", "auto_map")  # `pack()` changes a config after construction
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k not in left_out}, **kwargs)

    @classmethod
    def _load_pretrained_model(cls, *args, **kwargs):
        kwargs["keep_in_fp32_modules"] = [*(kwargs.get("keep_in_fp32_modules") or []), "weight_scale"]
        return super()._load_pretrained_model(*args, **kwargs)


class TernaryAdapterMixin:
    """Adapters need the package."""


def refuse_adapters(model, action):
    """There are none."""


def check_config(where, config, cls):
    """The package checks values and names the file."""


def size_in_bytes(budget):
    """The package also reads strings such as "4GB"."""
    return budget or 0


def warn_half_precision_codes(dtype):
    """The package warns that half precision moves codes of float weights."""
'''

_MODEL_END = """

def _no_integers(bits):
    raise ImportError(f"Integer activations of {bits} bits need this package's kernels: pip install diffusers-terdit")


_torch_ops.register_kernels(
    "cpu",
    choose=lambda device, case: _torch_ops.Choice("decode", None, "the integer kernels are in diffusers-terdit"),
    check_integers=_no_integers,
    linear=_decode.linear,
    linear_backward=_decode.linear_backward,
    integer_linear=_reference.integer_linear,
)
"""

_TRANSFORMER_END = """
# FirstBlockCache and MagCache of diffusers know a block by its class.
TransformerBlockRegistry.register(TerDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))
"""

_LAST = """

if _FIRST_RUN is None:
    _FIRST_RUN = dict(globals())
    _FIRST_RUN["_FIRST_RUN"] = _FIRST_RUN
else:
    globals().update(_FIRST_RUN)
"""

_PIPELINE_PREAMBLE = '''\
class StrictPipelineMixin:
    """diffusers' pipeline, saved as if it had been loaded by the package."""

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def to_json_string(self):
        config = {key: value for key, value in json.loads(super().to_json_string()).items() if key != "_name_or_path"}
        config["transformer"] = ["diffusers_terdit", "TerDiTTransformer2DModel"]
        return json.dumps(config, indent=2, sort_keys=True) + "\\n"


class PipelineAdapterMixin:
    """Adapters need the package."""


def reset_step_caches(model):
    """Forget what diffusers' step caches keep between the steps of one run of a sampler."""
    model._reset_stateful_cache()
'''

_IS_OFFLOADED = f"\n\n{inspect.getsource(is_offloaded).replace('_GROUP_OFFLOADING', repr(_GROUP_OFFLOADING))}"

_MODEL_IMPORTS = (
    "import hashlib",
    "import itertools",
    "import torch",
    "from diffusers import ConfigMixin, ModelMixin",
    "from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry",
    "from types import SimpleNamespace",
)
_PIPELINE_IMPORTS = ("import json", "from diffusers import ModelMixin as TerDiTTransformer2DModel")


def export_remote_code(folder: str | os.PathLike) -> list[Path]:
    """Add this package's code to a saved pipeline, model or layer, which then loads without the package.

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, `AutoModel.from_pretrained(folder,
    trust_remote_code=True)` and, in a pipeline, `AutoModel.from_pretrained(folder, subfolder="transformer",
    trust_remote_code=True)` run it. Once the code is there, `trust_remote_code=True` is needed with the package, too:
    keep it in a separate revision.

    Args:
        folder (`str` or `os.PathLike`): As `save_pretrained` wrote it; its `model_index.json` and `config.json` are
            changed.

    Returns:
        `list[Path]`: The Python files.

    Raises:
        FileNotFoundError: `folder` is no folder with a saved pipeline or model.
        ValueError: It holds something else than a pipeline, transformer or layer of this package.
    """
    folder = Path(folder)
    index, config = folder / "model_index.json", folder / "config.json"
    if index.is_file():
        return _export_pipeline(folder, index)
    if config.is_file():
        return [_export_model(config)]
    raise FileNotFoundError(
        f"{folder} holds neither model_index.json nor config.json. Pass a folder that `save_pretrained` wrote."
    )


def _export_pipeline(folder: Path, index: Path) -> list[Path]:
    config = read_json(index)
    name = config.get("_class_name")
    transformer = config.get("transformer") or [None, None]
    if "TerDiTPipeline" not in (name, *(name if isinstance(name, list) else [])):
        raise ValueError(f"{index} is that of a {name}, {_NO_CODE}")
    if transformer[1] != TerDiTTransformer2DModel.__name__:
        raise ValueError(f"{index} says `transformer` is a {transformer[1]}, expected a TerDiTTransformer2DModel.")
    component = _export_model(folder / "transformer" / "config.json")
    code = _join(PIPELINE, _PIPELINE_IMPORTS, _PIPELINE_PREAMBLE + _IS_OFFLOADED, "")
    pipeline = _write_code(folder, "pipeline_terdit", code)
    config["_class_name"] = [pipeline.stem, TerDiTPipeline.__name__]
    config["transformer"] = [component.stem, TerDiTTransformer2DModel.__name__]
    # AutoModel looks here, not into the component's config, when it is asked for a subfolder.
    config["auto_map"] = {"AutoModel": f"{component.stem}.{TerDiTTransformer2DModel.__name__}"}
    write_json(index, config)
    return [pipeline, component]


def _export_model(path: Path) -> Path:
    config = read_json(path)
    name = config.get("_class_name")
    if name == TerDiTTransformer2DModel.__name__:
        code = _join(
            TRANSFORMER, _MODEL_IMPORTS, _MODEL_PREAMBLE + _IS_OFFLOADED, _MODEL_END + _TRANSFORMER_END + _LAST
        )
        file = "transformer_terdit"
    elif name == TernaryLinear.__name__:
        code, file = _join(LAYER, _MODEL_IMPORTS, _MODEL_PREAMBLE, _MODEL_END + _LAST), "ternary_linear"
    else:
        raise ValueError(f"{path} is that of a {name}, {_NO_CODE}")
    written = _write_code(path.parent, file, code)
    write_json(path, {**config, "auto_map": {"AutoModel": f"{written.stem}.{name}"}})
    return written


def _write_code(folder: Path, name: str, code: str) -> Path:
    """Write a Python file in the place of older exports.

    Its digest is in its name: diffusers loads the files of all folders into one package, by name.
    """
    for path in folder.glob(f"{name}_*.py"):
        if path.read_text("utf-8").startswith(_HEADER.split("{")[0]):
            path.unlink()
    path = folder / f"{name}_{hashlib.sha256(code.encode()).hexdigest()[:12]}.py"
    with new_file(path) as partial:
        partial.write_text(code, encoding="utf-8")
    return path


def _join(files: tuple[str, ...], imports: tuple[str, ...], preamble: str, end: str) -> str:
    """Return one file: header, imports, preamble, then the files without their imports."""
    outside = set(imports)
    sections = []
    for file in files:
        text = (Path(__file__).parent / file).read_text("utf-8")
        found, inside, body = _parts(text)
        outside |= found
        names = "\n".join(inside)
        if file in ARITHMETIC:
            stem = Path(file).stem
            body = indent(f"{names}\n\n{body}".strip(), "    ")
            body = f"def _{stem}():\n{body}\n\n    return SimpleNamespace(**locals())\n\n\n_{stem} = _{stem}()"
        else:
            body = f"{names}\n\n\n{body}".strip()
        sections.append(f"# ---- {file} ----\n\n\n{body}\n")
    outside = {line.replace("from torch.library import Library, ", "from torch.library import ") for line in outside}
    lines = sorted(outside, key=lambda line: (line.startswith("from"), line))
    header = _HEADER.format(version=version("diffusers-terdit"), files=", ".join(files))
    code = "\n".join([header, *lines, "", "", preamble, "", "\n\n".join(sections)]) + end
    ast.parse(code)
    return code


def _parts(text: str) -> tuple[set[str], list[str], str]:
    """Take a file apart: its imports from outside, lines in the place of those from this package, and the rest."""
    lines = text.splitlines()
    outside: set[str] = set()
    inside: list[str] = []
    stems = [Path(file).stem for file in ARITHMETIC]
    for node in ast.parse(text).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        if isinstance(node, ast.Import) or not node.level:
            outside.add(ast.unparse(node))
        else:
            module = (node.module or "").rpartition(".")[2]
            for name in (alias.name for alias in node.names):  # a name defined nowhere here comes from the preamble
                if name in stems:
                    inside.append(f"{name} = _{name}")
                elif module in stems or (module == "ops" and name in OPS):
                    inside.append(f"{name} = _{OPS.get(name, module)}.{name}")
        lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
    return outside, inside, re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines).strip())

"""What this package tells diffusers about itself, and the export of its code for repositories that bring their own.

diffusers runs a repository's code after `trust_remote_code=True`. It takes one file per component, so the modules that
a class needs are joined into one: their own text, without what that class does not use.
"""

import ast
import builtins
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .layers import TernaryLinear
from .models.transformer_terdit import TerDiTTransformer2DModel
from .pipelines.pipeline_terdit import TerDiTPipeline
from .storage.weights import read_json


PACKAGE = "diffusers_terdit"
_NO_CODE = (
    "which this package does not have the code of. Pass the folder of a TerDiTPipeline, TerDiTTransformer2DModel or"
    " TernaryLinear."
)
OPTIONAL = ("numba", "triton")  # what the kernels that stay in the package need

_HEADER = """\
# Written by export_remote_code of diffusers-terdit {version}, from these files of it: {sources}.
# Apache-2.0, as the package. Do not edit: export again.
#
# It computes what the package computes, exactly, in plain PyTorch. The package's kernels (numba on a CPU, Triton on a
# GPU) are not in here: `find_spec` finds neither, and a CPU has no integer activations, not in bfloat16 either.
# With `pip install diffusers-terdit` and `import diffusers_terdit` the main revision loads without this code.
"""
# diffusers runs a file for every model that it loads, in one module. The functions of an earlier run would meet the
# classes of a later one, and take no layer for a ternary one; an op that is registered again leaves the first dead.
_FIRST_RUN = """

_FIRST_RUN = globals().get("_FIRST_RUN")
"""
_CUSTOM_OP = '''

def _namespace() -> str:
    """For the ops: one of their own beside the package's, and those of other copies of this file in the process."""
    start = f"terdit_{{hashlib.sha256(__name__.encode()).hexdigest()[:12]}}"
    names = (f"{{start}}_{{number}}" for number in itertools.count())
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "{op}"))


if _FIRST_RUN is None:
    _NAMESPACE = _namespace()


def custom_op(name: str, **options):
    """torch's, the first time that this file runs."""
    if _FIRST_RUN is not None:
        return lambda function: _FIRST_RUN[function.__name__]
    return torch.library.custom_op(name.replace("{package}", _NAMESPACE), **options)
'''
_LATER_RUN = """


if _FIRST_RUN is None:
    _FIRST_RUN = dict(globals())
    _FIRST_RUN["_FIRST_RUN"] = _FIRST_RUN
else:  # diffusers runs this file for every model that it loads: classes and ops stay those of the first time
    globals().update(_FIRST_RUN)
"""
_FIND_SPEC = f'''

def find_spec(name: str) -> object | None:
    """Whether a package is installed; those of the kernels that are not in this file count as missing."""
    return None if name in {OPTIONAL!r} else importlib.util.find_spec(name)
'''


def export_remote_code(folder: str | os.PathLike) -> list[Path]:
    """Add this package's code to a saved pipeline, model or layer, which then loads without the package.

    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, `AutoModel.from_pretrained(folder,
    trust_remote_code=True)` and, in a pipeline, `AutoModel.from_pretrained(folder, subfolder="transformer",
    trust_remote_code=True)` run it. Once the code is there, `trust_remote_code=True` is needed with the package, too:
    keep it in a revision of its own.

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
    # The class annotation of the transformer is only that: its code comes from the component's own file.
    outside = {
        ("models.transformer_terdit", "TerDiTTransformer2DModel"): "from diffusers import ModelMixin as {}",
    }
    pipeline = _write_code(folder, "pipeline_terdit", _join("pipelines.pipeline_terdit", ["TerDiTPipeline"], outside))
    config["_class_name"] = [pipeline.stem, TerDiTPipeline.__name__]
    config["transformer"] = [component.stem, TerDiTTransformer2DModel.__name__]
    # AutoModel looks here, not into the component's config, when it is asked for a subfolder.
    config["auto_map"] = {"AutoModel": f"{component.stem}.{TerDiTTransformer2DModel.__name__}"}
    _write_json(index, config)
    return [pipeline, component]


def _export_model(path: Path) -> Path:
    config = read_json(path)
    name = config.get("_class_name")
    if name == TerDiTTransformer2DModel.__name__:
        # FirstBlockCache and MagCache of diffusers know a block by its class.
        epilogue = 'register("diffusers", classes=(), blocks=(TerDiTBlock,), quantizers={})'
        code = _join("models.transformer_terdit", [name, "TerDiTBlock"], epilogue=("_diffusers", "register", epilogue))
        file = "transformer_terdit"
    elif name == TernaryLinear.__name__:
        code, file = _join("layers", [name]), "ternary_linear"
    else:
        raise ValueError(f"{path} is that of a {name}, {_NO_CODE}")
    written = _write_code(path.parent, file, code)
    _write_json(path, {**config, "auto_map": {"AutoModel": f"{written.stem}.{name}"}})
    return written


def _write_code(folder: Path, name: str, code: str) -> Path:
    """Write a Python file in the place of older exports.

    Its digest is in its name: diffusers loads the files of all folders into one package, by name.
    """
    for path in folder.glob(f"{name}_*.py"):
        if path.read_text("utf-8").startswith(_HEADER.split("{")[0]):
            path.unlink()
    path = folder / f"{name}_{hashlib.sha256(code.encode()).hexdigest()[:12]}.py"
    path.write_text(code, encoding="utf-8")
    return path


def _write_json(path: Path, config: dict) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass
class _Statement:
    """A top-level statement of a module, with the comments above it."""

    node: ast.stmt
    text: str
    binds: set[str] = field(default_factory=set)  # names it gives the module
    kept: bool = False

    @cached_property
    def uses(self) -> set[str]:
        return {node.id for node in ast.walk(self.node) if isinstance(node, ast.Name)}

    def attributes(self, name: str) -> set[str] | None:
        """The attributes of the module `name` that are used; `None` when it is passed around as a whole."""
        inside = [node for node in ast.walk(self.node) if isinstance(node, ast.Attribute)]
        found = [node for node in inside if isinstance(node.value, ast.Name) and node.value.id == name]
        whole = sum(isinstance(node, ast.Name) and node.id == name for node in ast.walk(self.node))
        return {node.attr for node in found} if whole == len(found) else None


class _Source:
    """A module of this package, taken apart into top-level statements."""

    def __init__(self, name: str):
        self.name = name
        path = Path(__file__).parent.joinpath(*name.split("."))
        self.is_package = path.is_dir()
        self.path = path / "__init__.py" if self.is_package else path.with_suffix(".py")
        text = self.path.read_text("utf-8")
        lines = text.splitlines(keepends=True)
        self.statements: list[_Statement] = []
        self.imports: dict[str, tuple[str, str | None]] = {}  # local name -> (module of this package, name in it)
        self.outside: dict[str, str] = {}  # local name -> import statement
        end = 0
        for node in ast.parse(text).body:
            segment = "".join(lines[end : node.end_lineno]).strip("\n")
            end = node.end_lineno or end
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                self._add_import(node)
            elif not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"):
                self.statements.append(_Statement(node, segment, set(_bound_names(node))))

    def _add_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            local = alias.asname or alias.name
            if isinstance(node, ast.Import):
                self.outside[local.split(".")[0]] = f"import {alias.name}" + (f" as {local}" if alias.asname else "")
            elif not node.level:
                text = f"from {node.module} import {alias.name}" + (f" as {local}" if alias.asname else "")
                self.outside[local] = text
            else:
                parts = self.name.split(".")
                base = parts[: len(parts) + self.is_package - node.level]
                target = ".".join([*base, *(node.module.split(".") if node.module else [])])
                inner = ".".join(filter(None, [target, alias.name]))
                self.imports[local] = (inner, None) if _is_module(inner) else (target, alias.name)


def _is_module(name: str) -> bool:
    path = Path(__file__).parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _bound_names(node: ast.stmt) -> Iterator[str]:
    """Names that a top-level statement binds; none for one that is there for its effect."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield from [] if node.name == "_" else [node.name]
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    elif isinstance(node, ast.If):
        for inner in [*node.body, *node.orelse]:
            if isinstance(inner, (ast.Import, ast.ImportFrom)):
                yield from (alias.asname or alias.name for alias in inner.names)
            else:
                yield from _bound_names(inner)


class _Join:
    """What the wanted classes need of the modules they stand in, and under which names it stands in one file."""

    def __init__(self, outside: dict[tuple[str, str], str]):
        self.outside = outside
        self.sources: dict[str, _Source] = {}  # in the order of import
        self.kept: dict[tuple[str, str], None] = {}  # (module, name)
        self.namespaces: dict[str, set[str]] = defaultdict(set)  # module that is used as an object: attributes

    def source(self, name: str) -> _Source:
        if name not in self.sources:
            source = _Source(name)
            for target, _ in source.imports.values():  # before itself
                if not any((target, inner) in self.outside for inner in self._names_from(source, target)):
                    self.source(target)
            self.sources[name] = source
        return self.sources[name]

    @staticmethod
    def _names_from(source: _Source, target: str) -> list[str]:
        return [inner for module, inner in source.imports.values() if module == target and inner]

    def resolve(self, module: str, name: str) -> tuple[str, str]:
        """Where a name that a module may only import is defined."""
        target = self.source(module).imports.get(name)
        return self.resolve(target[0], target[1]) if target and target[1] else (module, name)

    def keep(self, module: str, name: str) -> None:
        module, name = self.resolve(module, name)
        if (module, name) in self.kept:
            return
        source = self.source(module)
        found = [statement for statement in source.statements if name in statement.binds]
        if not found and name not in source.outside:
            raise RuntimeError(f"{source.path} does not define `{name}`.")
        self.kept[module, name] = None
        for statement in found:
            self.keep_statement(source, statement)

    def keep_statement(self, source: _Source, statement: _Statement) -> None:
        if statement.kept:
            return
        statement.kept = True
        for name in statement.binds:
            self.keep(source.name, name)
        for name in statement.uses - statement.binds:
            target = source.imports.get(name)
            if target is None:
                if any(name in other.binds for other in source.statements):
                    self.keep(source.name, name)
            elif target[1] is not None:
                if (target[0], target[1]) not in self.outside:
                    self.keep(target[0], target[1])
            else:
                attributes = statement.attributes(name)
                defined = {bound for other in self.source(target[0]).statements for bound in other.binds}
                for attribute in defined if attributes is None else attributes:
                    self.keep(target[0], attribute)
                    self.namespaces[target[0]].add(attribute)

    def keep_effects(self) -> None:
        """Statements such as `op.register_fake(...)`, once they speak of something that is kept."""
        before = -1
        while before != len(self.kept):
            before = len(self.kept)
            for source in list(self.sources.values()):
                own = {name for module, name in self.kept if module == source.name}
                for statement in source.statements:
                    is_text = isinstance(statement.node, ast.Expr) and isinstance(statement.node.value, ast.Constant)
                    if not statement.binds and not is_text and statement.uses & own:
                        self.keep_statement(source, statement)

    def final_names(self) -> dict[tuple[str, str], str]:
        """A name of one module stays; of several modules the last one's does, the others' get their module's name."""
        owners: dict[str, list[str]] = defaultdict(list)
        for module, name in self.kept:
            owners[name].append(module)
        order = list(self.sources)
        taken = {name for source in self.sources.values() for name in [*source.outside, *source.imports]}
        final = {}
        for name, modules in owners.items():
            last = max(modules, key=order.index)
            for module in modules:
                prefix = module.rsplit(".", 1)[-1]
                final[module, name] = name if module == last else f"{prefix}_{name.lstrip('_')}"
        wrong = [name for name, count in _counts(final.values()).items() if count > 1 or hasattr(builtins, name)]
        wrong += [
            new for (module, name), new in final.items() if new in taken and new not in self.sources[module].outside
            and not any(self.resolve(s, new) == (module, name) for s in self.sources if new in self.sources[s].imports)
        ]  # fmt: skip
        if wrong:
            raise RuntimeError(f"Names that mean several things in the joined file: {sorted(set(wrong))}.")
        return final


def _counts(names) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name in names:
        counts[name] += 1
    return counts


def _join(
    module: str,
    names: list[str],
    outside: dict[tuple[str, str], str] | None = None,
    epilogue: tuple[str, str, str] | None = None,
) -> str:
    """One self-contained file with the named classes of a module.

    Args:
        module (`str`): Module inside this package.
        names (`list[str]`): What is wanted of it.
        outside (`dict`, *optional*): (module, name) -> import statement for a name that stands in another file.
        epilogue (`tuple`, *optional*): (module, name, statement): a call of `name` at the end.
    """
    from . import __version__  # which is not there yet while the package is imported

    join = _Join(outside or {})
    join.source(module)
    for name in names:
        join.keep(module, name)
    if epilogue:
        join.keep(*epilogue[:2])
    join.keep_effects()
    final = join.final_names()

    imports: dict[str, str] = {}
    sections: list[str] = []
    used: list[str] = []
    for source in join.sources.values():
        kept = [statement for statement in source.statements if statement.kept]
        if not kept:
            continue
        used.append(source.path.relative_to(Path(__file__).parent).as_posix())
        renamed = {name: new for (owner, name), new in final.items() if owner == source.name and new != name}
        for name in sorted(set().union(*(statement.uses for statement in kept))):
            text = source.outside.get(name) or _outside_import(source, name, join.outside)
            if text and imports.setdefault(name, text) != text:  # two things of one name
                renamed[name] = f"{source.name.rsplit('.', 1)[-1]}_{name}"
                imports[renamed[name]] = f"{text.removesuffix(f' as {name}')} as {renamed[name]}"
        for local, (target, inner) in source.imports.items():
            place = join.resolve(target, inner) if inner and (target, inner) not in join.outside else None
            new = final.get(place) if place else None if inner else target.rsplit(".", 1)[-1]
            if new and new != local:
                renamed[local] = new
        text = "\n\n\n".join(_as_it_stands_here(statement) for statement in kept)
        for name, new in renamed.items():
            text = re.sub(rf"(?<![\w.]){name}\b(?!\.py\b)", new, text)
        section = [f"# ---- {used[-1]} ----", text]
        if attributes := join.namespaces.get(source.name):
            alias = source.name.rsplit(".", 1)[-1]
            pairs = [f"    {name}={final[join.resolve(source.name, name)]}," for name in sorted(attributes)]
            section.append("\n".join([f"{alias} = SimpleNamespace(", *pairs, ")"]))
        sections.append("\n\n\n".join(section))
    if join.namespaces:
        imports["SimpleNamespace"] = "from types import SimpleNamespace"
    find_spec = imports.pop("find_spec", None)
    if find_spec or any("importlib.import_module(" in section for section in sections):
        imports["importlib"] = "import importlib.util"
    header = _HEADER.format(version=__version__, sources=", ".join(used))
    ops = imports.pop("custom_op", None)
    if ops:
        imports |= {name: f"import {name}" for name in ("hashlib", "itertools", "torch")}
    lines = sorted(set(imports.values()), key=lambda line: (line.startswith("from"), line))
    body = "\n\n\n".join(sections)
    start = "\n".join(lines) + _FIRST_RUN + (_FIND_SPEC if find_spec else "")
    if ops:
        start += _CUSTOM_OP.format(op=re.findall(rf'"{PACKAGE}::(\w+)"', body)[0], package=PACKAGE)
    body = start + "\n\n" + body + _LATER_RUN
    if epilogue:
        body += f"\n\n{epilogue[2]}\n"
    ast.parse(body)
    return header + "\n" + body


def _outside_import(source: _Source, name: str, outside: dict[tuple[str, str], str]) -> str | None:
    target = source.imports.get(name)
    statement = outside.get((target[0], target[1])) if target and target[1] else None
    return statement.format(name) if statement else None


def _as_it_stands_here(statement: _Statement) -> str:
    """The text of a statement, but for its imports."""
    # A module that is left out is imported inside functions only; reaching that says so.
    text = re.sub(
        r"^( *)from \.[\w.]* import (.+?)(  #.*)?$",
        lambda found: (
            f'{found[1]}raise ImportError("This file does not hold {found[2].strip()}: pip install diffusers-terdit")'
        ),
        statement.text,
        flags=re.MULTILINE,
    )
    if not isinstance(statement.node, ast.If):
        return text
    # diffusers searches a file for import statements, and warns of what is not installed, optional or not.
    return re.sub(
        r"^( +)from (\w[\w.]*) import (\w+)(?: as (\w+))?$",
        lambda found: f'{found[1]}{found[4] or found[3]} = importlib.import_module("{found[2]}").{found[3]}',
        text,
        flags=re.MULTILINE,
    )

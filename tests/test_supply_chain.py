"""No code from data, few dependencies with floors and reasons, a lock of plain pins, and tokens that stay secret."""

import ast
import logging
import os
import re
import subprocess
import sys
import tomllib
import traceback
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import diffusers
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from diffusers_terdit import TerDiTPipeline, convert_original_checkpoint, training
from diffusers_terdit.cli import main
from diffusers_terdit.hub.push import push_saved


ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").rglob("*.py")])

# What sys.audit says in a process that does ordinary things. Code that is in no file may run where a module is being
# imported (namedtuple, dataclass) or a type hint is read; numba unpickles its own cache of compiled kernels, which
# lies where this package's bytecode does, or in NUMBA_CACHE_DIR.
AUDIT = """
import os, sys, sysconfig
events = []

def stack():
    frame, found = sys._getframe(2), []
    while frame is not None:
        found.append(frame.f_code.co_filename.replace(os.sep, "/"))
        frame = frame.f_back
    return found

def hook(event, arguments):
    if event == "exec":
        name, files = arguments[0].co_filename, stack()
        imported = any(file.startswith("<frozen importlib") for file in files)
        if not (os.path.isfile(name) or imported or files[0].endswith("/typing.py")):
            events.append((event, name, files[0]))
    elif event == "pickle.find_class":
        if not any(file.endswith("/numba/core/caching.py") for file in stack()):
            events.append((event, *arguments))
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system", "os.exec",
                   "os.posix_spawn", "os.fork", "urllib.Request"):
        events.append((event, str(arguments)))

sys.addaudithook(hook)
for name in ("datasets", "sklearn", "scipy", "pandas", "matplotlib", "gradio", "peft", "torchmetrics"):
    sys.modules[name] = None  # the base is enough
"""

NORMAL = """
sys.path.insert(0, sys.argv[1])
import numpy as np
import evaluate
import torch
from diffusers_terdit import TerDiTPipeline, cli

torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    pipe = TerDiTPipeline.from_pretrained("pipeline", dtype=dtype)
    pipe(["three"], num_inference_steps=1)
    pipe.save_pretrained("saved")
assert cli.main(["info", "saved"]) == 0
assert cli.main(["generate", "saved", "--labels", "three", "--num_inference_steps", "1", "--output", "a.png"]) == 0
np.savez("real.npz", np.zeros((8, 8, 8, 1), np.uint8))
flags = ["--num_images", "8", "--num_inference_steps", "1", "--reference", "real.npz", "--output_dir", "evaluation"]
evaluate.main(["--model", "digits", *flags])

folders = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")] + sys.argv[1:]
folders += [os.path.dirname(os.path.dirname(sys.modules["diffusers_terdit"].__file__))]
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
for file in filter(None, files):
    if os.path.isabs(file) and not any(os.path.realpath(file).startswith(os.path.realpath(f)) for f in folders):
        events.append(("import", file))
"""

HOSTILE = """
import pickle, socket
pickle.loads(b"cposix\\ngetcwd\\n.")
exec("1 + 1")
eval("2 + 2")
try:
    socket.create_connection(("127.0.0.1", 9), 0.1)
except OSError:
    pass
"""


def audit(code, folder, *arguments):
    """Lines of what the hook saw."""
    command = [sys.executable, "-c", f"{AUDIT}{code}\nprint('seen', *events, sep='\\n')", *map(str, arguments)]
    # not offline: nothing may be asked of a network that is there
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("seen\n")[-1].splitlines()


def test_ordinary_use_unpickles_nothing_runs_no_data_and_calls_nobody(tiny_pipeline, tmp_path):
    tiny_pipeline(vae=True, weight_format="packed").save_pretrained(tmp_path / "pipeline")
    assert audit(NORMAL, tmp_path, ROOT / "examples") == []


def test_the_audit_sees_what_it_looks_for(tmp_path):
    seen = [line for line in audit(HOSTILE, tmp_path) if "getaddrinfo" not in line]
    expected = [
        "('pickle.find_class', 'posix', 'getcwd'",
        "('exec', '<string>'",
        "('exec', '<string>'",
        "('socket.con",
    ]
    assert len(seen) == 4
    assert all(line.startswith(start) for line, start in zip(seen, expected, strict=True))


FORBIDDEN = {"eval", "exec", "__import__", "compile", "execfile"}
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "pickle"}
# What is used in spite of the rule, and why.
EXCEPTIONS = {
    ("src/diffusers_terdit/storage/weights.py", "import pickle"): "names torch's UnpicklingError",
    ("src/diffusers_terdit/evaluation/inception.py", "import pickle"): "names torch's UnpicklingError",
}


def name_of(node):
    """`torch.load` of a call of it."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def offences(source):
    """What a text has that could run data as code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Attribute) and name_of(node).startswith("pickle."):
            found += [name_of(node)] if not name_of(node).endswith("Error") else []
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func), {item.arg: item.value for item in node.keywords}
        true = {key for key, value in given.items() if isinstance(value, ast.Constant) and value.value is True}
        if name in FORBIDDEN or name.startswith(("os.system", "os.popen", "os.exec", "os.spawn", "torch.hub.")):
            found.append(name)
        if name == "torch.load" and "weights_only" not in true:
            found.append("torch.load without weights_only=True")
        if name.startswith("yaml.") and "load" in name and not name.startswith("yaml.safe_"):
            found.append(name)
        if name in ("np.load", "numpy.load") and "allow_pickle" in true:
            found.append("np.load with allow_pickle")
        found += [f"{key}=True" for key in ("shell", "trust_remote_code") if key in true]
    return found


def test_no_source_could_run_data_as_code():
    assert len(SOURCES) > 50
    found = {
        (path.relative_to(ROOT).as_posix(), what) for path in SOURCES for what in offences(path.read_text("utf-8"))
    }
    assert found == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)",
        "exec(x)",
        "__import__(x)",
        "import marshal",
        "from pickle import loads",
        "pickle.loads(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "yaml.load(x)",
        "yaml.unsafe_load(x)",
        "np.load(x, allow_pickle=True)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "A.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_search_finds(code):
    assert offences(code)


def requirements(extra=None):
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [item for item in map(Requirement, lines) if item.name != "diffusers-terdit"]


EVERY = [None, *PROJECT["optional-dependencies"]]


@pytest.mark.parametrize("extra", EVERY)
def test_every_dependency_has_a_floor_no_cap_and_a_reason(extra):
    comments = " ".join(line.strip("# ") for line in PYPROJECT.splitlines() if line.startswith("#"))
    for requirement in requirements(extra):
        assert [item.operator for item in requirement.specifier] == [">="], requirement
        assert requirement.url is None
        assert re.search(rf"(^|[.,]? ){re.escape(requirement.name)}(, [\w-]+)*: \w+", comments), requirement.name


def test_the_base_is_what_the_source_imports_and_extras_are_named_where_they_are_missing():
    """`transformers` is diffusers' own need: it loads no pipeline without."""
    base = {canonicalize_name(item.name) for item in requirements()}
    of_module = packages_distributions()
    extras = {canonicalize_name(r.name): e for e in ("train", "cpu", "lora", "triton") for r in requirements(e)}
    extras["llvmlite"] = "cpu"  # numba's own
    kernels = {"instructions.py", "integer.py", "lookup.py", "triton_kernels.py"}  # imported where they can run
    named = "".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    used = set()
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                modules = [node.module] if node.level == 0 else []
            else:
                modules = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            for top in {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"diffusers_terdit"}:
                name = canonicalize_name(of_module.get(top, [top])[0])
                used.add(name)
                if name not in base:
                    assert name in extras, f"{path}: {top}"
                    assert node not in tree.body or path.name in kernels, f"{path} imports {top} at the top"
                    assert name == "triton" or f"diffusers-terdit[{extras[name]}]" in named
    assert base - used == {"transformers"}


@pytest.mark.parametrize(
    ("module", "call"), [("sklearn", training.data.Digits), ("datasets", training.data.open_dataset)]
)
def test_a_missing_extra_says_what_to_install(monkeypatch, module, call):
    for name in (module, f"{module}.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"needs {module}: pip install 'diffusers-terdit\[train\]'"):
        call("anything")


class TestLock:
    """`requirements.lock`, which the Makefile installs from; torch and triton are pinned in the Makefile."""

    lines = [
        line for line in (ROOT / "requirements.lock").read_text("utf-8").splitlines() if line[:1] not in ("#", "")
    ]
    pins = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}
    made = dict(re.findall(r"\b(torch|triton)==([\d.]+)", (ROOT / "Makefile").read_text("utf-8")))

    def test_is_plain_pins_each_once(self):
        for line in self.lines:  # no URL, path, option or index, no range, no other version for some
            assert re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][\w.]*", line), line
        assert len(self.pins) == len(self.lines)

    def test_satisfies_the_floors(self):
        pins = self.pins | {name: Version(version) for name, version in self.made.items()}
        for requirement in (item for extra in EVERY for item in requirements(extra)):
            version = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: {version}"

    def test_covers_what_the_environment_resolves_and_nothing_else(self):
        seen, waiting = set(), [("diffusers-terdit", ("dev", "triton"))]
        while waiting:
            name, extras = waiting.pop()
            if (name, extras) in seen:
                continue
            seen.add((name, extras))
            try:
                lines = distribution(name).requires or []
            except ModuleNotFoundError:
                continue
            for item in map(Requirement, lines):
                if item.marker is None or any(item.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                    waiting.append((canonicalize_name(item.name), tuple(sorted(item.extras))))
        found = {name for name, _ in seen}
        # setuptools comes with torch and triton, as they ask for it
        assert found - self.pins.keys() <= {"diffusers-terdit", "torch", "triton", "setuptools"}


# Tokens and paths


@pytest.fixture
def loud():
    """Every logger at its lowest level."""
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_debug()
    diffusers.utils.logging.enable_propagation()
    levels = {name: logging.getLogger(name).level for name in (None, "huggingface_hub", "httpx", "httpcore")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    diffusers.utils.logging.disable_propagation()
    diffusers.utils.logging.set_verbosity(verbosity)


@pytest.fixture
def sent(fake_hub, monkeypatch):
    """What the Hub is sent besides headers: addresses and bodies."""
    requests, answer = [], fake_hub._answer

    def record(method, path, headers, body):
        requests.append(f"{method} {path}".encode() + body)
        return answer(method, path, headers, body)

    monkeypatch.setattr(fake_hub, "_answer", record)
    return requests


def words_of(error):
    """Everything that an exception could print, also with its causes."""
    return "".join(traceback.format_exception(error, chain=True)) + repr(error)


@pytest.mark.parametrize("source", ["argument", "environment", "login"])
def test_a_token_is_in_no_log_message_file_or_request_body(
    fake_hub, sent, loud, tiny_pipeline, tmp_path, monkeypatch, capfd, caplog, source
):
    monkeypatch.chdir(tmp_path)
    given = {}
    if source == "argument":
        given = {"token": fake_hub.token}
    elif source == "environment":
        monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    else:
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / "token").write_text(fake_hub.token)
    pipe = tiny_pipeline(vae=True, weight_format="packed")
    pipe.push_to_hub("user/mine", private=True, **given)
    loaded = TerDiTPipeline.from_pretrained("user/mine", **given)
    loaded.save_pretrained("saved", push_to_hub=True, repo_id="user/again", **given)
    training.export.save_pipeline(pipe, "trained")
    push_saved(pipe, "trained", training.export.card_options(pipe, {"steps": "1"}), "user/trained", **given)
    with pytest.raises((OSError, ValueError)) as missing:
        convert_original_checkpoint("user/mine", **given)
    if source != "argument":
        assert main(["push", "saved", "user/by-command"]) == 0
        assert main(["push", "saved", "somebody-else/there", "--license", "mit"]) in (0, 1)
    assert len(sent) > 20
    places = [*sent, words_of(missing.value).encode(), repr(loaded).encode(), str(loaded.config).encode()]
    places += [caplog.text.encode(), "".join(capfd.readouterr()).encode()]
    places += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "hf"]
    for repo in fake_hub.repos.values():
        places += [data for title, files in repo.commits.values() for data in (title.encode(), *files.values())]
    assert any(b"DEBUG" in place for place in places)
    assert not [place[:200] for place in places if fake_hub.token.encode() in place]


@pytest.mark.parametrize("work", ["load", "push", "convert"])
def test_a_token_that_is_refused_is_in_no_message(fake_hub, loud, tiny_pipeline, tmp_path, caplog, capfd, work):
    fake_hub.add_files("user/secret", {}, private=True)
    do = {"load": TerDiTPipeline.from_pretrained, "push": tiny_pipeline().push_to_hub}
    do["convert"] = convert_original_checkpoint
    for token in (fake_hub.stranger_token, "hf_expired0123456789"):
        with pytest.raises((OSError, ValueError)) as error:
            do[work]("user/secret", token=token)
        assert token not in words_of(error.value) + caplog.text + "".join(capfd.readouterr())


def test_no_path_of_this_machine_is_saved_or_pushed(fake_hub, tiny_pipeline, tmp_path, monkeypatch):
    home = tmp_path / "home" / "somebody"
    tiny_pipeline(vae=True, weight_format="packed").save_pretrained(home / "models" / "first")
    pipe = TerDiTPipeline.from_pretrained(home / "models" / "first")
    places = {}
    pipe.save_pretrained(tmp_path / "whole")
    pipe.transformer.save_pretrained(tmp_path / "model")
    training.export.save_pipeline(pipe, tmp_path / "trained")
    options = training.export.card_options(pipe, {"steps": "1"})
    training.export.save_card(pipe, tmp_path / "trained", "trained", options)
    optimizer = torch.optim.AdamW(pipe.transformer.parameters())
    training.checkpointing.save(tmp_path / "checkpoint-1", pipe.transformer, pipe.transformer, optimizer, {"step": 1})
    for name in ("whole", "model", "trained", "checkpoint-1"):
        places |= {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
    monkeypatch.setenv("HF_TOKEN", fake_hub.token)
    # a folder that was saved by something else, with paths in it
    for name in ("vae", "transformer"):
        config = home / "models" / "first" / name / "config.json"
        config.write_text(config.read_text().replace("{", f'{{\n  "_name_or_path": "{home}/vae",', 1))
    assert main(["push", str(home / "models" / "first"), "user/by-command"]) == 0
    pipe.push_to_hub("user/pushed")
    for name, repo in fake_hub.repos.items():
        places |= {f"{name}/{path}": data for path, data in repo.files().items()}
    assert len(places) > 30
    for name, data in places.items():
        assert b"somebody" not in data, name
        assert str(tmp_path).encode() not in data, name
        assert b"_name_or_path" not in data, name

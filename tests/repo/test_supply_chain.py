"""Data never runs as code, nothing is asked of a network unasked, and every dependency is declared, with a reason.

To satisfy it: read files with safetensors, JSON or `torch.load(..., weights_only=True)`; give a new dependency a floor
and a line `name: reason.` in pyproject.toml, and a pin in requirements.lock.
"""

import ast
import re
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]

# What sys.audit says in a process that does ordinary things. Code that is in no file may run where a module is being
# imported (namedtuple, dataclass) or a type hint is read.
AUDIT = """
import os, runpy, sys, sysconfig
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
    elif event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen",
                   "os.system", "os.exec", "os.posix_spawn", "os.fork", "urllib.Request"):
        events.append((event, str(arguments)))

def program(path, *arguments):
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code

sys.addaudithook(hook)
for name in ("numba", "datasets", "sklearn", "scipy", "pandas", "matplotlib", "gradio", "peft", "torchmetrics"):
    sys.modules[name] = None  # the base is enough
"""

NORMAL = """
import numpy as np
import torch
import shutil
import diffusers_terdit
from diffusers_terdit import TerDiTPipeline
from diffusers_terdit.training.data import ImageSamples

evaluate, dependencies = sys.argv[1:]
here = os.path.dirname(os.path.dirname(diffusers_terdit.__file__))
assert here == sysconfig.get_path("purelib"), here  # the wheel's
torch.set_num_threads(1)
for dtype in (torch.float32, torch.bfloat16):
    pipe = TerDiTPipeline.from_pretrained("pipeline", dtype=dtype)
    pipe(["three"], num_inference_steps=1)
    pipe.save_pretrained("saved")
terdit = os.path.join(sysconfig.get_path("scripts"), "terdit")
program(terdit, "info", "saved")
program(terdit, "generate", "saved", "--labels", "three", "--num_inference_steps", "1", "--output", "a.png")
np.savez("real.npz", np.zeros((8, 8, 8, 1), np.uint8))
program(evaluate, "--model", "digits", "--num_images", "8", "--num_inference_steps", "1", "--reference", "real.npz",
        "--output_dir", "evaluation")
os.makedirs("images/cat")
with open("images/cat/photo.jpg", "w") as photo:  # for PostScript, whatever its name, Pillow runs Ghostscript
    photo.write("%!PS-Adobe-3.0 EPSF-3.0\\n%%BoundingBox: 0 0 8 8\\n%%EndComments\\n%%EOF\\n")
shutil.copy("a.png", "images/cat")
images = ImageSamples.from_folder("images", resolution=8)
assert len(images) == 2 and torch.equal(images[1][0], images[0][0])  # the next one is taken

folders = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")] + [dependencies]
for file in filter(None, [getattr(module, "__file__", None) for module in list(sys.modules.values())]):
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
import PIL.Image
open("photo.jpg", "w").write("%!PS-Adobe-3.0 EPSF-3.0\\n%%BoundingBox: 0 0 8 8\\n%%EndComments\\n%%EOF\\n")
try:
    PIL.Image.open("photo.jpg").load()
except OSError:
    pass
"""


def audit(run_wheel, code, folder, *arguments):
    """Lines of what the hook saw."""
    done = run_wheel(folder, "-c", f"{AUDIT}{code}\nprint('seen', *events, sep='\\n')", *arguments)
    return done.split("seen\n")[-1].splitlines()


def test_the_wheel_works_and_unpickles_nothing_runs_no_data_and_calls_nobody(run_wheel, tiny_pipeline, tmp_path):
    tiny_pipeline(vae=True, weight_format="packed").save_pretrained(tmp_path / "pipeline")
    dependencies = Path(pytest.__file__).parents[1]
    assert audit(run_wheel, NORMAL, tmp_path, ROOT / "examples" / "evaluate.py", dependencies) == []
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_audit_sees_what_it_looks_for(run_wheel, tmp_path):
    seen = [line.split("'")[1] for line in audit(run_wheel, HOSTILE, tmp_path) if "getaddrinfo" not in line]
    assert seen == ["pickle.find_class", "exec", "exec", "socket.connect", "subprocess.Popen"]


CALLS = r"eval|exec|compile|__import__|os\.(system|popen|exec\w*|spawn\w*)|torch\.hub\..+|yaml\.(?!safe_)\w*load\w*"
CALLS += r"|pickle\..+"
MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "pickle"}
KEYWORDS = {"shell=True", "trust_remote_code=True", "allow_pickle=True"}
# torch's UnpicklingError, to catch it; and hostile files, to be refused
EXCEPTIONS = {
    ("src/diffusers_terdit/storage/weights.py", "import pickle"),
    ("src/diffusers_terdit/evaluation/inception.py", "import pickle"),
    ("examples/reliability/files.py", "import pickle"),
    ("examples/reliability/files.py", "pickle.dumps"),
}


def offences(source):
    """What a text has that could run data as code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            yield from (f"import {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords}
            if re.fullmatch(CALLS, name) or (name == "torch.load" and "weights_only=True" not in given):
                yield name
            yield from given & KEYWORDS


def test_no_source_could_run_data_as_code():
    files = [path for folder in ("src", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {(path, what) for path in files for what in offences(path.read_text("utf-8"))}
    wrong = [(path.relative_to(ROOT), what) for path, what in found - {(ROOT / p, w) for p, w in EXCEPTIONS}]
    assert not wrong, f"another way, or a line in EXCEPTIONS with its reason: {wrong}"


@pytest.mark.parametrize(
    "code",
    [
        "eval(x)", "exec(x)", "__import__(x)", "import marshal", "from pickle import loads", "pickle.loads(x)",
        "torch.load(x)", "torch.load(x, weights_only=False)", "yaml.load(x)", "yaml.unsafe_load(x)",
        "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "os.system(x)",
        "A.from_pretrained(x, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_search_finds(code):
    assert list(offences(code))


EVERY = [None, *PROJECT["optional-dependencies"]]


def requirements(extra=None):
    lines = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    return [item for item in map(Requirement, lines) if item.name != "diffusers-terdit"]


def test_every_dependency_has_a_floor_no_cap_and_a_reason():
    comments = " ".join(line.strip("# ") for line in PYPROJECT.splitlines() if line.startswith("#"))
    for item in (item for extra in EVERY for item in requirements(extra)):
        assert [part.operator for part in item.specifier] == [">="], f"write {item.name}>=... in pyproject.toml"
        reason = re.search(rf"(^|[.,]? ){re.escape(item.name)}(, [\w-]+)*: \w+", comments)
        assert reason, f"write `# {item.name}: what it is for.` above it in pyproject.toml"


def test_the_base_is_what_the_source_imports_and_extras_are_named_where_they_are_missing():
    base = {canonicalize_name(item.name) for item in requirements()}
    of_module = packages_distributions()
    optional = ("train", "cpu", "lora", "triton", "export")
    extras = {canonicalize_name(r.name): extra for extra in optional for r in requirements(extra)}
    extras["llvmlite"] = "cpu"  # numba's own
    kernels = {"exact_amx.py", "lookup.py", "pack.py", "scale_gradient.py", "triton_kernels.py"}
    kernels |= {"instructions.py", "integer.py", "integer_amx.py", "integer_lookup.py"}
    texts = {path: path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py")}
    used = set()
    for path, text in texts.items():
        tree = ast.parse(text)
        for node in (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))):
            relative = isinstance(node, ast.ImportFrom) and node.level
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]
            for top in set() if relative else {module.split(".")[0] for module in modules}:
                name = canonicalize_name(of_module.get(top, [top])[0])
                if top in sys.stdlib_module_names or top == "diffusers_terdit":
                    continue
                used.add(name)
                if name not in base:
                    assert name in extras, f"{path} imports {top}: name its package in pyproject.toml"
                    assert node not in tree.body or path.name in kernels, f"{path}: import {top} where it is used"
                    generic = extras[name] == "train" and "pip install {package}" in text
                    named = generic or any(f"pip install {name}" in text for text in texts.values())
                    assert named or name in ("triton", "llvmlite"), f"say `pip install {name}` where it is missing"
    assert base <= used, "a dependency that nothing imports: take it out of pyproject.toml"


class TestLock:
    """`requirements.lock`, which the Makefile installs from; torch and triton are pinned in the Makefile."""

    lines = re.findall(r"^[^#\n].*", (ROOT / "requirements.lock").read_text("utf-8"), re.MULTILINE)
    made = dict(re.findall(r"\b(torch|triton)==([\d.]+)", (ROOT / "Makefile").read_text("utf-8")))

    def test_is_plain_pins_that_satisfy_the_floors(self):
        for line in self.lines:  # no URL, path, option or index, no range, no other version for some
            assert re.fullmatch(r"[A-Za-z0-9][\w.-]*==[0-9][\w.]*", line), f"write name==version, not {line}"
        pins = dict(line.split("==") for line in self.lines) | self.made
        pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
        for item in (item for extra in EVERY for item in requirements(extra)):
            pin = pins[canonicalize_name(item.name)]
            assert item.specifier.contains(pin), f"{item} in pyproject.toml, but requirements.lock pins {pin}"

    def test_covers_what_the_environment_resolves(self):
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
        pinned = {canonicalize_name(line.split("==")[0]) for line in self.lines}
        # setuptools comes with torch and triton, as they ask for it
        left = {name for name, _ in seen} - pinned - {"diffusers-terdit", "torch", "triton", "setuptools"}
        assert not left, f"add a line name==version to requirements.lock for {left}"

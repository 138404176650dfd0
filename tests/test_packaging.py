"""The wheel holds the package and nothing else, and works where there is no repository."""

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import diffusers_terdit


ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "diffusers_terdit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_there_is_one_version():
    assert PROJECT["version"] == diffusers_terdit.__version__
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, by ending."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return {path.suffix: path for path in folder.iterdir()}


def test_the_wheel_is_pure_and_holds_the_package_alone(distributions):
    with zipfile.ZipFile(distributions[".whl"]) as wheel:
        names = set(wheel.namelist())
        info = f"diffusers_terdit-{PROJECT['version']}.dist-info"
        tags = email.message_from_bytes(wheel.read(f"{info}/WHEEL"))
    assert (tags["Root-Is-Purelib"], tags["Tag"]) == ("true", "py3-none-any")
    source = {path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in names if not name.startswith(info)} == {
        path.relative_to(SOURCE.parent).as_posix() for path in source
    }
    assert {path.suffix for path in source} == {".py", ".json", ".md", ".safetensors", ".typed"}
    for name in ("py.typed", "conversion/imagenet1k_labels.json", "evaluation/digits_classifier.safetensors"):
        assert f"diffusers_terdit/{name}" in names
    for checkpoint in ("digits", "emoji"):
        for name in ("model_index.json", "transformer/diffusion_pytorch_model.safetensors", "README.md"):
            assert f"diffusers_terdit/checkpoints/{checkpoint}/{name}" in names
    assert distributions[".whl"].stat().st_size < 3e6
    assert f"{info}/licenses/LICENSE" in names


def test_metadata_says_what_pyproject_says(distributions):
    with zipfile.ZipFile(distributions[".whl"]) as wheel:
        info = f"diffusers_terdit-{PROJECT['version']}.dist-info"
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert {"train", "app", "lora", "cpu", "triton", "results"} <= set(metadata.get_all("Provides-Extra"))
    # Plain requirements only: a registry refuses direct references, and caps would hold the host's releases back.
    requirements = metadata.get_all("Requires-Dist")
    assert not [line for line in requirements if "@" in line or "<" in line]
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert "terdit = diffusers_terdit.cli:main" in scripts
    assert metadata.get_payload().startswith("# diffusers-terdit")


def test_the_sdist_holds_what_a_wheel_is_made_of(distributions):
    with tarfile.open(distributions[".gz"]) as sdist:
        names = [Path(*Path(name).parts[1:]).as_posix() for name in sdist.getnames()]
    assert "src/diffusers_terdit/py.typed" in names
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO", ".gitignore"}
    assert {name.split("/")[0] for name in names} == {"src", *files}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".nbc", ".nbi", ".pyc"))]


def test_both_can_be_uploaded(distributions):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *distributions.values()]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("PASSED") == 2


def test_the_wheel_works_away_from_the_repository(distributions, tmp_path):
    venv.create(tmp_path / "env", symlinks=True)
    scripts = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    install = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*install, "--quiet", distributions[".whl"]], check=True, timeout=120)
    # What the package needs comes from this environment: an entry of sys.path after the new one's own folder.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*command) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    find = "import importlib.util as u; print(u.find_spec('diffusers_terdit').origin)"
    assert Path(run(scripts / "python", "-c", find)).is_relative_to(site)
    said = run(scripts / "terdit", "generate", "emoji", "--labels", "ghost", "--num_inference_steps", "2")
    assert "1 images of 32 x 32" in said
    assert (tmp_path / "terdit.png").stat().st_size > 1000

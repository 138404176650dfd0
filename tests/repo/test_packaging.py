"""What is published is the package and nothing else, under one version; test_supply_chain.py runs the wheel.

To satisfy it: a file that is not to be published stays out of src/, and a release changes the version in every place
that the first test reads.
"""

import email
import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import diffusers_terdit
from diffusers_terdit import cli


ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "diffusers_terdit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PROGRAMS = {f"{module}.py" for module, _ in cli.PROGRAMS.values()}


def test_there_is_one_version():
    assert PROJECT["version"] == diffusers_terdit.__version__, "change src/diffusers_terdit/__init__.py, too"
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_the_wheel_is_pure_and_holds_the_package_alone(distributions):
    info = f"diffusers_terdit-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(distributions[".whl"]) as wheel:
        names = set(wheel.namelist())
        tags = email.message_from_bytes(wheel.read(f"{info}/WHEEL"))
        metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
        scripts = wheel.read(f"{info}/entry_points.txt").decode()
    source = {path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    source.add(SOURCE.parent / "diffusers_terdit_command.py")
    differs = {name for name in names if not name.startswith(info)} ^ {
        *(path.relative_to(SOURCE.parent).as_posix() for path in source),
        *(f"diffusers_terdit/programs/{name}" for name in PROGRAMS),
    }
    assert not differs, f"in src/ or in the wheel, not in both; see [tool.hatch] in pyproject.toml: {differs}"
    assert f"{info}/licenses/LICENSE" in names
    assert (tags["Root-Is-Purelib"], tags["Tag"]) == ("true", "py3-none-any")
    assert "terdit = diffusers_terdit_command:main" in scripts
    relative = re.findall(r"\]\((?!https?:|#)[^)]*\)", metadata.get_payload())
    assert not relative, f"a page of a registry leads nowhere with {relative}"
    refused = [line for line in metadata.get_all("Requires-Dist") if "@" in line]
    assert not refused, f"a registry refuses direct references: name a release instead of {refused}"
    assert distributions[".whl"].stat().st_size < 3e6, "a checkpoint this large belongs on the Hub"


def test_the_sdist_holds_what_a_wheel_is_made_of(distributions):
    with tarfile.open(distributions[".gz"]) as sdist:
        names = [Path(*Path(name).parts[1:]).as_posix() for name in sdist.getnames()]
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO", ".gitignore"}
    assert {name.split("/")[0] for name in names} == {"src", "examples", *files}, (
        "see [tool.hatch.build.targets.sdist]"
    )
    assert {Path(name).name for name in names if name.startswith("examples/")} == PROGRAMS
    assert not [name for name in names if name.endswith((".nbc", ".nbi", ".pyc"))]


def test_a_wheel_of_the_sdist_is_the_same(distributions, tmp_path):
    with tarfile.open(distributions[".gz"]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    folder = next(tmp_path.iterdir())
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel"], cwd=folder, check=True, timeout=120)
    with zipfile.ZipFile(next((folder / "dist").iterdir())) as again, zipfile.ZipFile(distributions[".whl"]) as wheel:
        assert {item.filename: item.CRC for item in again.filelist} == {i.filename: i.CRC for i in wheel.filelist}


class TestPrograms:
    @pytest.mark.parametrize("command", cli.PROGRAMS)
    def test_each_is_started_from_the_wheel(self, run_wheel, tmp_path, command):
        if command == "app":
            pytest.importorskip("gradio")
        command_line = "import sys; from diffusers_terdit.cli import main; sys.exit(main(sys.argv[1:]))"
        assert f"usage: terdit {command} " in run_wheel(tmp_path, "-c", command_line, command, "--help")

    def test_a_module_of_the_wheel_trains(self, run_wheel, tmp_path):
        module = "diffusers_terdit.programs.train_terdit"
        options = ["--max_train_steps", 2, "--num_inference_steps", 1, "--num_validation_images", 1]
        run_wheel(tmp_path, "-m", module, "--demo", "--output_dir", tmp_path / "out", *options)
        assert (tmp_path / "out" / "model_index.json").is_file()

    def test_a_checkout_starts_the_examples(self):
        for module, _ in cli.PROGRAMS.values():
            if module != "app":
                path = Path(importlib.import_module(f"diffusers_terdit.programs.{module}").__file__)
                assert path == ROOT / "examples" / f"{module}.py"

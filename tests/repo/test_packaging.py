"""What is published is the package and nothing else, under one version; test_supply_chain.py runs the wheel.

To satisfy it: a file that is not to be published stays out of src/, and a release changes the version in every place
that the first test reads.
"""

import email
import tarfile
import tomllib
import zipfile
from pathlib import Path

import diffusers_terdit


ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "diffusers_terdit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


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
        path.relative_to(SOURCE.parent).as_posix() for path in source
    }
    assert not differs, f"in src/ or in the wheel, not in both; see [tool.hatch] in pyproject.toml: {differs}"
    assert f"{info}/licenses/LICENSE" in names
    assert (tags["Root-Is-Purelib"], tags["Tag"]) == ("true", "py3-none-any")
    assert "terdit = diffusers_terdit_command:main" in scripts
    refused = [line for line in metadata.get_all("Requires-Dist") if "@" in line]
    assert not refused, f"a registry refuses direct references: name a release instead of {refused}"
    assert distributions[".whl"].stat().st_size < 3e6, "a checkpoint this large belongs on the Hub"


def test_the_sdist_holds_what_a_wheel_is_made_of(distributions):
    with tarfile.open(distributions[".gz"]) as sdist:
        names = [Path(*Path(name).parts[1:]).as_posix() for name in sdist.getnames()]
    files = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "PKG-INFO", ".gitignore"}
    assert {name.split("/")[0] for name in names} == {"src", *files}, "see [tool.hatch.build.targets.sdist]"
    assert not [name for name in names if name.endswith((".nbc", ".nbi", ".pyc"))]

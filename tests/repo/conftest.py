"""The distributions of this checkout, and an environment in which the wheel is installed."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def distributions(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, by ending."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="session")
def run_wheel(distributions, tmp_path_factory):
    """`run_wheel(folder, *arguments)`: what Python prints where the wheel is installed and the repository is not.

    What the package depends on comes from the environment of the tests. No variable of Python or the Hub is passed on.
    """
    home = tmp_path_factory.mktemp("wheel") / "env"
    venv.create(home, symlinks=True)
    python = home / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, distributions[".whl"]], check=True, timeout=120)
    # An entry of sys.path after the new environment's own folder
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(folder, *arguments):
        env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_", "HF_"))}
        env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf")}
        command = [str(python), *map(str, arguments)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run

"""The patch of docs/upstream.md applies to the installed diffusers, which then loads ternary models by itself.

To satisfy it: write the patch anew for the diffusers that is installed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import diffusers_terdit
from diffusers_terdit import TernaryConfig
from tiny_flux2 import tiny_flux2_pipeline


PAGE = Path(__file__).parents[2] / "docs" / "upstream.md"
SOURCE, PAGES = re.findall(r"^```diff\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
LOAD = """
import sys, diffusers, torch
transformer = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1]).transformer
torch.save(transformer.state_dict(), f"{sys.argv[1]}/loaded.pt")
print(diffusers.__file__, type(transformer.transformer_blocks[0].attn.to_q))
"""
FAIL = """
import sys
from diffusers import Flux2Transformer2DModel
from diffusers.utils import import_utils
for change in ({"available": False}, {"available": True, "version": "0.0.9"}):
    for name, value in change.items():
        setattr(import_utils, f"_diffusers_terdit_{name}", value)
    try:
        Flux2Transformer2DModel.from_pretrained(f"{sys.argv[1]}/transformer")
    except ImportError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_flux2_pipeline()
    TernaryConfig(scale_granularity=16).quantize(pipe.transformer)
    return pipe


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


def apply(patch, folder, *arguments):
    """Apply a patch in a folder that is no part of a repository; what git prints."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(["git", "apply", *arguments, "-"], input=patch, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A folder with a patched copy of the installed diffusers."""
    folder = tmp_path_factory.mktemp("patched")
    source = Path(diffusers.__file__).parent
    shutil.copytree(source, folder / "src" / "diffusers", ignore=shutil.ignore_patterns("__pycache__"))
    apply(SOURCE, folder)
    return folder / "src"


def run(code, folder, patched):
    """What a new process prints that finds the patched diffusers first, and this package."""
    paths = (patched, Path(diffusers_terdit.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-c", code, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_saved_pipeline_loads_from_its_config_json_alone(pipe, saved, patched):
    printed = run(LOAD, saved, patched)
    assert printed.startswith(str(patched))
    assert "diffusers_terdit.layers.TernaryLinear" in printed
    loaded = torch.load(saved / "loaded.pt")
    assert all(torch.equal(value, loaded[name]) for name, value in pipe.transformer.state_dict().items())


def test_without_this_package_or_with_an_old_one_the_error_says_what_to_install(saved, patched):
    needs = "A model with ternary weights requires diffusers-terdit >= 0.1.0: `pip install -U diffusers-terdit`"
    assert run(FAIL, saved, patched).splitlines() == [needs, needs]


def test_the_patch_of_the_pages_is_whole(tmp_path):
    assert [line.split() for line in apply(PAGES, tmp_path, "--numstat").splitlines()] == [
        ["4", "0", "docs/source/en/community_projects.md"],
        ["1", "0", "docs/source/en/quantization/overview.md"],
    ]

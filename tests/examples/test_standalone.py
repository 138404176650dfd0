"""What a user starts stands alone: it imports the standard library, this package and declared dependencies."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
# Installed under other names, or with a dependency that is declared.
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "huggingface-hub": "huggingface_hub"}
WITH_OTHERS = {"tokenizers", "tqdm"}  # transformers, huggingface-hub


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in ("train", "lora", "app"))]
    names = {re.match(r"[\w-]+", requirement)[0] for requirements in lists for requirement in requirements}
    return {MODULES.get(name, name) for name in names} | WITH_OTHERS | {"diffusers_terdit"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_no_local_file(script):
    imported = set()
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names <= declared()


def test_the_readme_lists_every_script():
    text = (ROOT / "examples" / "README.md").read_text("utf-8")
    programs = {f"examples/{path.name}" for path in SCRIPTS}
    for folder in ("experiments", "reliability"):
        paths = (ROOT / "examples" / folder).glob("*.py")
        programs |= {f"examples/{folder}/{path.name}" for path in paths if "main(" in path.read_text("utf-8")}
    programs.discard("examples/experiments/common.py")
    assert programs <= set(re.findall(r"examples/[\w/]+\.py", text))

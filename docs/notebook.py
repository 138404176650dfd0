"""Write tutorial.ipynb from tutorial.md, cell by cell, and run it, so that it shows its outputs.

    pip install nbclient ipykernel
    python docs/notebook.py

A test holds the cells equal to the page.
"""

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory


PAGE = Path(__file__).with_name("tutorial.md")
# Code blocks of the page, each with its language.
CODE = re.compile(r"^```(python|bash)\n(.*?)\n```$", re.MULTILINE | re.DOTALL)


def notebook(page: str) -> str:
    """A page as the JSON of a notebook without outputs: text, and its Python and shell blocks as cells."""
    parts = CODE.split(page.replace("\\\n", ""))  # text, language, code, text, ...
    cells = []
    for i, part in enumerate(parts):
        if i % 3 == 1 or not part.strip():
            continue
        if i % 3 == 2 and parts[i - 1] == "bash":
            # The page is read in the repository, the notebook runs in docs/.
            part = re.sub(r'^pip install "\.', '%pip install --quiet "..', part, flags=re.MULTILINE)
            part = re.sub(r"^(?!%)", "!", part, flags=re.MULTILINE)
        code = {"execution_count": None, "outputs": []} if i % 3 else {}
        lines = part.strip().splitlines(keepends=True)
        kind = "code" if i % 3 else "markdown"
        metadata = {"tags": ["skip-execution"]} if lines[0].startswith("%pip") else {}
        cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": metadata, **code, "source": lines})
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def run(text: str) -> str:
    """Run a notebook in a new kernel, and return it with what its cells show, but for progress bars and warnings."""
    import nbformat
    from nbclient import NotebookClient

    found = nbformat.reads(text, as_version=4)
    with TemporaryDirectory() as folder:
        NotebookClient(found, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    content = json.loads(text)
    for cell, executed in zip(content["cells"], found.cells, strict=True):
        if cell["cell_type"] == "code":
            shown = [output for output in executed.outputs if output.get("name") != "stderr"]
            for output in shown:
                output.get("data", {}).pop("image/jpeg", None)  # it is there as PNG
            cell |= {"execution_count": executed.execution_count, "outputs": shown}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.with_suffix(".ipynb").write_text(run(notebook(PAGE.read_text("utf-8"))), "utf-8")

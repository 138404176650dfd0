"""Write tutorial.ipynb from tutorial.md, cell by cell: `python docs/notebook.py`. A test holds them equal."""

import json
import re
from pathlib import Path


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
        cells.append({"cell_type": kind, "id": f"cell-{len(cells)}", "metadata": {}, **code, "source": lines})
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": cells, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PAGE.with_suffix(".ipynb").write_text(notebook(PAGE.read_text("utf-8")), "utf-8")

"""The Python in the documents runs."""

import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PAGES = sorted(
    page for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")] if "```python" in page.read_text("utf-8")
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    namespace = {}
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!http|#|mailto:)([^)#]+)", page.read_text("utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_readme_names_every_command_and_short_enough_to_read():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert all(command in readme for command in ("make demo", "make test", "terdit generate", "terdit convert"))
    assert len(readme.splitlines()) < 150

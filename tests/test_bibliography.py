"""docs/bibliography.md holds every paper that is named anywhere, once."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent


def papers(text):
    return re.findall(r"arxiv\.org/(?:abs|pdf|html)/(\d{4}\.\d{4,5})", text)


def test_every_paper_that_is_named_stands_in_the_bibliography():
    listed = papers((ROOT / "docs" / "bibliography.md").read_text("utf-8"))
    assert len(listed) == len(set(listed))
    files = [ROOT / "README.md"]
    for folder in ("docs", "src", "examples"):
        files += [path for suffix in ("md", "py") for path in (ROOT / folder).rglob(f"*.{suffix}")]
    named = {(paper, path.name) for path in files for paper in papers(path.read_text("utf-8"))}
    assert sorted(item for item in named if item[0] not in listed) == []


def test_the_link_of_a_paper_is_that_of_its_number():
    text = (ROOT / "docs" / "bibliography.md").read_text("utf-8")
    links = re.findall(r"\[arXiv ([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)", text)
    assert len(links) == text.count("arXiv ")
    assert all(number == target for number, target in links)

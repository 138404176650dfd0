"""The Python in the documents runs, their commands exist with these flags, and the site builds."""

import argparse
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import diffusers_terdit
from diffusers_terdit import cli, evaluation, losses, training


ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Read on their own. Language: mark in the line above, text
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
# Python that nothing here runs. A new one has to be added to these numbers, so that none slips through.
MARKED = {"needs a GPU": 1, "needs the Hub": 2}
RUN_ELSEWHERE = {"hub.md": (4, "hub/test_loading.py")}
# Programs of others in the commands, which are not checked.
FOREIGN = {"npm": 1, "tar": 1, "train_autoencoderkl.py": 1}


# What makes a page's snippets short enough for a test: text, and what stands in its place there.
SHORTER = {"tutorial.md": ("steps = 1000", "steps = 4")}


def run_snippets(page: Path, long: str = "", short: str = "") -> dict:
    """Run the Python of a page, one block after the other; its names."""
    snippets, names = [text for _, text in blocks(page, "python")], {}
    if long:
        assert sum(snippet.count(long) for snippet in snippets) == 1
    for snippet in snippets:
        exec(compile(snippet.replace(long, short) if long else snippet, str(page), "exec"), names)
    return names


def blocks(page: Path, *languages: str) -> list[tuple[str | None, str]]:
    """(mark, text) of the fenced blocks of a page."""
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [(block["mark"], block["text"]) for block in found if block["language"] in languages]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_snippets_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_snippets(page, *SHORTER.get(page.name, ("", "")))


@pytest.mark.slow
def test_the_tutorial_trains_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_snippets(DOCS / "tutorial.md")
    names["training"].export.image_grid(names["pictures"], 10).save("tutorial-digits.png")
    assert (names["read"].reshape(4, 10) == names["torch"].arange(10)).float().mean() >= 0.9


def test_the_notebook_is_the_tutorial():
    # Its code cells are the snippets that run above; nothing in it was run, so it holds no outputs.
    written = runpy.run_path(str(DOCS / "notebook.py"))["notebook"]((DOCS / "tutorial.md").read_text("utf-8"))
    assert (DOCS / "tutorial.ipynb").read_text("utf-8") == written, "run `python docs/notebook.py`"
    cells = json.loads(written)["cells"]
    code = ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]
    assert code[0].startswith("%pip install")
    assert [text for text in code if text[0] not in "%!"] == [t for _, t in blocks(DOCS / "tutorial.md", "python")]


def test_python_that_is_not_run_is_marked_and_counted():
    marks = Counter()
    for page in PAGES:
        found = blocks(page, "py")
        count, test = RUN_ELSEWHERE.get(page.name, (0, None))
        if test:
            assert len(found) == count
            assert f'"{page.name}"' in (ROOT / "tests" / test).read_text("utf-8")
            continue
        for mark, text in found:
            compile(text, str(page), "exec")
            marks[mark] += 1
    assert marks == MARKED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_of_a_kind_that_is_checked(page):
    text = page.read_text("utf-8")
    kinds = [block["language"] for block in BLOCK.finditer(text)]
    assert set(kinds) <= {"python", "py", "bash", "console", "bibtex", ""}
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(kinds)  # none is left open
    assert set(re.findall(r"^[ >]+```(.+)", text, re.MULTILINE)) <= {"html"}  # indented: not found by `blocks`


# Commands: each is parsed by the program's own parser.


class Parsed(Exception):
    """Leaves a script once its arguments are read."""


@cache
def script_parser(script: str):
    """What reads the arguments of a script: its `parse_args`, or the parser that its `main` builds."""
    path = ROOT / script
    assert path.is_file(), f"{script} does not exist"
    main = "def parse_args(" not in path.read_text("utf-8")
    found = []

    def capture(parser, *args):
        found.append(parser)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        if not main:
            return runpy.run_path(str(path))["parse_args"]
        patch.setattr(sys, "argv", [script])
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")
    return found[0].parse_args


@cache
def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]


def check_command(words: list[str]) -> str | None:
    """Parse a command as its program would; the name of the program if it is another's."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "accelerate":
        assert rest.pop(0) == "launch"
        args = launch_command_parser().parse_args(rest)
        assert args.config_file is None or (ROOT / args.config_file).is_file(), args.config_file
        program, rest = args.training_script, args.training_script_args
    elif program == "torchrun":
        args = get_args_parser().parse_args(rest)
        program, rest = args.training_script, args.training_script_args
    elif program == "python":
        program, *rest = rest
    if program.startswith(("examples/", "docs/", "tests/")):
        script_parser(program)(rest)
    elif program == "terdit":
        cli.build_parser().parse_args(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert {word for word in rest if not re.match(r"[A-Z]+=", word)} <= set(targets), rest
    elif program == "pip":
        assert rest[0] == "install"
        named = re.findall(r"\[(.*?)\]", " ".join(rest))
        assert set(",".join(named).split(",")) - {""} <= set(extras()), rest
    elif program == "git":
        assert rest[0] in ("clone", "tag", "push"), rest
    else:
        return program
    return None


def commands(text: str, language: str):
    """The commands of a block, each as a list of words; Python between two ENDs is compiled and left out."""
    text = re.sub(
        r"^python - <<'END'\n(.*?)^END\n", lambda m: compile(m[1], "END", "exec") and "", text, flags=re.M | re.S
    )
    text = re.sub(r"<[^<>\n]+>", "PLACEHOLDER", text.replace("\\\n", ""))
    for line in text.splitlines():
        if language == "console":
            if not line.startswith("$ "):
                continue  # output
            line = line[2:]
        if words := shlex.split(line, comments=True):
            yield words


def test_commands_have_these_flags(monkeypatch):
    # The kernel of docs/speed.md that a reader writes.
    monkeypatch.setitem(sys.modules, "my_kernels", types.SimpleNamespace(linear=print))
    foreign, wrong, count = Counter(), [], 0
    for page in PAGES:
        for language in ("bash", "console"):
            for _, text in blocks(page, language):
                for words in commands(text, language):
                    count += 1
                    if "examples/app.py" in words and find_spec("gradio") is None:
                        continue  # it ends before it reads its arguments
                    said = io.StringIO()
                    try:
                        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                            foreign[check_command(words)] += 1
                    except (SystemExit, AssertionError) as error:
                        reason = (said.getvalue() or str(error)).strip().splitlines()[-1:]
                        wrong.append(f"{page.name}: {shlex.join(words)}: {''.join(reason)}")
    assert not wrong, "\n".join(wrong)
    assert count > 50
    del foreign[None]
    assert foreign == FOREIGN


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    targets = re.findall(r"\]\((?!http|#|mailto:)([^)#]+)", page.read_text("utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_readme_names_every_command_and_short_enough_to_read():
    readme = (ROOT / "README.md").read_text("utf-8")
    assert all(command in readme for command in ("make demo", "make test", "terdit generate", "terdit convert"))
    assert len(readme.splitlines()) < 150


# The site


def public_names() -> set[str]:
    """Everything public, by the name under which the API page has to show it."""
    package = "diffusers_terdit"
    bases = {"DiffusionPipeline", "ModelMixin", "SchedulerMixin"}  # diffusers'
    names = {f"{package}.{name}" for name in set(diffusers_terdit.__all__) - bases}
    names |= {f"{evaluation.__name__}.{n}" for n in evaluation.__all__ if callable(getattr(evaluation, n))}
    for module in (losses, *(getattr(training, name) for name in training.__all__)):
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        names |= {f"{module.__name__}.{name}" for name in own if not name.startswith("_")}
    return names | {f"{package}.checkpoints.bundled", f"{package}.conversion.convert_dense_checkpoint"}


def test_site_builds_without_a_warning_and_reads_nothing_from_another_host(tmp_path):
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        tmp_path / "cache",
        DOCS,
        tmp_path / "site",
    ]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    pages = {
        path.relative_to(tmp_path / "site").as_posix(): path.read_text("utf-8")
        for path in (tmp_path / "site").rglob("*.html")
    }
    assert {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in PAGES[1:]} <= set(pages)
    loads = re.compile(r"<(?!a\b|link rel=\"canonical)[^>]*(?:src|href|action|data)=\"(?:https?:)?//[^\"]*\"[^>]*>")
    for name, text in pages.items():
        assert not loads.findall(text), name
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text("utf-8")), style
    shown = set(re.findall(r'id="(?:module-)?(diffusers_terdit\.[\w.]+)"', pages["api.html"]))
    assert not public_names() - shown
    # Markdown of a docstring that was not understood
    text = re.sub(r"<pre>.*?</pre>", "", pages["api.html"], flags=re.DOTALL)
    assert not re.findall(r"`\w+`|\[<code|\\\(|\*optional\*", text)

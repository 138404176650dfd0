"""The pages show what is so: their Python runs, their commands have these flags, their links lead somewhere.

To satisfy it: correct the page, or write Python that cannot run here as ```py under `<!-- needs a GPU -->` or
`<!-- needs the Hub -->`; the message of each test says which page.
"""

import argparse
import contextlib
import io
import json
import re
import runpy
import shlex
import sys
import tomllib
import types
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

import diffusers_terdit
from diffusers_terdit import cli, evaluation, losses, training


ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
MARKS = {"needs a GPU", "needs the Hub"}
FOREIGN = {"npm", "tar", "train_autoencoderkl.py"}  # programs whose flags are not looked at
# What makes a page's Python short enough for a test: text, and what replaces it there
SHORTER = {"tutorial.md": ("steps = 1000", "steps = 4")}


def blocks(page, *languages):
    """(mark, text) of the fenced blocks of a page."""
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [(block["mark"], block["text"]) for block in found if block["language"] in languages]


def run_snippets(page, long="", short=""):
    """Run the Python of a page, one block after the other; its names."""
    text = "\n".join(text for _, text in blocks(page, "python"))
    assert long in text, f"correct SHORTER: {page.name} no longer says {long}"
    names = {}
    exec(compile(text.replace(long, short) if long else text, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "true")  # where OpenVINO reports nothing to its makers
    run_snippets(page, *SHORTER.get(page.name, ("", "")))


@pytest.mark.slow
def test_the_tutorial_trains_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_snippets(DOCS / "tutorial.md")
    names["training"].export.image_grid(names["pictures"], 10).save("tutorial-digits.png")
    assert (names["read"].reshape(4, 10) == names["torch"].arange(10)).float().mean() >= 0.9


def test_the_notebook_is_the_tutorial():
    written = runpy.run_path(str(DOCS / "notebook.py"))["notebook"]((DOCS / "tutorial.md").read_text("utf-8"))
    found = json.loads((DOCS / "tutorial.ipynb").read_text("utf-8"))
    outputs = []
    for cell in found["cells"]:
        if cell["cell_type"] == "code":
            outputs += cell["outputs"]
            cell |= {"execution_count": None, "outputs": []}
    assert found == json.loads(written), "run `python docs/notebook.py`"
    assert any("image/png" in output.get("data", {}) for output in outputs), "the notebook was not run"
    assert not any(output["output_type"] == "error" for output in outputs)


def test_blocks_are_of_a_kind_that_is_checked():
    wrong = []
    for page in PAGES:
        text = page.read_text("utf-8")
        kinds = [block["language"] for block in BLOCK.finditer(text)]
        left = set(kinds) - {"python", "py", "bash", "console", "bibtex", "diff", ""}
        wrong += [f"{page.name}: nothing checks a block of {kind}" for kind in left]
        wrong += [f"{page.name}: a ``` is left open"] * (len(re.findall(r"^```", text, re.M)) != 2 * len(kinds))
        indented = set(re.findall(r"^[ >]+```(.+)", text, re.MULTILINE)) - {"html"}
        wrong += [f"{page.name}: nothing checks an indented block of {kind}" for kind in indented]
        for mark, text in blocks(page, "py"):
            compile(text, str(page), "exec")
            if page.name != "hub.md" and mark not in MARKS:  # tests/hub/test_loading.py runs that of hub.md
                wrong.append(f"{page.name}: nothing runs ```py; write ```python, or one of {MARKS} above it: {text}")
    assert not wrong, "\n".join(wrong)


# Commands: each is parsed by the program's own parser.


class Parsed(Exception):
    """Leaves a script once its arguments are read."""


@cache
def script_parser(script):
    """What reads the arguments of a script: its `parse_args`, or the parser that its `main` builds."""
    path = ROOT / script
    assert path.is_file(), f"{script} does not exist"
    found = []

    def capture(parser, *args):
        found.append(parser)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        if "def parse_args(" in path.read_text("utf-8"):
            return runpy.run_path(str(path))["parse_args"]
        patch.setattr(sys, "argv", [script])
        patch.setattr(argparse.ArgumentParser, "parse_args", capture)
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")
    return found[0].parse_args


def check_command(words):
    """Parse a command as its program would."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "accelerate":
        assert rest.pop(0) == "launch", "only `accelerate launch` is checked"
        args = launch_command_parser().parse_args(rest)
        assert args.config_file is None or (ROOT / args.config_file).is_file(), f"there is no {args.config_file}"
        program, rest = args.training_script, args.training_script_args
    elif program == "torchrun":
        args = get_args_parser().parse_args(rest)
        program, rest = args.training_script, args.training_script_args
    elif program == "python":
        program, *rest = rest
    elif program == "terdit" and rest[0] in cli.PROGRAMS:
        program, rest = f"examples/{cli.PROGRAMS[rest[0]][0]}.py", rest[1:]
    program = re.sub(r"^diffusers_terdit\.programs\.(\w+)$", r"examples/\1.py", program)
    if program.startswith(("examples/", "docs/", "tests/")):
        script_parser(program)(rest)
    elif program == "terdit":
        cli.build_parser().parse_args(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        missing = {word for word in rest if "=" not in word} - set(targets)
        assert not missing, f"the Makefile has no target {missing}"
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        named = set(",".join(re.findall(r"\[(.*?)\]", " ".join(rest))).split(",")) - {""}
        assert named <= set(project["optional-dependencies"]), "pyproject.toml has no such extra"
    else:
        assert program in FOREIGN | {"git"}, "a program that is not known here: add it to FOREIGN"


def commands(page):
    """The commands of a page, each as a list of words; Python between two ENDs is compiled and left out."""
    for line in re.findall(r"^\| `(python .+?)` \|", page.read_text("utf-8"), re.MULTILINE):  # of a table
        yield shlex.split(line)
    for language in ("bash", "console"):
        for _, text in blocks(page, language):
            text = re.sub(
                r"^python - <<'END'\n(.*?)^END\n",
                lambda m: compile(m[1], "END", "exec") and "",
                text,
                flags=re.M | re.S,
            )
            text = re.sub(r"<[^<>\n]+>", "PLACEHOLDER", text.replace("\\\n", ""))
            for line in text.splitlines():
                if language == "console" and not line.startswith("$ "):
                    continue  # output
                if words := shlex.split(line.removeprefix("$ "), comments=True):
                    yield words


def test_commands_have_these_flags(monkeypatch):
    # The kernel of docs/speed.md that a reader writes.
    monkeypatch.setitem(sys.modules, "my_kernels", types.SimpleNamespace(linear=print))
    wrong = []
    for name, words in [(page.name, words) for page in PAGES for words in commands(page)]:
        if "examples/app.py" in words and find_spec("gradio") is None:
            continue  # it ends before it reads its arguments
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                check_command(words)
        except (SystemExit, AssertionError) as error:
            reason = (said.getvalue() or str(error)).strip().splitlines()[-1:]
            wrong.append(f"{name}: {shlex.join(words)}: {''.join(reason)}")
    assert not wrong, "\n".join(wrong)


def test_links_between_files_lead_somewhere():
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\((?!http|#|mailto:)([^)#]+)", BLOCK.sub("", page.read_text("utf-8")))
    ]
    missing = [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
    assert not missing, f"links to files that are not there: {missing}"


def test_every_paper_that_is_named_is_in_the_bibliography():
    def papers(path):
        return re.findall(r"arxiv\.org/(?:abs|pdf|html)/(\d{4}\.\d{4,5})", path.read_text("utf-8"))

    listed = papers(DOCS / "bibliography.md")
    files = [*PAGES, *(path for folder in ("src", "examples") for path in (ROOT / folder).rglob("*.py"))]
    missing = [f"{paper} of {path.name}" for path in files for paper in papers(path) if paper not in listed]
    assert not missing, f"add to docs/bibliography.md: {missing}"
    assert len(listed) == len(set(listed)), "docs/bibliography.md has a paper twice"


# The site


def public_names():
    """Everything public, by the name under which the API page has to show it."""
    package = "diffusers_terdit"
    bases = {"DiffusionPipeline", "ModelMixin", "SchedulerMixin"}  # diffusers'
    names = {f"{package}.{name}" for name in set(diffusers_terdit.__all__) - bases}
    names |= {f"{evaluation.__name__}.{n}" for n in evaluation.__all__ if callable(getattr(evaluation, n))}
    for module in (losses, *(getattr(training, name) for name in training.__all__)):
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        names |= {f"{module.__name__}.{name}" for name in own if not name.startswith("_")}
    return names | {f"{package}.checkpoints.bundled", f"{package}.conversion.convert_ternary_checkpoint"}


def test_the_site_builds_without_a_warning_and_reads_nothing_from_another_host(tmp_path, capsys):
    for package in ("myst_parser", "furo"):
        pytest.importorskip(package)
    main = pytest.importorskip("sphinx.cmd.build").build_main
    site = tmp_path / "site"
    with warnings.catch_warnings(action="ignore"):  # of Sphinx's own code
        failed = main(["-W", "--keep-going", "-q", "-d", str(tmp_path / "cache"), str(DOCS), str(site)])
    assert not failed, f"`make docs` says:\n{capsys.readouterr().err[-3000:]}"
    pages = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}
    unbuilt = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")} - set(pages)
    assert not unbuilt, f"not in the site: link them in docs/index.md: {unbuilt}"
    loads = re.compile(r"<(?!a\b|link rel=\"canonical)[^>]*(?:src|href|action|data)=\"(?:https?:)?//[^\"]*\"[^>]*>")
    foreign = {name: loads.findall(text) for name, text in pages.items() if loads.findall(text)}
    styles = [
        path.name
        for path in site.rglob("*.css")
        if re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text())
    ]
    assert not foreign, f"pages that load from another host: {foreign}"
    assert not styles, f"styles that load from another host: {styles}"
    shown = set(re.findall(r'id="(?:module-)?(diffusers_terdit\.[\w.]+)"', pages["api.html"]))
    assert not public_names() - shown, f"add to docs/api.rst: {public_names() - shown}"
    raw = re.findall(
        r"`\w+`|\[<code|\\\(|\*optional\*", re.sub(r"<pre>.*?</pre>", "", pages["api.html"], flags=re.DOTALL)
    )
    assert not raw, f"Markdown of a docstring that Sphinx did not understand: {raw}"

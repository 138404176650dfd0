"""The site of these pages: `make docs` writes it to outputs/docs. Nothing in it is read from another host.

The pages stay plain Markdown. Their order is that of the lists in index.md; the API is read from the docstrings, which
are written in diffusers' form: Google's sections, Markdown inside.
"""

import json
import re
import subprocess
from pathlib import Path

import diffusers_terdit


project = "diffusers-terdit"
author = "The diffusers-terdit authors"
copyright = author
version = release = diffusers_terdit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["images"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list, as parameters are
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"{project} {version}"
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}


def add_toctree(app, docname, source):
    """Each section of index.md becomes a part of the sidebar, in the order of its links."""
    if docname != "index":
        return
    _, *sections = re.split(r"^## ", source[0], flags=re.MULTILINE)
    for section in sections:
        caption, text = section.split("\n", 1)
        pages = re.findall(r"\]\(([\w/]+)\.(?:md|rst)\)", text)
        source[0] += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n\n" + "\n".join(pages) + "\n```\n"


def for_the_site(app, docname, source):
    """What GitHub shows by itself: links to Markdown outside of these pages, and the marks of snippets."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])
    source[0] = re.sub(r"^<!-- needs (.+) -->$", r"*Needs \1:*\n", source[0], flags=re.MULTILINE)


def markdown_to_rst(app, what, name, obj, options, lines):
    """The Markdown of a docstring, as Sphinx reads it, before Napoleon turns its sections into fields."""
    # Formulas stand as they are: typesetting them takes a script from elsewhere.
    text = re.sub(r"\\\((.+?)\\\)", lambda match: f"`{match[1]}`", "\n".join(lines))
    parts = re.split(r"((?:^Examples:\n)?^```\w*\n.*?^```$|\[`[^`]+`\]|`[^`]+`)", text, flags=re.MULTILINE | re.DOTALL)
    for i, part in enumerate(parts):
        if i % 2 == 0:  # words
            part = re.sub(r"(?<!optional)\*(?!optional\*)", r"\\*", part)
            part = re.sub(r"\[([^\]]+)\]\((https?://[^)]+)\)", r"`\1 <\2>`__", part)
            part = re.sub(r"^( *)(Source|Raises): +(?=\S)", r"\n\1**\2:** ", part, flags=re.MULTILINE)
        elif "```" in part:
            code = part.split("\n")[part.startswith("Examples:") + 1 : -1]
            part = "\n.. code-block:: python\n\n" + "".join(f"    {line}\n" for line in code)
        elif part.startswith("["):  # [`Name`], [`~module.Name`]
            part = f":py:obj:{part[1:-1]}"
        else:
            part = f"`{part}`"
        parts[i] = part
    lines[:] = "".join(parts).split("\n")


KERNELS, MODELS = ("ops", "layers.py"), ("models", "pipelines", "modeling.py", "storage")
TRAINING = (*KERNELS, "models", "pipelines", "training", "losses.py", "evaluation")
# The code, in src/diffusers_terdit, whose figures a page shows.
MEASURES = {
    "kernels": KERNELS,
    "step": (*KERNELS, "models"),
    "numerics": (*KERNELS, "models", "pipelines"),
    "deployment": (*KERNELS, *MODELS),
    "flux2": (*KERNELS, *MODELS, "quantization.py", "conversion"),
    "pipeline": (*KERNELS, *MODELS, "quantization.py", "conversion"),
    "adaln_norm": TRAINING,
    "worth_it": TRAINING,
    "few_steps": (*KERNELS, "models", "pipelines"),
    "text_to_image": (*TRAINING, "quantization.py"),
    "reliability": ("",),
}


def report_changes(app, error):
    """Print how many files of the code that a page of results measures have changed since it was measured."""
    root, folder = Path(app.srcdir).parent, Path(app.srcdir, "results")
    for name, found in json.loads((folder / "measured.json").read_text("utf-8")).items():
        page = name.split(".")[0]
        parts = MEASURES.get(page, MEASURES["reliability"])
        paths = [f"src/diffusers_terdit/{part}" for part in parts]

        def files(*words, paths=paths):
            done = subprocess.run(["git", *words, "--", *paths], cwd=root, capture_output=True, text=True)
            return (
                len([line for line in done.stdout.splitlines() if line.endswith(".py")])
                if not done.returncode
                else None
            )

        changed, tracked = files("diff", "--name-only", "--diff-filter=d", found["commit"]), files("ls-files")
        known = (
            f"{changed} of its {tracked} files have changed since" if changed is not None else "not in this history"
        )
        print(f"{name}: measured on {found['date']} at commit {found['commit']}; {known}")


def setup(app):
    """Sphinx calls this."""
    app.connect("build-finished", report_changes)
    app.connect("source-read", add_toctree)
    app.connect("source-read", for_the_site)
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)  # Napoleon comes at 500

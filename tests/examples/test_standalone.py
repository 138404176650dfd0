"""What a user starts stands alone: it imports the standard library, this package and declared dependencies."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from diffusers_terdit import arguments, cli


ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
PROGRAMS = [path for path in SCRIPTS if path.stem != "emoji_faces"]
TYPED = r'--(\w+)",\s*type=(at_least|keep_limit|granularity|positive|not_negative|share|seed)\b'
# Installed under other names, or with a dependency that is declared.
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL", "huggingface-hub": "huggingface_hub"}
WITH_OTHERS = {"tokenizers", "tqdm"}  # transformers, huggingface-hub
ASKED_FOR = {"bitsandbytes"}  # by a flag, whose error says how to install it


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in ("train", "lora", "app"))]
    names = {re.match(r"[\w-]+", requirement)[0] for requirements in lists for requirement in requirements}
    return {MODULES.get(name, name) for name in names} | WITH_OTHERS | ASKED_FOR | {"diffusers_terdit"}


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


class _Parsed(Exception):
    """Ends a program where it parses its arguments; holds the parser."""


def check_sentences(parser):
    for action in parser._actions[1:]:  # after --help
        assert re.fullmatch(r"\S+ .+\.", action.help or ""), f"{parser.prog} {action.dest}: {action.help}"


def test_a_sentence_explains_every_flag_of_the_command():
    commands = cli.build_parser()._subparsers._group_actions[0].choices
    assert "generate" in commands
    for parser in commands.values():
        check_sentences(parser)


@pytest.mark.parametrize("script", [path.stem for path in SCRIPTS])
def test_a_sentence_explains_every_flag(script, monkeypatch):
    pytest.importorskip("gradio" if script == "app" else "torch", reason="gradio is not installed")

    def stop(parser, *args, **kwargs):
        raise _Parsed(parser)

    program = importlib.import_module(script)
    monkeypatch.setattr(arguments.Parser, "parse_args", stop)
    with pytest.raises(_Parsed) as parsed:
        program.main([])
    check_sentences(parsed.value.args[0])


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.name)
def test_a_number_out_of_its_range_is_refused_before_any_work(script, capsys):
    pytest.importorskip("gradio" if script.stem == "app" else "torch", reason="gradio is not installed")
    program, text = importlib.import_module(script.stem), script.read_text("utf-8")
    options = dict(re.findall(TYPED, text))
    assert not re.findall(r"type=(?:int|float)\b(?![^)]*choices=)", text), "use a type of diffusers_terdit.arguments"
    for option in options:
        with pytest.raises(SystemExit) as stop:
            program.parse_args([f"--{option}", "-2"])
        assert stop.value.code == 2
        assert f"--{option}: expected " in capsys.readouterr().err
        with pytest.raises(SystemExit):
            program.parse_args([f"--{option}", "many"])
        assert f"--{option}: expected " in capsys.readouterr().err
    if "checkpoints_total_limit" in options:
        assert program.parse_args(["--demo", "--checkpoints_total_limit", "-1"]).checkpoints_total_limit == -1


@pytest.mark.parametrize("script", PROGRAMS, ids=lambda path: path.name)
def test_an_interrupt_is_one_line_in_the_imports_too(script, tmp_path):
    flags = {
        "app": [],
        "evaluate": [],
        "cache_latents": ["--train_data_dir", ".", "--pretrained_vae_model_name_or_path", "."],
    }
    command = [sys.executable, script, *flags.get(script.stem, ["--demo"])]
    command += [] if script.stem == "app" else ["--output_dir", tmp_path / "out"]
    assert interrupted(command, 1.0) == (130, f"{script.stem}: interrupted\n")


def interrupted(command, seconds):
    """Interrupt a command; its exit code and what it printed. pytest may ignore the signal, and pass that on."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    default = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    finally:
        signal.signal(signal.SIGINT, default)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    return process.wait(60), process.communicate()[0]

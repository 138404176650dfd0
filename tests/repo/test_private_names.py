"""Private names of diffusers and PEFT are imported and looked up in two files, which mend what their releases break.

To satisfy it: give `_diffusers.py` or `lora.py` a function for what is needed; a hook that diffusers calls on every
model, pipeline or quantizer, or that its own models read, goes into `INTERFACE` instead.
"""

import ast
import inspect
import sys
from pathlib import Path

import torch

import diffusers_terdit


SRC = Path(diffusers_terdit.__file__).parent
HOSTS = ("diffusers", "peft")
HOMES = {"_diffusers.py", "lora.py"}
INTERFACE = {
    # methods that diffusers calls
    "_dequantize", "_dict_from_json_file", "_load_pretrained_model", "_process_model_after_weight_loading",
    "_process_model_before_weight_loading",
    # what a class says about itself
    "_available_processors", "_callback_tensor_inputs", "_default_processor_cls", "_no_split_modules",
    "_optional_components", "_repeated_blocks", "_skip_layerwise_casting_patterns",
    "_supports_gradient_checkpointing", "_supports_param_buffer_assignment", "_supports_qkv_fusion",
    # what the code of diffusers' own models and pipelines reads
    "_attention_backend", "_execution_device", "_gradient_checkpointing_func", "_parallel_config",
    "_set_gradient_checkpointing",
}  # fmt: skip
OF_PYTHON_AND_TORCH = {"_abc_impl", "_fields"} | {name for name in dir(torch.nn.Module()) if name.startswith("_")}


def defined_in(tree):
    """Names that a file defines: functions, classes, variables, and attributes of `self` and `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from {node.attr} if ast.unparse(node.value) in ("self", "cls") else ()


def used_in(tree):
    """Names that a file looks up as attributes, torch's aside, or imports from diffusers or PEFT."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not ast.unparse(node).startswith("torch."):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            yield from (word.value for word in node.args[1:2] if isinstance(word, ast.Constant))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) and not node.level else ""
            imported = [f"{module}{alias.name}".split(".") for alias in node.names]
            yield from (part for parts in imported if parts[0] in HOSTS for part in parts)


def overridden():
    """(file, name) of what a class of this package and one of diffusers or PEFT that it derives from both define."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == SRC.name]
    for cls in {cls for module in modules for cls in vars(module).values() if isinstance(cls, type)}:
        top, _, part = cls.__module__.partition(".")
        if top == SRC.name and not part.startswith("programs."):  # those are in examples/
            file = Path(inspect.getfile(cls)).relative_to(SRC).as_posix()
            bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in HOSTS]
            yield from ((file, name) for base in bases for name in vars(cls).keys() & vars(base).keys())


def test_private_names_of_diffusers_and_peft_are_used_in_two_files():
    trees = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text("utf-8")) for path in SRC.rglob("*.py")}
    known = {name for tree in trees.values() for name in defined_in(tree)}
    used = {(file, name) for file, tree in trees.items() for name in used_in(tree) if name not in known}
    private = {
        (file, name)
        for file, name in {*used, *overridden()}
        if name == "peft" or (name.startswith("_") and not name.startswith("__") and name not in OF_PYTHON_AND_TORCH)
    }
    wrong = {(file, name) for file, name in private if file not in HOMES and name not in INTERFACE}
    assert not wrong, f"use a function of _diffusers.py or lora.py instead of: {wrong}"
    # The search finds what is known to be there.
    assert private > {("_diffusers.py", "_helpers"), ("lora.py", "peft"), ("modeling.py", "_load_pretrained_model")}

"""What this package leans on in diffusers and PEFT; `_diffusers.py` and `lora.py` are the files to mend."""

import ast
import inspect
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ConfigMixin
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.loaders import PeftAdapterMixin
from diffusers.models import model_loading_utils
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

import diffusers_terdit
from diffusers_terdit import TernaryLinear, _diffusers
from diffusers_terdit.models.transformer_terdit import TerDiTBlock


SRC = Path(diffusers_terdit.__file__).parent
HOSTS = ("diffusers", "peft")
HOMES = {"_diffusers.py", "lora.py"}

# Private names that every model, pipeline or quantizer of diffusers uses, wherever it stands.
INTERFACE = {
    # methods that diffusers calls
    "_dequantize",
    "_dict_from_json_file",
    "_load_pretrained_model",
    "_process_model_after_weight_loading",
    "_process_model_before_weight_loading",
    # what a class says about itself
    "_available_processors",
    "_callback_tensor_inputs",
    "_default_processor_cls",
    "_no_split_modules",
    "_optional_components",
    "_repeated_blocks",
    "_skip_layerwise_casting_patterns",
    "_supports_gradient_checkpointing",
    "_supports_param_buffer_assignment",
    "_supports_qkv_fusion",
    # what the code of diffusers' own models and pipelines reads
    "_attention_backend",
    "_execution_device",
    "_gradient_checkpointing_func",
    "_parallel_config",
    "_set_gradient_checkpointing",
}
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
    """(file, name) of private names that a class of this package and one that it derives from both define."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == SRC.name]
    classes = {cls for module in modules for cls in vars(module).values() if isinstance(cls, type)}
    for cls in classes:
        if cls.__module__.split(".")[0] == SRC.name:
            file = Path(inspect.getfile(cls)).relative_to(SRC).as_posix()
            bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in HOSTS]
            yield from ((file, name) for base in bases for name in vars(cls).keys() & vars(base).keys())


def test_private_names_of_diffusers_and_peft_stand_in_two_files():
    trees = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text("utf-8")) for path in SRC.rglob("*.py")}
    ours = {name for tree in trees.values() for name in defined_in(tree)}
    used = {(file, name) for file, tree in trees.items() for name in used_in(tree) if name not in ours}
    private = {
        (file, name)
        for file, name in {*used, *overridden()}
        if name == "peft" or (name.startswith("_") and not name.startswith("__") and name not in OF_PYTHON_AND_TORCH)
    }
    assert {(file, name) for file, name in private if file not in HOMES and name not in INTERFACE} == set()
    assert private > {  # the search finds what is known to be there
        ("_diffusers.py", "_fetch_state_dict"),
        ("_diffusers.py", "_helpers"),
        ("_diffusers.py", "_internal_dict"),
        ("_diffusers.py", "_diffusers_hook"),
        ("lora.py", "_register_custom_module"),
        ("lora.py", "peft"),
        ("modeling.py", "_load_pretrained_model"),
    }


class TestContactWithTheHost:
    """Each of these breaks when diffusers changes what this package leans on."""

    def test_tables_that_registration_writes_to_exist(self):
        assert LOADABLE_CLASSES["diffusers"]["ModelMixin"] == ["save_pretrained", "from_pretrained"]
        assert LOADABLE_CLASSES["diffusers_terdit"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}
        assert TransformerBlockRegistry.get(TerDiTBlock).return_hidden_states_index == 0

    @pytest.mark.parametrize("name", ["TerDiTPipeline", "TerDiTTransformer2DModel", "TernaryLinear"])
    def test_host_finds_the_classes_by_name(self, name):
        assert getattr(diffusers, name) is getattr(diffusers_terdit, name)

    def test_registering_twice_and_over_a_host_class_changes_nothing(self):
        class AutoencoderKL:
            pass

        theirs, tables = diffusers.AutoencoderKL, {key: dict(value) for key, value in LOADABLE_CLASSES.items()}
        _diffusers.register("diffusers_terdit", classes=[AutoencoderKL], blocks=[TerDiTBlock], quantizers={})
        assert diffusers.AutoencoderKL is theirs
        assert tables == LOADABLE_CLASSES

    @pytest.mark.parametrize("name", ["ModelMixin", "SchedulerMixin", "DiffusionPipeline"])
    def test_base_classes_are_where_the_host_looks_for_them(self, name):
        assert getattr(diffusers_terdit, name) is getattr(diffusers, name)

    def test_config_hooks_that_are_overridden_exist(self):
        assert list(inspect.signature(ConfigMixin.extract_init_dict).parameters) == ["config_dict", "kwargs"]
        assert list(inspect.signature(ConfigMixin.to_json_string).parameters) == ["self"]
        assert "_supports_param_buffer_assignment" in inspect.getsource(model_loading_utils)

    def test_the_config_of_a_lora_is_made_where_it_is_looked_for(self):
        code = PeftAdapterMixin.load_lora_adapter.__code__
        assert "_create_lora_config" in code.co_names
        assert code.co_freevars == ()

    def test_a_key_leaves_the_config(self):
        vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=32)
        _diffusers.remove_from_config(vae, "latent_channels")
        assert "latent_channels" not in vae.config
        assert vae.config["block_out_channels"] == (32,)


def test_registration_replaces_nothing_of_the_host(monkeypatch):
    own = object()
    monkeypatch.setattr(diffusers, "TernaryLinear", own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _diffusers.register("diffusers_terdit", classes=(TernaryLinear,), blocks=(), quantizers={})
    assert diffusers.TernaryLinear is own
    assert LOADABLE_CLASSES["diffusers_terdit"] == {"ModelMixin": ["save_pretrained", "from_pretrained"]}

"""`export_remote_code`: what it writes loads without this package, and computes the same."""

import ast
import builtins
import json
import re
import symtable
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.utils import dynamic_modules_utils
from huggingface_hub import create_branch, upload_folder

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel, TernaryLinear, export_remote_code, remote_code
from diffusers_terdit.ops.cpu import choose
from fake_hub import run_with_hub


REPO = "user/terdit"
# A process in which the package is not installed, for all that Python can tell.
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_terdit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
try:
    import diffusers_terdit
    raise SystemExit("the package can be imported")
except ModuleNotFoundError:
    pass

import torch
from diffusers import AutoModel, DiffusionPipeline

def sample(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe([3, "seven"], num_inference_steps=2, generator=generator, output_type="pt").images
"""


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe([3, "seven"], num_inference_steps=2, generator=generator, output_type="pt").images


def text_of(folder, pattern):
    (path,) = folder.glob(pattern)
    return path.read_text("utf-8")


@pytest.fixture
def pipe(tiny_pipeline, monkeypatch):
    """It computes as that code does, in plain PyTorch: tables of lookups sum in another order."""
    monkeypatch.setattr(choose, "has_numba", lambda: False)
    return tiny_pipeline(vae=True, weight_format="packed")


@pytest.fixture
def folder(pipe, tmp_path, monkeypatch):
    """A saved pipeline with its code."""
    monkeypatch.chdir(tmp_path)
    pipe.save_pretrained("pipeline")
    export_remote_code("pipeline")
    return tmp_path / "pipeline"


@pytest.fixture
def loaded(fake_hub, folder):
    """The pipeline, loaded with its own code."""
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_without_the_package_a_folder_and_a_revision_give_the_same_bits(fake_hub, folder, pipe, tmp_path):
    pipe.push_to_hub(REPO, token=fake_hub.token)
    create_branch(REPO, branch="remote-code", token=fake_hub.token)
    upload_folder(repo_id=REPO, folder_path=folder, revision="remote-code", token=fake_hub.token)
    TernaryLinear(8, 8).pack().save_pretrained("layer")
    export_remote_code("layer")
    pipe.transformer.save_pretrained("model")
    export_remote_code("model")
    torch.save({"images": sample(pipe)}, "images.pt")
    code = f"""{REFUSE}
from huggingface_hub import snapshot_download
snapshot_download({REPO!r}, revision="remote-code")
expected = torch.load("images.pt")
options = dict(revision="remote-code", trust_remote_code=True)
from_hub = DiffusionPipeline.from_pretrained({REPO!r}, **options)
assert torch.equal(sample(from_hub), expected["images"])
from_folder = DiffusionPipeline.from_pretrained("pipeline", trust_remote_code=True)
assert torch.equal(sample(from_folder), expected["images"])
models = [
    AutoModel.from_pretrained({REPO!r}, subfolder="transformer", **options),
    AutoModel.from_pretrained("pipeline", subfolder="transformer", trust_remote_code=True),
    AutoModel.from_pretrained("pipeline/transformer", trust_remote_code=True),
    AutoModel.from_pretrained("model", trust_remote_code=True),
]
inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
outputs = [model(*inputs).sample for model in models]
assert all(torch.equal(output, outputs[0]) for output in outputs)
layer = AutoModel.from_pretrained("layer", trust_remote_code=True)
assert layer(torch.randn(2, 8)).shape == (2, 8)

# What the first pipeline is made of is still that after all those loads; an op that was registered twice would crash.
for _ in range(3):
    DiffusionPipeline.from_pretrained("pipeline", trust_remote_code=True)
    assert all(torch.equal(model(*inputs).sample, outputs[0]) for model in models)
assert torch.equal(sample(from_hub), expected["images"])
assert torch.equal(sample(from_folder), expected["images"])
from_folder.transformer.unpack().pack()
assert torch.equal(sample(from_folder), expected["images"])
assert not any(name.startswith("diffusers_terdit") for name in sys.modules)
from_hub.save_pretrained("saved-without-the-package")

import pytest
from fake_hub import patch_constants
patch_constants(pytest.MonkeyPatch(), HF_HUB_OFFLINE=True)
folder = snapshot_download({REPO!r}, revision="remote-code")
offline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(sample(offline), expected["images"])
print("done")
"""
    assert run_with_hub(fake_hub, code, tmp_path).strip() == "done"
    again = TerDiTPipeline.from_pretrained("saved-without-the-package")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), sample(pipe))
    saved = [path for path in (tmp_path / "saved-without-the-package").rglob("*") if path.suffix in (".json", ".py")]
    assert not [path for path in saved if re.search("auto_map|diffusers_modules|remote", path.read_text("utf-8"))]


class TestBesideThePackage:
    def test_it_samples_the_same_and_both_go_on_working(self, loaded, pipe):
        assert type(loaded) is not TerDiTPipeline
        assert type(loaded).__module__.startswith("diffusers_modules")
        for each in (loaded, pipe, loaded, pipe):
            assert torch.equal(sample(each), sample(pipe))

    def test_every_load_gives_the_same_classes(self, loaded, folder):
        again = [DiffusionPipeline.from_pretrained(folder, trust_remote_code=True) for _ in range(2)]
        assert len({type(each.transformer) for each in [loaded, *again]}) == 1
        assert loaded.transformer.ternary_layers().keys() == again[1].transformer.ternary_layers().keys() != set()

    def test_code_of_another_release_does_not_reach_into_this_one(self, loaded, folder, pipe, tmp_path, monkeypatch):
        before = sample(loaded)
        monkeypatch.setattr(remote_code, "version", lambda name: "9.9")
        pipe.save_pretrained("other")
        export_remote_code("other")
        other = DiffusionPipeline.from_pretrained(tmp_path / "other", trust_remote_code=True)
        assert type(other.transformer) is not type(loaded.transformer)
        assert len(loaded.transformer.ternary_layers()) == len(other.transformer.ternary_layers()) > 0
        assert torch.equal(sample(loaded), before)

    def test_it_needs_the_flag_with_the_package_too(self, fake_hub, folder):
        for loader in (TerDiTPipeline, DiffusionPipeline):
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                loader.from_pretrained(folder)
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModel.from_pretrained(folder, subfolder="transformer")
        model = TerDiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")  # by its class: ours
        assert "auto_map" not in model.config

    def test_gradients_casts_compilation_and_step_caches_work(self, loaded, pipe):
        from diffusers import FirstBlockCacheConfig

        model = loaded.transformer
        inputs = torch.randn(2, 4, 8, 8, requires_grad=True), torch.tensor([3, 900]), torch.tensor([1, 10])
        model(*inputs).sample.sum().backward()
        assert inputs[0].grad.abs().sum() > 0
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs).sample, model(*inputs).sample)
        torch._dynamo.reset()
        model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
        model.disable_cache()
        assert model.to(torch.bfloat16).transformer_blocks[0].attn.to_q.weight_scale.dtype == torch.float32

    def test_what_needs_the_package_says_so(self, loaded):
        with pytest.raises(ImportError, match="pip install diffusers-terdit"):
            loaded.transformer.set_activation_bits(8)


class TestFiles:
    def test_every_name_in_them_is_defined(self, folder, tmp_path):
        TernaryLinear(8, 8).save_pretrained("layer")
        paths = [*export_remote_code("pipeline"), *export_remote_code("layer")]
        assert [path.name.rpartition("_")[0] for path in paths] == [
            "pipeline_terdit",
            "transformer_terdit",
            "ternary_linear",
        ]
        for path in paths:
            text = path.read_text("utf-8")
            top = symtable.symtable(text, path.name, "exec")
            defined = {
                symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()
            }
            known = defined | set(vars(builtins)) | {"__name__", "__class__"}
            assert not {name for name in global_names(top) if name not in known}

    def test_a_stranger_can_read_them(self, folder):
        for path in folder.rglob("*.py"):
            text = path.read_text("utf-8")
            meanings: dict[str, set[str]] = {}
            for node in ast.parse(text).body:
                named = [getattr(node, "name", None), *map(ast.unparse, getattr(node, "targets", []))]
                for name in filter(None, named):
                    meanings.setdefault(name, set()).add(ast.unparse(node))
            twice = {name for name, statements in meanings.items() if len(statements) > 1}
            # a function, then what it gives
            assert twice <= {f"_{Path(file).stem}" for file in remote_code.ARITHMETIC}
            assert not re.search("filelock|huggingface_hub|numba\\b.*import|class .*Lora", text)

    def test_they_import_nothing_of_the_package_and_of_each_other(self, folder):
        for path in folder.rglob("*.py"):
            nodes = [
                n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, (ast.Import, ast.ImportFrom))
            ]
            assert not [n for n in nodes if getattr(n, "level", 0)]
            modules = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
            modules |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
            roots = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names
            assert roots <= {"torch", "numpy", "diffusers"}
            # diffusers would warn of a package that is only optional; it searches the text.
            assert dynamic_modules_utils.check_imports(path) == []
            assert not re.search(r"^\s*(from|import) peft\b", path.read_text("utf-8"), re.MULTILINE)

    def test_their_header_says_where_they_come_from_and_what_is_left_out(self, folder):
        text = text_of(folder, "transformer/*.py")
        header = text.partition("\n\n")[0]
        assert "ops/reference.py" in header
        assert "numba" in header
        assert "Triton" in header
        assert "Apache-2.0" in header
        assert "integer.py" not in header

    def test_exporting_again_changes_nothing_and_replaces_older_code(self, folder):
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        (folder / "transformer" / "transformer_terdit_0123456789ab.py").write_text(text_of(folder, "transformer/*.py"))
        (folder / "transformer" / "transformer_terdit_mine.py").write_text("mine = 1\n")
        export_remote_code(folder)
        (folder / "transformer" / "transformer_terdit_mine.py").unlink()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files

    def test_nothing_is_written_through_links(self, folder, tmp_path):
        """The name of the code that is to be written can be known to whoever made the folder."""
        code = next(folder.glob("transformer/transformer_terdit_*.py"))
        for path in (code, folder / "transformer" / "config.json"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
            path.unlink()
            path.symlink_to(tmp_path / path.name)
        (tmp_path / code.name).write_text("mine")
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        export_remote_code(folder)
        assert code.is_file()
        assert not code.is_symlink()
        assert all(path.read_bytes() == content for path, content in before.items())

    def test_the_index_names_the_files(self, folder):
        index = json.loads((folder / "model_index.json").read_text())
        assert (folder / f"{index['_class_name'][0]}.py").is_file()
        assert (folder / "transformer" / f"{index['transformer'][0]}.py").is_file()
        assert index["vae"] == ["diffusers", "AutoencoderKL"]


def global_names(table):
    for symbol in table.get_symbols():
        if symbol.is_global() or (table.get_type() == "module" and symbol.is_referenced()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from global_names(child)


def test_a_pipeline_of_another_transformer_gets_no_code(tmp_path):
    index = {"_class_name": "TerDiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="expected a TerDiTTransformer2DModel"):
        export_remote_code(tmp_path)
    assert not list(tmp_path.rglob("*.py"))

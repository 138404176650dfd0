"""`torch.compile`, whole and block by block, `torch.export` and AOTInductor: the numbers of the eager model."""

import copy
import io
import shutil
import subprocess
import sys

import pytest
import torch
from torch.export import Dim

from diffusers_terdit import TerDiTTransformer2DModel
from diffusers_terdit.ops import has_integer_kernel


# Inductor imports a module of torch that defines a deprecated TorchScript method.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}  # of others the last bits of rotary positions differ
VARIANTS = {"float": {}, "packed": {"weight_format": "packed"}, "dense": {"ternary": False}}
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="inductor needs a C++ compiler"
)


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def model(tiny_model, request):
    return tiny_model(**request.param)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


@torch.no_grad()
def predict(model, inputs):
    return model(**inputs).sample


def graphs():
    """Graphs compiled since the test began."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class TestCompiling:
    def test_whole_model_is_one_graph_with_the_same_gradients(self, tiny_model, tiny_inputs):
        samples, gradients = [], []
        for compile in (False, True):
            model = tiny_model(num_layers=1).train()
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compile else model
            samples.append(run(**tiny_inputs()).sample)
            samples[-1].square().mean().backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert graphs() == 1
        torch.testing.assert_close(*samples)
        for eager, compiled in zip(*gradients, strict=True):
            torch.testing.assert_close(compiled, eager)

    @pytest.mark.parametrize("bits", ["auto", 8])
    def test_integer_activations_compile(self, tiny_model, tiny_inputs, bits):
        if bits == 8 and not has_integer_kernel("cpu"):
            pytest.skip("no AVX2 or no numba")
        model, inputs = tiny_model("packed", num_layers=1).to(torch.bfloat16), tiny_inputs(dtype=torch.bfloat16)
        model.set_activation_bits(bits)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(predict(compiled, inputs), predict(model, inputs))

    def test_blocks_compile_once_for_all(self, model, tiny_inputs):
        expected = predict(model, tiny_inputs())
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(predict(model, tiny_inputs()), expected)
        assert graphs() == 1
        torch.testing.assert_close(predict(copy.deepcopy(model), tiny_inputs()), expected)

    def test_blocks_compiled_for_any_size_are_not_compiled_again(self, tiny_model, tiny_inputs):
        model = tiny_model("packed", num_layers=1)
        sizes = (3, 8, 8), (5, 4, 12), (6, 6, 6)
        expected = [predict(model, tiny_inputs(*size)) for size in sizes]
        model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="aot_eager")
        compiled = []
        for size, sample in zip(sizes, expected, strict=True):
            torch.testing.assert_close(predict(model, tiny_inputs(*size)), sample, rtol=1e-4, atol=1e-5)
            compiled.append(graphs())
        assert len(set(compiled)) == 1

    @pytest.mark.parametrize(("weight_format", "regional"), [("packed", False), ("float", True)])
    def test_pipeline_samples_the_same_without_compiling_every_step(self, tiny_pipeline, weight_format, regional):
        pipe = tiny_pipeline(weight_format=weight_format, num_layers=2 if regional else 1)

        def sample():
            return pipe(
                [1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="pt"
            ).images

        expected = sample()
        compile = pipe.transformer.compile_repeated_blocks if regional else pipe.transformer.compile
        compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(sample(), expected, rtol=1e-4, atol=1e-4)
        before = graphs()
        assert 1 <= before <= 2
        sample()
        assert graphs() == before

    def test_an_adapter_compiles(self, tiny_model, tiny_inputs):
        peft = pytest.importorskip("peft")
        model = tiny_model("packed", num_layers=1)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "gate_proj"], init_lora_weights=False))
        expected = predict(model, tiny_inputs())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(predict(compiled, tiny_inputs()), expected)

    def test_a_compiled_model_is_saved_as_a_plain_one(self, tiny_model, tiny_inputs, tmp_path):
        model = tiny_model("packed")
        expected = predict(model, tiny_inputs())
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        predict(model, tiny_inputs())
        model.save_pretrained(tmp_path)
        assert torch.equal(predict(TerDiTTransformer2DModel.from_pretrained(tmp_path), tiny_inputs()), expected)

    @needs_compiler
    def test_inductor_fuses_around_the_ternary_op(self, tiny_model):
        feed_forward, hidden_states = tiny_model("packed").transformer_blocks[0].ff, torch.randn(2, 5, 32)
        with torch.no_grad():
            compiled = torch.compile(feed_forward, fullgraph=True)(hidden_states)
            torch.testing.assert_close(compiled, feed_forward(hidden_states), rtol=1e-5, atol=1e-6)

    @needs_compiler
    @pytest.mark.parametrize(
        ("device", "tolerance"),
        [pytest.param("cpu", 1e-5, marks=pytest.mark.slow), pytest.param("cuda", 1e-4, marks=pytest.mark.gpu)],
    )
    @pytest.mark.parametrize("regional", [False, True])
    def test_inductor_agrees_with_eager(self, model, tiny_inputs, regional, device, tolerance):
        model.to(device)
        inputs = {name: tensor.to(device) for name, tensor in tiny_inputs().items()}
        expected = predict(model, inputs)
        (model.compile_repeated_blocks if regional else model.compile)(fullgraph=True)
        torch.testing.assert_close(predict(model, inputs), expected, rtol=10 * tolerance, atol=tolerance)


def exported(model, inputs, sizes=False):
    """An `ExportedProgram` for every batch, and with `sizes` for every height and width from two patches on."""
    batch = Dim("batch", min=1, max=64)
    latents = {0: batch}
    if sizes:
        latents |= {2: 2 * Dim("rows", min=2, max=8), 3: 2 * Dim("columns", min=2, max=8)}
    shapes = {"hidden_states": latents, "timestep": {0: batch}, "class_labels": {0: batch}, "return_dict": None}
    with torch.no_grad():
        return torch.export.export(model, (), inputs | {"return_dict": False}, dynamic_shapes=shapes)


class TestExporting:
    def test_exported_model_stays_packed_and_computes_the_same_after_a_round_trip(self, tiny_model, tiny_inputs):
        model, file = tiny_model("packed", num_layers=1, **HEADS), io.BytesIO()
        program = exported(model, tiny_inputs())
        assert {n: t.dtype for n, t in program.state_dict.items()} == {
            n: t.dtype for n, t in model.state_dict().items()
        }
        operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert "diffusers_terdit.linear.default" in operations
        torch.export.save(program, file)
        file.seek(0)
        run = torch.export.load(file).module()
        for batch in (1, 2, 5):
            with torch.no_grad():
                (sample,) = run(**tiny_inputs(batch), return_dict=False)
            assert torch.equal(sample, predict(model, tiny_inputs(batch)))

    def test_one_export_is_for_every_size(self, tiny_model, tiny_inputs):
        model = tiny_model(num_layers=1, pos_embed_type="rope+sincos2d", **HEADS)
        run = exported(model, tiny_inputs(2, 8, 12), sizes=True).module()
        for size in ((1, 4, 6), (3, 8, 8), (2, 4, 16)):
            with torch.no_grad():
                (sample,) = run(**tiny_inputs(*size), return_dict=False)
            assert torch.equal(sample, predict(model, tiny_inputs(*size)))

    @pytest.mark.slow
    def test_a_file_asks_for_the_package_and_nothing_else(self, tiny_model, tiny_inputs, tmp_path):
        model = tiny_model("packed")
        torch.export.save(exported(model, tiny_inputs()), tmp_path / "model.pt2")
        torch.save([tiny_inputs(3), predict(model, tiny_inputs(3))], tmp_path / "io.pt")
        code = f"""
import torch
try:
    torch.export.load({str(tmp_path / "model.pt2")!r})
except RuntimeError:
    pass
else:
    raise AssertionError("loaded without the package")
import diffusers_terdit
inputs, expected = torch.load({str(tmp_path / "io.pt")!r})
with torch.no_grad():
    (sample,) = torch.export.load({str(tmp_path / "model.pt2")!r}).module()(**inputs, return_dict=False)
assert torch.equal(sample, expected)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "resolve torch.ops.diffusers_terdit" in done.stderr

    @needs_compiler
    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
    def test_aot_inductor_package_agrees_with_eager(self, tiny_model, tiny_inputs, tmp_path):
        model = tiny_model("packed")
        program = exported(model, tiny_inputs())
        with torch.no_grad():
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
            run = torch._inductor.aoti_load_package(path)
            for batch in (1, 2, 5):
                (sample,) = run(**tiny_inputs(batch), return_dict=False)
                torch.testing.assert_close(sample, predict(model, tiny_inputs(batch)), rtol=1e-4, atol=1e-5)

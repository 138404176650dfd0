"""The GPU's path. Here the Triton kernel runs in Triton's interpreter and the matmuls on the CPU; tests marked `gpu`
need a CUDA device and run the real thing.
"""

import itertools
import os

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from diffusers_terdit import TernaryLinear, ops
from diffusers_terdit.ops import (
    dequantize,
    gpu,
    has_integer_kernel,
    integer_linear,
    pack_ternary,
    reference,
    ternary_linear,
)


SHAPES = [(4, 1), (36, 65), (64, 48), (132, 1023), (16, 1025), (8, 2048)]  # (N, K)
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-6}


@pytest.fixture(scope="module")
def triton_module():
    """The kernel, interpreted where there is no GPU to compile it for."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setitem(os.environ, "TRITON_INTERPRET", "1")  # read when a kernel is defined
        from diffusers_terdit.ops import triton_kernels
    return triton_kernels


@pytest.fixture
def triton_kernels(request, triton_module):
    """The kernel, for the device of the test: compiled for a GPU, it takes no tensors of the CPU."""
    device = request.node.callspec.params.get("device", "cpu") if hasattr(request.node, "callspec") else "cpu"
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter runs where there is no GPU")
    return triton_module


@pytest.fixture(params=["triton", "pytorch"])
def decoder(request, monkeypatch):
    """Both ways to decode a weight."""
    found = request.getfixturevalue("triton_kernels") if request.param == "triton" else None
    monkeypatch.setattr(gpu, "kernels", lambda device: found)


def new_weight(out_features, in_features, granularity="tensor", device="cpu"):
    """Packed codes, their scale, and a bias."""
    generator = torch.Generator().manual_seed(out_features + in_features)
    codes = torch.randint(-1, 2, (out_features, in_features), generator=generator)
    scale = 0.02 + 0.01 * torch.rand(
        reference.scale_shape(out_features, in_features, granularity), generator=generator
    )
    bias = torch.randn(out_features, generator=generator)
    return pack_ternary(codes).to(device), scale.to(device), bias.to(device)


@pytest.mark.parametrize("device", DEVICES)
class TestUnpack:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_it_is_the_references(self, triton_kernels, shape, dtype, device):
        packed, _, _ = new_weight(*shape, device=device)
        assert torch.equal(triton_kernels.unpack(packed, dtype), reference.unpack_ternary(packed, dtype))

    @pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
    @pytest.mark.parametrize(
        ("shape", "granularity"),
        [((8, 12), "tensor"), ((36, 65), "row"), ((12, 96), 32), ((8, 1100), 4), ((4, 6), 1)],
        ids=str,
    )
    def test_with_a_scale_it_is_the_dequantized_weight(self, triton_kernels, shape, granularity, dtype, device):
        packed, scale, _ = new_weight(*shape, granularity, device)
        expected = dequantize(reference.unpack_ternary(packed), scale).to(dtype)
        found = triton_kernels.unpack(packed, dtype, scale)
        if dtype == torch.bfloat16 and device == "cpu":  # Triton's interpreter cuts floats off instead of rounding
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, expected)

    def test_a_weight_that_is_not_contiguous(self, triton_kernels, device):
        packed, _, _ = new_weight(64, 48, device=device)
        assert torch.equal(
            triton_kernels.unpack(packed[::2, ::3], torch.float32), reference.unpack_ternary(packed[::2, ::3])
        )


def relative_error(output, expected):
    return float((output.double() - expected).norm() / expected.norm())


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("device", DEVICES)
class TestLinear:
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("rows", [1, 2, 33, (2, 3), 0])
    def test_it_agrees_with_float64(self, rows, dtype, granularity, device):
        packed, scale, bias = new_weight(36, 72, granularity, device)
        shape = rows if isinstance(rows, tuple) else (rows,)
        x = torch.randn(*shape, 72, device=device).to(dtype)
        for shift in (None, bias):
            output = gpu.linear(x, packed, scale, shift)
            expected = reference.ternary_linear(x.double(), packed, scale.double(), shift)
            assert output.dtype == dtype
            assert output.shape == (*shape, 36)
            assert rows == 0 or relative_error(output, expected) < TOLERANCE[dtype]

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_float_weight_gives_the_bits_of_its_packed_form(self, dtype, device):
        layer = TernaryLinear(64, 32).to(device)
        x = torch.randn(5, 64, device=device).to(dtype)
        before = gpu.linear(x, layer.weight, layer.weight_scale, None)
        layer.pack()
        assert torch.equal(gpu.linear(x, layer.weight_packed, layer.weight_scale, None), before)

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_gradients_are_those_of_the_dense_layer(self, granularity, device):
        packed, scale, _ = new_weight(36, 72, granularity, device)
        x = torch.randn(7, 72, device=device, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(7, 36, device=device)
        weight = dequantize(reference.unpack_ternary(packed), scale).double()
        expected = grad.double() @ weight
        found, _, scale_grad = gpu.linear_backward(grad, x.detach().float(), packed, scale, True)
        assert relative_error(found, expected) < 1e-5
        free = scale.double().requires_grad_()
        wide = free if granularity == "row" or granularity == "tensor" else free.repeat_interleave(8, 1)
        (x.detach() @ (reference.unpack_ternary(packed, torch.float64) * wide).T).backward(grad.double())
        assert relative_error(scale_grad, free.grad) < 1e-4

    def test_float16_does_not_overflow_before_the_scale(self, device):
        packed = torch.zeros(1, 4096, dtype=torch.uint8, device=device)  # all -1
        x = torch.full((2, 4096), 100.0, dtype=torch.float16, device=device)  # sums of 409,600
        for scale in (torch.tensor([0.01]), torch.full((4, 1), 0.01)):
            assert torch.equal(gpu.linear(x, packed, scale.to(device), None).cpu(), torch.full((2, 4), -4096.0).half())

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    @pytest.mark.parametrize("factor", [1e-4, 1e2])
    @pytest.mark.parametrize("outlier", [1, 1000])
    def test_float16_is_finite_where_its_result_is(self, factor, outlier, granularity, device):
        packed, scale, bias = new_weight(64, 256, granularity, device)
        scale = factor * scale
        x = torch.randn(5, 256, device=device).half()
        x[:, ::64] *= outlier
        expected = reference.ternary_linear(x.double(), packed, scale, bias)
        fits = expected.abs() < 60000
        output = gpu.linear(x, packed, scale, bias)
        assert fits.any()
        assert output[fits].isfinite().all()
        assert relative_error(output[fits], expected[fits]) < 2e-3

    @pytest.mark.parametrize("value", [0.0, -0.7, 1e-30, 3e4, float("nan"), float("inf")])
    def test_any_scale_in_float16(self, value, device):
        packed, _, _ = new_weight(8, 16, device=device)
        x = torch.randn(3, 16, device=device).half()
        scale = torch.tensor([value], device=device)
        expected = reference.ternary_linear(x.float(), packed, scale, None).half()
        torch.testing.assert_close(gpu.linear(x, packed, scale, None), expected, rtol=2e-3, atol=1e-3, equal_nan=True)


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("device", DEVICES)
class TestIntegerLinear:
    @pytest.mark.parametrize("bits", [16, 8])
    @pytest.mark.parametrize("rows", [1, 16, 17, 40])
    @pytest.mark.parametrize("shape", [(32, 64), (64, 1024), (36, 65)], ids=str)
    def test_it_gives_the_references_bits(self, shape, rows, bits, device):
        for granularity, dtype in itertools.product(("tensor", "row"), (torch.float32, torch.bfloat16, torch.float16)):
            packed, scale, bias = new_weight(*shape, granularity, device)
            x = torch.randn(rows, shape[1], device=device).to(dtype)
            for shift in (None, bias):
                expected = reference.integer_linear(x, packed, scale, shift, bits)
                assert torch.equal(gpu.integer_linear(x, packed, scale, shift, bits), expected)

    def test_the_largest_codes_do_not_overflow(self, device):
        packed = torch.full((2, 65536), 0b10101010, dtype=torch.uint8, device=device)  # all +1
        x = torch.ones(2, 65536, device=device)
        scale = torch.ones(1, device=device)
        assert torch.equal(gpu.integer_linear(x, packed, scale, None, 16), torch.full((2, 8), 65536.0, device=device))

    def test_several_dimensions_and_none(self, device):
        packed, scale, _ = new_weight(32, 64, device=device)
        x = torch.randn(2, 3, 64, device=device)
        assert gpu.integer_linear(x, packed, scale, None, 16).shape == (2, 3, 32)
        assert gpu.integer_linear(x[0, 0], packed, scale, None, 16).shape == (32,)
        assert gpu.integer_linear(x[:0], packed, scale, None, 8).shape == (0, 3, 32)

    @pytest.mark.parametrize("bits", [16, 8])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_row_that_is_not_finite(self, value, bits, device):
        packed, scale, _ = new_weight(32, 64, device=device)
        x = torch.randn(20, 64, device=device)
        x[3, 5] = value
        output = gpu.integer_linear(x, packed, scale, None, bits)
        assert output[3].isnan().all()
        assert output[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.usefixtures("decoder")
class TestWhatTheCompilerSees:
    """On a GPU; here the tensors lie on the CPU."""

    @pytest.fixture(autouse=True)
    def _as_on_a_gpu(self, monkeypatch):
        monkeypatch.setattr(ops, "_is_fused", lambda input: torch.compiler.is_compiling())
        monkeypatch.setattr(ops, "has_integer_kernel", lambda device_type: True)
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def compiled(self, function, *inputs):
        """What the compiled function gives, and the operations of its one graph."""
        record = AotEagerAndRecordGraphs()
        output = torch.compile(function, backend=record, fullgraph=True)(*inputs)
        (graph,) = record.fw_graphs
        return output, [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_the_scale_stands_beside_the_product(self, granularity, dtype):
        packed, scale, bias = new_weight(36, 72, granularity)
        x = torch.randn(5, 72, dtype=dtype)
        output, nodes = self.compiled(ternary_linear, x, packed, scale, bias)
        assert nodes.count("diffusers_terdit.product.default") == 1
        assert "diffusers_terdit.linear.default" not in nodes
        assert any(node.startswith("aten.add") for node in nodes)
        assert any(node.startswith("aten.mul") for node in nodes) == (granularity != 8)
        expected = reference.ternary_linear(x.double(), packed, scale, bias)
        assert relative_error(output, expected) < TOLERANCE[dtype]

    @pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function")
    def test_a_scale_that_is_trained_takes_the_whole_op(self):
        packed, scale, _ = new_weight(36, 72)
        output, nodes = self.compiled(ternary_linear, torch.randn(5, 72), packed, scale.requires_grad_())
        assert "diffusers_terdit.linear.default" in nodes
        output.sum().backward()
        assert scale.grad is not None

    @torch.no_grad()
    @pytest.mark.parametrize("bits", [16, 8])
    def test_the_rounding_of_activations_stands_beside_the_product(self, bits):
        packed, scale, bias = new_weight(32, 64)
        x = torch.randn(40, 64)
        output, nodes = self.compiled(lambda x: integer_linear(x, packed, scale, bias, bits), x)
        assert nodes.count("diffusers_terdit.integer_product.default") == 1
        assert any(node.startswith("aten.round") for node in nodes)
        assert torch.equal(output, reference.integer_linear(x, packed, scale, bias, bits))

    def test_the_whole_network_is_one_graph(self, tiny_model, tiny_inputs):
        model = tiny_model("packed")
        inputs = tiny_inputs()
        for bits, op in ((None, "product"), (16, "integer_product")):
            model.set_activation_bits(bits)
            with torch.no_grad():
                expected = model(**inputs).sample
                output, nodes = self.compiled(lambda *x: model(*x, return_dict=False)[0], *inputs.values())
            assert nodes.count(f"diffusers_terdit.{op}.default") == len(model.ternary_layers())
            assert relative_error(output, expected.double()) < 1e-3

    def test_gradients_to_the_input(self, tiny_model, tiny_inputs):
        model = tiny_model("packed").requires_grad_(False)
        inputs = {**tiny_inputs(), "hidden_states": tiny_inputs()["hidden_states"].requires_grad_()}
        grads = []
        for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            function(**inputs).sample.square().sum().backward()
            grads.append(inputs["hidden_states"].grad.clone())
            inputs["hidden_states"].grad = None
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("decoder")
class TestProduct:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_torchs_checks(self, granularity, dtype):
        packed, scale, _ = new_weight(36, 72, granularity)
        x = torch.randn(5, 72, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.diffusers_terdit.product.default, (x, packed, scale))

    def test_torchs_checks_of_the_integer_product(self):
        packed, _, _ = new_weight(32, 64)
        rows = torch.randint(-127, 128, (5, 64), dtype=torch.int8)
        torch.library.opcheck(torch.ops.diffusers_terdit.integer_product.default, (rows, packed))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_with_the_scale_beside_it_is_the_linear(self, granularity, dtype):
        packed, scale, bias = new_weight(36, 72, granularity)
        grads, outputs = [], []
        for fused in (False, True):
            x = torch.randn(5, 72, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
            if fused:
                _, outer = reference.split_scale(scale, dtype)
                product = torch.ops.diffusers_terdit.product(x, packed, scale)
                output = reference.scale_and_shift(product, outer, bias).to(dtype)
            else:
                output = ternary_linear(x, packed, scale, bias)
            output.float().square().sum().backward()
            outputs.append(output.detach())
            grads.append(x.grad)
        tolerance = {"rtol": 3e-3, "atol": 3e-3} if dtype == torch.float16 else {}
        torch.testing.assert_close(*outputs, **tolerance)
        torch.testing.assert_close(*grads, **tolerance)


class TestKernels:
    """Where Triton cannot run, one line says so and PyTorch decodes."""

    @pytest.fixture(autouse=True)
    def _forget(self, caplog):
        caplog.set_level("INFO", logger=gpu.logger.name)
        gpu.kernels.cache_clear()
        yield
        gpu.kernels.cache_clear()

    def test_no_triton(self, monkeypatch, caplog):
        monkeypatch.setattr(gpu, "find_spec", lambda name: None)
        for _ in range(2):
            assert gpu.kernels(torch.device("cuda", 0)) is None
        assert [record.message for record in caplog.records if "Triton is not installed" in record.message]
        assert len(caplog.records) == 1

    def test_an_old_gpu(self, monkeypatch, caplog):
        monkeypatch.setattr(gpu, "find_spec", lambda name: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old card")
        assert gpu.kernels(torch.device("cuda", 0)) is None
        assert "An old card is too old" in caplog.text

    def test_triton_that_cannot_launch(self, monkeypatch, caplog, triton_kernels):
        def unpack(*args):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(triton_kernels, "unpack", unpack)
        assert gpu.kernels(torch.device("cpu")) is None
        assert "Failed to find C compiler" in caplog.text
        assert "More." not in caplog.text

    def test_a_kernel_that_is_wrong_is_not_used(self, monkeypatch, caplog, triton_kernels):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(triton_kernels, "unpack", lambda packed, dtype: torch.zeros(4 * len(packed), 9))
        assert gpu.kernels(torch.device("cpu")) is None
        assert "wrong results" in caplog.text

    def test_one_that_works(self, monkeypatch, triton_kernels):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        assert gpu.kernels(torch.device("cpu")) is triton_kernels


class TestLayers:
    """Layers whose activations claim to be on a GPU, or are."""

    @pytest.fixture(autouse=True)
    def _no_graphs_of_other_tests(self):
        torch._dynamo.reset()  # after eight graphs of a function, `fullgraph=True` raises
        yield
        torch._dynamo.reset()

    def test_integers_need_tensor_cores(self, monkeypatch):
        for capability, expected in (((7, 0), False), ((7, 5), True), ((9, 0), True)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
            assert has_integer_kernel("cuda") is expected

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("bits", [None, 16, 8])
    def test_a_whole_network_on_a_gpu(self, tiny_model, tiny_inputs, bits, dtype):
        model = tiny_model("packed")
        with torch.inference_mode():
            expected = model(**tiny_inputs()).sample
            model.to("cuda", dtype).set_activation_bits(bits)
            inputs = {name: value.to("cuda") for name, value in tiny_inputs(dtype=dtype).items()}
            output = model(**inputs).sample
            compiled = torch.compile(model, fullgraph=True)(**inputs).sample
        tolerance = {None: 0, 16: 0, 8: 0.1}[bits] + {torch.float32: 1e-3}.get(dtype, 3e-2)
        assert relative_error(output.cpu(), expected) < tolerance
        assert relative_error(compiled.cpu(), expected) < tolerance

    @pytest.mark.gpu
    @pytest.mark.parametrize("bits", [None, 8])
    def test_a_cuda_graph_gives_the_same(self, tiny_model, tiny_inputs, bits):
        model = tiny_model("packed").to("cuda", torch.bfloat16)
        model.set_activation_bits(bits)
        inputs = {name: value.to("cuda") for name, value in tiny_inputs(dtype=torch.bfloat16).items()}
        with torch.inference_mode():
            expected = model(**inputs).sample
            compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
            for _ in range(4):
                output = compiled(**inputs).sample.clone()
        assert relative_error(output, expected.double()) < 2e-2

    @pytest.mark.gpu
    def test_two_streams_do_not_share_a_decoded_weight(self):
        packed, scale, _ = new_weight(2048, 2048, device="cuda")
        other = packed.roll(1, 0)
        x = torch.randn(64, 2048, device="cuda")
        expected = [ternary_linear(x, weight, scale) for weight in (packed, other)]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(2)]
        for _ in range(20):
            outputs = []
            for stream, weight in zip(streams, (packed, other), strict=True):
                with torch.cuda.stream(stream):
                    outputs.append(ternary_linear(x, weight, scale))
            torch.cuda.synchronize()
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))

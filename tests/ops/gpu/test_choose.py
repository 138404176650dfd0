"""Which decoder and which matmul a GPU gets."""

import pytest
import torch
from weights import new_weight, relative_error

from diffusers_terdit.ops import check_integers, choose_kernel, has_integer_kernel, ternary_linear, torch_ops
from diffusers_terdit.ops.gpu import choose, decode
from diffusers_terdit.ops.torch_ops import Case


CUDA = torch.device("cuda", 0)


class TestKernels:
    """Where Triton cannot run, one line says so and PyTorch decodes."""

    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        choose.kernels.cache_clear()
        yield
        choose.kernels.cache_clear()

    def test_no_triton(self, monkeypatch, caplog):
        monkeypatch.setattr(choose, "find_spec", lambda name: None)
        for _ in range(2):
            assert choose.kernels(CUDA) is choose.IN_PYTORCH
        assert [record.message for record in caplog.records if "Triton is not installed" in record.message]
        assert len(caplog.records) == 1

    def test_an_old_gpu(self, monkeypatch, caplog):
        monkeypatch.setattr(choose, "find_spec", lambda name: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "An old card")
        assert choose.kernels(CUDA) is choose.IN_PYTORCH
        assert "An old card is too old" in caplog.text

    def test_triton_is_tried_and_left_where_it_cannot_launch_or_is_wrong(self, monkeypatch, caplog, triton_kernels):
        def no_compiler(*args):
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        own = choose.kernels(torch.device("cpu"))
        assert own == tuple(getattr(triton_kernels, name) for name in own._fields)
        for unpack, words in (
            (no_compiler, "Failed to find C compiler"),
            (lambda packed, dtype: torch.zeros(4 * len(packed), 12, dtype=dtype), "wrong results"),
        ):
            choose.kernels.cache_clear()
            monkeypatch.setattr(triton_kernels, "unpack", unpack)
            assert choose.kernels(torch.device("cpu")) is choose.IN_PYTORCH
            assert words in caplog.text
        assert "More." not in caplog.text

    def test_the_first_call_is_not_inside_a_capture(self, monkeypatch):
        monkeypatch.setattr(choose, "find_spec", lambda name: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="Call the model once before capturing"):
            choose.kernels(CUDA)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        assert choose.kernels(CUDA) is choose.IN_PYTORCH  # the error was not kept
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choose.kernels(CUDA) is choose.IN_PYTORCH


class TestChoose:
    @pytest.fixture(params=[(7, 0), (7, 5), (9, 0)], ids=str)
    def recent(self, request, monkeypatch):
        """Whether the GPU that there seems to be has 8-bit tensor cores."""
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
        caches = choose._multiplies_bytes, decode.takes_pieces
        for cached in caches:
            cached.cache_clear()
        yield request.param >= (7, 5)
        for cached in caches:
            cached.cache_clear()

    def test_nothing_is_rounded_unless_asked_for(self, recent):
        for bits in ("auto", None):
            choice = choose_kernel(CUDA, torch.bfloat16, 64, 64, requested_bits=bits)
            assert choice == ("exact, matmul in bfloat16", None, "bfloat16 is not rounded unless asked for")

    @pytest.mark.parametrize(
        ("sizes", "kernel"),
        [((64, 64), "integers, matmul in int8"), ((36, 64), "integers, matmul in float64")],
        ids=str,
    )
    def test_integers_need_tensor_cores(self, recent, sizes, kernel):
        assert has_integer_kernel("cuda") is recent
        for bits, trained in ((8, None), (16, None), ("auto", 8)):
            choice = choose_kernel(CUDA, torch.float32, *sizes, requested_bits=bits, trained_bits=trained)
            assert choice[:2] == ((kernel, trained or bits) if recent else ("exact, matmul in float32", None))
            assert recent or "compute capability 7.5" in choice.reason

    @pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0)], ids=str)
    def test_fp8_needs_a_card_that_has_it(self, capability, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        recent = capability >= (8, 9)
        for sizes, granularity, packed, fits in (
            ((64, 32), "row", True, True),
            ((64, 24), "row", True, False),
            ((56, 32), "tensor", True, False),
            ((64, 32), 16, True, False),
            ((64, 32), "tensor", False, False),
        ):
            case = Case(torch.bfloat16, *sizes, granularity, packed, "fp8", None)
            choice = choose.choose(torch.device("cuda", 0), case)
            assert choice.bits == ("fp8" if fits and recent else None)
            assert ("capability 8.9" in choice.reason) is (choice.bits is None)
        trained = Case(torch.bfloat16, 64, 32, "row", True, "fp8", 8)  # rounds as it was trained to
        assert choose.choose(torch.device("cuda", 0), trained).bits == 8

    @pytest.mark.parametrize("works", [True, False])
    def test_rocm_has_integers_where_its_library_multiplies_them(self, works, monkeypatch):
        def multiply(a, b):
            if not works:
                raise RuntimeError("_int_mm is not there on this card")
            return torch.full((32, 32), 32)

        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(torch, "_int_mm", multiply)
        choose._multiplies_bytes.cache_clear()
        assert (
            choose.choose(torch.device("cpu"), Case(torch.bfloat16, 64, 64, "row", True, 8, None)).bits == 8
        ) is works
        choose._multiplies_bytes.cache_clear()

    def test_float32_goes_through_bfloat16_where_its_tensor_cores_are(self, recent):
        pieces = torch.cuda.get_device_capability() >= (8, 0)
        for granularity, in_pieces in (("tensor", pieces), ("row", pieces), (32, False)):
            choice = choose_kernel(CUDA, torch.float32, 64, 64, granularity, requested_bits=None)
            assert choice.kernel == f"exact, matmul in {'3 x bfloat16' if in_pieces else 'float32'}"
        assert choose_kernel(CUDA, torch.float32, 63, 64, packed=False).kernel == "exact, matmul in float32"

    def test_groups_are_exact(self):
        choice = choose_kernel(CUDA, torch.bfloat16, 64, 64, 32, requested_bits=8)
        assert choice[:2] == ("exact, matmul in bfloat16", None)
        assert "one scale per matrix or row" in choice.reason

    def test_asking_in_vain_is_said_once(self, recent, caplog):
        torch_ops.warn_once.cache_clear()
        for _ in range(2):
            check_integers("cuda", 8)
        lines = [record.getMessage() for record in caplog.records]
        message = "There are no integer kernels for this cuda device; ternary layers compute exactly."
        assert lines == ([] if recent else [message])
        torch_ops.warn_once.cache_clear()


class TestLayers:
    """Layers on a GPU."""

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

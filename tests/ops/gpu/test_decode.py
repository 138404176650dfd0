"""The linear ops of a GPU with either decoder."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from weights import TOLERANCE, new_weight, relative_error

from diffusers_terdit import TernaryLinear
from diffusers_terdit.ops import dequantize, reference
from diffusers_terdit.ops.gpu import choose, decode


class TestLinear:
    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_it_agrees_with_float64(self, dtype, granularity, decoder, device):
        packed, scale, bias = new_weight(36, 72, granularity, device)
        for shape, shift in (((33,), None), ((2, 3), bias), ((0,), bias)):
            x = torch.randn(*shape, 72, device=device).to(dtype)
            output = decode.linear(decoder, x, packed, scale, shift)
            expected = reference.ternary_linear(x.double(), packed, scale.double(), shift)
            assert output.dtype == dtype
            assert output.shape == (*shape, 36)
            assert shape == (0,) or relative_error(output, expected) < TOLERANCE[dtype]
            if shift is None:
                inner, _ = reference.split_scale(scale, dtype)
                found = decode.product(decoder, x, packed, inner)
                assert found.dtype == dtype
                torch.testing.assert_close(found, reference.product(x, packed, inner), rtol=1e-2, atol=1e-2)

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_a_float_weight_gives_the_bits_of_its_packed_form(self, dtype, decoder, device):
        layer = TernaryLinear(64, 32).to(device)
        x = torch.randn(5, 64, device=device).to(dtype)
        before = decode.linear(decoder, x, layer.weight, layer.weight_scale, None)
        layer.pack()
        assert torch.equal(decode.linear(decoder, x, layer.weight_packed, layer.weight_scale, None), before)

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_gradients_are_those_of_the_dense_layer(self, granularity, decoder, device):
        packed, scale, _ = new_weight(36, 72, granularity, device)
        x = torch.randn(7, 72, device=device, dtype=torch.float64, requires_grad=True)
        grad = torch.randn(7, 36, device=device)
        weight = dequantize(reference.unpack_ternary(packed), scale).double()
        expected = grad.double() @ weight
        found, weight_grad, scale_grad = decode.linear_backward(decoder, grad, x.detach().float(), packed, scale, True)
        assert relative_error(found, expected) < 1e-5
        expected = reference.linear_backward(grad, x.detach().float(), reference.unpack_ternary(packed), scale, True)
        assert relative_error(weight_grad, expected[1].double()) < 1e-5
        free = scale.double().requires_grad_()
        wide = free.repeat_interleave(8, 1) if granularity == 8 else free
        (x.detach() @ (reference.unpack_ternary(packed, torch.float64) * wide).T).backward(grad.double())
        assert relative_error(scale_grad, free.grad) < 1e-4

    def test_float16_does_not_overflow_before_the_scale(self, decoder, device):
        packed = torch.zeros(1, 4096, dtype=torch.uint8, device=device)  # all -1
        x = torch.full((2, 4096), 100.0, dtype=torch.float16, device=device)  # sums of 409,600
        for scale in (torch.tensor([0.01]), torch.full((4, 1), 0.01)):
            output = decode.linear(decoder, x, packed, scale.to(device), None)
            assert torch.equal(output.cpu(), torch.full((2, 4), -4096.0).half())

    @pytest.mark.parametrize("granularity", ["tensor", "row", 8])
    def test_float16_is_finite_where_its_result_is(self, granularity, decoder, device):
        for factor, outlier in itertools.product((1e-4, 1e2), (1, 1000)):
            packed, scale, bias = new_weight(64, 256, granularity, device)
            x = torch.randn(5, 256, device=device).half()
            x[:, ::64] *= outlier
            expected = reference.ternary_linear(x.double(), packed, factor * scale, bias)
            fits = expected.abs() < 60000
            output = decode.linear(decoder, x, packed, factor * scale, bias)
            assert fits.any()
            assert output[fits].isfinite().all()
            assert relative_error(output[fits], expected[fits]) < 2e-3

    def test_any_scale_in_float16(self, decoder, device):
        packed, _, _ = new_weight(8, 16, device=device)
        x = torch.randn(3, 16, device=device).half()
        for value in (0.0, -0.7, 1e-30, 3e4, float("nan"), float("inf")):
            scale = torch.tensor([value], device=device)
            expected = reference.ternary_linear(x.float(), packed, scale, None).half()
            output = decode.linear(decoder, x, packed, scale, None)
            torch.testing.assert_close(output, expected, rtol=2e-3, atol=1e-3, equal_nan=True)


class TestProducts:
    """Several weights of one input."""

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    def test_it_is_the_product_of_each(self, dtype, decoder, device):
        layers = [
            new_weight(36, 72, "tensor", device),
            new_weight(8, 72, "row", device),
            new_weight(16, 72, 8, device),
        ]
        for shape, kinds in (((33,), layers), ((2, 3), layers[:2]), ((2, 3), layers[:1]), ((0,), layers)):
            x = torch.randn(*shape, 72, device=device).to(dtype)
            weights = [packed for packed, _, _ in kinds]
            factors = [reference.split_scale(scale, dtype)[0] for _, scale, _ in kinds]
            found = decode.products(decoder, x, weights, factors)
            assert found.dtype == dtype
            assert found.shape == (*shape, sum(4 * len(packed) for packed in weights))
            for part, packed, factor in zip(
                found.split([4 * len(packed) for packed in weights], -1), weights, factors, strict=True
            ):
                wide = None if factor is None else factor.double()
                expected = reference.product(x.double(), packed, wide)
                assert not x.numel() or relative_error(part, expected) < TOLERANCE[dtype]

    def test_float32_in_pieces(self, decoder, device, monkeypatch):
        layers = [new_weight(36, 72, "tensor", device), new_weight(8, 72, "row", device)]
        x, asked = torch.randn(5, 72, device=device), []
        monkeypatch.setattr(decode, "takes_pieces", lambda *given: asked.append(given) or True)
        found = decode.products(decoder, x, [packed for packed, _, _ in layers], [None, None])
        expected = [reference.product(x.double(), packed, None) for packed, _, _ in layers]
        assert relative_error(found, torch.cat(expected, -1)) < 1e-6
        assert asked == [(x.device, torch.float32, False)]


class TestPieces:
    """float32 as three numbers of bfloat16."""

    @pytest.mark.parametrize("shape", [(33, 3072, 64), (2, 5, 256, 36), (0, 64, 8)], ids=str)
    def test_it_is_as_accurate_as_a_matmul_of_float32(self, shape, device):
        *rows, in_features, out_features = shape
        matrix = torch.randint(-1, 2, (in_features, out_features), device=device)
        x = torch.randn(*rows, in_features, device=device) * 10 ** torch.linspace(-6, 6, in_features, device=device)
        found, expected = decode.product_in_pieces(x, matrix.bfloat16()), x.double() @ matrix.double()
        assert found.dtype == torch.float32
        assert found.shape == (*rows, out_features)
        assert not found.numel() or relative_error(found, expected) < 3e-7
        assert not found.numel() or relative_error(found, expected) < 2 * relative_error(x @ matrix.float(), expected)

    def test_three_pieces_hold_every_float32(self, device):
        values = torch.randint(2**24, (1000, 1), device=device) * 2.0 ** torch.randint(
            -40, 40, (1000, 1), device=device
        )
        one = torch.ones(1, 4, dtype=torch.bfloat16, device=device)
        assert torch.equal(decode.product_in_pieces(values, one), values.expand(-1, 4))

    @pytest.mark.parametrize("granularity", ["tensor", "row"])
    def test_layers_of_float32_and_their_gradients(self, granularity, decoder, device, monkeypatch):
        packed, scale, bias = new_weight(36, 72, granularity, device)
        x, grad = torch.randn(5, 72, device=device), torch.randn(5, 36, device=device)
        asked = []
        monkeypatch.setattr(decode, "takes_pieces", lambda *given: asked.append(given) or True)
        output = decode.linear(decoder, x, packed, scale, bias)
        assert relative_error(output, reference.ternary_linear(x.double(), packed, scale.double(), bias)) < 1e-6
        found = decode.linear_backward(decoder, grad, x, packed, scale, True)
        ternary = reference.unpack_ternary(packed, torch.float64)
        expected = reference.linear_backward(grad.double(), x.double(), ternary, scale.double(), True)
        assert all(relative_error(a, b.double()) < 1e-5 for a, b in zip(found, expected, strict=True))
        assert asked[0] == (x.device, torch.float32, False)


class TestIntegerLinear:
    @pytest.mark.parametrize("bits", [16, 8])
    @pytest.mark.parametrize("rows", [1, 16, 17, 40])
    @pytest.mark.parametrize("shape", [(32, 64), (36, 65)], ids=str)
    def test_it_gives_the_references_bits(self, shape, rows, bits, kernels, device):
        group = 16 if shape[1] == 64 else 13
        cases = ("tensor", torch.float32), ("row", torch.bfloat16), ("row", torch.float16), (group, torch.float32)
        for granularity, dtype in cases:
            packed, scale, bias = new_weight(*shape, granularity, device)
            x, shift = torch.randn(rows, shape[1], device=device).to(dtype), None if granularity == "tensor" else bias
            expected = reference.integer_linear(x, packed, scale, shift, bits)
            found = decode.integer_linear(kernels, x, packed, scale, shift, bits)
            if dtype == torch.bfloat16 and device == "cpu":  # which Triton's interpreter does not round to
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
            else:
                assert torch.equal(found, expected)
        bytes_ = torch.randint(-128, 128, (rows, shape[1]), dtype=torch.int8, device=device)
        assert torch.equal(
            decode.integer_product(kernels.unpack, bytes_, packed), reference.integer_product(bytes_, packed)
        )

    def test_the_largest_codes_do_not_overflow(self, kernels, device):
        packed = torch.full((2, 65536), 0b10101010, dtype=torch.uint8, device=device)  # all +1
        x, scale = torch.ones(2, 65536, device=device), torch.ones(1, device=device)
        output = decode.integer_linear(kernels, x, packed, scale, None, 16)
        assert torch.equal(output.cpu(), torch.full((2, 8), 65536.0))

    def test_several_dimensions_and_none(self, kernels, device):
        packed, scale, _ = new_weight(32, 64, device=device)
        x = torch.randn(2, 3, 64, device=device)
        assert decode.integer_linear(kernels, x, packed, scale, None, 16).shape == (2, 3, 32)
        assert decode.integer_linear(kernels, x[0, 0], packed, scale, None, 16).shape == (32,)
        assert decode.integer_linear(kernels, x[:0], packed, scale, None, 8).shape == (0, 3, 32)

    @pytest.mark.parametrize("bits", [16, 8])
    def test_layers_of_one_input_round_it_once(self, bits, kernels, device):
        weights = [new_weight(32, 64, "row", device), (*new_weight(64, 64, "tensor", device)[:2], None)]
        x, roundings = torch.randn(2, 20, 64, device=device), []
        counted = kernels._replace(
            round_to_bytes=lambda *given: roundings.append(given) or kernels.round_to_bytes(*given)
        )
        lists = [list(parts) for parts in zip(*weights, strict=True)]
        found = decode.linears(counted, x, *lists, bits)
        assert all(map(torch.equal, found, reference.linears(x, *lists, bits)))
        assert len(roundings) == 1
        exact = decode.linears(kernels, x, *lists, None)
        assert all(torch.equal(a, decode.linear(kernels.unpack, x, *w)) for a, w in zip(exact, weights, strict=True))

    @pytest.mark.filterwarnings("ignore:invalid value encountered in")  # Triton's interpreter
    @pytest.mark.parametrize("bits", [16, 8])
    def test_a_row_that_is_not_finite(self, bits, kernels, device):
        packed, scale, _ = new_weight(32, 64, device=device)
        x = torch.randn(20, 64, device=device)
        x[3, 5], x[7, 0] = float("nan"), float("inf")
        output = decode.integer_linear(kernels, x, packed, scale, None, bits)
        assert output.isnan().all(1).nonzero().flatten().tolist() == [3, 7]
        assert output[[0, 1, 2, 4]].isfinite().all()


class TestFp8:
    """float8_e4m3fn: `torch._scaled_mm` runs on a CPU, too."""

    @pytest.mark.parametrize("granularity", ["tensor", "row"])
    @pytest.mark.parametrize("rows", [0, 1, 40])
    def test_it_is_the_product_of_what_was_rounded(self, rows, granularity, decoder, device):
        if device == "cuda" and torch.cuda.get_device_capability() < choose.FIRST_WITH_FP8:
            pytest.skip("needs a card with fp8")
        packed, scale, _ = new_weight(64, 256, granularity, device)
        x = torch.randn(rows, 256, device=device, dtype=torch.bfloat16) * 1000
        codes, step = reference.round_to_fp8(x)
        found = decode.fp8_product(decoder, codes, step, packed, scale)
        assert found.dtype == torch.bfloat16
        assert found.shape == (rows, 64)
        rounded = codes.double() * step.double()
        expected = reference.ternary_linear(rounded, packed, scale.double(), None)
        assert not rows or relative_error(found, expected) < 4e-3  # bfloat16
        assert not rows or relative_error(reference.fp8_product(codes, step, packed, scale), expected) < 4e-3
        exact = reference.ternary_linear(x.double(), packed, scale.double(), None)
        assert not rows or 5e-3 < relative_error(found, exact) < 4e-2

    def test_a_row_that_is_not_finite(self, decoder):
        packed, scale, _ = new_weight(32, 64)
        x = torch.randn(20, 64)
        x[3, 5], x[7, 0], x[9] = float("nan"), float("inf"), 0
        output = decode.fp8_product(decoder, *reference.round_to_fp8(x), packed, scale)
        assert output.isnan().any(1).nonzero().flatten().tolist() == [3, 7]
        assert not output[9].any()


class _Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write; not those of matmuls, views and what only allocates."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("mm", "empty", "empty_like", "new_empty", "device"):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, output)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.nbytes for t in tensors)
        return output


class TestTraffic:
    """What a training step moves, counted on fake tensors of a GPU: kernels by what they read and write."""

    LAYERS = [(3072, 3072), (8192, 3072), (8192, 3072), (3072, 8192)]  # of 4.2B

    def inputs(self, rows, out_features, in_features):
        with torch.device("cuda"):
            scale, weight = torch.empty(1), torch.empty(out_features, in_features)
            packed = torch.empty(out_features // 4, in_features, dtype=torch.uint8)
            x = torch.empty(rows, in_features, dtype=torch.bfloat16)
            return x, torch.empty(rows, out_features, dtype=torch.bfloat16), weight, packed, scale

    def step(self, *shape):
        with FakeTensorMode():
            x, grad, weight, packed, scale = self.inputs(*shape)
            with _Traffic() as traffic:

                def unpack(packed, dtype, scale=None):
                    out = torch.empty(4 * len(packed), packed.shape[1], dtype=dtype, device="cuda")
                    traffic.bytes += packed.nbytes + out.nbytes
                    return out

                traffic.bytes += 2 * weight.nbytes + packed.nbytes  # `pack`: two passes
                decode.linear(unpack, x, packed, scale, None)
                gradients = decode.linear_backward(unpack, grad, x, packed, scale, True)
                assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]
        return traffic.bytes

    def plain_step(self, *shape):
        with FakeTensorMode():
            x, grad, weight, _, scale = self.inputs(*shape)
            with _Traffic() as traffic:
                reference.float_linear(x, weight, scale, None)
                ternary = reference.round_to_ternary(weight, "tensor").to(grad.dtype)
                reference.linear_backward(grad, x, ternary, scale, True)
        return traffic.bytes

    def around_integers(self, layers, rows, bits, in_one_pass):
        """Bytes per layer, of several of one input, that move before and after the matmuls of bytes."""
        with FakeTensorMode(), torch.device("cuda"):
            inputs = [self.inputs(rows, *layer) for layer in layers]
            with _Traffic() as traffic:

                def one_pass(read, *made):
                    traffic.bytes += sum(tensor.nbytes for tensor in (*read, *made))
                    return made

                def round_to_bytes(x, bits):
                    codes = torch.empty(rows * bits // 8, x.shape[1], dtype=torch.int8)
                    return one_pass([x], codes, torch.empty(rows, 1))

                def multiply(codes, packed):
                    return torch.empty(len(codes), 4 * len(packed), dtype=torch.int32)

                def scale_sums(sums, step, scale, bias, dtype):
                    return one_pass([sums, step, scale], torch.empty(rows, sums.shape[1], dtype=dtype))[0]

                ways = (round_to_bytes, multiply, scale_sums) if in_one_pass else (reference.round_to_bytes, multiply)
                weights = [(packed, scale, None) for _, _, _, packed, scale in inputs]
                found = reference.integer_linears_by_bytes(inputs[0][0], weights, bits, *ways)
                assert [output.shape[1] for output in found] == [layer[0] for layer in layers]
        return traffic.bytes / len(layers)

    @pytest.mark.parametrize("bits", [8, 16])
    def test_a_seventh_around_the_integers(self, bits):
        gate, up = (8192, 3072), (8192, 3072)
        together = self.around_integers([gate, up], 4096, bits, True)
        alone = self.around_integers([gate], 4096, bits, True)
        values, outputs = 4096 * 3072, 4096 * 8192
        read, written, sums = 2, bits // 8, bits // 2  # bytes for each; the output has two
        assert together == pytest.approx(values * (read + written) / 2 + outputs * (sums + 2), rel=1e-3)
        assert alone == pytest.approx(together + values * (read + written) / 2, rel=1e-3)
        assert together < 0.14 * self.around_integers([gate], 4096, bits, False)

    def test_a_tenth_of_what_the_reference_moves(self):
        weights = sum(n * k for n, k in self.LAYERS)
        # for each weight 4 bytes for the mean, 4.25 to pack, and twice 2.25 to decode
        assert sum(self.step(16, *layer) for layer in self.LAYERS) / weights < 13
        found = [sum(step(2048, *layer) for layer in self.LAYERS) for step in (self.step, self.plain_step)]
        assert found[0] / found[1] < 0.12

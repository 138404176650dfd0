"""The other ways to multiply by a weight on a CPU: dense ones, of which the fastest is tried out, and other packages.

A peer is a name, the dtype of its input, the packages that it needs, and a function that prepares a weight, (N, K)
float32 = one scale times {-1, 0, +1}, and returns x (M, K) -> (M, N). None of them has a bias.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn


Product = Callable[[Tensor], Tensor]
TRIALS = 7  # calls of each candidate, of which the fastest counts
HOPELESS = 30  # times the fastest, on one row: not tried with more
CHOSEN: dict[tuple, str] = {}  # the fastest, for all layers of a shape


class Peer(NamedTuple):
    name: str
    dtype: str
    needs: tuple[str, ...]
    build: Callable[[Tensor], Product]

    def is_installed(self) -> bool:
        try:
            return all(find_spec(name) for name in self.needs)
        except ModuleNotFoundError:  # the package that `name` is in
            return False


# Dense


def one_dnn(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T by oneDNN, which `F.linear` calls for bfloat16, and never for float32."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def one_dnn_int8(a: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    """Return the product of int8 codes in float32."""
    tail = (None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(a, 1.0, 0, packed, ones, zeros, *tail)


def candidates(a: Tensor, b: Tensor, prepack: bool) -> dict[str, Callable[[], Product]]:
    """Return what prepares b, (N, K), for a product with a, (M, K), by name; some libraries refuse some shapes."""
    if a.dtype == torch.int8:
        packed = partial(torch.ops.onednn.qlinear_prepack, b, list(a.shape))
        ends = torch.ones(len(b)), torch.zeros(len(b), dtype=torch.int64)
        return {
            "torch._int_mm": lambda: lambda x: torch._int_mm(x, b.T),
            "oneDNN": lambda: partial(lambda packed, x: one_dnn_int8(x, packed, *ends), packed()),
        }
    found: dict[str, Callable[[], Product]] = {
        "F.linear": lambda: lambda x: nn.functional.linear(x, b),
        "oneDNN": lambda: lambda x: one_dnn(x, b),
    }
    if prepack:
        reordered = partial(torch.ops.mkldnn._reorder_linear_weight, b, len(a))
        found["oneDNN, prepacked"] = lambda: partial(lambda packed, x: one_dnn(x, packed), reordered())
    return found


def fastest(a: Tensor, b: Tensor, prepack: bool) -> str:
    """Return the name of the fastest candidate, by processor time with one thread; tried out once for a shape."""
    key = (a.shape, a.stride(), b.shape, b.stride(), a.dtype, prepack, torch.get_num_threads())
    if key not in CHOSEN:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        products, times = {}, {}
        for name, prepare in candidates(a, b, prepack).items():
            with contextlib.suppress(RuntimeError):  # no such primitive
                product = prepare()
                times[name] = []
                for _ in range(4):  # the first call compiles
                    start = clock()
                    product(a[:1])
                    times[name].append(clock() - start)
                products[name] = product
        # oneDNN has a plain loop where it has no kernel for a processor: half a minute for 512 rows
        least = min(min(times[name]) for name in products)
        products = {name: product for name, product in products.items() if min(times[name]) < HOPELESS * least}
        for name, product in products.items():
            product(a)
            times[name] = []
        for _ in range(TRIALS):  # in turns, on a machine that others use
            for name, product in products.items():
                start = clock()
                product(a)
                times[name].append(clock() - start)
        CHOSEN[key] = min(products, key=lambda name: min(times[name]))
    return CHOSEN[key]


class BestDense:
    """x (M, K) -> x @ weight.T by what is fastest for M rows, prepared at the first call; int8 codes give a float sum.

    `names` holds what was chosen by number of rows.
    """

    def __init__(self, weight: Tensor):
        self.weight, self.names, self.products = weight, {}, {}

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        if rows not in self.products:
            self.names[rows] = fastest(x, self.weight, True)
            self.products[rows] = candidates(x, self.weight, True)[self.names[rows]]()
        return self.products[rows](x)


def int8_codes(weight: Tensor) -> Tensor:
    """Return -1, 0 or +1 of a weight that is one scale times these, int8."""
    return weight.sign().to(torch.int8)


class Swapped(nn.Module):
    """A linear layer without gradients that multiplies as a peer does."""

    def __init__(self, linear: nn.Linear, build: Callable[[Tensor], Product]):
        super().__init__()
        self.product, self.bias = build(linear.weight.detach()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        output = self.product(x.reshape(-1, x.shape[-1])).unflatten(0, x.shape[:-1])
        return output if self.bias is None else output.add_(self.bias)


class _BestProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return best_product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return best_product(grad, weight.T), best_product(grad.T, x.T)


def best_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T by what is fastest, of matrices that are not there before the call."""
    return candidates(a, b, False)[fastest(a, b, False)]()(a)


class BestDenseLinear(nn.Linear):
    """A linear layer to train whose output and two gradients are each computed by what is fastest."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):
            x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
        output = _BestProducts.apply(x.reshape(-1, x.shape[-1]), weight).unflatten(0, x.shape[:-1])
        return output if self.bias is None else output + self.bias.to(output.dtype)


def train_on_best_dense(model: nn.Module) -> nn.Module:
    """Let every `nn.Linear` of a model be a `BestDenseLinear`, in place, with the parameters that it has."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = BestDenseLinear
    return model


def swap(model: nn.Module, build: Callable[[Tensor], Product]) -> nn.Module:
    """Let every `nn.Linear` of a model multiply as a peer does, in place, one after the other."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(name, Swapped(layer, build))
    return model


# Other packages


def of_module(change: Callable[[nn.Module], Callable | None], dtype: torch.dtype, weight: Tensor) -> Product:
    """Return a linear layer after a package has changed the model that it is in."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    with torch.inference_mode(False), torch.no_grad():
        layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
        model = nn.Sequential(layer)
        return change(model) or model


def sdnq(model: nn.Module, **settings) -> nn.Module:
    """With groups of the size that it chooses; its int8 products are OpenVINO's where that is installed."""
    from sdnq.quantizer import sdnq_post_load_quant

    return sdnq_post_load_quant(model, **settings)


def torchao(model: nn.Module) -> Callable:
    """Compiled, as its pages recommend; without, its int8 takes twice as long on a CPU."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, dynamic=False, recompile_limit=1000)  # of all layers together


def quanto(model: nn.Module, weights: str) -> None:
    from optimum.quanto import freeze, quantize

    quantize(model, weights=weights)
    freeze(model)


def bitsandbytes_nf4(model: nn.Sequential) -> None:
    from bitsandbytes.nn import Linear4bit

    layer = model[0]
    outputs, inputs = layer.weight.shape
    model[0] = Linear4bit(inputs, outputs, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4")
    model[0].load_state_dict(layer.state_dict())
    model[0].to("cpu")  # this rounds


def gguf(model: nn.Sequential) -> None:
    """Four bits, decoded in every call by diffusers; its reader of files makes such layers."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    weight, kind = model[0].weight, GGMLQuantizationType.Q4_0
    packed = torch.from_numpy(quants.quantize(weight.float().numpy(), kind))
    layer = GGUFLinear(weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype)
    layer.weight = GGUFParameter(packed, quant_type=kind)
    model[0] = layer


def four_to_a_byte(codes: Tensor) -> Tensor:
    """Return neighbors along the last dimension in one byte, the first in its lowest bits."""
    return sum(codes[..., place::4].to(torch.uint8) << 2 * place for place in range(4))


def openvino(weight: Tensor, two_bits: bool) -> Product:
    import openvino as ov
    from openvino import opset13 as op

    x = op.parameter([-1, weight.shape[1]], ov.Type.f32)
    if two_bits:
        packed = four_to_a_byte(int8_codes(weight) + 1).numpy()
        tensor = ov.Tensor(packed, list(weight.shape), ov.Type.u2)  # of `packed`, which ends with this function
        codes = op.convert(op.constant(tensor, shared_memory=False), ov.Type.f32)
        one, scale = (op.constant(number.numpy()) for number in (torch.ones(()), weight.abs().max()))
        matrix = op.multiply(op.subtract(codes, one), scale)
    else:
        matrix = op.constant(weight.numpy())
    model = ov.Model([op.matmul(x, matrix, False, True)], [x])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda x: torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0])


def onnx_runtime(weight: Tensor, accuracy_level: int | None) -> Product:
    """`MatMulNBits` of two bits with this level (1: float32, 4: int8) and a scale for 128 inputs; `None`: dense."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    (outputs, inputs), group = weight.shape, 128
    if accuracy_level is None:
        tensors = {"W": weight.T.contiguous()}
        node = helper.make_node("MatMul", ["X", *tensors], ["Y"])
    else:
        codes = int8_codes(weight) + 2  # 2 stands for zero
        packed = four_to_a_byte(codes).reshape(outputs, inputs // group, group // 4)
        tensors = {"W": packed, "S": weight.abs().max().repeat(outputs * inputs // group)}
        settings = {"N": outputs, "K": inputs, "bits": 2, "block_size": group, "accuracy_level": accuracy_level}
        node = helper.make_node("MatMulNBits", ["X", *tensors], ["Y"], domain="com.microsoft", **settings)
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", size])
        for name, size in (("X", inputs), ("Y", outputs))
    )
    arrays = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "layer", [x], [y], arrays), opset_imports=opsets, ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the others' turns need the cores
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"X": x.numpy()})[0])


def of_package(name: str, needs: str, change: Callable, *dtypes: str) -> list[Peer]:
    return [Peer(name, dtype, (needs,), partial(of_module, change, getattr(torch, dtype))) for dtype in dtypes]


SDNQ_INT8 = partial(sdnq, weights_dtype="int8", use_quantized_matmul=True)
ONNX = ("onnx", "onnxruntime")
PEERS = [
    *of_package("SDNQ int8", "sdnq", SDNQ_INT8, "float32", "bfloat16"),
    *of_package("SDNQ int4", "sdnq", partial(sdnq, weights_dtype="int4"), "float32"),
    *of_package("SDNQ int2", "sdnq", partial(sdnq, weights_dtype="int2"), "float32"),
    *of_package("torchao int8", "torchao", torchao, "float32", "bfloat16"),
    *of_package("quanto int8", "optimum.quanto", partial(quanto, weights="qint8"), "float32"),
    *of_package("bitsandbytes nf4", "bitsandbytes", bitsandbytes_nf4, "float32"),
    *of_package("GGUF Q4_0 in diffusers", "gguf", gguf, "float32"),
    Peer("OpenVINO u2", "float32", ("openvino",), partial(openvino, two_bits=True)),
    Peer("OpenVINO dense", "float32", ("openvino",), partial(openvino, two_bits=False)),
    Peer("ONNX Runtime 2 bits", "float32", ONNX, partial(onnx_runtime, accuracy_level=1)),
    Peer("ONNX Runtime 2 bits, int8", "float32", ONNX, partial(onnx_runtime, accuracy_level=4)),
    Peer("ONNX Runtime dense", "float32", ONNX, partial(onnx_runtime, accuracy_level=None)),
]


def installed() -> list[Peer]:
    return [peer for peer in PEERS if peer.is_installed()]

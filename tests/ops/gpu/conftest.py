"""The GPU's path. Here the Triton kernel runs in Triton's interpreter and the matmuls on the CPU; tests marked `gpu`
need a CUDA device and run the real thing.
"""

import os

import pytest
import torch

from diffusers_terdit.ops.gpu import decode


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture(scope="module")
def triton_module():
    """The kernel, interpreted where there is no GPU to compile it for."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setitem(os.environ, "TRITON_INTERPRET", "1")  # read when a kernel is defined
        from diffusers_terdit.ops.gpu import triton_kernels
    return triton_kernels


@pytest.fixture
def triton_kernels(request, triton_module):
    """The kernel, for the device of the test: compiled for a GPU, it takes no tensors of the CPU."""
    device = request.node.callspec.params.get("device", "cpu") if hasattr(request.node, "callspec") else "cpu"
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter runs where there is no GPU")
    return triton_module


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()  # after eight graphs of a function, `fullgraph=True` raises
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["triton", "pytorch"])
def kernels(request):
    """Both sets of kernels."""
    if request.param == "pytorch":
        return decode.IN_PYTORCH
    triton_kernels = request.getfixturevalue("triton_kernels")
    return decode.Kernels(*(getattr(triton_kernels, name) for name in decode.Kernels._fields))


@pytest.fixture
def decoder(kernels):
    """Both ways to decode a weight."""
    return kernels.unpack

"""CUDA graphs of a whole forward pass: the host starts one graph instead of every kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def capture(function: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """Return a function's kernels as a CUDA graph to replay, and its output, which each replay writes again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles and tries what a first call compiles and tries
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = function()
    return graph.replay, output


def graphed(function: Callable[..., tuple[Tensor]], device: torch.device) -> Callable[..., tuple[Tensor]]:
    """Return a function that replays CUDA graphs of another, one for each set of shapes, dtypes and other arguments.

    Its outputs are copies, so that a scheduler may keep them. The graphs take turns and share their memory.
    """
    graphs, pool = {}, torch.cuda.graph_pool_handle()

    def call(**arguments: Any) -> tuple[Tensor]:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in arguments.items() if name not in tensors}
        key = (*((name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()), *others.items())
        if key not in graphs:
            inputs = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
            graphs[key] = inputs, *capture(lambda: function(**inputs, **others), pool)
        inputs, replay, outputs = graphs[key]
        for name, tensor in tensors.items():
            inputs[name].copy_(tensor, non_blocking=True)
        replay()
        return tuple(output.clone() for output in outputs)

    return call

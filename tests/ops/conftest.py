"""The op tests run on garbage: what a kernel forgets to write shows as NaN, 255 or 127, not as a lucky zero."""

import pytest
import torch

from diffusers_terdit.ops import torch_ops
from diffusers_terdit.ops.cpu import scratch


@pytest.fixture(autouse=True)
def _garbage_in_new_memory(monkeypatch):
    monkeypatch.setattr(scratch, "buffers", type(scratch.buffers)())  # no buffer left over from another test
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills what `torch.empty` returns with NaN or the largest integer
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _no_decision_from_another_test():
    torch_ops.decide.cache_clear()
    yield
    torch_ops.decide.cache_clear()


@pytest.fixture
def set_num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)

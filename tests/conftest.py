"""Tiny real models and pipelines that every test may ask for; no weight is zero, so that each shows in the output."""

import pytest
import torch

from diffusers_terdit import TerDiTPipeline, TerDiTTransformer2DModel
from diffusers_terdit.ops import torch_ops
from diffusers_terdit.ops.cpu import choose
from diffusers_terdit.pipelines.schedulers import default_scheduler
from fake_hub import fake_hub  # noqa: F401 - a fixture
from tiny import randomize, tiny_vae


DIGITS = ["zero, nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """Init arguments of a network of 50 thousand weights that takes 8x8 latents."""
    return {
        "sample_size": 8,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "num_classes": 10,
        "ffn_dim": 64,
    }


@pytest.fixture
def tiny_model(tiny_config):
    """`tiny_model(weight_format="float", seed=0, **init_arguments)`: in eval mode, same weights for the same seed."""

    def make(weight_format="float", seed=0, **init_arguments):
        torch.manual_seed(seed)
        model = randomize(TerDiTTransformer2DModel(**{**tiny_config, **init_arguments}), seed).eval()
        return model.pack() if weight_format == "packed" else model

    return make


@pytest.fixture
def tiny_inputs():
    """`tiny_inputs(batch=2, height=8, width=8, channels=4, dtype=torch.float32)`: seeded arguments of `forward`."""

    def make(batch=2, height=8, width=8, channels=4, dtype=torch.float32):
        generator = torch.Generator().manual_seed(1)
        return {
            "hidden_states": torch.randn(batch, channels, height, width, generator=generator).to(dtype),
            "timestep": torch.arange(batch) * 300 + 7,
            "class_labels": torch.arange(batch) * 3 % 11,
        }

    return make


@pytest.fixture(name="tiny_vae")
def _tiny_vae():
    return tiny_vae()


@pytest.fixture
def tiny_pipeline(tiny_model, tiny_vae):
    """`tiny_pipeline(vae=False, weight_format="float", ..., **init_arguments)`: RGB pixels, or latents with a VAE."""

    def make(
        vae=False, weight_format="float", scheduler=None, id2label=None, guidance_channels=None,
        sampling_defaults=None, **init_arguments,
    ):  # fmt: skip
        transformer = tiny_model(weight_format, **{"in_channels": 4 if vae else 3, **init_arguments})
        pipe = TerDiTPipeline(
            transformer=transformer,
            scheduler=default_scheduler() if scheduler is None else scheduler,
            vae=tiny_vae if vae else None,
            id2label={str(i): name for i, name in enumerate(DIGITS)} if id2label is None else id2label,
            guidance_channels=guidance_channels,
            sampling_defaults=sampling_defaults,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def no_integer_kernels(monkeypatch):
    """A machine without numba."""
    monkeypatch.setattr(choose, "integer_kernels", dict)
    monkeypatch.setattr(choose, "has_numba", lambda: False)
    for function in (torch_ops.decide, torch_ops.warn_once):
        function.cache_clear()
    yield
    for function in (torch_ops.decide, torch_ops.warn_once):
        function.cache_clear()

"""A pushed pipeline, and a folder of its own for every test."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sample():
    """`sample(pipe)`: two images, the same from the same weights."""

    def draw(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe([3, "seven"], num_inference_steps=2, generator=generator, output_type="pt").images

    return draw


@pytest.fixture
def pushed(fake_hub, tiny_pipeline):
    """A packed pipeline with a VAE, in the repository `user/terdit`."""
    pipe = tiny_pipeline(vae=True, weight_format="packed")
    pipe.push_to_hub("user/terdit", token=fake_hub.token)
    return pipe

"""A file of Inception weights that follow a formula, for tests of the network and of what measures with it."""

import zlib

import numpy as np
import pytest
import torch

from diffusers_terdit.evaluation.inception import InceptionV3


def formula_weight(name, shape):
    """Uniform numbers seeded by the tensor's name, scaled so that activations keep their size."""
    uniform = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)
    if len(shape) > 1:
        values = (uniform - 0.5) * np.sqrt(24 / np.prod(shape[1:]))
    elif name.endswith(("running_var", "bn.weight")):
        values = 0.5 + uniform
    else:
        values = uniform - 0.5
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Names and shapes of the tensors, from the error that an empty file gets."""
    empty = tmp_path_factory.mktemp("inception") / "empty.pth"
    torch.save({}, empty)
    found = {}

    class Recorder(InceptionV3):
        def state_dict(self):
            state = super().state_dict()
            found.update({name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name})
            return state

    with pytest.raises(ValueError, match="is missing"):
        Recorder(empty)
    return found


@pytest.fixture(scope="module")
def weights_path(shapes, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({name: formula_weight(name, shape) for name, shape in shapes.items()}, path)
    yield path
    path.unlink()  # 96 MB

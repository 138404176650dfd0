"""FID's Inception gives what torch-fidelity's does, on weights that a formula makes: the published ones are not here.

`data/inception-vectors.safetensors` holds what torch-fidelity 0.4.0's `FeatureExtractorInceptionV3` gives for the
weights and images below: `2048` as features, the first 7 channels of its `Mixed_6d.branch1x1` (a forward hook),
flattened in the order (height, width, channel), as spatial, `logits_unbiased` as logits. Made with torch 2.13.0 on a
CPU; this package's network gave the same bits there.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusers_terdit.evaluation import image_statistics, network_name
from diffusers_terdit.evaluation.inception import InceptionV3, resize
from tiny_inception import formula_weight, shapes, weights_path  # noqa: F401 - fixtures


VECTORS = Path(__file__).parents[1] / "data" / "inception-vectors.safetensors"
SIZES = {0: (40, 56), 1: (320, 301)}  # one that is enlarged, one that shrinks


def formula_images(seed, count=2):
    return np.random.RandomState(seed).randint(0, 256, (count, *SIZES[seed], 3)).astype(np.uint8)


def to_network(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def state(shapes):
    """Tensors of the right names and shapes whose file is small."""
    return {name: torch.ones(1).expand(shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def network(weights_path):
    return InceptionV3(weights_path)


class TestNetwork:
    @pytest.mark.parametrize("seed", SIZES)
    def test_it_gives_what_torch_fidelitys_network_gives(self, network, seed):
        expected = load_file(VECTORS)
        found = network(to_network(formula_images(seed)))
        assert {name: tuple(value.shape) for name, value in found.items()} == {
            "features": (2, 2048),
            "spatial": (2, 2023),
            "logits": (2, 1008),
        }
        for name, value in found.items():  # the two images differ by more than 1e-1 in each
            torch.testing.assert_close(value, expected[f"{seed}.{name}"], rtol=1e-4, atol=1e-3)

    def test_it_has_the_tensors_of_the_published_file(self, shapes):
        assert len(shapes) == 94 * 5 + 2  # convolutions with four tensors of their norm; classifier
        assert sum(np.prod(shape) for shape in shapes.values()) == 23_885_392
        assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
        assert shapes["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
        assert shapes["Mixed_7c.branch3x3dbl_3b.bn.running_var"] == (384,)
        assert shapes["fc.weight"] == (1008, 2048)

    def test_it_never_trains(self, network):
        assert not network.train().Mixed_5b.branch1x1.bn.training
        assert not any(parameter.requires_grad for parameter in network.parameters())

    def test_it_measures_images(self, network):
        found = image_statistics(formula_images(0), network, batch_size=1)
        assert found.features.width == 2048
        assert found.spatial.width == 2023
        assert found.network == network_name(network)
        torch.testing.assert_close(found.vectors[:2], load_file(VECTORS)["0.features"], rtol=1e-4, atol=1e-3)


class TestResize:
    @pytest.mark.parametrize("size", [7, 32, 299, 512])
    def test_pixels_lie_where_tensorflow_1_puts_them(self, size):
        image = np.random.RandomState(size).random_sample((size, size + 1))
        found = resize(torch.from_numpy(image)[None, None], 299)[0, 0].numpy()

        def at(row, column):
            y, x = row * size / 299, column * (size + 1) / 299
            top, left = int(y), int(x)
            bottom, right = min(top + 1, size - 1), min(left + 1, size)
            upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            return upper * (1 - (y - top)) + lower * (y - top)

        for row, column in [(0, 0), (1, 1), (17, 203), (150, 149), (297, 298), (298, 298)]:
            assert found[row, column] == pytest.approx(at(row, column), abs=1e-4)

    def test_an_image_of_the_size_stays(self):
        image = torch.rand(1, 3, 299, 299)
        assert torch.equal(resize(image, 299), image)


class TestWeightsFile:
    def test_the_name_says_whether_it_is_the_published_file(self, network, weights_path, monkeypatch):
        digest = hashlib.sha256(weights_path.read_bytes()).hexdigest()
        assert network_name(network) == f"unknown-inception-v3 (sha256 {digest[:12]}...)"
        monkeypatch.setattr("diffusers_terdit.evaluation.inception.KNOWN_SHA256", digest[:8])
        assert network_name(InceptionV3(weights_path)) == f"inception-2015-12-05 (sha256 {digest[:12]}...)"

    def test_half_precision_becomes_float32_and_counters_of_training_steps_are_ignored(self, state, tmp_path):
        half = {name: torch.ones(1).half().expand(value.shape) for name, value in state.items()}
        counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(7)}
        torch.save(half | counters, tmp_path / "weights.pth")
        network = InceptionV3(tmp_path / "weights.pth")
        assert network.Mixed_5b.branch1x1.bn.num_batches_tracked == 0
        assert all(value.dtype == torch.float32 for value in network.parameters())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"fc.bias": None}, "fc.bias is missing"),
            ({"AuxLogits.fc.bias": torch.zeros(1000)}, "AuxLogits.fc.bias is not Inception's"),
            ({"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight is \(1000, 2048\) instead of \(1008, 2048\)"),
        ],
    )
    def test_wrong_tensors_are_named(self, state, tmp_path, change, message):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        torch.save(changed, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match=f"weights.pth does not hold FID's Inception: {message}"):
            InceptionV3(tmp_path / "weights.pth")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", torch.nn.Linear(2, 2)], ids=repr)
    def test_an_unreadable_file_or_a_pickle_with_code_is_an_oserror(self, tmp_path, content):
        path = tmp_path / "broken.pth"
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(OSError, match=r"broken\.pth is no readable file of tensors"):
            InceptionV3(path)

"""Statistics of images, their file, ADM's reference files, and the comparison of two sets."""

import contextlib
import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_terdit.evaluation import (
    ImageStatistics,
    compare,
    fingerprint,
    frechet_distance,
    image_statistics,
    inception_score,
    network_name,
    open_samples,
    precision_and_recall,
)
from diffusers_terdit.evaluation.digits import digits_classifier
from tiny_images import (
    Projection,
    Returning,
    precision_and_recall_by_scikit_learn,
)


def outputs_of(network, images):
    with torch.no_grad():
        return network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


class TestImageStatistics:
    @pytest.mark.parametrize("batch_size", [7, 64, 5000])
    def test_batches_do_not_matter(self, digits, batch_size):
        network = Projection().eval()
        found = image_statistics(digits[:100], network, batch_size)
        outputs = outputs_of(network, digits[:100])
        assert found.count == found.features.count == found.spatial.count == 100
        rows = outputs["features"].double().numpy()
        np.testing.assert_allclose(found.features.covariance, np.cov(rows, rowvar=False), atol=1e-6)
        np.testing.assert_allclose(found.spatial.mean, outputs["spatial"].double().mean(0), atol=1e-6)
        assert found.inception_score == pytest.approx(inception_score(outputs["logits"].double().softmax(1)), rel=1e-5)
        torch.testing.assert_close(found.vectors, outputs["features"])
        assert found.fingerprint == fingerprint(digits[:100])

    def test_a_network_may_give_features_alone(self, digits):
        found = image_statistics(digits[:10], Projection(extras=False))
        assert found.spatial is found.inception_score is None
        assert found.features.width == 12

    @pytest.mark.parametrize(("most", "kept"), [(0, 0), (5, 5), (12, 12), (99, 20)])
    def test_the_first_vectors_are_kept(self, digits, most, kept):
        whole = image_statistics(digits[:20], Projection()).vectors
        found = image_statistics(digits[:20], Projection(), batch_size=8, max_vectors=most).vectors
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, whole[:kept])

    def test_pixels_are_in_the_order_and_range_that_networks_expect(self, digits):
        images = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3) * 7
        seen = []
        image_statistics(images, Returning(lambda pixels: (seen.append(pixels), pixels.flatten(1))[1]))
        assert seen[0].shape == (2, 3, 2, 3)
        assert seen[0].dtype == torch.float32
        assert seen[0][1, 2, 0, 1] == pytest.approx(images[1, 0, 1, 2] / 255)
        assert seen[0].is_contiguous()
        # gray ones are repeated for a network that says so
        network = Returning(lambda pixels: pixels.mean((2, 3)))
        assert image_statistics(digits[:9], network).features.width == 1
        network.channels = 3
        found = image_statistics(digits[:9], network)
        assert torch.equal(found.vectors[:, 0], found.vectors[:, 2])

    def test_memory_maps_are_read_slice_by_slice(self, digits, tmp_path):
        class Slices:
            shape, dtype = digits[:100].shape, digits.dtype
            taken = []

            def __getitem__(self, rows):
                self.taken.append((rows.start, rows.stop))
                return digits[:100][rows]

        found = image_statistics(Slices(), Projection(), batch_size=40)
        assert Slices.taken == [(0, 40), (40, 80), (80, 120)]
        np.savez(tmp_path / "samples.npz", digits[:100])
        mapped = image_statistics(open_samples(tmp_path / "samples.npz"), Projection(), batch_size=40)
        assert torch.equal(mapped.features.covariance, found.features.covariance)
        assert mapped.fingerprint == found.fingerprint

    def test_modules_are_evaluated_and_left_as_they_were(self, digits):
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.BatchNorm1d(64)).train()
        network[2].eval()
        first, second = image_statistics(digits[:20], network), image_statistics(digits[:20], network)
        assert torch.equal(first.vectors, second.vectors)
        assert [module.training for module in network.modules()] == [True, True, True, False]
        assert network[2].num_batches_tracked == 0

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            (lambda pixels: [pixels], "a dict with `features`, got list"),
            (lambda pixels: pixels.flatten(1)[:4], r"`features` must be \(5, D\) for 5 images, got \(4, 64\)"),
            (lambda pixels: {"features": pixels.flatten(1), "spatial": pixels}, r"`spatial` must be \(5, D\)"),
            (lambda pixels: {"features": pixels.flatten(1), "logits": pixels}, r"`logits` must be \(5, D\)"),
            (lambda pixels: pixels.flatten(1).log() * 0, "Features of 5 rows hold NaN or infinity: rows 0, 1"),
        ],
    )
    def test_impossible_networks_are_refused(self, digits, outputs, message):
        with pytest.raises(ValueError, match=message):
            image_statistics(digits[:5], Returning(outputs))

    def test_a_network_is_known_by_name_and_weights(self, digits):
        network = Projection()
        name = network_name(network)
        assert name.startswith("projection (sha256 ")
        assert network_name(Projection(seed=1)) != name
        assert network_name(Projection().half()) != name
        assert network_name(network.train()) == name
        assert network_name(nn.Flatten()).startswith("Flatten (sha256 ")
        network.weights_sha256 = "0123456789abcdef"
        assert network_name(network) == "projection (sha256 0123456789ab...)"
        assert image_statistics(digits[:4], network, name="mine").network == "mine (sha256 0123456789ab...)"

    @pytest.mark.parametrize("chunk", [1, 3, 100])
    def test_fingerprints_are_of_the_pixels(self, digits, chunk):
        images = digits[:5]
        expected = fingerprint(images)
        assert fingerprint(images, chunk) == expected
        assert fingerprint(np.asfortranarray(images), chunk) == expected
        changed = images.copy()
        changed[4, 7, 7, 0] ^= 1
        for other in (changed, images.reshape(5, 4, 16, 1), images[::-1]):
            assert fingerprint(other) != expected


class TestCompare:
    def test_keys_and_values(self, digits):
        samples = image_statistics(digits[:400], Projection())
        reference = image_statistics(digits[400:1000], Projection())
        found = compare(samples, reference)
        assert list(found) == ["fid", "sfid", "inception_score", "precision", "recall"]
        assert found["fid"] == pytest.approx(frechet_distance(samples.vectors, reference.vectors), rel=1e-6)
        assert found["sfid"] == frechet_distance(samples.spatial, reference.spatial)
        assert found["inception_score"] == samples.inception_score
        expected = precision_and_recall_by_scikit_learn(samples.vectors, reference.vectors)
        assert (found["precision"], found["recall"]) == pytest.approx(expected, abs=1e-12)

    def test_what_a_set_lacks_is_left_out(self, digits):
        whole, bare = (Projection(extras=extras) for extras in (True, False))
        assert set(compare(*[image_statistics(digits[:50], bare)] * 2)) == {"fid", "precision", "recall"}
        full = image_statistics(digits[:50], whole)
        without = image_statistics(digits[:50], whole, max_vectors=0)
        assert set(compare(full, without)) == {"fid", "sfid", "inception_score"}

    def test_a_copy_is_perfect_and_damage_shows(self, digits):
        def blurred(images):
            padded = np.pad(images.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
            shifted = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
            return np.mean(shifted, axis=0).astype(np.uint8)

        def shuffled(images):
            order = np.random.RandomState(0).permutation(64)
            return images.reshape(-1, 64)[:, order].reshape(images.shape)

        network = digits_classifier()
        reference = image_statistics(digits[:900], network)
        copy, fresh, blur, shuffle = (
            compare(image_statistics(images, network), reference)
            for images in (digits[:900][::-1], digits[900:], blurred(digits[:900]), shuffled(digits[:900]))
        )
        assert abs(copy["fid"]) < 1e-3
        assert (copy["precision"], copy["recall"]) == (1, 1)
        assert copy["fid"] < fresh["fid"] < 0.5 * blur["fid"]
        assert blur["fid"] < shuffle["fid"]
        assert fresh["precision"] > 0.8
        assert shuffle["precision"] < blur["precision"] < fresh["precision"]
        assert shuffle["inception_score"] < copy["inception_score"]


class TestFile:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "reference.safetensors"

    @pytest.fixture
    def statistics(self, digits, path):
        found = image_statistics(digits[:60], Projection(), max_vectors=40)
        found.save(path)
        return found

    @pytest.mark.parametrize("extras", [True, False])
    def test_what_is_saved_is_loaded(self, digits, tmp_path, extras):
        statistics = image_statistics(digits[:60], Projection(extras=extras), max_vectors=40 * extras)
        path = tmp_path / "new" / "reference.safetensors"
        statistics.save(path)
        loaded = ImageStatistics.load(path)
        for name in ("count", "inception_score", "network", "fingerprint"):
            assert getattr(loaded, name) == getattr(statistics, name)
        assert torch.equal(loaded.vectors, statistics.vectors)
        for name in ("features", "spatial")[: 1 + extras]:
            before, after = getattr(statistics, name), getattr(loaded, name)
            assert after.count == before.count == 60
            assert torch.equal(after.mean, before.mean)
            assert torch.equal(after.covariance, before.covariance)
        assert (loaded.spatial is None) is not extras
        other = image_statistics(digits[60:], Projection(extras=extras))
        assert compare(other, loaded) == compare(other, statistics)
        assert [file.name for file in path.parent.iterdir()] == [path.name]

    def test_others_may_read_it(self, statistics, path, tmp_path):
        (tmp_path / "b").touch()
        assert path.stat().st_mode == (tmp_path / "b").stat().st_mode

    def test_a_changed_byte_is_noticed(self, statistics, path):
        content = path.read_bytes()
        header = struct.unpack("<Q", content[:8])[0]
        random = np.random.RandomState(0)
        places = [*range(0, 8 + header, 7), *random.randint(8 + header, len(content), 30), len(content) - 1]
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << random.randint(8)
            path.write_bytes(changed)
            if place >= 8 + header:
                with pytest.raises(ValueError, match=r"reference\.safetensors was changed"):
                    ImageStatistics.load(path)
                continue
            with contextlib.suppress(ValueError, OSError):  # it may be white space that was changed
                loaded = ImageStatistics.load(path)
                assert loaded.fingerprint == statistics.fingerprint
                assert torch.equal(loaded.vectors, statistics.vectors)
                assert torch.equal(loaded.features.covariance, statistics.features.covariance)
        path.write_bytes(content[:-100])
        with pytest.raises(OSError, match=r"reference\.safetensors is no readable"):
            ImageStatistics.load(path)

    def test_changed_metadata_is_noticed(self, statistics, path):
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        fields = json.loads(metadata["fields"])
        changes = [{"count": 61}, {"network": "other"}, {"inception_score": None}, {"fingerprint": ""}]
        damaged = [(tensors, metadata | {"fields": json.dumps(fields | change)}) for change in changes]
        damaged.append(({name: value for name, value in tensors.items() if name != "vectors"}, metadata))
        for some, changed in damaged:
            save_file(some, path, changed)
            with pytest.raises(ValueError, match="digest differs"):
                ImageStatistics.load(path)

    def test_a_failed_save_keeps_the_old_file(self, statistics, path, tmp_path, monkeypatch):
        before = path.read_bytes()

        def full(tensors, partial, metadata):
            partial.write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr("diffusers_terdit.evaluation.images.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            statistics.save(path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]


class TestAdmReference:
    @staticmethod
    def write(path, digits, leave_out=(), **changes):
        """A reference file as ADM's: moments of all images, and some of the images."""
        whole = image_statistics(digits, Projection())
        arrays = {
            "mu": whole.features.mean.numpy().astype(np.float32),
            "sigma": whole.features.covariance.numpy(),
            "mu_s": whole.spatial.mean.numpy(),
            "sigma_s": whole.spatial.covariance.numpy(),
            "arr_0": digits[:100],
            **changes,
        }
        np.savez(path, **{name: array for name, array in arrays.items() if name not in leave_out})
        return whole

    def test_moments_are_of_all_and_vectors_of_its_images(self, digits, tmp_path):
        path = tmp_path / "VIRTUAL_digits.npz"
        whole = self.write(path, digits)
        found = ImageStatistics.from_adm(path, Projection(), batch_size=30)
        assert found.count == found.features.count == 0
        torch.testing.assert_close(found.features.mean, whole.features.mean, rtol=1e-6, atol=1e-6)
        assert torch.equal(found.features.covariance, whole.features.covariance)
        assert torch.equal(found.spatial.covariance, whole.spatial.covariance)
        torch.testing.assert_close(found.vectors, whole.vectors[:100])
        assert found.network == whole.network
        found.save(tmp_path / "reference.safetensors")
        samples = image_statistics(digits[1000:], Projection())
        measures = compare(samples, ImageStatistics.load(tmp_path / "reference.safetensors"))
        assert measures["fid"] == pytest.approx(compare(samples, whole)["fid"], rel=1e-4)
        expected = precision_and_recall(samples.vectors, whole.vectors[:100])
        assert (measures["precision"], measures["recall"]) == expected
        # the fingerprint is of the whole file, not of its images
        self.write(path, digits[:1000])
        other = ImageStatistics.from_adm(path, Projection())
        assert torch.equal(found.vectors, other.vectors)
        assert found.fingerprint != other.fingerprint

    def test_images_alone_are_measured(self, digits, tmp_path):
        self.write(tmp_path / "samples.npz", digits, leave_out=("mu", "sigma", "mu_s", "sigma_s"))
        found = ImageStatistics.from_adm(tmp_path / "samples.npz", Projection())
        expected = image_statistics(digits[:100], Projection())
        assert (found.count, found.fingerprint) == (100, expected.fingerprint)
        assert torch.equal(found.features.covariance, expected.features.covariance)

    def test_moments_alone_give_distances(self, digits, tmp_path):
        whole = self.write(tmp_path / "moments.npz", digits, leave_out=("arr_0", "mu_s", "sigma_s"))
        measures = compare(whole, ImageStatistics.from_adm(tmp_path / "moments.npz", Projection()))
        assert set(measures) == {"fid", "inception_score"}
        assert abs(measures["fid"]) < 1e-6

    def test_moments_of_another_network_are_refused(self, digits, tmp_path):
        path = tmp_path / "reference.npz"
        self.write(path, digits)
        with pytest.raises(ValueError, match=r"`mu` of .* was made by another network than projection"):
            ImageStatistics.from_adm(path, Projection(seed=3))
        self.write(path, digits, mu_s=np.ones(7))
        with pytest.raises(ValueError, match=r"`mu_s` of .* was made by another network"):
            ImageStatistics.from_adm(path, Projection())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"leave_out": ("mu_s",)}, "only one of `mu_s` and `sigma_s`"),
            ({"sigma": np.eye(3)}, "a covariance"),
            ({"mu": np.array(["a"] * 12)}, "no ADM reference file"),
            ({"mu": np.array([None] * 12)}, "no ADM reference file"),  # a pickle
        ],
    )
    def test_impossible_files_are_refused(self, digits, tmp_path, arguments, message):
        self.write(tmp_path / "reference.npz", digits, **arguments)
        with pytest.raises(ValueError, match=rf"reference\.npz.*{message}"):
            ImageStatistics.from_adm(tmp_path / "reference.npz", Projection())

    def test_other_files_are_named(self, digits, tmp_path):
        path = tmp_path / "reference.npz"
        self.write(path, digits)
        path.write_bytes(path.read_bytes()[:-1000])
        np.save(tmp_path / "one.npy", digits)
        for other in (path, tmp_path / "one.npy"):
            with pytest.raises(OSError, match=rf"{other.name} is no whole \.npz file"):
                ImageStatistics.from_adm(other, Projection())

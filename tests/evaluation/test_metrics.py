"""The measures against computations written another way: numpy, scipy, scikit-learn, torchmetrics, exact integers."""

import contextlib
import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_terdit.evaluation import (
    GaussianStatistics,
    ImageStatistics,
    InceptionScore,
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


scipy_linalg = pytest.importorskip("scipy.linalg")
sklearn_datasets = pytest.importorskip("sklearn.datasets")
sklearn_neighbors = pytest.importorskip("sklearn.neighbors")


def random_features(rows, width, seed=0, dtype=torch.float32):
    """Correlated features, none with the mean or the spread of another."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    scale = torch.linspace(0.1, 3, width, dtype=torch.float64)
    rows = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (rows * scale @ mixing + torch.rand(width, generator=generator, dtype=torch.float64)).to(dtype)


def random_probabilities(rows, classes, seed=0):
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * logits).softmax(1)


class Projection(nn.Module):
    """Random features of 8x8 images, seeded, with what a network may have beside them."""

    name = "projection"

    def __init__(self, inputs=64, width=12, seed=0, extras=True):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(inputs, width, generator=generator) / inputs**0.5)
        self.head = nn.Parameter(torch.randn(width, 5, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.extras = extras

    def forward(self, images):
        features = self.dropout((images.flatten(1) @ self.weight).relu())
        if not self.extras:
            return features
        return {"features": features, "spatial": images.flatten(1)[:, :7], "logits": features @ self.head}


class Returning(nn.Module):
    """Gives what it was told to."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, images):
        return self.outputs(images)


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits as images: (1797, 8, 8, 1) uint8."""
    return (sklearn_datasets.load_digits().images * 15.9375).astype(np.uint8)[..., None]


class TestGaussianStatistics:
    @pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 33, 34], [1] * 100, [0, 60, 0, 40]], ids=str)
    def test_pieces_give_the_whole(self, sizes):
        features = random_features(100, 7)
        statistics = GaussianStatistics(7)
        for piece in features.split(sizes):
            statistics.update(piece)
        assert statistics.count == 100
        assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
        rows = features.numpy().astype(np.float64)
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(statistics.covariance, np.cov(rows, rowvar=False), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("offset", [1e4, 1e7])
    def test_a_mean_far_from_zero_costs_no_accuracy(self, offset):
        noise = np.random.default_rng(0).standard_normal((3000, 4))
        rows = noise + offset
        statistics = GaussianStatistics(4)
        for piece in torch.from_numpy(rows).split(64):
            statistics.update(piece)
        # What the sum of squares would lose at 1e7 is of the size of the variance.
        np.testing.assert_allclose(statistics.covariance, np.cov(rows - offset, rowvar=False), rtol=0, atol=1e-7)
        np.testing.assert_allclose(statistics.mean, rows.mean(0), rtol=1e-14)

    def test_half_precision_rows_are_summed_in_float64(self):
        features = random_features(500, 3).bfloat16()
        statistics = GaussianStatistics(3)
        statistics.update(features)
        np.testing.assert_allclose(statistics.covariance, np.cov(features.double().numpy().T), atol=1e-12)

    def test_gradients_are_not_kept(self):
        statistics = GaussianStatistics(3)
        statistics.update(random_features(5, 3).requires_grad_())
        assert not statistics.covariance.requires_grad

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_rows_that_are_not_finite_are_named(self, value):
        features = random_features(10, 3)
        features[4, 1] = features[7, 0] = value
        statistics = GaussianStatistics(3)
        statistics.update(random_features(100, 3))
        with pytest.raises(ValueError, match=r"Features of 2 rows hold NaN or infinity: rows 104, 107, counted"):
            statistics.update(features)
        assert statistics.count == 100

    def test_impossible_rows_are_refused(self):
        statistics = GaussianStatistics(3)
        for shape in ((5, 4), (5,), (5, 3, 1)):
            with pytest.raises(ValueError, match=r"Features must be \(N, 3\)"):
                statistics.update(torch.zeros(shape))
        with pytest.raises(ValueError, match="at least 1, got 0"):
            GaussianStatistics(0)

    def test_too_few_rows_are_refused(self):
        statistics = GaussianStatistics(3)
        with pytest.raises(ValueError, match="mean of no features"):
            _ = statistics.mean
        statistics.update(torch.ones(1, 3))
        assert statistics.mean.tolist() == [1, 1, 1]
        with pytest.raises(ValueError, match="at least 2 rows of features, got 1"):
            _ = statistics.covariance

    def test_what_is_given_out_can_be_changed(self):
        counted = GaussianStatistics(2)
        counted.update(random_features(9, 2))
        for statistics in (counted, GaussianStatistics.from_moments(counted.mean, counted.covariance)):
            before = statistics.mean.tolist(), statistics.covariance.tolist()
            statistics.mean.zero_()
            statistics.covariance.zero_()
            assert (statistics.mean.tolist(), statistics.covariance.tolist()) == before

    def test_moments_take_no_more_rows(self):
        statistics = GaussianStatistics.from_moments(torch.tensor([1.0, 2]), torch.eye(2), 30)
        assert (statistics.count, statistics.width) == (30, 2)
        assert statistics.mean.tolist() == [1, 2]
        assert torch.equal(statistics.covariance, torch.eye(2, dtype=torch.float64))
        with pytest.raises(ValueError, match="take no more rows"):
            statistics.update(torch.ones(3, 2))

    @pytest.mark.parametrize(
        ("mean", "covariance", "message"),
        [
            (torch.zeros(2), torch.eye(3), r"a mean \(D,\) and a covariance \(D, D\)"),
            (torch.zeros(1, 2), torch.eye(2), r"a mean \(D,\) and a covariance \(D, D\)"),
            (torch.tensor([0, torch.nan]), torch.eye(2), "NaN or infinity"),
            (torch.zeros(2), torch.full((2, 2), torch.inf), "NaN or infinity"),
            (torch.zeros(2), torch.tensor([[1.0, 0], [0.5, 1]]), "not symmetric"),
        ],
    )
    def test_impossible_moments_are_refused(self, mean, covariance, message):
        with pytest.raises(ValueError, match=message):
            GaussianStatistics.from_moments(mean, covariance)


class TestFrechetDistance:
    @staticmethod
    def by_scipy(features, other):
        """As the FID is usually computed: the square root of a product that is not symmetric."""
        first, second = features.double().numpy(), other.double().numpy()
        covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
        root = scipy_linalg.sqrtm(covariances[0] @ covariances[1])
        difference = first.mean(0) - second.mean(0)
        return difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root.real)

    @pytest.mark.parametrize(("rows", "more", "width"), [(200, 300, 2), (300, 200, 40), (500, 500, 64)])
    def test_scipy_computes_the_same(self, rows, more, width):
        features, other = random_features(rows, width), random_features(more, width, seed=1)
        expected = self.by_scipy(features, other)
        assert frechet_distance(features, other) == pytest.approx(expected, rel=1e-9)

    def test_torchmetrics_computes_the_same(self, digits):
        image_metrics = pytest.importorskip("torchmetrics.image.fid")
        network = Projection(inputs=192, extras=False).eval()
        network.num_features = 12
        judge = image_metrics.FrechetInceptionDistance(feature=network, normalize=True)
        judge.set_dtype(torch.float64)
        halves = [
            torch.from_numpy(rows).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).double() / 255
            for rows in (digits[:500], digits[500:1200])
        ]
        network.double()
        judge.update(halves[0], real=True)
        judge.update(halves[1], real=False)
        with torch.no_grad():
            found = frechet_distance(*(network(half) for half in halves))
        assert found == pytest.approx(float(judge.compute()), rel=1e-6)

    def test_gaussians_with_known_distances(self):
        mean = torch.tensor([1.0, 2, 3])
        diagonal, other = torch.tensor([1.0, 4, 0]), torch.tensor([9.0, 0, 2.25])
        first = GaussianStatistics.from_moments(mean, diagonal.diag())
        second = GaussianStatistics.from_moments(mean + 2, other.diag())
        assert frechet_distance(first, second) == pytest.approx(12 + 4 + 4 + 2.25)
        # Of two matrices of rank one, tr (A B)^(1/2) = |a . b|.
        a, b = torch.tensor([1.0, 2, -1]), torch.tensor([0.5, -3, 1])
        first = GaussianStatistics.from_moments(mean, a.outer(a))
        second = GaussianStatistics.from_moments(mean, b.outer(b))
        assert frechet_distance(first, second) == pytest.approx(6 + 10.25 - 2 * 6.5)

    @pytest.mark.parametrize(("rows", "width"), [(1000, 64), (50, 64), (2, 64), (40, 700)])
    def test_a_copy_is_at_no_distance(self, rows, width):
        features = random_features(rows, width) * 10
        copy = features[torch.randperm(rows)]
        assert abs(frechet_distance(features, copy)) < 1e-8

    @pytest.mark.slow
    @pytest.mark.parametrize("rows", [300, 5000])
    def test_a_copy_is_at_no_distance_at_inceptions_width(self, rows):
        features = random_features(rows, 2048).relu()
        assert abs(frechet_distance(features, features.flip(0))) < 1e-3

    def test_rows_that_do_not_vary_are_a_point(self):
        features = random_features(100, 4)
        point = torch.full((5, 4), 2.0)
        trace = np.trace(np.cov(features.double().numpy().T))
        expected = float((features.double().mean(0) - 2).square().sum()) + trace
        assert frechet_distance(features, point) == pytest.approx(expected)
        assert frechet_distance(point, point) == 0

    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 12), st.integers(0, 2**16), st.floats(-1e3, 1e3))
    def test_it_is_a_distance(self, rows, more, width, seed, shift):
        features = random_features(rows, width, seed, torch.float64)
        other = random_features(more, width, seed + 1, torch.float64)
        distance = frechet_distance(features, other)
        assert distance > -1e-9
        assert frechet_distance(other, features) == pytest.approx(distance, rel=1e-6, abs=1e-6)
        assert frechet_distance(features + shift, other + shift) == pytest.approx(distance, rel=1e-6, abs=1e-5)
        assert frechet_distance(features, features + shift) == pytest.approx(width * shift**2, rel=1e-6, abs=1e-6)
        turn = torch.linalg.qr(random_features(width, width, seed + 2, torch.float64)).Q
        assert frechet_distance(features @ turn, other @ turn) == pytest.approx(distance, rel=1e-6, abs=1e-5)
        assert frechet_distance(features * 3, other * 3) == pytest.approx(9 * distance, rel=1e-6, abs=1e-5)

    def test_sets_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="one width, got 3 and 4"):
            frechet_distance(torch.ones(5, 3), torch.ones(5, 4))
        with pytest.raises(ValueError, match="at least 2 rows of features, got 1"):
            frechet_distance(torch.ones(1, 3), torch.ones(5, 3))
        with pytest.raises(ValueError, match=r"\(N, D\)"):
            frechet_distance(torch.ones(5), torch.ones(5))
        with pytest.raises(ValueError, match="rows 2, counted"):
            frechet_distance(torch.tensor([[0.0], [1], [torch.nan]]), torch.ones(5, 1))
        with pytest.raises(ValueError, match="no covariance: it has a variance of -1"):
            frechet_distance(
                GaussianStatistics.from_moments(torch.zeros(2), torch.tensor([1.0, -1]).diag()),
                random_features(9, 2),
            )


class TestInceptionScore:
    @staticmethod
    def by_numpy(probabilities, split_size):
        """ADM's lines: the mean over splits of exp(E KL(p(y|x) || p(y)))."""
        scores = []
        for start in range(0, len(probabilities), split_size):
            part = probabilities[start : start + split_size].numpy()
            kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
            scores.append(np.exp(kl.sum(1).mean()))
        return np.mean(scores)

    @pytest.mark.parametrize("split_size", [1, 7, 50, 99, 100, 101, 5000])
    def test_numpy_computes_the_same(self, split_size):
        probabilities = random_probabilities(100, 12)
        expected = self.by_numpy(probabilities, split_size)
        assert inception_score(probabilities, split_size) == pytest.approx(expected, rel=1e-12)

    def test_adms_splits_are_the_default(self):
        probabilities = random_probabilities(7000, 3)
        assert inception_score(probabilities) == pytest.approx(self.by_numpy(probabilities, 5000), rel=1e-12)
        assert inception_score(probabilities) != pytest.approx(self.by_numpy(probabilities, 7000), rel=1e-9)

    @pytest.mark.parametrize("sizes", [[1] * 100, [99, 1], [0, 50, 50], [13] * 7 + [9]], ids=str)
    def test_pieces_give_the_whole(self, sizes):
        probabilities = random_probabilities(100, 12)
        score = InceptionScore(split_size=30)
        for piece in probabilities.split(sizes):
            score.update(piece)
        assert score.value == pytest.approx(self.by_numpy(probabilities, 30), rel=1e-12)
        assert score.count == 100

    @pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all extracted features:UserWarning")
    @pytest.mark.filterwarnings("ignore:std.{4}degrees of freedom is <= 0:UserWarning")
    def test_torchmetrics_computes_the_same(self):
        image_metrics = pytest.importorskip("torchmetrics.image.inception")
        logits = torch.randn(60, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        judge = image_metrics.InceptionScore(feature=Returning(lambda images: logits), splits=1)
        judge.update(torch.zeros(60, 3, 8, 8, dtype=torch.uint8))
        assert inception_score(logits.softmax(1)) == pytest.approx(float(judge.compute()[0]), rel=1e-9)

    def test_it_counts_classes(self):
        assert inception_score(torch.eye(10).repeat(20, 1)) == pytest.approx(10)
        assert inception_score(torch.full((20, 10), 0.1)) == pytest.approx(1)
        assert inception_score(torch.eye(10)[[3]].repeat(20, 1)) == pytest.approx(1)

    def test_impossible_probabilities_are_refused(self):
        with pytest.raises(ValueError, match="of no images"):
            inception_score(torch.zeros(0, 5))
        with pytest.raises(ValueError, match=r"must be \(N, K\), got \(5,\)"):
            inception_score(torch.ones(5))
        with pytest.raises(ValueError, match="at least 1, got 0"):
            inception_score(torch.eye(2), split_size=0)
        score = InceptionScore()
        score.update(torch.eye(3))
        with pytest.raises(ValueError, match=r"Row 4 is no set of probabilities: it sums to 2 .* softmax"):
            score.update(torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
        with pytest.raises(ValueError, match="Row 3 is no set of probabilities"):
            score.update(torch.tensor([[1.5, -0.5, 0]]))
        with pytest.raises(ValueError, match="rows 3, counted"):
            score.update(torch.tensor([[torch.nan, 1, 0]]))
        with pytest.raises(ValueError, match=r"must be \(N, 3\), got \(4, 4\)"):
            score.update(torch.eye(4))
        assert score.count == 3


class TestPrecisionAndRecall:
    @staticmethod
    def by_scikit_learn(samples, reference, neighbours=3):
        def covered(points, centres):
            judge = sklearn_neighbors.NearestNeighbors(algorithm="brute").fit(centres)
            radii = judge.kneighbors(n_neighbors=neighbours)[0][:, -1]  # of other points
            distances = np.sqrt(((points[:, None] - centres[None]) ** 2).sum(-1))
            return (distances <= radii * (1 + 1e-9)).any(1).mean()

        samples, reference = samples.double().numpy(), reference.double().numpy()
        return covered(samples, reference), covered(reference, samples)

    @staticmethod
    def by_integers(samples, reference, neighbours):
        """Exact, of lists of rows of integers."""

        def squared(a, b):
            return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

        def covered(points, centres):
            radii = [
                sorted(squared(centre, other) for j, other in enumerate(centres) if j != i)[neighbours - 1]
                for i, centre in enumerate(centres)
            ]
            inside = [
                any(squared(point, centre) <= radius for centre, radius in zip(centres, radii, strict=True))
                for point in points
            ]
            return sum(inside) / len(points)

        return covered(samples, reference), covered(reference, samples)

    @pytest.mark.parametrize(
        ("rows", "more", "width", "neighbours"), [(80, 120, 5, 3), (150, 60, 30, 1), (70, 70, 2, 5)]
    )
    def test_scikit_learn_finds_the_same(self, rows, more, width, neighbours):
        samples, reference = random_features(rows + more, width).split([rows, more])
        samples = samples * 1.3 + 0.3
        expected = self.by_scikit_learn(samples, reference, neighbours)
        assert 0 < min(expected) <= max(expected) < 1
        assert precision_and_recall(samples, reference, neighbours) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("chunk", [1, 7, 60, 90, 1000])
    def test_chunks_do_not_matter(self, chunk):
        samples, reference = random_features(60, 4), random_features(90, 4, seed=1)
        expected = self.by_scikit_learn(samples, reference)
        assert precision_and_recall(samples, reference, chunk=chunk) == pytest.approx(expected, abs=1e-12)

    grid = st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=5, max_size=14)

    @settings(max_examples=60, deadline=None)
    @given(
        grid, grid, st.integers(1, 4), st.integers(1, 6), st.sampled_from([(1, 0), (0.1, 0), (0.1, 0.1), (0.25, 1e4)])
    )
    def test_ties_and_duplicates_are_exact(self, samples, reference, neighbours, chunk, place):
        exact = self.by_integers(samples, reference, neighbours)
        step, offset = place  # a tenth is no exact float: distances that should be equal differ by rounding
        rows = [torch.tensor(points, dtype=torch.float64) * step + offset for points in (samples, reference)]
        assert precision_and_recall(*rows, neighbours, chunk) == pytest.approx(exact, abs=1e-12)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(4, 30), st.integers(4, 30), st.integers(0, 2**16))
    def test_precision_of_one_is_recall_of_the_other(self, rows, more, seed):
        samples, reference = random_features(rows, 3, seed), random_features(more, 3, seed + 1)
        precision, recall = precision_and_recall(samples, reference)
        assert precision_and_recall(reference, samples) == (recall, precision)
        turned = precision_and_recall(samples.flip(0) + 16, reference.flip(0) + 16)  # exact enough in float32
        assert turned == pytest.approx((precision, recall), abs=1.1 / min(rows, more))

    def test_known_sets(self):
        features = random_features(50, 6)
        assert precision_and_recall(features, features.flip(0)) == (1, 1)
        assert precision_and_recall(features + 1e3, features) == (0, 0)
        # One image again and again is precise, and recalls itself only.
        assert precision_and_recall(features[[7]].repeat(50, 1), features) == (1, 1 / 50)
        # Half of the reference, twice as often.
        half = precision_and_recall(features[:25].repeat_interleave(4, 0), features)
        assert half == (1, 0.5)

    def test_features_far_from_zero_lose_nothing(self):
        samples, reference = random_features(80, 5, dtype=torch.float64), random_features(90, 5, 1, torch.float64)
        expected = precision_and_recall(samples, reference)
        assert precision_and_recall(samples + 1e6, reference + 1e6) == expected

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_half_precision_features_are_measured_in_float64(self, dtype):
        samples, reference = random_features(80, 5).to(dtype), random_features(90, 5, 1).to(dtype)
        assert precision_and_recall(samples, reference) == precision_and_recall(samples.double(), reference.double())

    def test_impossible_sets_are_refused(self):
        features = random_features(10, 3)
        with pytest.raises(ValueError, match="3 neighbours need at least 4 samples, got 3"):
            precision_and_recall(features[:3], features)
        with pytest.raises(ValueError, match="5 neighbours need at least 6 reference, got 5"):
            precision_and_recall(features, features[:5], neighbours=5)
        with pytest.raises(ValueError, match=r"\(N, D\) and \(M, D\), got \(10, 3\) and \(10, 2\)"):
            precision_and_recall(features, features[:, :2])
        with pytest.raises(ValueError, match="at least 1, got 0"):
            precision_and_recall(features, features, neighbours=0)
        with pytest.raises(ValueError, match="at least 1, got 3 and 0"):
            precision_and_recall(features, features, chunk=0)
        with pytest.raises(ValueError, match="reference: of 1 rows hold NaN or infinity: rows 2,"):
            precision_and_recall(features, torch.where(torch.arange(10)[:, None] == 2, torch.nan, features))


class TestImageStatistics:
    @pytest.mark.parametrize("batch_size", [1, 7, 64, 5000])
    def test_batches_do_not_matter(self, digits, batch_size):
        network = Projection().eval()
        found = image_statistics(digits[:100], network, batch_size)
        with torch.no_grad():
            outputs = network(torch.from_numpy(digits[:100]).permute(0, 3, 1, 2).float() / 255)
        assert found.count == found.features.count == found.spatial.count == 100
        rows = outputs["features"].double().numpy()
        np.testing.assert_allclose(found.features.covariance, np.cov(rows, rowvar=False), atol=1e-6)
        np.testing.assert_allclose(found.spatial.mean, outputs["spatial"].double().mean(0), atol=1e-6)
        assert found.inception_score == pytest.approx(inception_score(outputs["logits"].double().softmax(1)), rel=1e-5)
        torch.testing.assert_close(found.vectors, outputs["features"])
        assert found.fingerprint == fingerprint(digits[:100])

    def test_the_inception_score_has_adms_splits(self, digits):
        network = Projection().eval()
        images = np.concatenate([digits] * 3)
        with torch.no_grad():
            logits = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)["logits"].double()
        expected = TestInceptionScore.by_numpy(logits.softmax(1), 5000)
        assert image_statistics(images, network, 1000).inception_score == pytest.approx(expected, rel=1e-6)
        assert expected != pytest.approx(TestInceptionScore.by_numpy(logits.softmax(1), 10_000), rel=1e-4)

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

    def test_pixels_are_in_the_order_and_range_that_networks_expect(self):
        images = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3) * 7
        seen = []
        network = Returning(lambda pixels: (seen.append(pixels), pixels.flatten(1))[1])
        image_statistics(images, network)
        assert seen[0].shape == (2, 3, 2, 3)
        assert seen[0].dtype == torch.float32
        assert seen[0][1, 2, 0, 1] == pytest.approx(images[1, 0, 1, 2] / 255)
        assert seen[0].is_contiguous()

    def test_gray_images_are_repeated_for_a_network_that_says_so(self, digits):
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

    def test_progress_wraps_the_batches(self, digits):
        calls = []

        def progress(batches, total):
            calls.append(total)
            yield from batches

        image_statistics(digits[:100], Projection(), batch_size=30, progress=progress)
        assert calls == [4]
        with pytest.raises(ValueError, match="all 4 batches"):
            image_statistics(digits[:100], Projection(), 30, progress=lambda batches, total: list(batches)[:2])

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((4, 8, 8, 1), np.float32), r"uint8 images \(N, H, W, C\), got float32 \(4, 8, 8, 1\)"),
            (np.zeros((4, 8, 8), np.uint8), r"uint8 images \(N, H, W, C\), got uint8 \(4, 8, 8\)"),
            ([np.zeros((8, 8, 1), np.uint8)] * 4, r"uint8 images \(N, H, W, C\), got list"),
            (torch.zeros(4, 8, 8, 1, dtype=torch.uint8), "got torch.uint8"),
            (np.zeros((0, 8, 8, 1), np.uint8), "no images"),
            (np.zeros((4, 0, 8, 1), np.uint8), "no images"),
            (np.zeros((4, 3, 8, 8), np.uint8), "transpose it"),
            (np.zeros((1, 8, 8, 1), np.uint8), "at least 2 images"),
        ],
    )
    def test_impossible_images_are_refused(self, images, message):
        with pytest.raises(ValueError, match=message):
            image_statistics(images, Projection())

    @pytest.mark.parametrize(
        ("outputs", "message"),
        [
            (lambda pixels: [pixels], "a dict with `features`, got list"),
            (lambda pixels: {"pool": pixels}, "a dict with `features`, got a dict of pool"),
            (lambda pixels: pixels, r"`features` must be \(5, D\) for 5 images, got \(5, 1, 8, 8\)"),
            (lambda pixels: pixels.flatten(1)[:4], r"`features` must be \(5, D\) for 5 images, got \(4, 64\)"),
            (lambda pixels: {"features": pixels.flatten(1), "spatial": pixels}, r"`spatial` must be \(5, D\)"),
            (lambda pixels: {"features": pixels.flatten(1), "logits": pixels}, r"`logits` must be \(5, D\)"),
            (lambda pixels: pixels.flatten(1).log() * 0, "Features of 5 rows hold NaN or infinity: rows 0, 1"),
        ],
    )
    def test_impossible_networks_are_refused(self, digits, outputs, message):
        with pytest.raises(ValueError, match=message):
            image_statistics(digits[:5], Returning(outputs))

    def test_impossible_arguments_are_refused(self, digits):
        with pytest.raises(ValueError, match=r"must be a torch.nn.Module, got function"):
            image_statistics(digits, lambda pixels: pixels)
        with pytest.raises(ValueError, match="at least 1, `max_vectors` 0, got 0 and 50000"):
            image_statistics(digits, Projection(), batch_size=0)
        with pytest.raises(ValueError, match="got 64 and -1"):
            image_statistics(digits, Projection(), max_vectors=-1)
        network = Projection()
        network.channels = 3
        with pytest.raises(ValueError, match="takes 3 channels, the images have 4"):
            image_statistics(np.zeros((4, 8, 8, 4), np.uint8), network)

    def test_a_network_is_known_by_name_and_weights(self, digits):
        network = Projection()
        name = network_name(network)
        assert name.startswith("projection (sha256 ")
        assert network_name(Projection(seed=1)) != name
        assert network_name(Projection().half()) != name
        assert network_name(network.train()) == name
        assert network_name(nn.Flatten()).startswith("Flatten (sha256 ")
        assert network_name(network, "other").startswith("other (sha256 ")
        network.weights_sha256 = "0123456789abcdef"
        assert network_name(network) == "projection (sha256 0123456789ab...)"
        assert image_statistics(digits[:4], network, name="mine").network == "mine (sha256 0123456789ab...)"

    @pytest.mark.parametrize("chunk", [1, 3, 5, 100])
    def test_fingerprints_are_of_the_pixels(self, digits, chunk):
        images = digits[:5]
        expected = fingerprint(images)
        assert fingerprint(images, chunk) == expected
        assert fingerprint(np.asfortranarray(images), chunk) == expected
        changed = images.copy()
        changed[4, 7, 7, 0] ^= 1
        assert fingerprint(changed) != expected
        assert fingerprint(images.reshape(5, 4, 16, 1)) != expected
        assert fingerprint(images[::-1]) != expected
        with pytest.raises(ValueError, match="at least 1, got 0"):
            fingerprint(images, 0)


class TestCompare:
    def test_keys_and_values(self, digits):
        samples = image_statistics(digits[:400], Projection())
        reference = image_statistics(digits[400:1000], Projection())
        found = compare(samples, reference)
        assert list(found) == ["fid", "sfid", "inception_score", "precision", "recall"]
        assert found["fid"] == pytest.approx(frechet_distance(samples.vectors, reference.vectors), rel=1e-6)
        assert found["sfid"] == frechet_distance(samples.spatial, reference.spatial)
        assert found["inception_score"] == samples.inception_score
        expected = TestPrecisionAndRecall.by_scikit_learn(samples.vectors, reference.vectors)
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

    def test_two_networks_are_refused(self, digits):
        with pytest.raises(ValueError, match=r"two networks, projection \(sha256 \w+\.\.\.\) and projection"):
            compare(image_statistics(digits[:50], Projection()), image_statistics(digits[:50], Projection(seed=1)))

    def test_too_few_images_are_refused(self, digits):
        with pytest.raises(ValueError, match="at least 4 samples, got 3"):
            compare(*(image_statistics(digits[:count], Projection()) for count in (3, 50)))


class TestFile:
    @pytest.fixture
    def statistics(self, digits):
        return image_statistics(digits[:60], Projection(), max_vectors=40)

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

    def test_others_may_read_it(self, statistics, tmp_path):
        statistics.save(tmp_path / "a")
        (tmp_path / "b").touch()
        assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode

    def test_a_changed_byte_is_noticed(self, statistics, tmp_path):
        path = tmp_path / "reference.safetensors"
        statistics.save(path)
        content = path.read_bytes()
        header = struct.unpack("<Q", content[:8])[0]
        random = np.random.RandomState(0)
        places = [*range(0, 8 + header, 3), *random.randint(8 + header, len(content), 100), len(content) - 1]
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

    def test_changed_metadata_is_noticed(self, statistics, tmp_path):
        path = tmp_path / "reference.safetensors"
        statistics.save(path)
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        fields = json.loads(metadata["fields"])
        for change in ({"count": 61}, {"network": "other"}, {"inception_score": None}, {"fingerprint": ""}):
            save_file(tensors, path, metadata | {"fields": json.dumps(fields | change)})
            with pytest.raises(ValueError, match="digest differs"):
                ImageStatistics.load(path)
        save_file({name: value.clone() for name, value in tensors.items() if name != "vectors"}, path, metadata)
        with pytest.raises(ValueError, match="digest differs"):
            ImageStatistics.load(path)
        save_file(tensors, path, metadata | {"version": "2"})
        with pytest.raises(ValueError, match="version '2'"):
            ImageStatistics.load(path)

    def test_other_files_are_refused(self, statistics, tmp_path):
        path = tmp_path / "reference.safetensors"
        with pytest.raises(FileNotFoundError, match=r"no file .*reference\.safetensors"):
            ImageStatistics.load(path)
        save_file({"weight": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match=r"reference\.safetensors holds no image statistics: its format is None"):
            ImageStatistics.load(path)
        for content in (b"", b"short", b"\xff" * 100, json.dumps({"a": 1}).encode()):
            path.write_bytes(content)
            with pytest.raises(OSError, match=r"reference\.safetensors is no readable"):
                ImageStatistics.load(path)
        statistics.save(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(OSError, match=r"reference\.safetensors is no readable"):
            ImageStatistics.load(path)

    def test_a_failed_save_keeps_the_old_file(self, statistics, tmp_path, monkeypatch):
        path = tmp_path / "reference.safetensors"
        statistics.save(path)
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

    def test_the_fingerprint_is_of_the_whole_file(self, digits, tmp_path):
        self.write(tmp_path / "a.npz", digits)
        self.write(tmp_path / "b.npz", digits[:1000])
        first, second = (ImageStatistics.from_adm(tmp_path / name, Projection()) for name in ("a.npz", "b.npz"))
        assert torch.equal(first.vectors, second.vectors)
        assert first.fingerprint != second.fingerprint

    def test_images_alone_are_measured(self, digits, tmp_path):
        self.write(tmp_path / "samples.npz", digits, leave_out=("mu", "sigma", "mu_s", "sigma_s"))
        found = ImageStatistics.from_adm(tmp_path / "samples.npz", Projection())
        expected = image_statistics(digits[:100], Projection())
        assert (found.count, found.fingerprint) == (100, expected.fingerprint)
        assert torch.equal(found.features.covariance, expected.features.covariance)

    def test_moments_alone_give_distances(self, digits, tmp_path):
        whole = self.write(tmp_path / "moments.npz", digits, leave_out=("arr_0", "mu_s", "sigma_s"))
        found = ImageStatistics.from_adm(tmp_path / "moments.npz", Projection())
        measures = compare(whole, found)
        assert set(measures) == {"fid", "inception_score"}
        assert abs(measures["fid"]) < 1e-6

    def test_moments_of_another_network_are_refused(self, digits, tmp_path):
        path = tmp_path / "reference.npz"
        self.write(path, digits)
        with pytest.raises(ValueError, match=r"`mu` of .* was made by another network than projection"):
            ImageStatistics.from_adm(path, Projection(seed=3))
        with pytest.raises(ValueError, match=r"`mu` of .* has 12 numbers, projection .* gives 9"):
            ImageStatistics.from_adm(path, Projection(width=9))
        self.write(path, digits, mu_s=np.ones(7))
        with pytest.raises(ValueError, match=r"`mu_s` of .* was made by another network"):
            ImageStatistics.from_adm(path, Projection())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"leave_out": ("sigma",)}, "only one of `mu` and `sigma`"),
            ({"leave_out": ("mu_s",)}, "only one of `mu_s` and `sigma_s`"),
            ({"leave_out": ("mu", "sigma", "arr_0")}, "neither `arr_0` nor `mu`"),
            ({"sigma": np.eye(3)}, "a covariance"),
            ({"mu": np.full(12, np.nan)}, "NaN"),
            ({"mu": np.array(["a"] * 12)}, "no ADM reference file"),
            ({"mu": np.array([None] * 12)}, "no ADM reference file"),
            ({"arr_0": np.zeros((9, 8, 8), np.uint8)}, "uint8 images"),
        ],
    )
    def test_impossible_files_are_refused(self, digits, tmp_path, arguments, message):
        self.write(tmp_path / "reference.npz", digits, **arguments)
        with pytest.raises(ValueError, match=rf"reference\.npz.*{message}"):
            ImageStatistics.from_adm(tmp_path / "reference.npz", Projection())

    def test_unreadable_files_are_named(self, digits, tmp_path):
        path = tmp_path / "reference.npz"
        with pytest.raises(FileNotFoundError, match=r"no file .*reference\.npz"):
            ImageStatistics.from_adm(path, Projection())
        self.write(path, digits)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(OSError, match=r"reference\.npz is no whole \.npz file"):
            ImageStatistics.from_adm(path, Projection())
        np.save(tmp_path / "one.npy", digits)
        with pytest.raises(OSError, match=r"one\.npy is no whole \.npz file"):
            ImageStatistics.from_adm(tmp_path / "one.npy", Projection())


class TestOpenSamples:
    def test_an_npz_is_mapped_not_read(self, digits, tmp_path):
        path = tmp_path / "samples.npz"
        np.savez(path, labels=np.arange(1797), arr_0=digits, arr_1=np.arange(5))
        images = open_samples(path)
        assert isinstance(images, np.memmap)
        assert not images.flags.writeable
        np.testing.assert_array_equal(images, digits)

    def test_an_npz_of_another_writer_is_mapped(self, digits, tmp_path):
        content = io.BytesIO()
        np.lib.format.write_array(content, digits, version=(2, 0))
        path = tmp_path / "samples.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "numbers")
            archive.writestr("arr_0.npy", content.getvalue())  # without numpy's zip64 field
        images = open_samples(path)
        assert isinstance(images, np.memmap)
        np.testing.assert_array_equal(images, digits)

    def test_npy_fortran_order_and_compression(self, digits, tmp_path):
        np.save(tmp_path / "a.npy", digits)
        np.save(tmp_path / "b.npy", np.asfortranarray(digits))
        np.savez(tmp_path / "c.npz", np.asfortranarray(digits))
        np.savez_compressed(tmp_path / "d.npz", digits)
        for name in ("a.npy", "b.npy", "c.npz", "d.npz"):
            images = open_samples(tmp_path / name)
            assert isinstance(images, np.memmap) is (name != "d.npz")
            np.testing.assert_array_equal(images, digits)
            assert fingerprint(images) == fingerprint(digits)

    @pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
    @pytest.mark.parametrize(
        ("array", "message"),
        [
            (np.zeros((4, 8, 8, 3)), r"uint8 images \(N, H, W, C\), got float64 \(4, 8, 8, 3\)"),
            (np.zeros((4, 8, 8), np.uint8), r"got uint8 \(4, 8, 8\)"),
            (np.zeros((0, 8, 8, 3), np.uint8), "holds no images"),
            (np.zeros((4, 3, 8, 8), np.uint8), "transpose"),
        ],
    )
    def test_other_arrays_are_refused(self, tmp_path, save, array, message):
        path = tmp_path / ("samples.npy" if save is np.save else "samples.npz")
        save(path, array)
        with pytest.raises(ValueError, match=message) as raised:
            open_samples(path)
        assert str(path) in str(raised.value)

    def test_objects_are_not_unpickled(self, tmp_path):
        objects = np.array([np.zeros((8, 8, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)], dtype=object)
        for save, name in ((np.save, "a.npy"), (np.savez, "b.npz"), (np.savez_compressed, "c.npz")):
            save(tmp_path / name, objects)
            with pytest.raises(ValueError, match=rf"{name}.*got object"):
                open_samples(tmp_path / name)

    def test_other_files_are_refused(self, tmp_path):
        path = tmp_path / "samples.npz"
        with pytest.raises(FileNotFoundError, match=r"no file .*samples\.npz"):
            open_samples(path)
        for content in (b"", b"text"):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"samples\.npz is neither a \.npz nor a \.npy"):
                open_samples(path)
        np.savez(path, images=np.zeros((2, 4, 4, 3), np.uint8))
        with pytest.raises(ValueError, match=r"samples\.npz has no `arr_0`, only images\.npy"):
            open_samples(path)

    @pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed])
    def test_files_that_are_cut_short_are_refused(self, digits, tmp_path, save):
        path = tmp_path / ("samples.npy" if save is np.save else "samples.npz")
        save(path, digits)
        content = path.read_bytes()
        for length in (5, 20, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(OSError, match=r"samples\.np. is damaged or cut short"):
                open_samples(path)

    def test_a_damaged_compressed_file_is_refused(self, digits, tmp_path):
        path = tmp_path / "samples.npz"
        np.savez_compressed(path, digits)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
        with pytest.raises(OSError, match=r"samples\.npz is damaged or cut short"):
            open_samples(path)

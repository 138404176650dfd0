"""Streaming moments against numpy, Fréchet distances against scipy, torchmetrics and known Gaussians."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_terdit.evaluation import GaussianStatistics, frechet_distance
from tiny_images import Projection, random_features


class TestGaussianStatistics:
    @pytest.mark.parametrize("sizes", [[1, 99], [33, 33, 34], [1] * 100, [0, 60, 0, 40]], ids=str)
    def test_pieces_give_the_whole(self, sizes):
        features = random_features(100, 7)
        statistics = GaussianStatistics(7)
        for piece in features.split(sizes):
            statistics.update(piece.requires_grad_())
        assert statistics.count == 100
        assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64
        assert not statistics.covariance.requires_grad
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

    def test_rows_that_are_refused_are_not_counted(self):
        features = random_features(10, 3)
        features[4, 1], features[7, 0] = float("nan"), -float("inf")
        statistics = GaussianStatistics(3)
        statistics.update(random_features(100, 3))
        with pytest.raises(ValueError, match=r"Features of 2 rows hold NaN or infinity: rows 104, 107, counted"):
            statistics.update(features)
        for shape in ((5, 4), (5,), (5, 3, 1)):
            with pytest.raises(ValueError, match="Features must be"):
                statistics.update(torch.zeros(shape))
        assert statistics.count == 100

    def test_what_is_given_out_can_be_changed(self):
        counted = GaussianStatistics(2)
        counted.update(random_features(9, 2))
        read = GaussianStatistics.from_moments(counted.mean, counted.covariance, 30)
        assert (read.count, read.width) == (30, 2)
        for statistics in (counted, read):
            before = statistics.mean.tolist(), statistics.covariance.tolist()
            statistics.mean.zero_()
            statistics.covariance.zero_()
            assert (statistics.mean.tolist(), statistics.covariance.tolist()) == before


class TestFrechetDistance:
    @pytest.mark.parametrize(("rows", "more", "width"), [(200, 300, 2), (300, 200, 40), (500, 500, 64)])
    def test_scipy_computes_the_same(self, rows, more, width):
        """As the FID is usually computed: the square root of a product that is not symmetric."""
        scipy_linalg = pytest.importorskip("scipy.linalg")
        features, other = random_features(rows, width), random_features(more, width, seed=1)
        first, second = features.double().numpy(), other.double().numpy()
        covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
        root = scipy_linalg.sqrtm(covariances[0] @ covariances[1])
        difference = first.mean(0) - second.mean(0)
        expected = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root.real)
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

    @pytest.mark.parametrize(
        ("rows", "width", "error"),
        [
            *((1000, 64, 1e-8), (2, 64, 1e-8), (40, 700, 1e-8)),
            pytest.param(5000, 2048, 1e-3, marks=pytest.mark.slow),  # Inception's width
        ],
    )
    def test_a_copy_is_at_no_distance(self, rows, width, error):
        features = random_features(rows, width).relu() * 10
        assert abs(frechet_distance(features, features.flip(0))) < error

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

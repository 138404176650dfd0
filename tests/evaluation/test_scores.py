"""The Inception Score against numpy and torchmetrics, precision and recall against scikit-learn and exact integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_terdit.evaluation import InceptionScore, inception_score, precision_and_recall
from tiny_images import Returning, inception_score_by_numpy, precision_and_recall_by_scikit_learn, random_features


def random_probabilities(rows, classes, seed=0):
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * logits).softmax(1)


class TestInceptionScore:
    @pytest.mark.parametrize("split_size", [1, 7, 99, 100, 101])
    def test_numpy_computes_the_same(self, split_size):
        probabilities = random_probabilities(100, 12)
        expected = inception_score_by_numpy(probabilities, split_size)
        assert inception_score(probabilities, split_size) == pytest.approx(expected, rel=1e-12)

    def test_adms_splits_are_the_default(self):
        probabilities = random_probabilities(7000, 3)
        expected, whole = (inception_score_by_numpy(probabilities, size) for size in (5000, 7000))
        assert inception_score(probabilities) == pytest.approx(expected, rel=1e-12)
        assert inception_score(probabilities) != pytest.approx(whole, rel=1e-9)

    @pytest.mark.parametrize("sizes", [[1] * 100, [0, 50, 50], [13] * 7 + [9]], ids=str)
    def test_pieces_give_the_whole(self, sizes):
        probabilities = random_probabilities(100, 12)
        score = InceptionScore(split_size=30)
        for piece in probabilities.split(sizes):
            score.update(piece)
        assert score.value == pytest.approx(inception_score_by_numpy(probabilities, 30), rel=1e-12)
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

    def test_rows_that_are_refused_are_not_counted(self):
        score = InceptionScore()
        score.update(torch.eye(3))
        for rows, message in (
            ([[1.0, 0, 0], [1, 1, 0]], "Row 4 is no set of probabilities: it sums to 2 "),
            ([[1.5, -0.5, 0]], "Row 3 is no set of probabilities"),
            ([[torch.nan, 1, 0]], "rows 3, counted"),
            ([[1.0, 0]], r"must be \(N, 3\), got \(1, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                score.update(torch.tensor(rows))
        assert score.count == 3


class TestPrecisionAndRecall:
    @staticmethod
    def by_integers(samples, reference, neighbors):
        """Exact, of lists of rows of integers."""

        def squared(a, b):
            return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

        def covered(points, centers):
            radii = [
                sorted(squared(center, other) for j, other in enumerate(centers) if j != i)[neighbors - 1]
                for i, center in enumerate(centers)
            ]
            inside = [
                any(squared(point, center) <= radius for center, radius in zip(centers, radii, strict=True))
                for point in points
            ]
            return sum(inside) / len(points)

        return covered(samples, reference), covered(reference, samples)

    @pytest.mark.parametrize(
        ("rows", "more", "width", "neighbors"), [(80, 120, 5, 3), (150, 60, 30, 1), (70, 70, 2, 5)]
    )
    def test_scikit_learn_finds_the_same(self, rows, more, width, neighbors):
        samples, reference = random_features(rows + more, width).split([rows, more])
        samples = samples * 1.3 + 0.3
        expected = precision_and_recall_by_scikit_learn(samples, reference, neighbors)
        assert 0 < min(expected) <= max(expected) < 1
        assert precision_and_recall(samples, reference, neighbors) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("chunk", [7, 30, 90])
    def test_chunks_do_not_matter(self, chunk):
        samples, reference = random_features(60, 4), random_features(90, 4, seed=1)
        expected = precision_and_recall_by_scikit_learn(samples, reference)
        assert precision_and_recall(samples, reference, chunk=chunk) == pytest.approx(expected, abs=1e-12)

    grid = st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=5, max_size=14)

    @settings(max_examples=60, deadline=None)
    @given(
        grid, grid, st.integers(1, 4), st.integers(1, 6), st.sampled_from([(1, 0), (0.1, 0), (0.1, 0.1), (0.25, 1e4)])
    )
    def test_ties_and_duplicates_are_exact(self, samples, reference, neighbors, chunk, place):
        exact = self.by_integers(samples, reference, neighbors)
        step, offset = place  # a tenth is no exact float: distances that should be equal differ by rounding
        rows = [torch.tensor(points, dtype=torch.float64) * step + offset for points in (samples, reference)]
        assert precision_and_recall(*rows, neighbors, chunk) == pytest.approx(exact, abs=1e-12)
        assert precision_and_recall(*rows[::-1], neighbors, chunk) == pytest.approx(exact[::-1], abs=1e-12)

    def test_known_sets(self):
        features = random_features(50, 6)
        assert precision_and_recall(features, features.flip(0)) == (1, 1)
        assert precision_and_recall(features + 1e3, features) == (0, 0)
        # One image again and again is precise, and recalls itself only.
        assert precision_and_recall(features[[7]].repeat(50, 1), features) == (1, 1 / 50)
        # Half of the reference, twice as often.
        assert precision_and_recall(features[:25].repeat_interleave(4, 0), features) == (1, 0.5)

    def test_distances_are_those_of_float64_wherever_the_features_lie(self):
        samples, reference = random_features(80, 5, dtype=torch.float64), random_features(90, 5, 1, torch.float64)
        expected = precision_and_recall(samples, reference)
        assert precision_and_recall(samples + 1e6, reference + 1e6) == expected
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            low = samples.to(dtype), reference.to(dtype)
            assert precision_and_recall(*low) == precision_and_recall(*(rows.double() for rows in low))

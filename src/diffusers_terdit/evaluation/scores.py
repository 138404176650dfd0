"""Inception Score, and precision and recall."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .gaussian import check_finite, shown


class InceptionScore:
    """The Inception Score of probabilities that arrive in any number of pieces, in float64.

    exp of the mean divergence of p(class | image) from p(class), over splits of `split_size` images in their order,
    the last one perhaps smaller, averaged over the splits with equal weight, as ADM does.

    Source: https://arxiv.org/abs/1606.03498.
    """

    def __init__(self, split_size: int = 5000) -> None:
        if split_size < 1:
            raise ValueError(f"`split_size` must be at least 1, got {split_size}.")
        self.split_size = split_size
        self.count = 0
        self._scores: list[float] = []  # of the splits that are full
        self._rows = 0  # in the split that is not
        self._negentropy = 0.0  # sum of p log p over its rows and classes
        self._sum: Tensor | None = None  # (K,)

    @torch.no_grad()
    def update(self, probabilities: Tensor) -> None:
        """Add rows (N, K) that are at least 0 and sum to 1. Raises: ValueError naming rows that are not."""
        is_matrix = isinstance(probabilities, Tensor) and probabilities.ndim == 2
        if not is_matrix or (self._sum is not None and probabilities.shape[1] != len(self._sum)):
            width = "K" if self._sum is None else len(self._sum)
            raise ValueError(f"Probabilities must be (N, {width}), got {shown(probabilities)}.")
        rows = probabilities.cpu().double()
        check_finite(rows, "Probabilities", self.count)
        bad = ((rows < 0).any(1) | ((rows.sum(1) - 1).abs() > 1e-2)).nonzero().flatten() + self.count
        if len(bad):
            total = float(rows[bad[0] - self.count].sum())
            raise ValueError(
                f"Row {int(bad[0])} is no set of probabilities: it sums to {total:.3g} or holds a negative number. "
                "Pass the softmax of logits."
            )
        self.count += len(rows)
        if self._sum is None:
            self._sum = torch.zeros(rows.shape[1], dtype=torch.float64)
        while len(rows):
            piece, rows = rows.tensor_split([self.split_size - self._rows])
            self._rows += len(piece)
            self._negentropy += float(torch.xlogy(piece, piece).sum())
            self._sum = self._sum + piece.sum(0)
            if self._rows == self.split_size:
                self._scores.append(self._score())
                self._rows, self._negentropy, self._sum = 0, 0.0, torch.zeros_like(self._sum)

    def _score(self) -> float:
        assert self._sum is not None
        mean = self._sum / self._rows  # (K,), p(class)
        return float((self._negentropy / self._rows - torch.xlogy(mean, mean).sum()).exp())

    @property
    def value(self) -> float:
        """The score so far. Raises: ValueError if there are no rows."""
        if not self.count:
            raise ValueError("There is no Inception Score of no images: call `update` first.")
        scores = [*self._scores, self._score()] if self._rows else self._scores
        return sum(scores) / len(scores)


def inception_score(probabilities: Tensor, split_size: int = 5000) -> float:
    """[`InceptionScore`] of class probabilities (N, K), float, rows that sum to 1."""
    score = InceptionScore(split_size)
    score.update(probabilities)
    return score.value


@torch.no_grad()
def precision_and_recall(
    samples: Tensor, reference: Tensor, neighbors: int = 3, chunk: int = 2048
) -> tuple[float, float]:
    """Share of samples within the reference's set, and share of the reference within the samples' set.

    A set is the union of balls around its features; a ball's radius is the distance to the k-th nearest other feature
    of the set. Points on the surface are inside, ties within rounding too. Distances are float64, on the device of
    `samples`, in blocks of `chunk` rows and columns, which do not change the result.

    Args:
        samples (`torch.Tensor`): (N, D), float.
        reference (`torch.Tensor`): (M, D), float.
        neighbors (`int`, defaults to 3): k, as ADM has it.
        chunk (`int`, defaults to 2048): Rows of a block; memory is some matrices of `chunk`^2 and `chunk` D doubles.

    Returns:
        `tuple[float, float]`: precision and recall, in [0, 1].

    Source: https://arxiv.org/abs/1904.06991.
    Raises: ValueError if a set has fewer than `neighbors` + 1 rows or values that are not finite, or widths differ.
    """
    if neighbors < 1 or chunk < 1:
        raise ValueError(f"`neighbors` and `chunk` must be at least 1, got {neighbors} and {chunk}.")
    matrices = all(isinstance(features, Tensor) and features.ndim == 2 for features in (samples, reference))
    if not matrices or samples.shape[1] != reference.shape[1]:
        got = f"{shown(samples)} and {shown(reference)}"
        raise ValueError(f"Precision and recall take features (N, D) and (M, D), got {got}.")
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbors:
            raise ValueError(f"{neighbors} neighbors need at least {neighbors + 1} {name}, got {len(features)}.")
        for start in range(0, len(features), chunk):
            check_finite(features[start : start + chunk], f"Features of the {name}:", start)

    # Rounding of a distance is below `margin` times the squared lengths of its two ends. Lengths from the middle of
    # the reference keep it small.
    margin = 4 * (samples.shape[1] + 4) * torch.finfo(torch.float64).eps
    sums = [rows.to(samples.device, torch.float64).sum(0) for rows in reference.split(chunk)]
    centre = torch.stack(sums).sum(0) / len(reference)
    blocks = _Blocks(samples, centre, chunk), _Blocks(reference, centre, chunk)
    sample_radii, reference_radii = (_squared_radii(features, neighbors, margin) for features in blocks)

    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=samples.device)
    for rows, reference_block in blocks[1]:
        for columns, sample_block in blocks[0]:
            distances = _squared_distances(reference_block, sample_block, -margin)
            precise[columns] |= (distances <= reference_radii[rows, None]).any(0)
            recalled[rows] |= (distances <= sample_radii[columns]).any(1)
    return float(precise.double().mean()), float(recalled.double().mean())


class _Blocks:
    """Slices of (N, D) features and what they hold, centred, in float64."""

    def __init__(self, features: Tensor, centre: Tensor, chunk: int) -> None:
        self.features, self.centre = features, centre
        self.slices = [slice(start, start + chunk) for start in range(0, len(features), chunk)]

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return self.from_block(0)

    def from_block(self, first: int) -> Iterator[tuple[slice, Tensor]]:
        for rows in self.slices[first:]:
            yield rows, self.features[rows].to(self.centre.device, torch.float64) - self.centre


def _squared_distances(rows: Tensor, columns: Tensor, margin: float) -> Tensor:
    """(n, D), (m, D) -> (n, m): squared distances, and `margin` times what rounding is measured by on top."""
    lengths = rows.square().sum(1)[:, None] + columns.square().sum(1)
    return (lengths * (1 + margin)).addmm_(rows, columns.T, alpha=-2)


def _squared_radii(blocks: _Blocks, neighbors: int, margin: float) -> Tensor:
    """Squared distance of each feature to the k-th nearest other one, upper end of rounding: (N,)."""
    nearest = blocks.centre.new_full((len(blocks.features), neighbors), torch.inf)

    def take(rows: slice, distances: Tensor) -> None:
        candidates = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = candidates.topk(neighbors, dim=1, largest=False).values

    for index, (rows, block) in enumerate(blocks):
        own = _squared_distances(block, block, margin)
        take(rows, own.fill_diagonal_(torch.inf))  # a feature is no neighbor of itself, a copy of it is
        for columns, other in blocks.from_block(index + 1):
            distances = _squared_distances(block, other, margin)
            take(rows, distances)
            take(columns, distances.T)
    return nearest.max(1).values

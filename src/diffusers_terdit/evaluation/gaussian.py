"""Features as a Gaussian: streaming mean and covariance, and the Fréchet distance of two of them."""

from __future__ import annotations

import torch
from torch import Tensor


class GaussianStatistics:
    """Mean and covariance of rows that arrive in any number of pieces, in float64.

    Each piece is centred on its own mean and merged, so a mean far from zero costs no accuracy. Memory: one (D, D)
    matrix.

    Args:
        width (`int`): D, the length of a row.

    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self, width: int) -> None:
        if width < 1:
            raise ValueError(f"`width` must be at least 1, got {width}.")
        self.width = width
        self.count = 0
        self._mean = torch.zeros(width, dtype=torch.float64)
        self._scatter = torch.zeros(width, width, dtype=torch.float64)  # sum of (row - mean) (row - mean)^T
        self._known_covariance: Tensor | None = None

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int = 0) -> GaussianStatistics:
        """Statistics that were computed elsewhere: they take no more rows.

        Args:
            mean (`torch.Tensor`): (D,), float.
            covariance (`torch.Tensor`): (D, D), float, divided by N - 1.
            count (`int`, defaults to 0): Rows behind them; 0 where nobody wrote it down.

        Raises: ValueError if the shapes do not fit or a value is not finite.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"Moments are a mean (D,) and a covariance (D, D), got {tuple(mean.shape)} and "
                f"{tuple(covariance.shape)}."
            )
        if not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(
                "The mean or the covariance holds NaN or infinity. Compute them again from finite features."
            )
        if not torch.allclose(covariance, covariance.T, atol=1e-6 * float(covariance.abs().max())):
            difference = float((covariance - covariance.T).abs().max())
            raise ValueError(
                f"The covariance is not symmetric: it and its transpose differ by up to {difference:.3g}. Compute it"
                " again from the features."
            )
        statistics = cls.__new__(cls)
        statistics.width, statistics.count = len(mean), count
        statistics._mean = mean.detach().to("cpu", torch.float64)
        statistics._known_covariance = covariance.detach().to("cpu", torch.float64)
        return statistics

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add rows (N, D) of any float dtype and device.

        Raises: ValueError for another width, or naming the rows that hold NaN or infinity.
        """
        if self._known_covariance is not None:
            raise ValueError(
                f"These statistics of {self.count} rows were read, not counted: they take no more rows. Count all rows"
                " with new ones."
            )
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"Features must be (N, {self.width}), got {tuple(features.shape)}.")
        rows = features.cpu().double()  # in this order: MPS has no float64
        check_finite(rows, "Features", self.count)
        added = len(rows)
        if not added:
            return
        total = self.count + added
        mean = rows.mean(0)
        rows = rows - mean
        shift = mean - self._mean
        self._scatter.addmm_(rows.T, rows)
        self._scatter.addr_(shift, shift, alpha=self.count * added / total)
        self._mean = self._mean + shift * (added / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,), float64."""
        if self._known_covariance is None and not self.count:
            raise ValueError("There is no mean of no features: call `update` first.")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D), float64, divided by N - 1. Raises: ValueError if there are fewer than two rows."""
        if self._known_covariance is not None:
            return self._known_covariance.clone()
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 rows of features, got {self.count}.")
        return self._scatter / (self.count - 1)


def frechet_distance(features: Tensor | GaussianStatistics, other: Tensor | GaussianStatistics) -> float:
    r"""Fréchet distance of two sets of features, as Gaussians: \(|m - n|^2 + tr A + tr B - 2 tr (A B)^{1/2}\).

    The last trace is the sum of the singular values of \(A^{1/2} B^{1/2}\), which loses no digits to the square root
    of a rounding error: a set is at 0 from its copy also where it has fewer rows than columns.

    Args:
        features (`torch.Tensor` or [`GaussianStatistics`]): (N, D), float.
        other (`torch.Tensor` or [`GaussianStatistics`]): (M, D), float.

    Returns:
        `float`: computed in float64. With Inception's features it is the FID.

    Source: https://arxiv.org/abs/1706.08500.
    Raises: ValueError if a set has fewer than two rows or values that are not finite, or the widths differ.
    """
    first, second = _statistics(features), _statistics(other)
    if first.width != second.width:
        raise ValueError(f"A Fréchet distance takes features of one width, got {first.width} and {second.width}.")
    covariances = first.covariance, second.covariance
    cross = torch.linalg.svdvals(_root(covariances[0]) @ _root(covariances[1]).T).sum()
    means = (first.mean - second.mean).square().sum()
    return float(means + covariances[0].trace() + covariances[1].trace() - 2 * cross)


def shown(given: object) -> str:
    """Shape of a tensor, type of anything else: for errors."""
    return str(tuple(given.shape)) if isinstance(given, Tensor) else type(given).__name__


def check_finite(rows: Tensor, what: str, first: int = 0) -> None:
    """Raise ValueError naming the rows of (N, ...) that hold NaN or infinity, counted from `first`."""
    bad = (~rows.isfinite()).flatten(1).any(1).nonzero().flatten() + first
    if len(bad):
        names = ", ".join(str(int(row)) for row in bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise ValueError(
            f"{what} of {len(bad)} rows hold NaN or infinity: rows {names}, counted from 0. Leave them out, or look at"
            " what made them."
        )


def _statistics(features: Tensor | GaussianStatistics) -> GaussianStatistics:
    if isinstance(features, GaussianStatistics):
        return features
    if not isinstance(features, Tensor) or features.ndim != 2:
        raise ValueError(f"Features must be a tensor (N, D), got {shown(features)}.")
    statistics = GaussianStatistics(features.shape[1])
    statistics.update(features)
    return statistics


def _root(covariance: Tensor) -> Tensor:
    """R (r, D) with R^T R = covariance, without the directions that have no variance."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    if eigenvalues[0] < -1e-6 * eigenvalues[-1].abs():
        raise ValueError(
            f"This is no covariance: it has a variance of {float(eigenvalues[0]):.3g}. Compute it again from the"
            " features."
        )
    positive = eigenvalues > 0
    return (vectors[:, positive] * eigenvalues[positive].sqrt()).T

"""The Frechet distance between two Gaussians fitted to features: the D of FID, FVD and their relatives.

    D = |mu_1 - mu_2|^2 + tr S_1 + tr S_2 - 2 tr (S_1 S_2)^(1/2)                                        (Heusel et al. 2017, Eq. 6)

Always float64, always symmetric solvers. tr (S_1 S_2)^(1/2) is the sum of the square roots of the eigenvalues of R S_2 R, R = S_1^(1/2),
which is symmetric and positive; its factor R belongs to the reference alone and is computed once. In float32 the same formula is off by
2 % at 400 dimensions and by 11 % at 2,048.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class FeatureError(ValueError):
    """Features that no distance can be computed from: not finite, of the wrong shape, too few."""


@dataclass(frozen=True)
class Moments:
    """Mean, unbiased covariance (divided by count - 1) and count of one set of features."""

    mean: Tensor  # float64 (d)
    covariance: Tensor  # float64 (d d)
    count: int

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance, (d d); eigenvalues that are rounding noise count as zero."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return (vectors * without_noise(values).sqrt()) @ vectors.T


def moments(features: Tensor, weights: Tensor | None = None) -> Moments:
    """Fit a Gaussian to features (n d).

    `weights` (n): whole numbers, how often each row counts (a bootstrap resample). Raises FeatureError for NaN, infinities and n < 2.
    """
    rows = checked(features).double()
    if weights is None:
        count = rows.shape[0]
        mean = rows.mean(0)
        centred = rows - mean
        weighted = centred
    else:
        weights = weights.to(rows)
        count = int(weights.sum())
        mean = weights @ rows / count
        centred = rows - mean
        weighted = centred * weights[:, None]
    if count < 2:
        raise FeatureError(f"A covariance needs at least 2 samples, got {count}. Measure more videos.")
    return Moments(mean, symmetric(weighted.T @ centred / (count - 1)), count)


class StreamingMoments:
    """Moments of features that come piece by piece and are not kept; pieces may be merged in any grouping (Chan et al. 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None  # sum of (x - mean)(x - mean)^T

    def update(self, features: Tensor) -> None:
        """Take in features (n d)."""
        rows = checked(features).double()
        mean = rows.mean(0)
        centred = rows - mean
        self._combine(rows.shape[0], mean, centred.T @ centred)

    def merge(self, others: Iterable[StreamingMoments]) -> None:
        for other in others:
            if other.mean is not None and other.scatter is not None:
                self._combine(other.count, other.mean, other.scatter)

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total = self.count + count
        step = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def compute(self) -> Moments:
        if self.mean is None or self.scatter is None or self.count < 2:
            raise FeatureError(f"A covariance needs at least 2 samples, got {self.count}. Measure more videos.")
        return Moments(self.mean, symmetric(self.scatter / (self.count - 1)), self.count)


def frechet_distance(reference: Moments, other: Moments) -> float:
    """D between two fitted Gaussians; `reference.root` is computed once and kept with the reference."""
    _same_width(reference, other)
    root = reference.root
    values = torch.linalg.eigvalsh(symmetric(root @ other.covariance @ root))
    return _assemble(reference, other, without_noise(values).sqrt().sum())


def frechet_distance_once(first: Moments, second: Moments) -> float:
    """The same D where neither root will be used again (resamples): a Cholesky factor L of S_1 serves as well, since L^T S_2 L has the
    eigenvalues of S_1 S_2, and it costs a fraction of an eigendecomposition. Falls back to the root where S_1 is singular."""
    _same_width(first, second)
    factor, failed = torch.linalg.cholesky_ex(first.covariance)
    if failed.item():
        return frechet_distance(first, second)
    values = torch.linalg.eigvalsh(symmetric(factor.T @ second.covariance @ factor))
    return _assemble(first, second, without_noise(values).sqrt().sum())


def frechet_distance_of_few(
    first: Tensor, second: Tensor, first_weights: Tensor | None = None, second_weights: Tensor | None = None
) -> float:
    """D straight from features (n d) and (m d): tr (S_1 S_2)^(1/2) is the nuclear norm of X Y^T / sqrt((n-1)(m-1)), X and Y centred.

    Exact, without thresholds, and cheap where n and m are below d. An independent path to the same number. Weights as for `moments`.
    """
    mean_x, x = _scaled(first, first_weights)
    mean_y, y = _scaled(second, second_weights)
    cross = torch.linalg.svdvals(x @ y.T).sum()
    distance = (mean_x - mean_y).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return _not_negative(distance, x.square().sum() + y.square().sum())


def _scaled(features: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean, and rows whose X^T X is the covariance; rows that count nothing are left out."""
    rows = checked(features).double()
    weights = torch.ones(rows.shape[0]) if weights is None else weights
    rows, weights = rows[(weights > 0).to(rows.device)], weights[weights > 0].to(rows)
    count = weights.sum()
    if count < 2:
        raise FeatureError(f"A covariance needs at least 2 samples, got {int(count)}. Measure more videos.")
    mean = weights @ rows / count
    return mean, (rows - mean) * (weights / (count - 1)).sqrt()[:, None]


def checked(features: Tensor) -> Tensor:
    """Refuse what would give a number that looks right: a wrong shape, NaN, infinities."""
    if features.ndim != 2 or features.shape[0] == 0:
        raise FeatureError(f"Features must be a table (samples, width) with at least one row, got shape {tuple(features.shape)}.")
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise FeatureError(f"{len(rows)} of {len(bad)} feature rows hold NaN or infinity (first rows: {rows[:8]}). Look at those videos.")
    return features


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def without_noise(values: Tensor) -> Tensor:
    """Eigenvalues of a positive matrix; those below largest * d * eps are rounding noise (rank deficiency) and become zero."""
    largest, least = float(values.max()), float(values.min())
    if least < -1e-6 * max(abs(largest), abs(least)):
        raise FeatureError(f"A covariance has no negative eigenvalues; this one has {least:.3g} beside {largest:.3g}: the solver failed.")
    floor = values.max() * values.numel() * torch.finfo(values.dtype).eps
    return torch.where(values > floor, values, torch.zeros_like(values))


def _same_width(first: Moments, second: Moments) -> None:
    if first.mean.shape != second.mean.shape:
        raise FeatureError(f"Features of {first.mean.numel()} and {second.mean.numel()} numbers cannot be compared: different networks.")


def _assemble(first: Moments, second: Moments, cross: Tensor) -> float:
    trace = first.covariance.trace() + second.covariance.trace()
    return _not_negative((first.mean - second.mean).square().sum() + trace - 2 * cross, trace)


def _not_negative(distance: Tensor, trace: Tensor) -> float:
    value, slack = float(distance), 1e-6 * float(trace)
    if value < -slack:
        raise FeatureError(f"The Frechet distance came out at {value:.6g}, below -1e-6 of the trace {float(trace):.6g}: the solver failed.")
    return max(value, 0.0)

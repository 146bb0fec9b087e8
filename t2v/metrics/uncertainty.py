"""How far a distance measured on N videos can be trusted: its standard error, and where it goes as N grows.

The unit is always the video: all frames of one are drawn together. Intervals are value +- 1.96 standard errors; percentiles of the
bootstrap are never used, since a resample adds the bias of a finite N a second time (measured coverage: 0 %).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from t2v.metrics.frechet import FeatureError, frechet_distance_of_few, frechet_distance_once, moments

Z95 = 1.96


@dataclass(frozen=True)
class Extrapolation:
    """The intercept of a line through distances at several N, over 1/N (Chong & Forsyth 2020)."""

    value: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def rounded(value: float) -> float:
    """To ten digits. Linear algebra libraries choose kernels by the alignment of memory, which moves the sixteenth from call to call."""
    return float(f"{value:.10g}")


def bootstrap_error(statistic: Callable[[Tensor, Tensor], float], real: int, fake: int, resamples: int = 100, seed: int = 0) -> float:
    """Standard error of `statistic(how often each real video counts (n), the same for fake videos (m))` over resamples of both sides."""
    if resamples < 2:
        raise ValueError(f"A standard error needs at least 2 resamples, got {resamples}.")
    generator = torch.Generator().manual_seed(seed)
    values = [statistic(draw(real, generator), draw(fake, generator)) for _ in range(resamples)]
    return float(torch.tensor(values, dtype=torch.float64).std())


def draw(videos: int, generator: torch.Generator) -> Tensor:
    """How often each of n videos is drawn when n are drawn with replacement; int64 (n)."""
    return torch.bincount(torch.randint(videos, (videos,), generator=generator), minlength=videos)


def frechet_error(real: Tensor, fake: Tensor, frames: int = 1, resamples: int = 100, seed: int = 0) -> float:
    """Standard error of the Frechet distance between features (n*frames d) and (m*frames d), rows of one video consecutive."""

    def statistic(count_real: Tensor, count_fake: Tensor) -> float:
        return distance(real, fake, count_real.repeat_interleave(frames), count_fake.repeat_interleave(frames))

    return bootstrap_error(statistic, real.shape[0] // frames, fake.shape[0] // frames, resamples, seed)


def mean_error(values: Tensor, groups: Tensor | None = None) -> float:
    """Standard error of the mean of values (n); clustered where several captions belong to one video, `groups` (n) naming the video."""
    values = values.double()
    if groups is None:
        groups = torch.arange(values.numel())
    names, inverse = torch.unique(groups, return_inverse=True)
    if names.numel() < 2:
        raise FeatureError(f"A standard error needs at least 2 videos, got {names.numel()}.")
    sums = torch.zeros(names.numel(), dtype=torch.float64).index_add_(0, inverse.cpu(), (values - values.mean()).cpu())
    clusters = names.numel()
    return float((sums.square().sum() * clusters / (clusters - 1)).sqrt() / values.numel())


def extrapolate(real: Tensor, fake: Tensor, frames: int = 1, points: int = 8, repeats: int = 6, seed: int = 0) -> Extrapolation:
    """The Frechet distance for infinitely many videos, from `points` sizes between N/4 and N drawn without replacement on both sides.

    To be shown beside the distance at N, labelled, never instead of it.
    """
    videos = min(real.shape[0], fake.shape[0]) // frames
    if videos < 8:
        raise FeatureError(f"Extrapolation to infinitely many videos needs at least 8, got {videos}.")
    generator = torch.Generator().manual_seed(seed)
    sizes = [round(videos / 4 + i * (videos - videos / 4) / (points - 1)) for i in range(points)]
    distances = []
    for size in sizes:
        values = [_at(real, fake, frames, size, generator) for _ in range(repeats if size < videos else 1)]
        distances.append(sum(values) / len(values))
    return Extrapolation(intercept([1 / size for size in sizes], distances), tuple(sizes), tuple(distances))


def intercept(x: list[float], y: list[float]) -> float:
    """Where the least-squares line through (x, y) meets x = 0."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
    return mean_y - slope * mean_x


def _at(real: Tensor, fake: Tensor, frames: int, size: int, generator: torch.Generator) -> float:
    chosen = [torch.randperm(side.shape[0] // frames, generator=generator)[:size].sort().values for side in (real, fake)]
    rows = [(pick[:, None] * frames + torch.arange(frames)).flatten() for pick in chosen]
    return distance(real[rows[0]], fake[rows[1]])


def distance(real: Tensor, fake: Tensor, real_weights: Tensor | None = None, fake_weights: Tensor | None = None) -> float:
    """The Frechet distance by the cheaper of the two exact ways: few rows or few numbers."""
    if min(real.shape[0], fake.shape[0]) <= real.shape[1]:
        return frechet_distance_of_few(real, fake, real_weights, fake_weights)
    return frechet_distance_once(moments(real, real_weights), moments(fake, fake_weights))

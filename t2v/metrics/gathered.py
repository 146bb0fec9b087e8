"""torchmetrics wrappers: features with their place in the manifest, gathered over ranks, sorted, without the duplicates of padded samplers.

What a wrapper computes is a function on the sorted table, so neither the number of ranks nor the order of updates can change a bit of it,
as long as each feature was computed in the same batch: `chunks` gives whole chunks to ranks for that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from t2v.metrics.clipsim import clipsim
from t2v.metrics.frechet import FeatureError, Moments, frechet_distance, moments
from t2v.metrics.uncertainty import rounded


def chunks(total: int, size: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """Chunk k is rows k*size .. (k+1)*size of the manifest on any number of ranks; rank r takes chunks r, r + world, ..."""
    for start in range(rank * size, total, world * size):
        yield range(start, min(start + size, total))


def deduplicated(index: Tensor, features: Tensor, expected: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
    """Rows sorted by manifest index, each once. Raises FeatureError where a row of the manifest is missing or a foreign one appears."""
    names, inverse = torch.unique(index, return_inverse=True)
    first = torch.full((names.numel(),), index.numel(), dtype=torch.long, device=index.device)
    first.scatter_reduce_(0, inverse, torch.arange(index.numel(), device=index.device), reduce="amin")
    if expected is not None:
        wanted, got = set(expected), set(names.tolist())
        if wanted != got:
            missing, foreign = sorted(wanted - got), sorted(got - wanted)
            raise FeatureError(
                f"Features of {len(got & wanted)} of {len(wanted)} videos: {len(missing)} missing {missing[:5]}, "
                f"{len(foreign)} not in the manifest {foreign[:5]}. Nothing is measured on a part."
            )
    return names, features[first]


class GatheredMetric(Metric):
    """Collects features (b *shape) and manifest indices (b); subclasses say what the sorted table gives. `expected`: the whole manifest."""

    full_state_update = False
    higher_is_better: bool | None = None
    index: list[Tensor]
    features: list[Tensor]

    def __init__(self, shape: Sequence[int], expected: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.shape, self.expected = tuple(shape), expected
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self.add_state("features", default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, index: Tensor | Sequence[int]) -> None:
        index = torch.as_tensor(index, dtype=torch.long)
        if features.shape[1:] != self.shape or index.shape != features.shape[:1]:
            raise FeatureError(f"Expected features (b, *{self.shape}), indices (b); got {tuple(features.shape)} and {tuple(index.shape)}.")
        self.index.append(index.to(self.device))
        self.features.append(features.detach().float().to(self.device))

    def table(self) -> tuple[Tensor, Tensor]:
        """Manifest indices (n) and features (n *shape) on the CPU, sorted."""
        index = torch.cat(self._with_nothing()["index"]).cpu()
        features = torch.cat(self._with_nothing()["features"]).cpu()
        return deduplicated(index, features, self.expected)

    def _with_nothing(self) -> dict[str, list[Tensor]]:
        """The states as lists that are never empty: a rank without a chunk still takes part in the gathering, with the right shape."""
        index: Any = self.index
        features: Any = self.features
        return {
            "index": [torch.zeros(0, dtype=torch.long, device=self.device), *(index if isinstance(index, list) else [index])],
            "features": [torch.zeros(0, *self.shape, device=self.device), *(features if isinstance(features, list) else [features])],
        }

    def _sync_dist(self, dist_sync_fn: Callable[..., Any] | None = None, process_group: Any = None) -> None:  # type: ignore[override]
        for name, value in self._with_nothing().items():
            setattr(self, name, value)
        if dist_sync_fn is None:
            super()._sync_dist(process_group=process_group)
        else:
            super()._sync_dist(dist_sync_fn, process_group)


class FrechetMetric(GatheredMetric):
    """The Frechet distance to a fixed reference; `width` numbers per row, `frames` rows per video (1 for video features)."""

    higher_is_better = False

    def __init__(self, reference: Moments, frames: int = 1, expected: Sequence[int] | None = None, **kwargs: Any) -> None:
        width = reference.mean.numel()
        super().__init__((width,) if frames == 1 else (frames, width), expected, **kwargs)
        self.reference = reference

    def compute(self) -> Tensor:
        features = self.table()[1].flatten(0, -2)
        return torch.tensor(rounded(frechet_distance(self.reference, moments(features))), dtype=torch.float64)


class ClipSimMetric(GatheredMetric):
    """CLIPSIM; a row holds a video's picture features and, last, its caption's: (frames + 1, width)."""

    higher_is_better = True

    def __init__(self, frames: int, width: int = 512, expected: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__((frames + 1, width), expected, **kwargs)

    def compute(self) -> Tensor:
        rows = self.table()[1]
        return torch.tensor(rounded(float(clipsim(rows[:, :-1], rows[:, -1]).mean())), dtype=torch.float64)

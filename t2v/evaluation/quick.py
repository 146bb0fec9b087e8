"""The same measurement during training, on a small protocol: a plain object that a callback calls on every rank.

Every rank calls `generate` equally often, so that sharded models (whose forward passes are collective) do not hang; rows that are made
twice for that reason count once. Ranks agree after every chunk, so that an exception on one becomes an error on all, not an endless wait.
What fails inside an exchange, in the forward pass of a sharded model, cannot be agreed upon: `generate` says so with OutOfStep, which is
raised at once, and the others end with its process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from t2v.evaluation.features import FeatureStore, checked, extract, identity
from t2v.evaluation.protocol import Dataset, Protocol, select
from t2v.evaluation.scores import check_protocol, distance_extractors, extractors_of, measure, reference_extractors
from t2v.evaluation.videos import Generate, real_videos
from t2v.metrics.features import Extractor
from t2v.metrics.frechet import Moments
from t2v.metrics.gathered import GatheredMetric
from t2v.ranks import connected, from_all


class OutOfStep(RuntimeError):
    """A rank failed where the others wait inside an exchange with it: they cannot be told, and only the end of its process ends them."""


class GatheredFeatures(GatheredMetric):
    """The sorted table itself."""

    def compute(self) -> Tensor:
        return self.table()[1]


class QuickEvaluation:
    """`evaluate(generate, rank, world)` -> {"val/fvd_n256": ...}, equal on all ranks. Names carry the number of videos.

    `cache`: folder that keeps the features of the real clips, shared by runs.
    """

    def __init__(
        self, protocol: Protocol, dataset: Dataset, extractors: Mapping[str, Extractor], cache: Path, prefix: str = "val/"
    ) -> None:
        check_protocol(protocol)
        absent = [name for name in extractors_of(protocol.metrics) if name not in extractors]
        if absent:
            raise ValueError(f"Protocol {protocol.name} needs the networks {absent}, which were not loaded.")
        self.protocol, self.dataset, self.prefix, self.cache = protocol, dataset, prefix, cache
        self.manifest = select(dataset, protocol)
        self.extractors = {name: extractors[name] for name in extractors_of(protocol.metrics)}
        self.real: dict[str, Tensor] | None = None
        self.references: dict[str, Moments] = {}  # of the real clips, fitted once
        self.texts: Tensor | None = None

    def __call__(self, generate: Generate, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> dict[str, float]:
        """Collective: all ranks must call it. `device` is where features are computed and gathered (a GPU under NCCL)."""
        with together(device):
            for extractor in self.extractors.values():
                extractor.to(device)
        made = self._features(generate, rank, world, device)
        real = self._real(rank, world, device)
        with together(device):
            scores = measure(
                self.protocol,
                self.manifest,
                {name: identity(extractor) for name, extractor in self.extractors.items()},
                made,
                real,
                self.references,
                captions=self._captions() if "clipsim" in self.protocol.metrics else None,
                device="cpu",
            )
        return {f"{self.prefix}{score.name}": score.value for score in scores}

    def _features(self, generate: Generate, rank: int, world: int, device: torch.device | str) -> dict[str, Tensor]:
        total, size = len(self.manifest), self.protocol.chunk
        gathered: dict[str, GatheredFeatures] = {}
        for rows in equal_chunks(total, size, rank, world):
            with together(device):
                chosen = [self.manifest.rows[index] for index in rows]
                videos = checked(generate([row.caption for row in chosen], [row.noise_seed for row in chosen]), rows)
                for name, extractor in self.extractors.items():
                    features = extractor(videos.to(device))
                    if name not in gathered:
                        gathered[name] = GatheredFeatures(features.shape[1:], range(total)).to(device)
                    gathered[name].update(features, list(rows))
                del videos, features  # before the next are made
        return {name: metric.compute() for name, metric in gathered.items()}

    def _real(self, rank: int, world: int, device: torch.device | str) -> dict[str, Tensor]:
        """Features of the real clips: from the cache, else rank by rank into it; with them their fitted Gaussians."""
        if self.real is None:
            names, clips, size = reference_extractors(self.protocol.metrics), self.manifest.clips, self.protocol.chunk
            total = len(clips)
            stores: dict[str, FeatureStore] = {}
            with together(device):
                for name in names:
                    stores[name] = FeatureStore.of_real_clips(self.cache, self.dataset, clips, self.extractors[name], name, size)
                videos = real_videos(self.dataset, clips, self.protocol)
                extract(videos, [self.extractors[name] for name in names], list(stores.values()), total, size, device, rank, world)
            with together(device):  # what all ranks have written
                real = {name: store.read(total) for name, store in stores.items()}
                self.references = {name: stores[name].moments(total) for name in distance_extractors(self.protocol.metrics)}
            self.real = real
        return self.real

    def _captions(self) -> Tensor:
        if self.texts is None:
            encode = getattr(self.extractors["clip_vit_b32"], "captions")  # noqa: B009 (only CLIP has a text tower)
            self.texts = encode([row.caption for row in self.manifest.rows]).cpu()
        return self.texts


def equal_chunks(total: int, size: int, rank: int, world: int) -> list[range]:
    """This rank's chunks, as many as any other rank's: where chunks run out, the first ones are done again."""
    every = [range(start, min(start + size, total)) for start in range(0, total, size)]
    rounds = -(-len(every) // world)
    return [every[(step * world + rank) % len(every)] for step in range(rounds)]


@contextmanager
def together(device: torch.device | str) -> Iterator[None]:
    """What fails inside on any rank ends in an error on all at its end: the failure itself where it happened; elsewhere one that names
    it, a ValueError if the user can mend it (ValueError, OSError), else a RuntimeError. Collective: every rank must come to its end, or
    raise OutOfStep."""
    failure: Exception | None = None
    try:
        yield
    except OutOfStep:
        raise
    except Exception as error:  # handed to the other ranks, then raised
        failure = error
    if connected():
        failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if failed.item():
            mendable = isinstance(failure, ValueError | OSError)
            said = from_all(None if failure is None else (f"{type(failure).__name__}: {failure}", mendable))
            if failure is None:
                rank, (text, mendable) = next((rank, words) for rank, words in enumerate(said) if words is not None)
                raise (ValueError if mendable else RuntimeError)(f"the evaluation failed on rank {rank}: {text}")
    if failure is not None:
        raise failure

"""The same measurement during training, on a small protocol: a plain object that a callback calls on every rank.

Every rank calls `generate` equally often, so that sharded models (whose forward passes are collective) do not hang; rows that are made
twice for that reason count once. An exception on one rank becomes an error on all, not a wait without end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2v.evaluation.features import FeatureStore, checked, extract, identity
from t2v.evaluation.protocol import Dataset, Protocol, digest, select
from t2v.evaluation.scores import check_protocol, extractors_of, measure, reference_extractors
from t2v.evaluation.videos import Generate, real_videos
from t2v.metrics.features import Extractor
from t2v.metrics.gathered import GatheredMetric


class GatheredFeatures(GatheredMetric):
    """The sorted table itself."""

    def compute(self) -> Tensor:
        return self.table()[1]


class QuickEvaluation:
    """`evaluate(generate, rank, world)` -> {"val/fvd_n256": ...}, equal on all ranks. Names carry the number of videos.

    `cache`: folder that keeps the features of the real clips, shared by runs. `last`: generated videos by row, the first of this rank's,
    for showing.
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
        self.texts: Tensor | None = None
        self.last: dict[int, Tensor] = {}

    def __call__(self, generate: Generate, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> dict[str, float]:
        """Collective: all ranks must call it. `device` is where features are computed and gathered (a GPU under NCCL)."""
        for extractor in self.extractors.values():
            extractor.to(device)
        made = self._features(generate, rank, world, device)
        real = self._real(rank, world, device)
        scores = measure(
            self.protocol,
            self.manifest,
            {name: identity(extractor) for name, extractor in self.extractors.items()},
            made,
            real,
            captions=self._captions() if "clipsim" in self.protocol.metrics else None,
            device="cpu",
        )
        return {f"{self.prefix}{score.name}": score.value for score in scores}

    def _features(self, generate: Generate, rank: int, world: int, device: torch.device | str) -> dict[str, Tensor]:
        total, size = len(self.manifest), self.protocol.chunk
        gathered: dict[str, GatheredFeatures] = {}
        failure: Exception | None = None
        try:
            self.last = {}
            for rows in equal_chunks(total, size, rank, world):
                chosen = [self.manifest.rows[index] for index in rows]
                videos = checked(generate([row.caption for row in chosen], [row.noise_seed for row in chosen]), rows)
                self.last.setdefault(rows.start, videos[0].cpu())
                for name, extractor in self.extractors.items():
                    features = extractor(videos.to(device))
                    if name not in gathered:
                        gathered[name] = GatheredFeatures(features.shape[1:], range(total)).to(device)
                    gathered[name].update(features, list(rows))
        except Exception as error:  # handed to the other ranks, then raised
            failure = error
        together(failure, device)
        return {name: metric.compute() for name, metric in gathered.items()}

    def _real(self, rank: int, world: int, device: torch.device | str) -> dict[str, Tensor]:
        """Features of the real clips: from the cache, else rank by rank into it."""
        if self.real is None:
            names, total, size = reference_extractors(self.protocol.metrics), len(self.manifest), self.protocol.chunk
            failure: Exception | None = None
            stores: dict[str, FeatureStore] = {}
            try:
                for name in names:
                    settings = {"videos": self.manifest.videos_sha256, "extractor": identity(self.extractors[name]), "chunk": size}
                    stores[name] = FeatureStore(self.cache / f"{self.dataset.name}-{name}-{digest(settings)[:16]}", settings)
                videos = real_videos(self.dataset, self.manifest, self.protocol)
                extract(videos, [self.extractors[name] for name in names], list(stores.values()), total, size, device, rank, world)
            except Exception as error:
                failure = error
            together(failure, device)
            self.real = {name: store.read(total) for name, store in stores.items()}
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


def together(failure: Exception | None, device: torch.device | str) -> None:
    """Raise on all ranks if any failed: the failure itself where it happened, RuntimeError elsewhere."""
    failed = torch.tensor([failure is not None], dtype=torch.int32, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(failed, torch.distributed.ReduceOp.MAX)
    if failure is not None:
        raise failure
    if failed.item():
        raise RuntimeError("the evaluation failed on another rank: see its error")

"""One evaluation from start to results, on any number of ranks, resumable: Table 1 of the paper for one model.

captions -> generate -> videos; real clips        features, chunk by chunk, on disk        scores -> results.json, results.md, page
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v.evaluation.features import FeatureStore, Videos, extract, identity
from t2v.evaluation.page import write_page
from t2v.evaluation.protocol import Dataset, Manifest, Protocol, select
from t2v.evaluation.results import Results, summary
from t2v.evaluation.scores import check_protocol, distance_extractors, environment, extractors_of, measure, reference_extractors
from t2v.evaluation.videos import Generate, VideoFolder, generated_videos, read_strip, real_videos, strip_path
from t2v.metrics.features import Extractor

PAGE_VIDEOS = 16
TEXT_BATCH = 256


@dataclass
class Evaluator:
    """`extractors` by name, ready on `device`; `cache` keeps reference features for all evaluations; `barrier` waits for the other ranks.

    `progress(stage, done, of)` is told after each chunk of this rank.
    """

    protocol: Protocol
    dataset: Dataset
    extractors: Mapping[str, Extractor]
    output: Path
    cache: Path
    device: torch.device | str = "cpu"
    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = field(default=lambda: None)
    progress: Callable[[str, int, int], None] = field(default=lambda stage, done, of: None)
    unverified: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_protocol(self.protocol)
        needed = extractors_of(self.protocol.metrics)
        absent = [name for name in needed if name not in self.extractors]
        if absent:
            raise ValueError(f"Protocol {self.protocol.name} needs the networks {absent}, which were not loaded.")
        self.manifest: Manifest = select(self.dataset, self.protocol)
        self.used = {name: self.extractors[name] for name in needed}

    def write_manifest(self) -> None:
        """Before anything is generated: what another model would have to make for videos=DIR."""
        path = self.output / "manifest.jsonl"
        if self.rank == 0:
            if path.exists() and Manifest.read(path).sha256 != self.manifest.sha256:
                raise ValueError(f"{self.output} holds an evaluation on other videos or captions: use another output folder, or remove it.")
            self.manifest.write(path)

    def of_model(self, generate: Generate, subject: str, details: Mapping[str, Any]) -> Results | None:
        """Generate and measure. `details` names the model and how it is sampled: a folder begun by another one is refused. Rank 0 has the
        results, the others None."""
        self.write_manifest()
        keep = len(self.manifest) if self.protocol.keep_videos else PAGE_VIDEOS
        videos = generated_videos(generate, self.manifest, self.protocol, self.output / "videos", keep)
        return self._measure(videos, subject, details, generated=True)

    def of_folder(self, folder: VideoFolder, subject: str, details: Mapping[str, Any]) -> Results | None:
        """Measure the videos of any model."""
        self.write_manifest()
        return self._measure(folder.videos(), subject, {**details, "lossless": folder.lossless}, generated=False)

    def reference_stores(self) -> dict[str, FeatureStore]:
        return {
            name: FeatureStore.of_real_clips(self.cache, self.dataset, self.manifest.clips, self.used[name], name, self.protocol.chunk)
            for name in reference_extractors(self.protocol.metrics)
        }

    def _measure(self, videos: Videos, subject: str, details: Mapping[str, Any], generated: bool) -> Results | None:
        made = {
            name: FeatureStore(
                self.output / "features" / name,
                {"manifest": self.manifest.sha256, "extractor": identity(e), "chunk": self.protocol.chunk, "subject": plain(details)},
            )
            for name, e in self.used.items()
        }
        references = self.reference_stores()
        real = real_videos(self.dataset, self.manifest.clips, self.protocol)
        self._extract("real", real, {name: self.used[name] for name in references}, references, len(self.manifest.clips))
        self._extract("generated", videos, self.used, made, len(self.manifest))
        self.barrier()
        if self.rank != 0:
            return None
        return self._report(subject, details, self._samples(videos, real, generated), made, references)

    def _extract(
        self, stage: str, videos: Videos, extractors: Mapping[str, Extractor], stores: Mapping[str, FeatureStore], total: int
    ) -> None:
        seen = 0

        def done(rows: int) -> None:
            nonlocal seen
            seen += rows
            self.progress(stage, min(seen * self.world, total), total)

        names = list(extractors)
        extract(
            videos,
            [extractors[name] for name in names],
            [stores[name] for name in names],
            total,
            self.protocol.chunk,
            self.device,
            self.rank,
            self.world,
            done,
        )

    def _report(
        self,
        subject: str,
        details: Mapping[str, Any],
        samples: list[tuple[str, Tensor, Tensor | None]],
        made: Mapping[str, FeatureStore],
        references: Mapping[str, FeatureStore],
    ) -> Results:
        n, clips = len(self.manifest), len(self.manifest.clips)
        captions = self._captions() if "clipsim" in self.protocol.metrics else None
        scores = measure(
            self.protocol,
            self.manifest,
            {name: identity(extractor) for name, extractor in self.used.items()},
            {name: store.read(n) for name, store in made.items()},
            {name: store.read(clips) for name, store in references.items()},
            {name: references[name].moments(clips) for name in distance_extractors(self.protocol.metrics)},
            captions,
            self.device,
        )
        about = {**plain(details), "dataset": self.dataset.name, "environment": environment()}
        about["weights"] = {name: identity(extractor) for name, extractor in self.used.items()}
        results = Results(
            subject, plain(asdict(self.protocol)), self.manifest.sha256, tuple(scores), about, tuple(sorted(set(self.unverified)))
        )
        results.write(self.output / "results.json")
        (self.output / "results.md").write_text(summary(results), encoding="utf-8")
        write_page(self.output / "page.html", results, samples)
        return results

    def _captions(self) -> Tensor:
        encode = getattr(self.used["clip_vit_b32"], "captions", None)
        if encode is None:
            raise ValueError("CLIPSIM needs an extractor with a text tower as clip_vit_b32.")
        texts = [row.caption for row in self.manifest.rows]
        return torch.cat([encode(texts[i : i + TEXT_BATCH]).cpu() for i in range(0, len(texts), TEXT_BATCH)])

    def _samples(self, videos: Videos, real: Videos, generated: bool) -> list[tuple[str, Tensor, Tensor | None]]:
        """The first videos of the manifest and the real ones beside them."""
        p = self.protocol
        samples: list[tuple[str, Tensor, Tensor | None]] = []
        shown: dict[int, Tensor] = {}
        for rows in (range(i, i + 1) for i in range(min(PAGE_VIDEOS, len(self.manifest)))):
            row = self.manifest.rows[rows.start]
            if generated:
                video = read_strip(strip_path(self.output / "videos", row.index), p.size, p.num_frames)
            else:
                video = videos(rows)[0]
            if video is not None:
                clip = self.manifest.clip_of_row[rows.start]
                if clip not in shown:
                    shown[clip] = real(range(clip, clip + 1))[0]
                samples.append((row.caption, video, shown[clip]))
        return samples


def plain(content: Any) -> Any:
    """As it will look after a trip through JSON."""
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return content if isinstance(content, (str, int, float, bool)) or content is None else str(content)

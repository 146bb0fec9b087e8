"""Features on disk, chunk by chunk: what a killed evaluation continues from, and what reference clips are measured only once for.

A store is a folder of one extractor: settings.json (what the features are of) and NNNNN.safetensors, one per chunk of the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from t2v.evaluation.protocol import Dataset, Manifest, digest, replace_file
from t2v.metrics.features import Extractor
from t2v.metrics.frechet import Moments, moments
from t2v.metrics.gathered import chunks, deduplicated

Videos = Callable[[range], Tensor]
"""Rows of the manifest -> uint8 (b f h w c)."""


class FeatureStore:
    """Features of the rows of one manifest by one extractor. Refuses a folder that holds others."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.fingerprint = digest(settings)
        path = folder / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False)
        if not path.exists():
            replace_file(path, text.encode())
        elif json.loads(path.read_text()) != json.loads(text):
            found = json.loads(path.read_text())
            differ = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
            raise ValueError(f"{folder} holds features of something else (differs in {differ}): use another output folder, or remove it.")

    @classmethod
    def of_real_clips(cls, cache: Path, dataset: Dataset, manifest: Manifest, extractor: Extractor, name: str, chunk: int) -> FeatureStore:
        """The one in `cache` for which any evaluation looks that measures the same videos with the same network, called `name`."""
        settings = {"videos": manifest.videos_sha256, "extractor": identity(extractor), "chunk": chunk}
        return cls(cache / f"{dataset.name}-{name}-{digest(settings)[:16]}", settings)

    def path(self, rows: range, chunk: int) -> Path:
        return self.folder / f"{rows.start // chunk:05d}.safetensors"

    def has(self, rows: range, chunk: int) -> bool:
        path = self.path(rows, chunk)
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor("index").tolist() == list(rows)
        except (SafetensorError, OSError):
            return False  # cut off by a full disk or a crash: computed again

    def write(self, rows: range, chunk: int, features: Tensor) -> None:
        if not torch.isfinite(features).all():
            bad = [row for row, values in zip(rows, features) if not torch.isfinite(values).all()]
            raise ValueError(f"{self.settings['extractor']['name']} gives NaN or infinity for rows {bad[:8]} of the manifest.")
        tensors = {"index": torch.tensor(list(rows)), "features": features.float().cpu().contiguous()}
        replace_file(self.path(rows, chunk), save(tensors))

    def read(self, total: int) -> Tensor:
        """All rows in order, (n d) or (n f d). FeatureError names rows that are not there."""
        index, features = [], []
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.stem.isdigit():
                with safe_open(path, "pt") as file:
                    index.append(file.get_tensor("index"))
                    features.append(file.get_tensor("features"))
        if not index:
            raise ValueError(f"{self.folder} holds no features.")
        return deduplicated(torch.cat(index), torch.cat(features), range(total))[1]

    def moments(self, total: int) -> Moments:
        """The fitted Gaussian, with its root, computed once and kept beside the features."""
        path = self.folder / "moments.safetensors"
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    kept = Moments(file.get_tensor("mean"), file.get_tensor("covariance"), int(file.get_tensor("count")))
                    kept.__dict__["root"] = file.get_tensor("root")
                    return kept
            except (SafetensorError, OSError):
                path.unlink(missing_ok=True)  # another rank may have been first
        fitted = moments(self.read(total).flatten(0, -2))
        tensors = {"mean": fitted.mean, "covariance": fitted.covariance, "root": fitted.root, "count": torch.tensor(fitted.count)}
        replace_file(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        return fitted


def identity(extractor: Extractor) -> dict[str, str]:
    """What makes an extractor's numbers comparable with another's."""
    return {"name": extractor.name, "recipe": extractor.recipe, "weights": extractor.weights}


def extract(
    videos: Videos,
    extractors: Sequence[Extractor],
    stores: Sequence[FeatureStore],
    total: int,
    chunk: int,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    done: Callable[[int], None] | None = None,
) -> None:
    """Fill the stores with this rank's chunks. A chunk that is there is not computed again; the frames of one chunk are held at a time.
    `done(rows)` is called after each."""
    for rows in chunks(total, chunk, rank, world):
        wanted = [(e, s) for e, s in zip(extractors, stores, strict=True) if not s.has(rows, chunk)]
        if wanted:
            frames = checked(videos(rows), rows).to(device)  # (b f h w c)
            for extractor, store in wanted:
                store.write(rows, chunk, extractor(frames))
            del frames  # before the next are made
        if done is not None:
            done(len(rows))


def checked(frames: Tensor, rows: range) -> Tensor:
    if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[0] != len(rows) or frames.shape[-1] != 3:
        raise ValueError(f"Rows {rows} should be uint8 videos ({len(rows)} f h w 3), got {frames.dtype} {tuple(frames.shape)}.")
    return frames


def in_threads(load: Callable[[int], Tensor], threads: int = 4) -> Videos:
    """Videos from a function of one row, decoded side by side (decoders release Python's lock)."""
    pool = ThreadPoolExecutor(threads)

    def videos(rows: range) -> Tensor:
        return stacked(list(pool.map(load, rows)), rows)

    return videos


def stacked(clips: Iterable[Tensor], rows: range) -> Tensor:
    """Clips (f h w c) of equal shape -> (b f h w c); ValueError names what differs."""
    clips = list(clips)
    shapes = {tuple(clip.shape) for clip in clips}
    if len(shapes) > 1:
        raise ValueError(f"Videos of rows {rows.start} to {rows.stop - 1} have different sizes (frames, height, width): {sorted(shapes)}.")
    return torch.stack(clips)

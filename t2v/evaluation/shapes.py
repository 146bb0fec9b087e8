"""Shapes as an evaluation data set: held-out clips drawn by the generator, and the pixel checker as an extractor beside `fvd_shapes`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2v.data.checker import check
from t2v.data.msrvtt import Sentence
from t2v.data.shape_world import ALL_COLOURS, ALL_SHAPES, BACKGROUNDS, DIRECTIONS, SPEEDS, Spec
from t2v.data.shapes import held_out_specs, render
from t2v.evaluation.protocol import digest
from t2v.evaluation.scores import ATTRIBUTES

VALUES = dict(zip(ATTRIBUTES, map(tuple, (ALL_COLOURS, ALL_SHAPES, BACKGROUNDS, DIRECTIONS, SPEEDS))))


class HeldOutShapes:
    """`videos` clips that no training shard holds, each with its one caption."""

    name = "shapes"
    recipe = "render 1"

    def __init__(self, videos: int = 256, seed: int = 0, kind: str = "mixed") -> None:
        specs = held_out_specs(videos, seed, kind)  # type: ignore[arg-type]
        self.specs: dict[str, Spec] = {f"shape{index:05d}": spec for index, spec in enumerate(specs)}
        self.sentences = [Sentence(video_id, 0, spec.caption) for video_id, spec in self.specs.items()]
        self.fingerprint = digest([sentence.caption for sentence in self.sentences])

    def missing(self, video_ids: Sequence[str]) -> list[str]:
        return [video_id for video_id in video_ids if video_id not in self.specs]

    def signature(self, video_ids: Sequence[str]) -> str:
        return digest([str(self.specs[video_id]) for video_id in sorted(video_ids)])

    def clip(self, video_id: str, *, num_frames: int, fps: float, size: int) -> Tensor:
        return render(self.specs[video_id], num_frames, fps, size)


class CheckerFeatures:
    """What the pixel checker sees, one code per attribute: 0 for what cannot be told, else 1 + the place in VALUES."""

    name = "checker"
    recipe = "checker 1"
    weights = "none"
    per_frame = False

    def __init__(self, fps: float = 3.0) -> None:
        self.fps = fps

    def to(self, device: torch.device | str) -> CheckerFeatures:
        return self

    def __call__(self, videos: Tensor) -> Tensor:
        rows = []
        for video in videos.cpu():
            seen = check(video, self.fps)
            names = [(values, getattr(seen, name)) for name, values in VALUES.items()]
            rows.append([values.index(found) + 1 if found in values else 0 for values, found in names])
        return torch.tensor(rows, dtype=torch.float32)

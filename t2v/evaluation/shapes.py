"""Shapes as an evaluation data set: held-out clips drawn by the generator, for `fvd_shapes` and its relatives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from t2v.data.msrvtt import Sentence
from t2v.data.shape_world import Spec
from t2v.data.shapes import held_out_specs, render
from t2v.evaluation.protocol import digest


class HeldOutShapes:
    """`videos` clips that no training shard holds, each with its one caption."""

    name = "shapes"
    recipe = "render 1"

    def __init__(self, videos: int = 256, seed: int = 0) -> None:
        self.specs: dict[str, Spec] = {f"shape{index:05d}": spec for index, spec in enumerate(held_out_specs(videos, seed))}
        self.sentences = [Sentence(video_id, 0, spec.caption) for video_id, spec in self.specs.items()]
        self.fingerprint = digest([sentence.caption for sentence in self.sentences])

    def missing(self, video_ids: Sequence[str]) -> list[str]:
        return [video_id for video_id in video_ids if video_id not in self.specs]

    def signature(self, video_ids: Sequence[str]) -> str:
        return digest([str(self.specs[video_id]) for video_id in sorted(video_ids)])

    def clip(self, video_id: str, *, num_frames: int, fps: float, size: int) -> Tensor:
        return render(self.specs[video_id], num_frames, fps, size)

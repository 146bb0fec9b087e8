"""The shapes data set in an evaluation: truth against truth is perfect, and chance stands beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2v.evaluation import Evaluator, Protocol
from t2v.evaluation.shapes import CheckerFeatures, HeldOutShapes
from t2v.metrics.features import MotionFeatures
from t2v.metrics.shapes_features import ShapesFeatures

PROTOCOL = Protocol("shapes", ("fvd_shapes", "attributes", "dynamics"), "shapes", num_videos=12, size=64, chunk=4, companions=False)


def evaluator(output: Path) -> Evaluator:
    networks = {"shapes": ShapesFeatures.shipped(), "checker": CheckerFeatures(), "motion": MotionFeatures()}
    return Evaluator(PROTOCOL, HeldOutShapes(16), networks, output, output / "cache")


def test_real_clips_are_perfect_and_frozen_ones_are_not(tmp_path: Path) -> None:
    run = evaluator(tmp_path / "real")
    clips = {row.noise_seed: run.dataset.clip(row.video_id, num_frames=16, fps=3, size=64) for row in run.manifest.rows}

    def real(captions: list[str], seeds: list[int]) -> Tensor:
        return torch.stack([clips[seed] for seed in seeds])

    def frozen(captions: list[str], seeds: list[int]) -> Tensor:
        return real(captions, seeds)[:, :1].expand(-1, 16, -1, -1, -1)

    best, still = run.of_model(real, "real", {}), evaluator(tmp_path / "frozen").of_model(frozen, "frozen", {})
    assert best is not None
    assert still is not None
    assert best.value("fvd_shapes_n12") == pytest.approx(0, abs=1e-4)
    assert best.value("all_attributes_right_n12") == 1.0
    assert still.value("fvd_shapes_n12") > 0.5
    assert still.value("direction_right_n12") == 0.0
    assert still.value("colour_right_n12") == 1.0
    assert still.value("still_videos_n12") == 1.0
    note = next(score.note for score in best.scores if score.metric == "colour_right")
    assert float(note.rsplit(" ", 1)[1]) < 0.7

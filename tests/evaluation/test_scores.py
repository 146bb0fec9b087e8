"""Features -> scores: the unit is the video, whatever its frames and captions, and what cannot be told is never right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2v.evaluation.protocol import Manifest, Row
from t2v.evaluation.scores import attributes, distances, mean_score
from t2v.metrics.uncertainty import mean_error


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def manifest(captions: int) -> Manifest:
    """20 videos of that many captions each."""
    return Manifest({}, tuple(Row(k, f"video{k // captions}", k, "", k) for k in range(20 * captions)))


def test_equal_frames_say_no_more_than_one() -> None:
    fake, real = gaussian(256, 4, 1), gaussian(256, 4, 2) + 0.5
    videos = distances("fid_vid_clip_vit_b32", fake, real, None, "", True, "cpu")
    frames = [side[:, None].expand(-1, 8, -1) for side in (fake, real)]
    for one, eight in zip(videos, distances("fid_vid_clip_vit_b32", *frames, None, "", True, "cpu"), strict=True):
        assert (one.name, one.note) == (eight.name, eight.note)
        assert eight.value == pytest.approx(one.value, rel=0.02)
        assert eight.error == (one.error and pytest.approx(one.error, rel=0.02))


def test_captions_of_one_video_cluster() -> None:
    values = gaussian(20, 1, 1).flatten().repeat_interleave(5)
    assert mean_score("clipsim", values, manifest(5), "").error == pytest.approx(mean_error(values[::5]))


def test_attributes_that_cannot_be_told_are_not_right() -> None:
    codes = torch.ones(20, 5)
    codes[:5, 0] = 0  # neither in the video nor in the real clip
    right = {score.metric: score.value for score in attributes(codes, codes, range(20), "")}
    assert (right["colour_right"], right["shape_right"], right["all_attributes_right"]) == (0.75, 1, 0.75)

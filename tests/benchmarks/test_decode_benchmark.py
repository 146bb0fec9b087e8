"""The benchmark compares like with like: every way gives the same frames."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from t2v.benchmarks import decode
from t2v.data.repacking import Recode
from t2v.video import probe, write_mp4


@pytest.fixture(scope="module")
def video() -> bytes:
    pictures = np.stack([np.full((84, 150, 3), (7 * k) % 256, np.uint8) for k in range(180)])
    buffer = io.BytesIO()
    write_mp4(buffer, pictures, decode.FPS, gop=50, preset="veryfast")
    return buffer.getvalue()


def test_the_same_frames(video: bytes) -> None:
    ours = decode.ours(video, 0.4)
    assert torch.equal(ours, decode.full_decode(video, 0.4))
    for method in (decode.plain_seek, *decode.others().values()):
        other = method(video, 0.4)
        assert other.shape == ours.shape
        assert (other.float() - ours.float()).abs().mean() < 3


def test_repacked_and_drawn_videos(video: bytes) -> None:
    assert probe(decode.reencoded(video, Recode(size=64))).frames == 72
    still, later = decode.drawn(0, seconds=1)[[0, 29]].astype(int)
    assert still.std() > 10
    assert np.abs(still - later).mean() > 1

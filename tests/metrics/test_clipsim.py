"""CLIPSIM, temporal consistency and dynamics by hand."""

from __future__ import annotations

import pytest
import torch

from t2v.metrics.clipsim import clipsim, dynamics, still_share, temporal_consistency


def test_clipsim_is_the_mean_of_cosines_not_the_cosine_of_the_mean() -> None:
    pictures = torch.tensor([[[3.0, 0.0], [0.0, 5.0]]])  # (b f d): frames at a right angle, any length
    caption = torch.tensor([[2.0, 0.0]])
    assert float(clipsim(pictures, caption)) == pytest.approx(0.5)
    pooled = torch.nn.functional.cosine_similarity(torch.tensor([0.5, 0.5]), caption[0], dim=0)
    assert float(pooled) == pytest.approx(0.7071, abs=1e-4)


def test_clipsim_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) and \(3, 4\)"):
        clipsim(torch.ones(2, 3, 4), torch.ones(3, 4))


def test_temporal_consistency() -> None:
    pictures = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    torch.testing.assert_close(temporal_consistency(pictures), torch.tensor([0.5, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 2 frames"):
        temporal_consistency(torch.ones(1, 1, 2))


def test_still_videos_are_counted() -> None:
    motion = torch.tensor([[0.0, 0.0], [0.001, 0.002], [0.1, 0.2]])
    torch.testing.assert_close(dynamics(motion), torch.tensor([0.0, 0.0015, 0.15], dtype=torch.float64))
    assert still_share(motion) == pytest.approx(2 / 3)

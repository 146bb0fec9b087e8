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


def test_few_videos_are_held_in_float64_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, captions = torch.randn(1100, 3, 8), torch.randn(1100, 8)
    sizes: list[int] = []
    cosine = torch.nn.functional.cosine_similarity

    def watched(one: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(len(one))
        return cosine(one, other, dim=dim)

    monkeypatch.setattr(torch.nn.functional, "cosine_similarity", watched)
    sims, smooth = clipsim(pictures, captions), temporal_consistency(pictures)
    assert sizes == [512, 512, 76] * 2
    pictures, captions = pictures.double(), captions.double()
    torch.testing.assert_close(sims, cosine(pictures, captions[:, None], dim=-1).mean(1))
    torch.testing.assert_close(smooth, cosine(pictures[:, 1:], pictures[:, :-1], dim=-1).mean(1))


def test_still_videos_are_counted() -> None:
    motion = torch.tensor([[0.0, 0.0], [0.001, 0.002], [0.1, 0.2]])
    torch.testing.assert_close(dynamics(motion), torch.tensor([0.0, 0.0015, 0.15], dtype=torch.float64))
    assert still_share(motion) == pytest.approx(2 / 3)

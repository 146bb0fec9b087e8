"""Kernel distance, bootstrap errors and extrapolation against known truths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2v.metrics.frechet import FeatureError, frechet_distance, moments
from t2v.metrics.kernel import kernel_distance
from t2v.metrics.uncertainty import bootstrap_error, draw, extrapolate, frechet_error, intercept, mean_error


def gaussian(n: int, d: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


class TestKernel:
    def test_by_hand(self) -> None:
        x, y = gaussian(5, 3, 1), gaussian(4, 3, 2)

        def k(a: Tensor, b: Tensor) -> float:
            return float((a.double() @ b.double() / 3 + 1) ** 3)

        same_x = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
        same_y = sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
        cross = sum(k(a, b) for a in x for b in y) / 20
        assert kernel_distance(x, y) == pytest.approx(same_x + same_y - 2 * cross, rel=1e-12)

    def test_torchmetrics_agrees(self) -> None:
        from torchmetrics.image.kid import poly_mmd

        x, y = gaussian(60, 16, 1), gaussian(60, 16, 2, 0.3)
        assert kernel_distance(x, y) == pytest.approx(float(poly_mmd(x.double(), y.double())), rel=1e-9)

    def test_has_no_bias(self) -> None:
        values = torch.tensor([kernel_distance(gaussian(16, 8, 2 * s), gaussian(16, 8, 2 * s + 1)) for s in range(200)])
        assert abs(float(values.mean())) < 3 * float(values.std()) / 200**0.5
        assert (values < 0).any()

    def test_blocks_change_little(self) -> None:
        x, y = gaussian(600, 8, 1), gaussian(600, 8, 2, 0.5)
        whole = kernel_distance(x, y)
        assert kernel_distance(x, y, block=100) == pytest.approx(whole, rel=0.1)

    def test_frames_of_one_video_are_not_independent(self) -> None:
        frames = 8
        x, y = gaussian(24, 8, 1).repeat_interleave(frames, 0), gaussian(24, 8, 2).repeat_interleave(frames, 0)
        videos = kernel_distance(gaussian(24, 8, 1), gaussian(24, 8, 2))
        assert kernel_distance(x, y, frames) == pytest.approx(videos, rel=1e-9)
        assert kernel_distance(x, y) > videos + 0.1  # as if frames were independent: far too large


class TestErrors:
    def test_a_draw_counts_each_video(self) -> None:
        counts = draw(50, torch.Generator().manual_seed(0))
        assert counts.sum() == 50
        assert (counts == 0).any()

    def test_bootstrap_finds_the_error_of_a_mean(self) -> None:
        x = gaussian(400, 1, 1).flatten().double()
        error = bootstrap_error(lambda a, b: float((a * x).sum() / 400), 400, 400, resamples=400)
        assert error == pytest.approx(1 / 20, rel=0.15)

    def test_frechet_error_covers_repetitions(self) -> None:
        """The spread over fresh samples is what the bootstrap on one of them says, within a third."""
        fresh = torch.tensor(
            [frechet_distance(moments(gaussian(128, 6, 3 * s)), moments(gaussian(128, 6, 3 * s + 1, 0.4))) for s in range(60)]
        )
        one = frechet_error(gaussian(128, 6, 1000), gaussian(128, 6, 1001, 0.4), resamples=60)
        assert one == pytest.approx(float(fresh.std()), rel=0.35)
        assert frechet_error(gaussian(128, 6, 1000), gaussian(96, 6, 1001, 0.4), resamples=60) > one / 2  # of different numbers of videos

    def test_videos_not_frames_are_drawn(self) -> None:
        frames = 8
        x, y = gaussian(64, 4, 1), gaussian(64, 4, 2, 0.3)
        many = frechet_error(x.repeat_interleave(frames, 0), y.repeat_interleave(frames, 0), frames=frames, resamples=50)
        assert many == pytest.approx(frechet_error(x, y, resamples=50), rel=0.05)

    def test_captions_of_one_video_cluster(self) -> None:
        values = gaussian(200, 1, 1).flatten()
        assert mean_error(values) == pytest.approx(float(values.std()) / 200**0.5, rel=1e-6)
        twenty = values.repeat_interleave(20)
        assert mean_error(twenty, torch.arange(200).repeat_interleave(20)) == pytest.approx(mean_error(values), rel=1e-6)
        assert mean_error(twenty) < mean_error(values) / 4


class TestExtrapolation:
    def test_is_near_the_truth_where_n_is_far_off(self) -> None:
        d, shift = 24, 0.5
        truth = d * shift**2
        runs = [(gaussian(256, d, 2 * s), gaussian(256, d, 2 * s + 1, shift)) for s in range(6)]
        at_n = sum(frechet_distance(moments(x), moments(y)) for x, y in runs) / 6
        to_infinity = sum(extrapolate(x, y, repeats=2).value for x, y in runs) / 6
        assert abs(to_infinity - truth) < 0.4 * (at_n - truth)

    def test_whole_videos_are_drawn(self) -> None:
        x, y = gaussian(64, 4, 1), gaussian(64, 4, 2, 0.3)
        videos, whole = extrapolate(x, y, frames=4), frechet_distance(moments(x), moments(y))
        assert videos.sizes == (4, 6, 7, 9, 11, 13, 14, 16)
        assert videos.distances[-1] == pytest.approx(whole)  # all of them

    def test_line(self) -> None:
        assert intercept([1.0, 0.5, 0.25], [5.0, 4.0, 3.5]) == pytest.approx(3.0)

    def test_needs_videos(self) -> None:
        with pytest.raises(FeatureError, match="at least 8, got 4"):
            extrapolate(gaussian(32, 3, 1), gaussian(32, 3, 2), frames=8)

"""The Frechet core against closed forms, SciPy, torchmetrics and an independent identity."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import Tensor

from t2v.metrics.frechet import (
    FeatureError,
    Moments,
    StreamingMoments,
    frechet_distance,
    frechet_distance_of_few,
    frechet_distance_once,
    moments,
)


def features(n: int, d: int, seed: int = 0, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or d, d, generator=generator, dtype=torch.float64) / (rank or d) ** 0.5
    return (torch.randn(n, rank or d, generator=generator, dtype=torch.float64) @ mix + torch.randn(d, generator=generator) * 0.1).float()


def gaussian(mean: Tensor, covariance: Tensor) -> Moments:
    return Moments(mean.double(), covariance.double(), 1000)


class TestClosedForms:
    def test_of_a_set_to_itself_is_zero(self) -> None:
        x = moments(features(300, 20))
        assert frechet_distance(x, x) <= 1e-9 * float(x.covariance.trace())

    def test_of_a_shift_is_its_square(self) -> None:
        x = features(300, 20).double()
        shift = torch.linspace(-1, 1, 20, dtype=torch.float64)
        assert frechet_distance(moments(x), moments(x + shift)) == pytest.approx(float(shift.square().sum()), rel=1e-10)

    def test_of_diagonal_gaussians(self) -> None:
        a, b = torch.rand(30).double() + 0.1, torch.rand(30).double() * 5
        got = frechet_distance(gaussian(torch.zeros(30), a.diag()), gaussian(torch.ones(30), b.diag()))
        assert got == pytest.approx(30 + float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-12)

    def test_of_a_scaled_set(self) -> None:
        x = features(500, 12).double()
        x = x - x.mean(0)
        want = 4.0 * float(moments(x).covariance.trace())  # (3 - 1)^2 tr S
        assert frechet_distance(moments(x), moments(3 * x)) == pytest.approx(want, rel=1e-10)

    def test_is_symmetric_and_deaf_to_rotations(self) -> None:
        x, y = features(200, 16, 1).double(), features(150, 16, 2).double() * 1.3
        rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
        there, back = frechet_distance(moments(x), moments(y)), frechet_distance(moments(y), moments(x))
        turned = frechet_distance(moments(x @ rotation), moments(y @ rotation))
        assert there == pytest.approx(back, rel=1e-10)
        assert there == pytest.approx(turned, rel=1e-10)


class TestOracles:
    @pytest.mark.parametrize(("n", "d"), [(400, 60), (40, 60)])
    def test_scipy_and_torchmetrics_and_the_nuclear_norm(self, n: int, d: int) -> None:
        from scipy.linalg import sqrtm
        from torchmetrics.image.fid import _compute_fid

        x, y = features(n, d, 1), features(n + 13, d, 2) * 1.2
        a, b = moments(x), moments(y)
        got = frechet_distance(a, b)
        root = np.real(sqrtm(a.covariance.numpy() @ b.covariance.numpy()))
        scipy = float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace()) - 2 * np.trace(root)
        tolerance = 1e-9 if n > d else 1e-5  # few samples: the product's root is ill-conditioned for SciPy
        assert got == pytest.approx(scipy, rel=tolerance)
        assert got == pytest.approx(float(_compute_fid(a.mean, a.covariance, b.mean, b.covariance)), rel=tolerance)
        assert got == pytest.approx(frechet_distance_of_few(x, y), rel=1e-6)
        assert got == pytest.approx(frechet_distance_once(a, b), rel=1e-9)

    def test_torchmetrics_own_metric_on_the_same_pictures(self) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        class Tiny(torch.nn.Module):
            num_features = 12

            def forward(self, x: Tensor) -> Tensor:
                return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)

        generator = torch.Generator().manual_seed(0)
        real = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
        fake = torch.randint(0, 200, (64, 3, 8, 8), dtype=torch.uint8, generator=generator)
        metric = FrechetInceptionDistance(feature=Tiny(), input_img_size=(3, 8, 8), normalize=False)
        metric.inception.num_features = metric.num_features = 12
        metric.update(real, real=True)
        metric.update(fake, real=False)
        ours = frechet_distance(moments(Tiny()(real)), moments(Tiny()(fake)))
        assert ours == pytest.approx(float(metric.compute()), rel=1e-4)

    def test_ill_conditioned(self) -> None:
        scale = torch.logspace(0, -9, 40, dtype=torch.float64)
        x, y = features(400, 40, 1).double() * scale, features(400, 40, 2).double() * scale
        assert frechet_distance(moments(x), moments(y)) == pytest.approx(frechet_distance_of_few(x, y), rel=1e-6)


class TestStreaming:
    def test_equals_batch_in_any_grouping(self) -> None:
        x = features(1000, 24) + 50  # a large mean: naive sums of squares would lose digits
        want = moments(x)
        parts = []
        for piece in x.split([7, 300, 1, 500, 192]):
            part = StreamingMoments()
            part.update(piece)
            parts.append(part)
        left, right = StreamingMoments(), StreamingMoments()
        left.merge(parts)
        right.merge(reversed(parts))
        for got in (left.compute(), right.compute()):
            assert got.count == 1000
            torch.testing.assert_close(got.mean, want.mean, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(got.covariance, want.covariance, rtol=1e-10, atol=1e-10)

    def test_weights_are_repetitions(self) -> None:
        x = features(50, 6)
        times = torch.randint(0, 4, (50,))
        got, want = moments(x, times), moments(x.repeat_interleave(times, 0))
        torch.testing.assert_close(got.covariance, want.covariance, rtol=1e-10, atol=1e-12)
        assert got.count == want.count
        y = features(40, 6, 1)
        few = frechet_distance_of_few(x, y, times)
        assert few == pytest.approx(frechet_distance(want, moments(y)), rel=1e-8)


class TestRefuses:
    def test_nan_by_row(self) -> None:
        x = features(20, 5)
        x[3, 2] = float("nan")
        x[7, 0] = float("inf")
        with pytest.raises(FeatureError, match=r"2 of 20 .*\[3, 7\]"):
            moments(x)

    def test_one_sample(self) -> None:
        with pytest.raises(FeatureError, match="at least 2 samples, got 1"):
            moments(features(1, 5))

    def test_features_of_two_networks(self) -> None:
        with pytest.raises(FeatureError, match="5 and 6"):
            frechet_distance(moments(features(9, 5)), moments(features(9, 6)))

    def test_a_matrix_that_is_no_covariance(self) -> None:
        broken = Moments(torch.zeros(2).double(), torch.tensor([[0.0, 2.0], [2.0, 0.0]]).double(), 9)
        with pytest.raises(FeatureError, match="the solver failed"):
            frechet_distance(gaussian(torch.zeros(2), torch.eye(2) * 9), broken)


@pytest.mark.slow
def test_fvd_statistics_of_2048_take_under_two_seconds() -> None:
    x, y = features(2048, 400, 1), features(2048, 400, 2)
    started = time.perf_counter()
    frechet_distance(moments(x), moments(y))
    assert time.perf_counter() - started < 2 * 4  # 2 s on an idle machine (measured 0.4 s); four times that where tests share it

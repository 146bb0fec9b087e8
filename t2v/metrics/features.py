"""Videos -> features: what every extractor promises, and the four that the paper's table needs.

An extractor is float32, without TF32, autocast or autotuning, so that equal batches give equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.metrics import i3d, inception
from t2v.metrics.clip import Clip
from t2v.metrics.resize import pillow_bicubic_float, tensorflow_bilinear


class Extractor(Protocol):
    """`name`, `recipe` (what happens to the pixels first) and `weights` (sha256) together say which numbers may be compared."""

    name: str
    recipe: str
    weights: str
    per_frame: bool

    def to(self, device: torch.device | str) -> Extractor: ...

    def __call__(self, videos: Tensor) -> Tensor:
        """uint8 (b f h w c) -> float32 (b d), or (b f d) if `per_frame`."""
        ...


class I3dFeatures:
    """The FVD's: bilinear to 224 x 224, [-1, 1], 400 logits."""

    name = "i3d"
    per_frame = False

    def __init__(self, network: i3d.InceptionI3d, weights: str, resize: str = "torch") -> None:
        if resize not in ("torch", "tf1"):
            raise ValueError(f"I3D's resize is torch (every PyTorch port's) or tf1 (the original's grid), got {resize!r}.")
        self.network, self.weights, self.resize = network, weights, resize
        self.recipe = f"bilinear-{resize}-{i3d.SIZE}-1"

    def to(self, device: torch.device | str) -> I3dFeatures:
        self.network.to(device)
        return self

    def __call__(self, videos: Tensor) -> Tensor:
        b, f = videos.shape[:2]
        x = videos.flatten(0, 1).permute(0, 3, 1, 2).float()  # (b*f c h w)
        if tuple(x.shape[2:]) != (i3d.SIZE, i3d.SIZE):
            if self.resize == "torch":
                x = F.interpolate(x, (i3d.SIZE, i3d.SIZE), mode="bilinear", align_corners=False, antialias=False)
            else:
                x = tensorflow_bilinear(x, i3d.SIZE, i3d.SIZE)
        x = (x / 127.5 - 1).unflatten(0, (b, f)).transpose(1, 2)  # (b c f 224 224)
        with exact_arithmetic():
            return self.network(x)


class InceptionFeatures:
    """FID-vid read literally: every frame is a picture, 2,048 features of the FID's Inception."""

    name = "inception_v3"
    per_frame = True

    def __init__(self, network: inception.FidInception, weights: str, resize: str = "clean") -> None:
        if resize not in ("clean", "tf1", "torch"):
            raise ValueError(f"Inception's resize is clean (clean-fid), tf1 (torch-fidelity) or torch (pytorch-fid), got {resize!r}.")
        self.network, self.weights, self.resize = network, weights, resize
        self.recipe = f"{resize}-{inception.SIZE}-1"

    def to(self, device: torch.device | str) -> InceptionFeatures:
        self.network.to(device)
        return self

    def __call__(self, videos: Tensor) -> Tensor:
        b, f = videos.shape[:2]
        frames, size = videos.flatten(0, 1), inception.SIZE  # (b*f h w c)
        if self.resize == "clean":
            x = pillow_bicubic_float(frames, size, size)
        elif self.resize == "tf1":
            x = tensorflow_bilinear(frames.permute(0, 3, 1, 2).float(), size, size)
        else:
            x = F.interpolate(frames.permute(0, 3, 1, 2).float(), (size, size), mode="bilinear", align_corners=False)
        with exact_arithmetic():
            return self.network(x).unflatten(0, (b, f))  # (b f 2048)


class ClipFeatures:
    """CLIP's picture features, not normalised: for CLIPSIM, temporal consistency, and the CLIP reading of FID-vid."""

    per_frame = True
    recipe = "pillow-bicubic-short-side-crop-1"

    def __init__(self, clip: Clip, weights: str, name: str = "clip_vit_b32") -> None:
        self.clip, self.weights, self.name = clip, weights, name

    def to(self, device: torch.device | str) -> ClipFeatures:
        self.clip.to(device)
        return self

    def __call__(self, videos: Tensor) -> Tensor:
        b, f = videos.shape[:2]
        with exact_arithmetic():
            return self.clip.pictures(videos.flatten(0, 1)).float().unflatten(0, (b, f))  # (b f 512)

    def captions(self, captions: list[str]) -> Tensor:
        with exact_arithmetic():
            return self.clip.captions(captions).float()  # (b 512)


class MotionFeatures:
    """Mean absolute change from frame to frame, 0..1: no network, but still videos cannot hide from it."""

    name = "motion"
    per_frame = False
    recipe = "mean-absolute-difference-1"
    weights = "none"

    def to(self, device: torch.device | str) -> MotionFeatures:
        return self

    def __call__(self, videos: Tensor) -> Tensor:
        x = videos.float() / 255
        return (x[:, 1:] - x[:, :-1]).abs().mean((2, 3, 4))  # (b f-1)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """float32 as written: no TF32, no autocast, no gradients, no autotuned kernels that change from call to call."""
    matmul, conv, tuned, deterministic = (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    try:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = conv
        torch.backends.cudnn.benchmark = tuned
        torch.backends.cudnn.deterministic = deterministic

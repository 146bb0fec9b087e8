"""Unbiased companion of the Frechet distance: squared maximum mean discrepancy with KID's cubic kernel (Binkowski et al. 2018).

On image features it is the KID, on video features the KVD. It has no bias in the number of samples, so it can be read at N = 256 already.
Where several rows (frames) belong to one video, pairs within a video are left out: frames of one video are not independent samples.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from t2v.metrics.frechet import FeatureError, checked

BLOCK = 4096
"""Rows per block of the estimate. Blocks are disjoint, of whole videos, and their mean is unbiased; memory stays at one such table."""


def kernel_distance(real: Tensor, fake: Tensor, frames: int = 1, block: int = BLOCK) -> float:
    """Unbiased MMD^2 between features (n d) and (m d), k(x, y) = (x.y / d + 1)^3; may be slightly negative where the sets agree.

    `frames`: rows of one video, consecutive; 1 for video features.
    """
    real, fake = checked(real), checked(fake)
    if real.shape[1] != fake.shape[1]:
        raise FeatureError(f"Features of {real.shape[1]} and {fake.shape[1]} numbers cannot be compared: different networks.")
    videos = min(real.shape[0], fake.shape[0]) // frames
    if videos < 2:
        raise FeatureError(f"The kernel distance needs at least 2 videos of {frames} rows, got {videos}.")
    blocks = max(1, -(-videos * frames // block))
    if blocks > videos // 2:
        blocks = videos // 2
    total, weight = 0.0, 0
    for real_part, fake_part in zip(_split(real, frames, blocks), _split(fake, frames, blocks)):
        size = min(real_part.shape[0], fake_part.shape[0])
        total += size * _one_block(real_part, fake_part, frames)
        weight += size
    return total / weight


def _split(features: Tensor, frames: int, blocks: int) -> list[Tensor]:
    videos = features.shape[0] // frames
    edges = [frames * (videos * i // blocks) for i in range(blocks + 1)]
    return [features[a:b] for a, b in pairwise(edges)]


def _one_block(real: Tensor, fake: Tensor, frames: int) -> float:
    x, y = real.double(), fake.double()
    return _between_videos(x, frames) + _between_videos(y, frames) - 2 * float(_kernel(x, y).mean())


def _between_videos(x: Tensor, frames: int) -> float:
    """Mean of the kernel over all pairs from different videos."""
    table = _kernel(x, x)
    videos = x.shape[0] // frames
    own = table.view(videos, frames, videos, frames).diagonal(dim1=0, dim2=2).sum()
    return float((table.sum() - own) / (frames**2 * videos * (videos - 1)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return torch.addmm(torch.ones((), dtype=x.dtype, device=x.device), x, y.T, alpha=1 / x.shape[1]).pow_(3)

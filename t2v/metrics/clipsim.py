"""CLIPSIM and what comes free with it (Wu et al. 2021, GODIVA).

CLIPSIM of a video is the mean over its frames of the cosine between CLIP's picture and text features, 0..1 (papers that print 29.30
multiply by 100). The mean of cosines, not the cosine of the mean: pooling first inflates it by 2 to 11 %.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 512  # videos
STILL = 0.5 / 255
"""A video whose frames change by less than half a grey level on average is called still."""


def clipsim(pictures: Tensor, captions: Tensor) -> Tensor:
    """Picture features (b f d) and caption features (b d) -> CLIPSIM of each video, float64 (b)."""
    if pictures.ndim != 3 or captions.ndim != 2 or pictures.shape[::2] != captions.shape:
        raise ValueError(f"CLIPSIM takes pictures (b f d) and captions (b d), got {tuple(pictures.shape)} and {tuple(captions.shape)}.")
    return _means(pictures, captions[:, None])


def temporal_consistency(pictures: Tensor) -> Tensor:
    """Mean cosine of adjacent frames' picture features (b f d), float64 (b): high for smooth videos, and highest for still ones."""
    if pictures.ndim != 3 or pictures.shape[1] < 2:
        raise ValueError(f"Temporal consistency takes picture features (b f d) of at least 2 frames, got {tuple(pictures.shape)}.")
    return _means(pictures[:, 1:], pictures[:, :-1])


def _means(one: Tensor, other: Tensor) -> Tensor:
    """Mean cosines (b f d), (b f d) -> float64 (b), some videos at a time: in float64 all of a split would take tens of GB."""
    pairs = zip(one.split(PIECE), other.split(PIECE))
    return torch.cat([F.cosine_similarity(some.double(), others.double(), dim=-1).mean(1) for some, others in pairs])


def dynamics(motion: Tensor) -> Tensor:
    """Mean absolute change from frame to frame (b f-1) in 0..1 -> one number per video, float64 (b)."""
    return motion.double().mean(1)


def still_share(motion: Tensor) -> float:
    """Share of videos (b f-1) that do not move."""
    return float((dynamics(motion) < STILL).double().mean())

"""Published numbers that a right set-up must give: FVD of random tensors, FVD of zeros and ones, CLIP's score of a noise picture.

They need the real weights, so they are run by `python -m t2v.evaluate check=true` and by tests that skip without them.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.metrics.clip import Clip
from t2v.metrics.features import I3dFeatures, exact_arithmetic
from t2v.metrics.frechet import frechet_distance_of_few

RANDOM_TENSORS = 10.138085  # universome/fvd-comparison: PyTorch 10.1380848, TensorFlow 10.1380854
ZEROS_AND_ONES = 151.2565  # JunyaoHu/common_metrics_on_video_quality: PyTorch; TensorFlow 151.39244
CLIP_B16_NOISE = 0.244260  # torchmetrics' documentation, 24.4260 there


def random_tensors(extractor: I3dFeatures, device: torch.device | str = "cpu", batch: int = 8) -> float:
    """FVD between 128 clips of RandomState(1) and 128 of RandomState(2), uniform in [0, 1), fed to the network as they are."""
    features = []
    for seed in (1, 2):
        clips = np.random.RandomState(seed).rand(128, 16, 224, 224, 3).astype(np.float32)
        parts = [torch.from_numpy(clips[i : i + batch]).permute(0, 4, 1, 2, 3).contiguous() for i in range(0, 128, batch)]
        with exact_arithmetic():
            features.append(torch.cat([extractor.network(part.to(device)).cpu() for part in parts]))
    return frechet_distance_of_few(*features)


def zeros_and_ones(extractor: I3dFeatures, device: torch.device | str = "cpu") -> float:
    """FVD between black and white clips of 30 frames. All clips of a side are equal, so two of each say it."""
    clips = torch.stack([torch.full((3, 30, 224, 224), -1.0), torch.full((3, 30, 224, 224), 1.0)])
    with exact_arithmetic():
        black, white = extractor.network(clips.to(device)).cpu()
    return frechet_distance_of_few(black.expand(2, -1), white.expand(2, -1))


def noise_picture(clip: Clip) -> float:
    """Cosine of ViT-B/16 between torch's uint8 noise (seed 42) and "a photo of a cat"."""
    picture: Tensor = torch.randint(255, (3, 224, 224), generator=torch.Generator().manual_seed(42)).to(torch.uint8)
    with exact_arithmetic():
        return float(F.cosine_similarity(clip.pictures(picture.permute(1, 2, 0)[None]), clip.captions(["a photo of a cat"])))


def colours(clip: Clip) -> bool:
    """No published value for ViT-B/32: does it at least tell a red picture from a blue one?"""
    pictures = torch.zeros(2, 224, 224, 3, dtype=torch.uint8)
    pictures[0, ..., 0] = pictures[1, ..., 2] = 230
    device = next(clip.network.parameters()).device
    with exact_arithmetic():
        x, y = clip.pictures(pictures.to(device)), clip.captions(["a red picture", "a blue picture"])
    table = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    return bool(table[0, 0] > table[0, 1] and table[1, 1] > table[1, 0])

"""InceptionI3d, RGB, Kinetics-400: the network of the FVD (Carreira & Zisserman 2017, Table 1 and Figure 3; Unterthiner et al. 2018).

The feature is the 400 logits before the softmax, averaged over time, as in the published TF-Hub module `deepmind/i3d-kinetics-400/1`: batch
normalisation without scale and with eps = 1e-3, TensorFlow's SAME padding (asymmetric where a stride does not divide), 224 x 224 pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 224  # pixels; other sizes either fail or, at 256, would silently give a 2 x 2 map of logits
MIN_FRAMES = 9  # three temporal strides of 2 must leave 2 steps for the head's 2-step average
CLASSES = 400

MIXED = {  # name: channels in, then of the branches 1x1 | 1x1 -> 3x3 | 1x1 -> 3x3 | pool -> 1x1
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}


class InceptionI3d(nn.Module):
    """Clips in [-1, 1] -> 400 logits. Weights come from `t2v.metrics.i3d_weights`; parameter names are those of piergiaj's port."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, (7, 7, 7), stride=(2, 2, 2))
        self.MaxPool3d_2a_3x3 = SamePool((1, 3, 3), stride=(1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, (1, 1, 1))
        self.Conv3d_2c_3x3 = Unit(64, 192, (3, 3, 3))
        self.MaxPool3d_3a_3x3 = SamePool((1, 3, 3), stride=(1, 2, 2))
        self.Mixed_3b = Mixed(*MIXED["Mixed_3b"])
        self.Mixed_3c = Mixed(*MIXED["Mixed_3c"])
        self.MaxPool3d_4a_3x3 = SamePool((3, 3, 3), stride=(2, 2, 2))
        self.Mixed_4b = Mixed(*MIXED["Mixed_4b"])
        self.Mixed_4c = Mixed(*MIXED["Mixed_4c"])
        self.Mixed_4d = Mixed(*MIXED["Mixed_4d"])
        self.Mixed_4e = Mixed(*MIXED["Mixed_4e"])
        self.Mixed_4f = Mixed(*MIXED["Mixed_4f"])
        self.MaxPool3d_5a_2x2 = SamePool((2, 2, 2), stride=(2, 2, 2))
        self.Mixed_5b = Mixed(*MIXED["Mixed_5b"])
        self.Mixed_5c = Mixed(*MIXED["Mixed_5c"])
        self.logits = Head(1024, CLASSES)

    def forward(self, clips: Tensor) -> Tensor:
        """Clips float (b 3 f 224 224) in [-1, 1], f >= 9 -> logits (b 400). ValueError for other sizes and shorter clips."""
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(f"I3D takes clips (b 3 f {SIZE} {SIZE}), got {tuple(clips.shape)}.")
        if tuple(clips.shape[3:]) != (SIZE, SIZE):
            raise ValueError(f"I3D takes {SIZE} x {SIZE} pixels, got {clips.shape[3]} x {clips.shape[4]}: resize first.")
        if clips.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D needs at least {MIN_FRAMES} frames, got {clips.shape[2]}: use longer clips (16 is the standard).")
        x = clips
        for block in self.children():
            x = block(x)
        return x  # (b 400)


class Unit(nn.Module):
    """SAME convolution, batch normalisation, ReLU."""

    def __init__(self, channels_in: int, channels: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels_in, channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(same_pad(x, self.conv3d.kernel_size, self.conv3d.stride))))


class SamePool(nn.Module):
    """SAME max pooling. Padding with zeros is exact, since its inputs come from a ReLU."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(same_pad(x, self.kernel, self.stride), self.kernel, self.stride)


class Mixed(nn.Module):
    """The inception block (Figure 3, right): four branches side by side."""

    def __init__(self, channels_in: int, b0: int, b1a: int, b1b: int, b2a: int, b2b: int, b3b: int) -> None:
        super().__init__()
        self.b0 = Unit(channels_in, b0, (1, 1, 1))
        self.b1a = Unit(channels_in, b1a, (1, 1, 1))
        self.b1b = Unit(b1a, b1b, (3, 3, 3))
        self.b2a = Unit(channels_in, b2a, (1, 1, 1))
        self.b2b = Unit(b2a, b2b, (3, 3, 3))
        self.b3a = SamePool((3, 3, 3), stride=(1, 1, 1))
        self.b3b = Unit(channels_in, b3b, (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class Head(nn.Module):
    """Average over 2 x 7 x 7, a 1x1x1 convolution to the classes, the mean over what is left of time."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(F.avg_pool3d(x, (2, 7, 7), stride=1))  # (b 400 f' 1 1)
        return x.squeeze(-1).squeeze(-1).mean(2)


def same_pad(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zero-pad the last three axes as TensorFlow's SAME does: ceil(n / stride) outputs, the odd zero at the end."""
    padding: list[int] = []
    for n, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride)):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding) if any(padding) else x

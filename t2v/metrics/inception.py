"""InceptionV3 as the FID uses it (Heusel et al. 2017): TensorFlow's 2015-12-05 network, 2,048 pooled features.

torchvision has the blocks; three habits of TensorFlow's are not in them: its average pooling leaves padding out of the count, the last
block pools by maximum, and there are 1,008 classes. The state dict is the one that pytorch-fid and torch-fidelity publish.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE

from t2v import weights

SIZE = 299
WIDTH = 2048


class _AveragePool:
    """The pooling branch of a block, with TensorFlow's count."""

    branch_pool: nn.Module

    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]  # type: ignore[misc]


class _A(_AveragePool, InceptionA):
    pass


class _C(_AveragePool, InceptionC):
    pass


class _E(_AveragePool, InceptionE):
    pass


class _LastE(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        pooled = F.max_pool2d(x, kernel_size=3, stride=1, padding=1)
        return [*super()._forward(x)[:-1], self.branch_pool(pooled)]


class FidInception(nn.Module):
    """Pictures float (n 3 299 299) in 0..255 -> features (n 2048)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = _A(192, pool_features=32)
        self.Mixed_5c = _A(256, pool_features=64)
        self.Mixed_5d = _A(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = _C(768, channels_7x7=128)
        self.Mixed_6c = _C(768, channels_7x7=160)
        self.Mixed_6d = _C(768, channels_7x7=160)
        self.Mixed_6e = _C(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = _E(1280)
        self.Mixed_7c = _LastE(2048)

    def forward(self, pictures: Tensor) -> Tensor:
        if tuple(pictures.shape[1:]) != (3, SIZE, SIZE):
            raise ValueError(f"InceptionV3 takes pictures (n 3 {SIZE} {SIZE}), got {tuple(pictures.shape)}: resize first.")
        x = (pictures - 128) / 128
        for block in self.children():
            x = block(x)
        return x.mean((2, 3))  # (n 2048)


def load(path: Path) -> FidInception:
    """The network with torch-fidelity's or pytorch-fid's file, already trusted; frozen and in evaluation mode."""
    state = weights.read(path)
    with torch.device("meta"):
        network = FidInception()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    for name in network.state_dict():  # the published file was saved before this counter existed
        if name.endswith(".num_batches_tracked"):
            state.setdefault(name, torch.zeros((), dtype=torch.long))
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval().requires_grad_(False)

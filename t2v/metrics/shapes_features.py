"""A small video network for the shapes data set: features for `fvd_shapes`, where no pretrained network can be had offline.

It was trained by this repository (`python -m t2v.evaluation.train_shapes_features`) to name colour, shape, background, direction and
speed of procedural clips. Its distance says nothing about natural videos and is never called FVD.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from t2v.metrics.features import exact_arithmetic

SIZE = 32  # pixels
WIDTH = 64  # numbers in a feature
SPREAD = 10.0  # about the standard deviation of the trained network's features on real clips; divided out, so that kernels stay in range
SHIPPED = Path(__file__).parent.parent / "pretrained" / "shapes_features" / "model.safetensors"


class ShapesNetwork(nn.Module):
    """Clips float (b f 3 32 32) in [-1, 1] -> features (b 64), and from them one linear head per attribute.

    Frames go through a small picture network; time is seen by two convolutions over frames, whose mean and spread are the feature.
    """

    def __init__(self, classes: dict[str, int] | None = None) -> None:
        super().__init__()
        widths = (32, 48, 64)
        self.pictures = nn.ModuleList(
            nn.Conv2d(a, b, k, stride=2, padding=k // 2) for a, b, k in zip((5, *widths[:-1]), widths, (5, 3, 3))
        )  # 5: colours and the two coordinates, without which a centre cannot be read off
        self.squeeze = nn.Linear(64 * 16, 64)
        self.time = nn.ModuleList([nn.Conv1d(64, 64, 3, padding=1), nn.Conv1d(64, 64, 3, padding=1)])
        self.feature = nn.Linear(128, WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, count) for name, count in (classes or {}).items()})

    def forward(self, clips: Tensor) -> Tensor:
        b = clips.shape[0]
        x = rearrange(clips, "b f c h w -> (b f) c h w")
        axis = torch.linspace(-1, 1, SIZE, device=x.device)
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(x.shape[0], -1, -1, -1)
        x = torch.cat([x, grid], dim=1)  # (b*f 5 32 32)
        for convolution in self.pictures:
            x = F.gelu(convolution(x))
        x = F.gelu(self.squeeze(x.flatten(1)))  # (b*f 64)
        x = rearrange(x, "(b f) c -> b c f", b=b)
        for convolution in self.time:
            x = x + F.gelu(convolution(x))
        moments = torch.cat([x.mean(2), (x[:, :, 1:] - x[:, :, :-1]).mean(2) * x.shape[2]], dim=1)  # (b 128): what, and where it goes
        return self.feature(F.gelu(moments))

    def logits(self, clips: Tensor) -> dict[str, Tensor]:
        feature = F.gelu(self.forward(clips))
        return {name: head(feature) for name, head in self.heads.items()}


def prepare(videos: Tensor) -> Tensor:
    """uint8 (b f h w c) -> float (b f 3 32 32) in [-1, 1], by area means."""
    b = videos.shape[0]
    x = rearrange(videos, "b f h w c -> (b f) c h w").float()
    x = F.interpolate(x, (SIZE, SIZE), mode="area") / 127.5 - 1
    return rearrange(x, "(b f) c h w -> b f c h w", b=b)


class ShapesFeatures:
    """The extractor of `fvd_shapes`."""

    name = "shapes"
    recipe = f"area-{SIZE}-spread-{SPREAD:g}-1"
    per_frame = False

    def __init__(self, network: ShapesNetwork, weights: str) -> None:
        self.network, self.weights = network.eval().requires_grad_(False), weights

    @classmethod
    def shipped(cls, path: Path = SHIPPED) -> ShapesFeatures:
        """The network that comes with the package."""
        if not path.is_file():
            raise ValueError(f"{path} is missing: reinstall t2v, or run python -m t2v.evaluation.train_shapes_features.")
        state = load_file(path)
        classes = {name.split(".")[1]: tensor.shape[0] for name, tensor in state.items() if name.startswith("heads.") and tensor.ndim == 1}
        network = ShapesNetwork(classes)
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
        return cls(network, hashlib.sha256(path.read_bytes()).hexdigest())

    def to(self, device: torch.device | str) -> ShapesFeatures:
        self.network.to(device)
        return self

    def __call__(self, videos: Tensor) -> Tensor:
        with exact_arithmetic():
            return self.network(prepare(videos)) / SPREAD

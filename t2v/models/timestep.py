"""The timestep's embedding: a sinusoid of the step index, then two linear layers (as in DDPM and Stable Diffusion)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(position: Tensor, width: int) -> Tensor:
    """Positions (n,) -> (n width), float32: cosines first, then sines, of frequencies 10000^(-i / (width / 2))."""
    half = width // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=position.device) / half
    angle = position[:, None].float() * exponent.exp()[None]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Timestep (b,) -> embedding (b d_out), the vector that every residual block receives."""

    def __init__(self, width: int, width_out: int):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, width_out)
        self.linear_2 = nn.Linear(width_out, width_out)

    def forward(self, timestep: Tensor) -> Tensor:
        embedding = sinusoid(timestep, self.width).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(embedding)))

"""Guidance binds a network to its text and gives the sampler what it sees: denoise(z, t)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from t2v.diffusion.objective import Denoiser

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(Z_t (b c f h w), t (b,)) -> predicted noise (b c f h w)."""


@dataclass(frozen=True)
class ClassifierFreeGuidance:
    """Section 4.1.2, Ho and Salimans (2022): e = e(empty) + scale (e(text) - e(empty)).

    The paper gives no scale; 9.0 is the released model's. Scale 1 is the conditional prediction itself, and costs half.
    """

    scale: float = 9.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale < 0:
            raise ValueError(f"guidance scale is {self.scale}; it must be a finite number, 0 or more (1: no guidance; released model: 9)")

    def __call__(self, unet: Denoiser, text: Tensor, empty_text: Tensor) -> Denoise:
        """text (b n d), empty_text (n d), (1 n d) or (b n d). The network is fed in the text's dtype."""
        if self.scale == 1:
            return lambda z, t: unet(z.to(text.dtype), t, text)
        both = torch.cat([empty_text.to(text).expand_as(text), text])  # (2b n d): one pass over the network, two texts for each clip

        def denoise(z: Tensor, t: Tensor) -> Tensor:
            unconditional, conditional = unet(z.to(both.dtype), t, both).chunk(2)
            return unconditional + self.scale * (conditional - unconditional)

        return denoise

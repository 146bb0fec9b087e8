"""How far off the network is (Eq. 5). Each variant is a class of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2v.diffusion.schedule import NoiseSchedule

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A network: (Z_t (b c f h w), t (b,), text (b n d)) -> predicted noise (b c f h w), or whatever `NoiseSchedule.prediction` says. Eq. 4.
With text (2b n d), as guidance asks, each clip is denoised for two texts, clip i's in the rows i and b + i of text and result."""


@dataclass(frozen=True)
class DenoisingLoss:
    """Eq. 5: the expectation of || epsilon - epsilon_theta(Z_t, c, t) ||^2, per sample and per latent value.

    Where `schedule.prediction` is not the noise, its target stands in epsilon's place.
    """

    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)

    def __call__(self, unet: Denoiser, latents: Tensor, text: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """latents, noise (b c f h w), text (b n d), timestep (b,) -> mean squared error of each sample (b,), in float32 or wider."""
        noisy = self.schedule.add_noise(latents, noise, timestep)  # (b c f h w)
        predicted = unet(noisy, timestep, text)
        dtype = torch.promote_types(predicted.dtype, torch.float32)
        target = self.schedule.target(latents, noise, timestep).to(dtype)
        return (predicted.to(dtype) - target).square().mean(dim=(1, 2, 3, 4))  # (b,)


@dataclass(frozen=True)
class MinSNRLoss(DenoisingLoss):
    """Eq. 5 with the weight min(SNR_t, gamma) on the error of the clip itself (Hang et al. 2023); not in the paper.

    In terms of the predicted noise that is min(SNR_t, gamma) / SNR_t, of velocity min(SNR_t, gamma) / (SNR_t + 1). The nearly clean
    steps, whose noise a small autoencoder's own noise hides, no longer drown those in which the text decides.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"objective.gamma is {self.gamma}; it is a signal to noise ratio above 0 (Hang et al.: 5)")

    def __call__(self, unet: Denoiser, latents: Tensor, text: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """As above, weighted: (b,)."""
        losses = super().__call__(unet, latents, text, timestep, noise)
        snr = self.schedule.snr(timestep).to(losses.dtype)
        return losses * (snr.clamp(max=self.gamma) / (snr + (self.schedule.prediction == "velocity")))

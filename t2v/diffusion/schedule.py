"""The forward process: how much of a clip is left at each step (section 3.1; DDPM with T = 1000, section 4.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor


class NoiseSchedule:
    """q(Z_t | Z_0) = N(sqrt(abar_t) Z_0, (1 - abar_t) I), with Stable Diffusion's "scaled linear" betas: linear in their square roots.

    The paper names T only; the betas are those of the released model. Tables are float64, as in its code: abar[0] = 0.99915, and
    abar[999] = 0.00466, so the last step still holds a trace of the clip. Steps are indices 0..T-1 (the paper counts 1..T).
    """

    def __init__(self, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps is {num_timesteps}; a schedule needs at least one step (the paper: 1000)")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start {beta_start} and beta_end {beta_end} must satisfy 0 < beta_start <= beta_end < 1")
        self.num_timesteps = num_timesteps  # T
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()  # (T,)
        self._alphas_cumprod = {torch.device("cpu"): (1 - self.betas).cumprod(0)}

    @property
    def config(self) -> dict[str, int | float]:
        """The constructor's arguments, as model.json stores them."""
        return {"num_timesteps": self.num_timesteps, "beta_start": self.beta_start, "beta_end": self.beta_end}

    def alphas_cumprod(self, device: torch.device | str = "cpu") -> Tensor:
        """abar, the signal's share of the variance: (T,) float64 on `device`, copied there once."""
        device = torch.device(device)
        if device not in self._alphas_cumprod:
            self._alphas_cumprod[device] = self._alphas_cumprod[torch.device("cpu")].to(device)
        return self._alphas_cumprod[device]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Copy the table ahead of the first step. Optional: `add_noise` finds the device of what it is given."""
        self.alphas_cumprod(device)
        return self

    def snr(self, timestep: Tensor) -> Tensor:
        """Signal to noise ratio abar_t / (1 - abar_t): float64, shaped like `timestep`."""
        signal = self.alphas_cumprod(timestep.device)[timestep]
        return signal / (1 - signal)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Z_t = sqrt(abar_t) Z_0 + sqrt(1 - abar_t) epsilon, the closed form of t noising steps (section 3.1).

        latents, noise (b c f h w), timestep (b,) of indices 0..T-1 -> (b c f h w), float32 or wider.
        """
        dtype = torch.promote_types(latents.dtype, torch.float32)
        signal = self.alphas_cumprod(latents.device)[timestep].view(-1, *[1] * (latents.ndim - 1))  # (b 1 1 1 1)
        return signal.sqrt().to(dtype) * latents + (1 - signal).sqrt().to(dtype) * noise

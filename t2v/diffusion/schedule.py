"""The forward process: how much of a clip is left at each step (section 3.1; DDPM with T = 1000, 4.1.2), and what is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from t2v.diffusion.randomness import Key, normal

PREDICTIONS = {"noise": "epsilon", "velocity": "v_prediction"}  # our name: diffusers' name


class NoiseSchedule:
    """q(Z_t | Z_0) = N(sqrt(abar_t) Z_0, (1 - abar_t) I), with Stable Diffusion's "scaled linear" betas: linear in their square roots.

    The paper names T only; the betas are those of the released model. Tables are float64, as in its code: abar[0] = 0.99915, and
    abar[999] = 0.00466, so the last step still holds a trace of the clip. Steps are indices 0..T-1 (the paper counts 1..T).

    `prediction` is what the network says of Z_t: "noise", the paper's epsilon, or "velocity" (Salimans and Ho 2022, as in SD 2.1-768).
    `shared_noise` is the share of the noise's variance that all frames of a clip have in common (mixed noise of PYoCo, Ge et al. 2023, who
    take 0.5); 0 in the paper: every frame has its own.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction: str = "noise",
        shared_noise: float = 0.0,
    ) -> None:
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps is {num_timesteps}; a schedule needs at least one step (the paper: 1000)")
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"beta_start {beta_start} and beta_end {beta_end} must satisfy 0 < beta_start <= beta_end < 1")
        if prediction not in PREDICTIONS:
            raise ValueError(f"schedule.prediction is {prediction!r}; a network predicts {' or '.join(PREDICTIONS)}")
        if not 0 <= shared_noise < 1:
            raise ValueError(f"schedule.shared_noise is {shared_noise}; it is a share of the noise's variance, from 0 to below 1")
        self.num_timesteps = num_timesteps  # T
        self.prediction = prediction
        self.shared_noise = shared_noise
        self.beta_start = beta_start
        self.beta_end = beta_end
        self.betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()  # (T,)
        self._alphas_cumprod = {torch.device("cpu"): (1 - self.betas).cumprod(0)}

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, as model.json stores them."""
        betas = {"beta_start": self.beta_start, "beta_end": self.beta_end}
        shared = {"shared_noise": self.shared_noise} if self.shared_noise else {}  # older than it, as are most readers
        return {"num_timesteps": self.num_timesteps, **betas, "prediction": self.prediction, **shared}

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

    def noise(self, keys: Sequence[Key], shape: Sequence[int]) -> Tensor:
        """epsilon for b clips of `shape` (c f h w), each from its own key: (b c f h w) float32 on the CPU, of unit variance."""
        own = normal(keys, shape)
        if not self.shared_noise:
            return own
        c, _, h, w = shape
        common = normal([(*key, "shared") for key in keys], (c, 1, h, w))
        return (1 - self.shared_noise) ** 0.5 * own + self.shared_noise**0.5 * common

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Z_t = sqrt(abar_t) Z_0 + sqrt(1 - abar_t) epsilon, the closed form of t noising steps (section 3.1).

        latents, noise (b c f h w), timestep (b,) of indices 0..T-1 -> (b c f h w), float32 or wider.
        """
        signal, noise_share = self._roots(latents, timestep)
        return signal * latents + noise_share * noise

    def target(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """What the network is to say of `add_noise`'s result: epsilon, or v = sqrt(abar_t) epsilon - sqrt(1 - abar_t) Z_0."""
        if self.prediction == "noise":
            return noise
        signal, noise_share = self._roots(latents, timestep)
        return signal * noise - noise_share * latents

    def _roots(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), (b 1 1 1 1), float32 or wider."""
        dtype = torch.promote_types(latents.dtype, torch.float32)
        signal = self.alphas_cumprod(latents.device)[timestep].view(-1, *[1] * (latents.ndim - 1))
        return signal.sqrt().to(dtype), (1 - signal).sqrt().to(dtype)

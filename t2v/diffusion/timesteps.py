"""Which steps of the forward process are trained on how often. Each variant is a class of its own; draws are keyed like all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from t2v.diffusion.randomness import Key, integers, uniform


@dataclass(frozen=True)
class UniformTimesteps:
    """Eq. 5: t is uniform over all steps."""

    def __call__(self, keys: Sequence[Key], num_timesteps: int) -> Tensor:
        """One step 0..T-1 a key: (b,) int64."""
        return integers(keys, num_timesteps)


@dataclass(frozen=True)
class ShiftedTimesteps:
    """More of the noisy steps: u uniform in [0, 1) -> t = T s u / (1 + (s - 1) u) (Esser et al. 2024, section 5.3.2); not in the paper.

    Where many frames show the same thing, noise that hides a picture does not hide a video yet: what the text alone decides, such as the
    direction of motion, is left to the noisiest steps. Half of the draws lie above T s / (1 + s).
    """

    shift: float = 3.0  # s; 1 is uniform

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"timesteps.shift is {self.shift}; it must be above 0 (1: uniform; more: noisier steps more often)")

    def __call__(self, keys: Sequence[Key], num_timesteps: int) -> Tensor:
        """One step 0..T-1 a key: (b,) int64."""
        u = uniform(keys).double()
        return (num_timesteps * self.shift * u / (1 + (self.shift - 1) * u)).long().clamp(max=num_timesteps - 1)

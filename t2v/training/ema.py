"""Exponential moving average of the weights: a second network, kept beside the first, which sampling calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """ema <- decay * ema + (1 - decay) * model after every optimizer step.

    With `warmup` the decay starts low and rises as (1 + step) / (10 + step), so that short trainings do not remember their start.
    The paper does not state an average; its authors' later code uses 0.9999 without warm-up.
    """

    def __init__(self, decay: float = 0.9999, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}: it must lie in [0, 1)")
        self.decay = decay
        self.warmup = warmup

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def start(self, average: nn.Module, model: nn.Module) -> None:
        """Step 0: the average is the model."""
        for mean, current in zip(average.parameters(), model.parameters()):
            mean.copy_(current)

    @torch.no_grad()
    def update(self, average: list[Tensor], model: list[Tensor], step: int) -> None:
        """Of the networks' parameters; exact on this rank's rows of them, because it works element by element."""
        torch._foreach_lerp_(average, model, 1 - self.decay_at(step))

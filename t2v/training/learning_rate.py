"""Learning-rate factors by optimizer step, for torch's LambdaLR."""

from __future__ import annotations

import math
from collections.abc import Callable


def constant(warmup_steps: int = 0) -> Callable[[int], float]:
    """Linear warm-up, then 1: the paper states one rate, 5e-5, for all of its 267 thousand iterations."""
    return lambda step: min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> Callable[[int], float]:
    """Linear warm-up, then a half cosine down to `final` at `total_steps`."""
    if total_steps <= warmup_steps:
        raise ValueError(
            f"a cosine of {total_steps} steps cannot hold a warm-up of {warmup_steps}: raise trainer.max_steps or lower "
            "lr_schedule.warmup_steps"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2

    return factor

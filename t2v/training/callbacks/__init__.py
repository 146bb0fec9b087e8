"""What happens around the steps: checkpoints and signals, TensorBoard, sample videos, the console, scores."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, Trainer

from t2v.diffusion.sampling import Sampler


class SamplingCallback(Callback):
    """Samples the model that is trained, with `sampler`, or with the model's own where that is None."""

    sampler: Sampler | None

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Raises ValueError for a sampler that does not go with the model's schedule, hours before it would be used."""
        module.pipeline(self.sampler)


def at_least_one(key: str, steps: int) -> int:
    """`steps`, the value of callbacks.`key`. ValueError if there is no such interval."""
    if steps < 1:
        raise ValueError(f"callbacks.{key} is {steps}: it must be at least 1")
    return steps

"""What happens around the steps: checkpoints and signals, TensorBoard, sample videos, the console, scores."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Callback, Trainer

from t2v.diffusion.sampling import Sampler
from t2v.training.checkpoints import asked_to_stop


class Stopped(Exception):
    """Out of sampling, on all ranks alike: a signal asks the training to end."""


class SamplingCallback(Callback):
    """Every `every_n_steps` optimizer steps (never if None) `look` samples the model that is trained, with `sampler`, or with the
    model's own where that is None.

    Signals come first: what is due when one comes, or under way, is left to the session that resumes from this step. A session that
    resumes therefore begins with what is due at its step, done before or not.
    """

    sampler: Sampler | None
    every_n_steps: int | None
    looked_step = -1

    def look(self, trainer: Trainer, module: Any) -> Any:
        """Every rank calls it."""
        raise NotImplementedError

    def is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return self.every_n_steps is not None and 0 < step < trainer.max_steps and step % self.every_n_steps == 0

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Raises ValueError for a sampler that does not go with the model's schedule, hours before it would be used."""
        module.pipeline(self.sampler)

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.looked_step = trainer.global_step
        self._look_if_due(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.looked_step:
            self.looked_step = trainer.global_step
            self._look_if_due(trainer, module)

    def _look_if_due(self, trainer: Trainer, module: Any) -> None:
        if not self.is_due(trainer):
            return
        try:
            go_on(trainer)
            self.look(trainer, module)
        except Stopped:
            trainer.should_stop = True  # callbacks.checkpoints saves, and the command ends with the signal's number


def go_on(trainer: Trainer) -> None:
    """Raises Stopped where a signal has come to any rank. Every rank must call it."""
    if asked_to_stop(trainer):
        raise Stopped


def at_least_one(key: str, steps: int) -> int:
    """`steps`, the value of callbacks.`key`. ValueError if there is no such interval."""
    if steps < 1:
        raise ValueError(f"callbacks.{key} is {steps}: it must be at least 1")
    return steps

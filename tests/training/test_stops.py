"""What ends a training early waits for the end of a step, and not for what is sampled meanwhile."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer
from ranks import on_ranks
from small_training import MadeUpData, fit, small_module

from t2v import checkpoint
from t2v.training.callbacks import SamplingCallback, go_on
from t2v.training.checkpoints import Checkpoints
from t2v.training.mixture import JointMixture

BATCH = {"image": 4, "video": 4}


class OutOfTime(Callback):
    """As Lightning's timer: asks after every micro-batch from the third on."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.should_stop or batch_idx >= 2


def test_a_timer_ends_no_training_in_the_middle_of_a_step(tmp_path: Path) -> None:
    data = MadeUpData(BATCH, {"image": 2, "video": 2}, JointMixture())
    trainer = fit(small_module(), data, tmp_path, steps=9, callbacks=[Checkpoints(), OutOfTime()])
    assert trainer.global_step == 2
    assert sorted(data.used) == [(stream, index) for stream in ("image", "video") for index in range(8)]


class Sampling(SamplingCallback):
    """Takes part in all steps; at `signalled`, rank 1 gets a signal when it has begun."""

    def __init__(self, signalled: int | None) -> None:
        self.sampler, self.every_n_steps, self.signalled = None, 1, signalled
        self.begun: list[int] = []
        self.done: list[int] = []

    def look(self, trainer: Trainer, module: Any) -> None:
        self.begun.append(trainer.global_step)
        if trainer.global_step == self.signalled and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        go_on(trainer)
        self.done.append(trainer.global_step)


def sampled(folder: Path, signalled: int | None) -> dict[str, Any]:
    first, second, saving = Sampling(signalled), Sampling(None), Checkpoints(every_n_steps=1, background=False)
    module, data = small_module(), MadeUpData(BATCH, {"image": 2, "video": 2}, JointMixture())
    resume = checkpoint.latest(folder)
    trainer = fit(module, data, folder, steps=5, strategy="ddp", world=2, resume=resume, callbacks=[saving, first, second])
    return {"step": trainer.global_step, "signal": saving.received, "begun": first.begun, "done": first.done, "after": second.done}


def test_a_signal_of_one_rank_ends_sampling_on_all_and_the_next_session_begins_with_it(tmp_path: Path) -> None:
    for rank in on_ranks(sampled, 2, tmp_path, tmp_path, 3):
        assert rank == {"step": 3, "signal": signal.SIGTERM, "begun": [1, 2, 3], "done": [1, 2], "after": [1, 2]}
    assert checkpoint.latest(tmp_path) == checkpoint.step_folder(tmp_path, 3)
    for rank in on_ranks(sampled, 2, tmp_path, tmp_path, None):
        assert rank == {"step": 5, "signal": None, "begun": [3, 4], "done": [3, 4], "after": [3, 4]}

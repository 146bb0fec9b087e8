"""The console: a bar with speed and time left on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ConsoleProgress(Callback):
    """Counts optimizer steps. `seconds_between_lines` applies where the output is not a terminal."""

    def __init__(self, seconds_between_lines: float = 30) -> None:
        self.seconds_between_lines = seconds_between_lines
        self.bar: Progress | None = None
        self.started = self.last_line = 0.0
        self.first_step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.started = self.last_line = time.monotonic()
        self.first_step = trainer.global_step
        if trainer.is_global_zero and sys.stdout.isatty():
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=Console(), transient=False)
            self.bar.start()
            self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not trainer.is_global_zero:
            return
        text = self._summary(trainer)
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, description=text)
        elif time.monotonic() - self.last_line > self.seconds_between_lines and trainer.global_step > self.first_step:
            self.last_line = time.monotonic()
            left = (trainer.max_steps - trainer.global_step) * (self.last_line - self.started) / (trainer.global_step - self.first_step)
            print(f"step {trainer.global_step}/{trainer.max_steps}  {text}  {_clock(left)} left", flush=True)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    @staticmethod
    def _summary(trainer: Trainer) -> str:
        metrics = trainer.callback_metrics
        shown = {"loss/image": "image loss {:.3f}", "loss/video": "video loss {:.3f}", "loss/reconstruction": "reconstruction {:.4f}"}
        shown |= {
            "speed/images_per_second": "{:.1f} images/s",
            "speed/clips_per_second": "{:.1f} clips/s",
            "speed/data_wait": "data wait {:.0%}",
        }
        return "  ".join(form.format(float(metrics[name])) for name, form in shown.items() if name in metrics)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"

"""A training small enough for a test: the shapes experiment with few samples, narrow layers and few steps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SMALL = (
    "experiment=shapes",
    "unet.block_out_channels=[32,64]",
    "data.image.urls={_target_: t2v.data.shapes.shards, root: '${paths.data}/shapes', media: image, count: 128}",
    "data.video.urls={_target_: t2v.data.shapes.shards, root: '${paths.data}/shapes', media: video, count: 32}",
    "batch={image: 5, video: 3}",
    "micro_batch={image: 3, video: 2}",
    "sampler.num_steps=2",
    "lr_schedule.warmup_steps=1",
    "lr_schedule.total_steps=8",
    "callbacks.score.num_prompts=4",
    "callbacks.samples.prompts=[a red circle moving left slowly on a black background]",
    "callbacks.samples.every_n_steps=100",
    "callbacks.training_log.every_n_steps=1",
    "trainer.accelerator=cpu",
)


class Trainings:
    """Starts `python -m t2v.train` in its own process, as users do."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data

    def command(self, *overrides: str, base: tuple[str, ...] = SMALL) -> list[str]:
        paths = (f"paths.data={self.data}", f"paths.experiments={self.folder}")
        flags = [override for override in overrides if override.startswith("-")]
        return [sys.executable, "-m", "t2v.train", *flags, *base, *paths, *(name for name in overrides if name not in flags)]

    def start(self, *overrides: str, base: tuple[str, ...] = SMALL) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"} | {"OMP_NUM_THREADS": "1"}
        command = self.command(*overrides, base=base)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.folder, env=environment)

    def run(self, *overrides: str, base: tuple[str, ...] = SMALL) -> tuple[int, str]:
        process = self.start(*overrides, base=base)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def stop_when(self, condition: Callable[[], bool], number: signal.Signals, *overrides: str) -> tuple[int, str]:
        """Send a signal as soon as the condition holds."""
        process = self.start(*overrides)
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(number)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def checkpoint(self, run: str, step: int) -> Path:
        return self.folder / "shapes" / "runs" / run / "checkpoints" / f"step-{step:08}"

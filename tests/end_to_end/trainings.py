"""A training small enough for a test: the shapes experiment with few samples, narrow layers and few steps."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

from process_groups import process_group

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

    def start(self, *overrides: str, base: tuple[str, ...] = SMALL) -> AbstractContextManager[subprocess.Popen[str]]:
        """A group of its own, which ends with the context."""
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"} | {"OMP_NUM_THREADS": "1"}
        return process_group(self.command(*overrides, base=base), cwd=self.folder, env=environment)

    def run(self, *overrides: str, base: tuple[str, ...] = SMALL) -> tuple[int, str]:
        with self.start(*overrides, base=base) as process:
            output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def stop_when(self, condition: Callable[[], bool], number: signal.Signals, *overrides: str) -> tuple[int, str]:
        """Send a signal as soon as the condition holds: SIGKILL to the training alone, others to its workers too, as SLURM does."""
        with self.start(*overrides) as process:
            while not condition():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.02)
            if number == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def checkpoint(self, run: str, step: int) -> Path:
        return self.folder / "shapes" / "runs" / run / "checkpoints" / f"step-{step:08}"


def losses(run: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> loss, from all lives of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # not in every process that is to be killed

    found: dict[tuple[str, int], float] = {}
    for file in sorted((run / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in ("loss/image", "loss/video"):
            found |= {(tag, event.step): event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
    return found


PRELOAD = ["t2v.train", "t2v.training.module", "t2v.training.run", "t2v.training.datamodules", "t2v.data.shapes", "t2v.data.webvid"]
PRELOAD += ["t2v.models.unet", "diffusers.models.autoencoders.autoencoder_kl", "open_clip.transformer", "torch.utils.tensorboard"]


def train(overrides: list[str], log: str, environment: dict[str, str]) -> None:
    """`python -m t2v.train ...` in a process that has done its imports already."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= environment
    sys.argv = ["train.py", *overrides]
    from t2v.train import main

    main()


@contextmanager
def ended(*processes: BaseProcess) -> Iterator[None]:
    """At the end none of them is alive, however the test ends."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


class Life:
    """One run of a small training, in as many lives as it takes: each is forked from a server that has done the imports."""

    def __init__(self, folder: Path, data: Path, steps: int, *more: str) -> None:
        self.folder = folder / "shapes/runs/chaos"
        self.log = folder.with_suffix(".log")
        self.steps = steps
        places = (f"paths.data={data}", f"paths.experiments={folder}", "run=chaos", f"trainer.max_steps={steps}")
        short = ("data.video.num_frames=2", "callbacks.checkpoints={every_n_steps: 2, keep: 2}")
        bare = ("callbacks.score=null", "callbacks.samples=null", "metric=null")
        self.overrides = [*SMALL, *places, *short, *bare, *more]

    def process(self, **environment: object) -> BaseProcess:
        """Started; `environment` is added to this one's."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        added = {name: str(value) for name, value in environment.items()}
        process: BaseProcess = context.Process(target=train, args=(self.overrides, str(self.log), added))
        process.start()
        return process

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""

    def checkpoints(self) -> set[str]:
        return {path.parent.name for path in self.folder.glob("checkpoints/step-*/complete")}

    def saving(self) -> bool:
        return any(not (path / "complete").exists() for path in self.folder.glob("checkpoints/*"))

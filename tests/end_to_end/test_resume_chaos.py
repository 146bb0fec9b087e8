"""SIGKILL at any moment, again and again: every sample that the resumed run consumes is the undisturbed run's, in the same step, and so is
every bit of the weights in the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainings import SMALL

STEPS_PER_LIFE = 4  # the most that a life below saves
PRELOAD = ["t2v.train", "t2v.training.module", "t2v.training.run", "t2v.training.datamodules", "t2v.data.shapes", "t2v.data.webvid"]
PRELOAD += ["t2v.models.unet", "diffusers.models.autoencoders.autoencoder_kl", "open_clip.transformer", "torch.utils.tensorboard"]
MOMENTS = ("after a checkpoint", "while saving", "anywhere")


def train(overrides: list[str], log: str) -> None:
    """`python -m t2v.train ...` in a process that has done its imports already."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["train.py", *overrides]
    from t2v.train import main

    main()


class Run:
    """One run of a small training, in as many lives as it takes."""

    def __init__(self, folder: Path, data: Path, steps: int) -> None:
        self.folder = folder / "shapes/runs/chaos"
        self.log = folder.with_suffix(".log")
        self.steps = steps
        self.overrides = [
            *SMALL,
            f"paths.data={data}",
            f"paths.experiments={folder}",
            "run=chaos",
            "data.video.num_frames=2",
            "batch={image: 3, video: 2}",
            "micro_batch={image: 2, video: 1}",
            "debug=consumed",
            f"trainer.max_steps={steps}",
            "callbacks.checkpoints={every_n_steps: 2, keep: 2}",
            "callbacks.score=null",
            "callbacks.samples=null",
            "metric=null",
            "loader={num_workers: 2, start_method: fork}",  # the process itself comes from a fork server
        ]

    def start(self) -> BaseProcess:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        process = context.Process(target=train, args=(self.overrides, str(self.log)))
        process.start()
        return process

    def finish(self) -> list[str]:
        """The consumed samples of all steps, one line per micro-batch and stream."""
        process = self.start()
        process.join(240)
        assert process.exitcode == 0, self.log.read_text()
        return (self.folder / "consumed_rank0.jsonl").read_text().splitlines()

    def checkpoints(self) -> set[str]:
        return {path.parent.name for path in self.folder.glob("checkpoints/step-*/complete")}

    def lines(self) -> int:
        return (self.folder / "consumed_rank0.jsonl").read_text().count("\n")

    def saving(self) -> bool:
        return any(not (path / "complete").exists() for path in self.folder.glob("checkpoints/*"))

    def live_until_killed(self, moment: str, rng: random.Random) -> None:
        process, before = self.start(), self.checkpoints()
        if moment == "anywhere":
            self._wait(process, rng.uniform(0, 3), lambda: bool(self.checkpoints() - before))
        else:
            self._wait(process, 100, lambda: bool(self.checkpoints() - before))
            assert self.checkpoints() - before, self.log.read_text()
            if moment == "while saving":
                self._wait(process, 100, self.saving)
            else:
                later = self.lines() + rng.randrange(12)  # up to 3 steps
                self._wait(process, 100, lambda: self.lines() >= later)
                time.sleep(rng.uniform(0, 0.05))
        assert process.is_alive(), self.log.read_text()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL

    @staticmethod
    def _wait(process: BaseProcess, seconds: float, condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and process.is_alive() and not condition():
            time.sleep(0.002)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_change_no_sample(kills: int, shapes_data: Path, tmp_path: Path) -> None:
    steps, rng = STEPS_PER_LIFE * kills + 2, random.Random(kills)
    undisturbed = Run(tmp_path / "straight", shapes_data, steps)
    straight = undisturbed.finish()
    run = Run(tmp_path / "killed", shapes_data, steps)
    for kill in range(kills):
        run.live_until_killed(MOMENTS[kill % len(MOMENTS)], rng)
    assert f"step-{steps:08d}" not in run.checkpoints()
    disturbed = run.finish()
    assert run.log.read_text().count("resume   step") >= kills // 2
    assert [json.loads(line)["step"] for line in straight] == [step for step in range(1, steps + 1) for _ in range(4)]  # 2 micro-batches
    assert disturbed == straight
    for name in ("unet.safetensors", "ema.safetensors"):
        one, other = (load_file(each.folder / f"checkpoints/step-{steps:08d}" / name) for each in (undisturbed, run))
        assert all(torch.equal(one[key], other[key]) for key in one), name

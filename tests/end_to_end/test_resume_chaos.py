"""SIGKILL at any moment, again and again: every sample that the resumed run consumes is the undisturbed run's, in the same step, and so is
every bit of the weights in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainings import Life, ended

STEPS_PER_LIFE = 4  # the most that a life below saves
MOMENTS = ("after a checkpoint", "while saving", "anywhere")


class Run(Life):
    """One process with two workers a stream, which writes down what it consumes."""

    def __init__(self, folder: Path, data: Path, steps: int) -> None:
        sizes = ("batch={image: 3, video: 2}", "micro_batch={image: 2, video: 1}")
        workers = "loader={num_workers: 2, start_method: fork}"  # the process itself comes from a fork server
        super().__init__(folder, data, steps, *sizes, workers, "debug=consumed")

    def finish(self) -> list[str]:
        """The consumed samples of all steps, one line per micro-batch and stream."""
        process = self.process()
        with ended(process):
            process.join(240)
        assert process.exitcode == 0, self.log.read_text()
        return (self.folder / "consumed_rank0.jsonl").read_text().splitlines()

    def lines(self) -> int:
        return (self.folder / "consumed_rank0.jsonl").read_text().count("\n")

    def live_until_killed(self, moment: str, rng: random.Random) -> None:
        process, before = self.process(), self.checkpoints()
        with ended(process):
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

"""Ends a training whose ranks wait for one that no longer answers, and names it.

A collective operation waits for its slowest rank, for half an hour by default, and then says little. Here a thread of every rank writes
into the run's folder, every few seconds, that its process lives and how far its training is. A rank that gets no further reads what the
others wrote. Files, since they answer also where the process that others depend on is the one that stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

FOLDER, VERDICT = ".ranks", "verdict"


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    beats: int  # grows as long as the process runs
    passed: int  # points of the training: the begin of a micro-batch, and that of its backward pass
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


class Judge:
    """Which rank was silent, or behind the others, for `seconds` of this process's clock."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.newest: dict[int, Beat] = {}
        self.beaten: dict[int, float] = {}  # when each rank's beats last grew
        self.moved: dict[int, float] = {}  # and what it has passed

    def hear(self, beats: Mapping[int, Beat]) -> tuple[int, str] | None:
        """The newest beat of every rank -> (rank, what is wrong with it), or None."""
        now = time.monotonic()
        for rank, beat in beats.items():
            before = self.newest.get(rank)
            if before is None or beat.beats != before.beats:
                self.beaten[rank] = now
            if before is None or beat.passed != before.passed:
                self.moved[rank] = now
        self.newest = dict(beats)
        ahead = max(beat.passed for beat in beats.values())
        for rank, beat in beats.items():
            if now - self.beaten[rank] > self.seconds:
                return rank, "does not answer: its process is stopped or gone"
            if beat.passed < ahead and now - self.moved[rank] > self.seconds:
                return (
                    rank,
                    f"is stuck in micro-batch {beat.passed // 2} of this session and others wait: its data or device may hang",
                )
        return None


class RankWatch(Callback):
    """One line, and exit code 1 on every rank, within about `seconds` of the moment when one of them stopped answering or moving.

    `seconds` must exceed the longest time that one rank works while the others wait: rank 0 makes the sample videos, for example.
    """

    def __init__(self, seconds: float = 900) -> None:
        if not seconds > 0:
            raise ValueError(f"callbacks.rank_watch.seconds is {seconds}: it must be above 0; ~callbacks.rank_watch leaves the watch out")
        self.seconds = seconds
        self.passed = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        folder = Path(trainer.default_root_dir) / FOLDER
        if trainer.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        trainer.strategy.barrier()
        self._say(folder, trainer.global_rank, 0)
        trainer.strategy.barrier()
        self._ended.clear()
        arguments = (folder, trainer.global_rank, trainer.world_size, getattr(trainer.strategy, "launcher", None))
        self._thread = threading.Thread(target=self._watch, args=arguments, daemon=True, name="rank watch")
        self._thread.start()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.passed += 1

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Any) -> None:
        self.passed += 1

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._ended.set()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._ended.set()

    def _watch(self, folder: Path, rank: int, world: int, launcher: Any) -> None:
        """Half of the time passes before anything is read: a training that moves costs a small file every few seconds."""
        interval = min(10.0, self.seconds / 10)
        beats, reached, since = 0, self.passed, time.monotonic()
        judge: Judge | None = None
        while not self._ended.wait(interval):
            beats += 1
            with contextlib.suppress(OSError):  # a full disk is no reason to end
                self._say(folder, rank, beats)
            if self.passed != reached:
                reached, since, judge = self.passed, time.monotonic(), None
            if time.monotonic() - since < self.seconds / 2:
                continue
            if (folder / VERDICT).exists():  # another rank has spoken
                os._exit(1)
            judge = judge or Judge(self.seconds / 2)
            try:
                accused = judge.hear(_read(folder, world))
            except OSError:  # the folder is away for a moment
                continue
            if accused is not None and not self._ended.is_set():
                self._end(folder, judge.newest[accused[0]], *accused)
                time.sleep(2 * interval)  # until every rank has seen the verdict
                if launcher is not None and rank == 0:
                    launcher.kill(signal.SIGKILL)
                os._exit(1)

    def _end(self, folder: Path, beat: Beat, rank: int, wrong: str) -> None:
        """Say it, if no other rank has. A stopped process would keep its GPU, so end it; on another host its launcher does."""
        try:
            (folder / VERDICT).touch(exist_ok=False)
        except FileExistsError:
            return
        name = f"rank {rank} (host {beat.host}, pid {beat.pid})"
        print(
            f"error: after {self.seconds:.0f} s of waiting, {name} {wrong}. The run ends; the same command continues it",
            file=sys.stderr,
            flush=True,
        )
        if beat.host == socket.gethostname() and beat.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)

    def _say(self, folder: Path, rank: int, beats: int) -> None:
        temporary = folder / f".rank-{rank}"
        temporary.write_text(json.dumps(asdict(Beat(beats, self.passed))))
        temporary.replace(folder / f"rank-{rank}")


def _read(folder: Path, world: int) -> dict[int, Beat]:
    return {rank: Beat(**json.loads((folder / f"rank-{rank}").read_text())) for rank in range(world)}

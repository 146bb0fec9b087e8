"""Ends a training whose ranks wait for one that no longer answers, and names it.

A collective operation waits for its slowest rank, for half an hour by default, and then says little. Here a thread of every rank writes
into the run's folder, every few seconds, that its process lives and how far its training is; in the backward pass, where ranks meet only at
its end (DDP) or block by block (FSDP), gradient by gradient. A rank that gets no further reads what the others wrote. Files, since they
answer also where the process that others depend on is the one that stopped.
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
from torch.utils.hooks import RemovableHandle

from t2v.training.background import WRITER

FOLDER, VERDICT = ".ranks", "verdict"
WATCH = "rank watch"  # names of threads
MARKS = 64  # gradients whose arrival is a point that is passed
LAST = 8  # and those of the first parameters, which are the last to come


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    beats: int  # grows as long as the process runs
    passed: int  # points of the training: the begin of a micro-batch, of its backward pass, of some gradients, the end of all
    place: str = ""  # where that is
    computes: bool = False  # between the begin of a micro-batch and the end of its backward pass
    exchanges: bool = False  # it is inside a call that ends when all ranks have made it
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


class Judge:
    """Which rank was silent, or behind the others, or not where they wait, for `seconds` of this process's clock."""

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
                return rank, self._stuck(beat)
        if all(beat.computes and now - self.moved[rank] > self.seconds for rank, beat in beats.items()):
            absent = [rank for rank, beat in beats.items() if not beat.exchanges]
            if 0 < len(absent) < len(beats):  # the same point, but all others are in an exchange there
                return absent[0], self._stuck(beats[absent[0]])
        return None

    @staticmethod
    def _stuck(beat: Beat) -> str:
        return f"is stuck in {beat.place} and others wait: its data or device may hang"


class RankWatch(Callback):
    """One line, and exit code 1 on every rank, within about `seconds` of the moment when one of them stopped answering or moving.

    `seconds` must exceed the longest time that one rank works while the others wait: rank 0 makes the sample videos, for example.
    """

    def __init__(self, seconds: float = 900) -> None:
        if not seconds > 0:
            raise ValueError(f"callbacks.rank_watch.seconds is {seconds}: it must be above 0; ~callbacks.rank_watch leaves the watch out")
        self.seconds = seconds
        self.passed = self.micro_batches = 0
        self.phase, self.computes = "", False
        self._marks: list[RemovableHandle] = []
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
        self._thread = threading.Thread(target=self._watch, args=arguments, daemon=True, name=WATCH)
        self._thread.start()

        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        marked = {id(p): p for p in (*parameters[:LAST], *parameters[:: max(1, len(parameters) // MARKS)])}.values()
        self._marks = [parameter.register_post_accumulate_grad_hook(self._mark) for parameter in marked]

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.micro_batches += 1
        self._pass("before its backward pass", computes=True)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Any) -> None:
        self._pass("in its backward pass", computes=True)

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self._pass("after its backward pass", computes=False)

    def _mark(self, parameter: Any) -> None:
        self.passed += 1

    def _pass(self, phase: str, computes: bool) -> None:
        self.phase, self.computes = phase, computes
        self.passed += 1

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._ended.set()
        for mark in self._marks:
            mark.remove()

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
        place = f"micro-batch {self.micro_batches} of this session, {self.phase}"
        temporary.write_text(json.dumps(asdict(Beat(beats, self.passed, place, self.computes, in_exchange()))))
        temporary.replace(folder / f"rank-{rank}")


def _read(folder: Path, world: int) -> dict[int, Beat]:
    return {rank: Beat(**json.loads((folder / f"rank-{rank}").read_text())) for rank in range(world)}


def in_exchange() -> bool:
    """Is a thread of this process, other than those that watch and write checkpoints, inside one of torch's calls between ranks?"""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        if names.get(ident) in (WATCH, WRITER):
            continue
        while frame is not None:
            if frame.f_code.co_filename.endswith("distributed_c10d.py"):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False

"""Checkpoints that are written while training goes on: the same bytes, one at a time, errors that are heard, nothing lost at the end."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loggers import TensorBoardLogger
from ranks import on_ranks
from safetensors.torch import load_file
from small_training import MadeUpData, fit, small_module

from t2v import checkpoint
from t2v.checkpoint import folder as folder_module
from t2v.training.background import Background, HostCopies
from t2v.training.checkpoints import Checkpoints
from t2v.training.mixture import JointMixture
from t2v.training.strategies import FullyShardedStrategy

BATCH = {"image": 2, "video": 2}


class SlowDisk:
    """Holds every write back until `open` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.writes = threading.Event(), 0
        write = checkpoint.write_pieces
        monkeypatch.setattr(checkpoint, "write_pieces", lambda *arguments: self._held(write, *arguments))

    def _held(self, write: Any, *arguments: Any) -> int:
        self.writes += 1
        assert self.open.wait(60)
        return int(write(*arguments))


class Opens(Callback):
    """Opens the disk after a step, and notes which checkpoints were whole before."""

    def __init__(self, disk: SlowDisk, step: int) -> None:
        self.disk, self.step, self.whole = disk, step, -1

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            self.whole = len(list(Path(trainer.default_root_dir).glob("checkpoints/*/complete")))
            self.disk.open.set()


def train(folder: Path, background: bool, every: int, *callbacks: Callback, **options: Any) -> Checkpoints:
    saving = Checkpoints(every_n_steps=every, keep=9, background=background)
    fit(small_module(), MadeUpData(BATCH, BATCH, JointMixture()), folder, steps=3, callbacks=[*callbacks, saving], **options)
    return saving


@pytest.mark.timeout(60)
def test_training_goes_on_and_the_bytes_are_those_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "waits", False, 2)
    disk = SlowDisk(monkeypatch)
    opens = Opens(disk, 3)
    saving = train(tmp_path / "goes_on", True, 2, opens)
    assert opens.whole == 0  # step 3 was trained before that of step 2 was whole
    assert saving.saved_step == 3
    for step in (2, 3):
        straight, found = (checkpoint.step_folder(tmp_path / name, step) for name in ("waits", "goes_on"))
        checkpoint.check(found)
        for path in sorted(straight.rglob("*.safetensors")):
            one, other = load_file(path), load_file(found / path.relative_to(straight))
            assert all(torch.equal(one[name], other[name]) for name in one), (step, path.name)


@pytest.mark.slow
def test_sharded_ranks_write_while_they_train(tmp_path: Path) -> None:
    assert on_ranks(sharded, 2, tmp_path, tmp_path) == [3, 3]
    for step in (1, 2, 3):
        checkpoint.check(checkpoint.step_folder(tmp_path, step))


def sharded(folder: Path) -> int:
    return train(folder, True, 1, strategy=FullyShardedStrategy(), world=2).saved_step


def test_the_stall_and_the_writing_are_measured(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    saving = Checkpoints(every_n_steps=2, background=True)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = fit(small_module(), MadeUpData(BATCH, BATCH, JointMixture()), tmp_path, steps=1)
    trainer.loggers = [logger]
    saving.save(trainer)
    saving._settle(trainer)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {tag for tag in events.Tags()["scalars"] if tag.startswith("checkpoint/")}
    assert found == {"checkpoint/seconds", "checkpoint/write_seconds", "checkpoint/gigabytes_per_writer"}


def test_an_error_of_the_thread_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> int:
        raise TypeError("not a matter of disks")

    monkeypatch.setattr(checkpoint, "write_pieces", broken)
    with pytest.raises(TypeError, match="not a matter of disks"):
        train(tmp_path, True, 1)
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_full_disk_in_the_thread_keeps_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = folder_module.commit

    def full(staging: Path, folder: Path, card: Any) -> Path:
        if folder.name.endswith("2"):
            raise OSError(28, "No space left on device")
        return commit(staging, folder, card)

    monkeypatch.setattr(checkpoint, "commit", full)
    saving = train(tmp_path, True, 1)
    assert saving.saved_step == 3
    assert [path.name for path in sorted(tmp_path.glob("checkpoints/*"))] == ["step-00000001", "step-00000003"]
    assert "No space left on device" in capsys.readouterr().err


def test_older_checkpoints_that_cannot_be_removed_end_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "prune", refused)
    assert train(tmp_path, True, 1).saved_step == 3
    assert "older checkpoints cannot be removed" in capsys.readouterr().err


def test_a_checkpoint_that_was_damaged_is_written_again(tmp_path: Path) -> None:
    train(tmp_path, False, 1)
    damaged = checkpoint.step_folder(tmp_path, 3)
    with (damaged / "ema.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.check(damaged)
    checkpoint.begin(damaged)
    assert not damaged.exists()


def test_one_job_at_a_time() -> None:
    background, order, looked = Background(), [], threading.Event()

    def job(name: str) -> None:
        time.sleep(0.05)
        if name == "c":
            looked.wait(60)
        order.append(name)

    for name in "abc":
        background.start(lambda name=name: job(name), in_thread=True)  # type: ignore[misc]
    assert order == ["a", "b"]
    looked.set()
    background.wait()
    assert order == ["a", "b", "c"]


def test_copies_are_used_again() -> None:
    copies = HostCopies()
    tensor = torch.arange(6.0).view(2, 3)
    first = copies.of({"file": {"a": checkpoint.Piece.whole(tensor)}})["file"]["a"].rows
    tensor.zero_()
    assert first.sum() == 15
    second = copies.of({"file": {"a": checkpoint.Piece.whole(tensor)}})["file"]["a"].rows
    assert second.data_ptr() == first.data_ptr()
    assert second.sum() == 0

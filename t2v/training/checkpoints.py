"""Lightning's checkpoints in the project's folder format, when they are written, and what signals do.

`t2v.checkpoint` owns the folder: temporary name, fsync, rename, marker last. Here Lightning's dictionary is divided into its parts:
the networks as safetensors, everything that only a resume needs under train/, the readers' positions under data/. The folder does not
tell how many processes wrote it, or in which strategy; any number in any strategy may continue from it.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from t2v import checkpoint as folder_format
from t2v.checkpoint import AutoencoderCard, CheckpointWriteError, ModelCard, Piece, step_folder
from t2v.training.sharding import is_sharded, piece_of

NETWORKS = {
    "unet.": "unet.safetensors",
    "ema_unet.": "ema.safetensors",
    "autoencoder.": "autoencoder.safetensors",
    "average.": "average.safetensors",
}
DATA_STATE = "MixtureDataModule"  # where Lightning puts what the data module's state_dict returns
STATE = "train/state.pt"  # schedule, callbacks, loops, the optimizer's numbers
MOMENTS = "train/optimizer.safetensors"  # the optimizer's tensors: <optimizer>.<parameter>.<name>
READERS = "data/readers.json"


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders for Lightning. `description` gives the content of model.json at the time of writing."""

    def __init__(self, description: Callable[[], ModelCard | AutoencoderCard]) -> None:
        self.description = description
        self.failure: str | None = None  # why the last checkpoint could not be written
        self.bytes_written = 0  # by this process, of tensors, for the last checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """The first rank calls it alone; every rank does where networks are sharded, and each writes its own rows.

        A disk that refuses ends in `failure`, not in an error that would leave the other ranks waiting; the folder is then as before.
        """
        folder, staging = Path(path), folder_format.staging_folder(path)
        together = any(is_sharded(tensor) for tensor in checkpoint["state_dict"].values())
        first = not together or dist.get_rank() == 0
        files, state, readers = divide(checkpoint)

        def begin() -> None:
            folder_format.begin(folder)
            for name in (STATE, READERS):
                (staging / name).parent.mkdir()
            torch.save(state, staging / STATE)
            (staging / READERS).write_text(json.dumps(readers), encoding="utf-8")
            for name, pieces in files.items():
                folder_format.reserve(staging / name, pieces)

        def write() -> None:
            self.bytes_written = sum(folder_format.write_pieces(staging / name, pieces) for name, pieces in files.items())

        def commit() -> None:
            folder_format.commit(staging, folder, self.description())

        self.failure = None
        for action, mine in ((begin, first), (write, True), (commit, first)):
            error = _attempt(action if mine else None, folder, together)
            if error is not None:
                if first:
                    shutil.rmtree(staging, ignore_errors=True)
                if not isinstance(error, CheckpointWriteError):
                    raise error
                self.failure = str(error)
                return

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors are views of the files: what a rank does not use of them is never read."""
        folder = Path(path)
        folder_format.check(folder)
        checkpoint = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        state = checkpoint.pop("other_weights")
        for prefix, file in NETWORKS.items():
            if (folder / file).is_file():
                state |= {prefix + name: tensor for name, tensor in load_file(folder / file).items()}
        checkpoint["state_dict"] = state
        for name, tensor in load_file(folder / MOMENTS).items():
            optimizer, parameter, key = name.split(".", 2)
            checkpoint["optimizer_states"][int(optimizer)]["state"][int(parameter)][key] = tensor
        checkpoint[DATA_STATE] = json.loads((folder / READERS).read_text())
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        folder_format.remove(path)


def divide(checkpoint: dict[str, Any]) -> tuple[dict[str, dict[str, Piece]], dict[str, Any], dict[str, Any]]:
    """Lightning's dictionary -> the pieces of each safetensors file, what goes to state.pt, the readers' positions."""
    state = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states", DATA_STATE)}
    files: dict[str, dict[str, Piece]] = {}
    state["other_weights"] = {}
    for name, tensor in checkpoint["state_dict"].items():
        prefix = next((prefix for prefix in NETWORKS if name.startswith(prefix)), None)
        if prefix is None:
            state["other_weights"][name] = tensor
        else:
            files.setdefault(NETWORKS[prefix], {})[name.removeprefix(prefix)] = piece_of(tensor)
    moments = files[MOMENTS] = {}
    state["optimizer_states"] = []
    for number, optimizer in enumerate(checkpoint.get("optimizer_states", [])):
        numbers: dict[int, dict[str, Any]] = {}
        for parameter, values in optimizer["state"].items():
            numbers[parameter] = {key: value for key, value in values.items() if not _is_large(value)}
            for key, value in values.items():
                if _is_large(value):
                    moments[f"{number}.{parameter}.{key}"] = piece_of(value)
        state["optimizer_states"].append({**optimizer, "state": numbers})
    return files, state, checkpoint.get(DATA_STATE, {})


def _is_large(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _attempt(action: Callable[[], None] | None, folder: Path, together: bool) -> Exception | None:
    """Run a part of the writing; the first error of any rank, the same on all of them."""
    error: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as raised:
        error = folder_format.write_error(raised, folder) or raised
    errors: list[Any] = [error]
    if together:
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error)
    return next((one for one in errors if one is not None), None)


def count_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """For a module's `on_load_checkpoint`: batches are counted anew, so that another number of ranks or micro-batches may continue."""
    batches = checkpoint["global_step"] * accumulate
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for span in ("total", "current"):
        progress[span] = dict.fromkeys(("ready", "started", "processed"), batches) | {"completed": batches - 1}


def lay_out_like_parameters(optimizer: Optimizer) -> None:
    """For a module's `on_train_start`: files keep no strides, but fused optimizers expect their parameter's."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if _is_large(value) and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_start(trainer: Trainer) -> None:
    """Raise ValueError on every rank unless all of them continue from the same step."""
    steps: list[Any] = [trainer.global_step] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(steps, trainer.global_step)
    other = next((rank for rank, step in enumerate(steps) if step != steps[0]), None)
    if other is not None:
        raise ValueError(
            f"rank 0 starts at step {steps[0]} and rank {other} at step {steps[other]}: "
            f"every host must see the run's folder {trainer.default_root_dir}"
        )


class Checkpoints(Callback):
    """Writes <run>/checkpoints/step-N every `every_n_steps` optimizer steps, at the end, and when a signal asks to stop.

    The newest `keep` stay.

    SIGUSR1 and SIGTERM (a scheduler takes the machine) and SIGINT (Ctrl-C) end the training at the next optimizer step, with a checkpoint.
    A second Ctrl-C ends it at once.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, every_n_steps: int = 1000, keep: int = 3) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"callbacks.checkpoints: every_n_steps is {every_n_steps} and keep is {keep}; both must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.received: int | None = None
        self.saved_step = self.tried_step = -1
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = self.tried_step = trainer.global_step
        _check_start(trainer)
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.tried_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = bool(trainer.strategy.reduce_boolean_decision(self.received is not None, all=False))  # one rank's signal stops all of them
        if stop or step % self.every_n_steps == 0 or step >= trainer.max_steps:
            self.save(trainer)
        if stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.tried_step:
            self.save(trainer)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def save(self, trainer: Trainer) -> None:
        """Every rank must call it. Where the disk refuses, training goes on and the older checkpoints are whole."""
        self.tried_step = trainer.global_step
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, FolderCheckpointIO)
        started = time.perf_counter()
        trainer.save_checkpoint(step_folder(trainer.default_root_dir, trainer.global_step))
        failure = trainer.strategy.broadcast(writer.failure)
        if failure is None:
            self.saved_step = trainer.global_step
        if not trainer.is_global_zero:
            return
        if failure is not None:
            print(f"warning: {failure}. The checkpoint before it is intact.", file=sys.stderr, flush=True)
            return
        folder_format.prune(trainer.default_root_dir, keep=self.keep)
        if trainer.logger is not None:
            cost = {"checkpoint/seconds": time.perf_counter() - started, "checkpoint/gigabytes_per_writer": writer.bytes_written / 1e9}
            trainer.logger.log_metrics(cost, trainer.global_step)

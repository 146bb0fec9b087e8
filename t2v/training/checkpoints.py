"""Lightning's checkpoints in the project's folder format, when they are written, and what signals do.

`t2v.checkpoint` owns the folder: temporary name, fsync, rename, marker last. Here Lightning's dictionary is divided into its parts:
the networks as safetensors, everything that only a resume needs under train/, the readers' positions under data/. The folder does not
tell how many processes wrote it, or in which strategy; any number in any strategy may continue from it.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Timer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from t2v import checkpoint as folder_format
from t2v.checkpoint import AutoencoderCard, CheckpointError, CheckpointWriteError, ModelCard, Piece, step_folder
from t2v.ranks import from_all
from t2v.training.background import Background, HostCopies
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
BYTES_OF_A_WEIGHT = 16  # that is trained, in a checkpoint: itself, its average and AdamW's two moments, in float32


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders for Lightning. `description` gives the content of model.json at the time of writing.

    In the `background`, training goes on as soon as the tensors are copied to host memory; one checkpoint at a time is being written.
    """

    def __init__(self, description: Callable[[], ModelCard | AutoencoderCard]) -> None:
        self.description = description
        self.background = False
        self.failure: str | None = None  # why the last checkpoint could not be written
        self.bytes_written = 0  # by this process, of tensors, for the last checkpoint
        self.write_seconds = 0.0
        self.afterwards: Callable[[], object] = lambda: None  # done by the first rank once a checkpoint is whole
        self._writing, self._copies = Background(), HostCopies()
        self._ranks: Any = None  # exchanges of their own for the threads that write

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """The first rank calls it alone; every rank does where networks are sharded, and each writes its own rows.

        A disk that refuses ends in `failure`, not in an error that would leave the other ranks waiting; the folder is then as before.
        """
        self.wait()
        together = any(is_sharded(tensor) for tensor in checkpoint["state_dict"].values())
        if together and self._ranks is None:
            self._ranks = dist.new_group(backend="gloo")
        files, state, readers = divide(checkpoint)
        if self.background:
            files = self._copies.of(files)
        numbers = io.BytesIO()
        torch.save(state, numbers)
        job = partial(self._write, Path(path), files, numbers, json.dumps(readers), self.description(), self._ranks if together else None)
        self._writing.start(job, self.background)

    @property
    def is_writing(self) -> bool:
        return self._writing.running

    def linger(self, seconds: float) -> None:
        """Wait for the checkpoint that is being written, but not for ever, and whatever becomes of it."""
        self._writing.join(seconds)

    def wait(self) -> None:
        """Until the checkpoint that is being written is whole, or has failed. Raises what is no matter of disks."""
        self._writing.wait()

    def _write(
        self,
        folder: Path,
        files: dict[str, dict[str, Piece]],
        state: io.BytesIO,
        readers: str,
        card: ModelCard | AutoencoderCard,
        ranks: Any,
    ) -> None:
        """`ranks`: the group of all that write; None for one alone."""
        started = time.perf_counter()
        staging = folder_format.staging_folder(folder)
        first = ranks is None or dist.get_rank() == 0

        def begin() -> None:
            folder_format.begin(folder)
            for name, content in ((STATE, state.getbuffer()), (READERS, readers.encode())):
                (staging / name).parent.mkdir()
                (staging / name).write_bytes(content)
            for name, pieces in files.items():
                folder_format.reserve(staging / name, pieces)

        def write() -> None:
            self.bytes_written = sum(folder_format.write_pieces(staging / name, pieces) for name, pieces in files.items())

        def commit() -> None:
            folder_format.commit(staging, folder, card)

        self.failure = None
        for action, mine in ((begin, first), (write, True), (commit, first)):
            error = _attempt(action if mine else None, folder, ranks)
            if error is not None:
                if first:
                    shutil.rmtree(staging, ignore_errors=True)
                if not isinstance(error, CheckpointWriteError):
                    raise error
                self.failure = str(error)
                return
        self.write_seconds = time.perf_counter() - started
        if first:
            try:
                self.afterwards()
            except OSError as error:  # of older checkpoints, which are in nobody's way
                print(f"warning: older checkpoints cannot be removed: {error}", file=sys.stderr, flush=True)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Tensors are views of the files: what a rank does not use of them is never read."""
        folder = Path(path)
        folder_format.check(folder)
        checkpoint = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        checkpoint.get("callbacks", {}).pop(Timer.__qualname__, None)  # trainer.max_time is of each session, not of all together
        state = checkpoint.pop("other_weights")
        for prefix, file in NETWORKS.items():
            if (folder / file).is_file():
                state |= {prefix + name: tensor for name, tensor in _tensors(folder / file).items()}
        checkpoint["state_dict"] = state
        for name, tensor in _tensors(folder / MOMENTS).items():
            optimizer, parameter, key = name.split(".", 2)
            checkpoint["optimizer_states"][int(optimizer)]["state"][int(parameter)][key] = tensor
        checkpoint[DATA_STATE] = json.loads((folder / READERS).read_text())
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        folder_format.remove(path)


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}): remove this checkpoint, and the same command continues from the one before"
        ) from error


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


def _attempt(action: Callable[[], None] | None, folder: Path, ranks: Any) -> Exception | None:
    """Run a part of the writing; the first error of any of the ranks, the same on all of them."""
    error: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as raised:
        error = folder_format.write_error(raised, folder) or raised
    errors: list[Any] = [error]
    if ranks is not None:
        errors *= dist.get_world_size()
        dist.all_gather_object(errors, error, group=ranks)
    return next((one for one in errors if one is not None), None)


def count_batches(checkpoint: dict[str, Any], accumulate: int) -> None:
    """For a module's `on_load_checkpoint`: batches are counted anew, so that another number of ranks or micro-batches may continue."""
    batches = checkpoint["global_step"] * accumulate
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for span in ("total", "current"):
        progress[span] = dict.fromkeys(("ready", "started", "processed"), batches) | {"completed": batches - 1}


def stop_between_steps(trainer: Trainer, batch_idx: int) -> None:
    """For a module's `on_train_batch_end`: Lightning's timer stops after any micro-batch, and asks again after the next. In the middle of a
    step the samples would count as trained on, though their gradients are lost."""
    if (batch_idx + 1) % trainer.accumulate_grad_batches:
        trainer.should_stop = False


def lay_out_like_parameters(optimizer: Optimizer) -> None:
    """For a module's `on_train_start`: files keep no strides, but fused optimizers expect their parameter's."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if _is_large(value) and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _check_start(trainer: Trainer) -> None:
    """Raise ValueError on every rank unless all of them continue from the same step."""
    steps = from_all(trainer.global_step)
    other = next((rank for rank, step in enumerate(steps) if step != steps[0]), None)
    if other is not None:
        raise ValueError(
            f"rank 0 starts at step {steps[0]} and rank {other} at step {steps[other]}: "
            f"every host must see the run's folder {trainer.default_root_dir}"
        )


class Checkpoints(Callback):
    """Writes <run>/checkpoints/step-N every `every_n_steps` optimizer steps, at the end, and when a signal asks to stop.

    The newest `keep` stay. In the `background` they are written while training goes on, from a copy in host memory; errors then show at
    the next step, and the end of the training waits for the last.

    SIGUSR1 and SIGTERM (a scheduler takes the machine) and SIGINT (Ctrl-C) end the training at the next optimizer step, with a checkpoint.
    A second Ctrl-C ends it at once.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, every_n_steps: int = 1000, keep: int = 3, background: bool = True) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"callbacks.checkpoints: every_n_steps is {every_n_steps} and keep is {keep}; both must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.background = background
        self.received: int | None = None
        self.saved_step = self.tried_step = -1
        self._pending: tuple[int, float] | None = None  # step and seconds of the stall, of the checkpoint that is being written
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = self.tried_step = trainer.global_step
        _check_start(trainer)
        trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
        folder_format.require_writable(trainer.default_root_dir, trained * BYTES_OF_A_WEIGHT)
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if not _writer(trainer).is_writing:
            self._settle(trainer)
        if step == self.tried_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        number = one_of_all(trainer, self.received)  # one rank's signal stops all of them
        stop = number is not None
        if stop:  # otherwise nothing is set: a signal may have come meanwhile
            self.received = number
        if stop or step % self.every_n_steps == 0 or step >= trainer.max_steps:
            self.save(trainer)
        if stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.tried_step:
            self.save(trainer)
        self._settle(trainer)
        self.saved_step = trainer.strategy.broadcast(self.saved_step)  # other ranks may not have written anything
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self.received = one_of_all(trainer, self.received)  # one may have come to a single rank since the last step

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        """A checkpoint that is being written is not to be lost, unless someone is in a hurry."""
        if not isinstance(exception, KeyboardInterrupt):
            _writer(trainer).linger(seconds=120)

    def save(self, trainer: Trainer) -> None:
        """Every rank must call it. Where the disk refuses, training goes on and the older checkpoints are whole."""
        self.tried_step = trainer.global_step
        writer = _writer(trainer)
        started = time.perf_counter()
        self._settle(trainer)  # one at a time
        writer.background = self.background
        writer.afterwards = partial(folder_format.prune, trainer.default_root_dir, keep=self.keep)
        trainer.save_checkpoint(step_folder(trainer.default_root_dir, trainer.global_step))
        self._pending = trainer.global_step, time.perf_counter() - started
        if not self.background:
            self._settle(trainer)

    def _settle(self, trainer: Trainer) -> None:
        """Wait for the checkpoint that is being written, if there is one, and say what became of it."""
        if self._pending is None:
            return
        (step, stalled), self._pending = self._pending, None
        writer = _writer(trainer)
        writer.wait()
        if writer.failure is None:
            self.saved_step = step
        if not trainer.is_global_zero:
            return
        if writer.failure is not None:
            before = folder_format.latest(trainer.default_root_dir)
            left = "there is none yet" if before is None else f"the newest whole one is {before.name}"
            print(f"warning: {writer.failure}; {left}", file=sys.stderr, flush=True)
        elif trainer.logger is not None:
            cost = {"seconds": stalled, "write_seconds": writer.write_seconds, "gigabytes_per_writer": writer.bytes_written / 1e9}
            trainer.logger.log_metrics({f"checkpoint/{name}": value for name, value in cost.items()}, step)


def one_of_all(trainer: Trainer, number: int | None) -> int | None:
    """The highest of the ranks' signals, the same on every rank; None where nobody got one."""
    if trainer.world_size == 1:
        return number
    highest = trainer.strategy.reduce(torch.tensor(number or 0, device=trainer.strategy.root_device), reduce_op="max")
    return int(highest) or None


def asked_to_stop(trainer: Trainer) -> bool:
    """Whether a signal has come to any rank. Every rank must call it."""
    saving = next((callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)  # type: ignore[attr-defined]
    return saving is not None and one_of_all(trainer, saving.received) is not None


def _writer(trainer: Trainer) -> FolderCheckpointIO:
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, FolderCheckpointIO)
    return writer

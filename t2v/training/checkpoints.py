"""Lightning's checkpoints in the project's folder format, when they are written, and what signals do.

`t2v.checkpoint` owns the folder: temporary name, fsync, rename, marker last. Here Lightning's dictionary is divided into its parts:
the UNet and its EMA as safetensors, everything that only a resume needs under train/, the readers' positions under data/.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file

from t2v import checkpoint as folder_format
from t2v.checkpoint import CheckpointWriteError, ModelCard, save_weights, step_folder

NETWORKS = {"unet.": "unet.safetensors", "ema_unet.": "ema.safetensors"}
DATA_STATE = "MixtureDataModule"  # where Lightning puts what the data module's state_dict returns
STATE = "train/state.pt"  # optimizer, schedule, callbacks, loops
READERS = "data/readers.json"


class FolderCheckpointIO(CheckpointIO):
    """Writes and reads checkpoint folders for Lightning. `description` gives the content of model.json at the time of writing."""

    def __init__(self, description: Callable[[], ModelCard]) -> None:
        self.description = description

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        rest = dict(checkpoint)
        state = rest.pop("state_dict")
        data = rest.pop(DATA_STATE, {})
        parts: dict[str, Callable[[Path], None]] = {}
        for prefix, file in NETWORKS.items():
            tensors = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            if tensors:
                parts[file] = functools.partial(save_weights, tensors)
        other = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(NETWORKS))}
        parts[STATE] = lambda target: torch.save({**rest, "other_weights": other}, target)
        parts[READERS] = lambda target: _write_text(target, json.dumps(data))
        folder_format.write(Path(path), parts, self.description())

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        folder = Path(path)
        folder_format.check(folder)
        checkpoint = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        state = checkpoint.pop("other_weights")
        for prefix, file in NETWORKS.items():
            if (folder / file).is_file():
                state |= {prefix + name: tensor for name, tensor in load_file(folder / file).items()}
        checkpoint["state_dict"] = state
        checkpoint[DATA_STATE] = json.loads((folder / READERS).read_text())
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        raise NotImplementedError("Checkpoints prunes by folder_format.prune")


def _write_text(target: Path, text: str) -> None:
    target.write_text(text, encoding="utf-8")


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
        self.saved_step = -1
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved_step = trainer.global_step
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.saved_step or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        stop = bool(trainer.strategy.reduce_boolean_decision(self.received is not None, all=False))  # one rank's signal stops all of them
        if stop or step % self.every_n_steps == 0 or step >= trainer.max_steps:
            self.save(trainer)
        if stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self.save(trainer)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def save(self, trainer: Trainer) -> None:
        self.saved_step = trainer.global_step
        try:
            trainer.save_checkpoint(step_folder(trainer.default_root_dir, trainer.global_step))
        except CheckpointWriteError as error:  # disk full, quota: the older ones are whole
            print(f"warning: {error}. The checkpoint before it is intact and training goes on.", file=sys.stderr)
            return
        if trainer.is_global_zero:
            folder_format.prune(trainer.default_root_dir, keep=self.keep)

"""Steps whose loss jumps, and the samples that may have caused it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, Trainer

from t2v.ranks import connected, from_all
from t2v.training.mixture import STREAMS
from t2v.training.nan_watch import MicroBatch


class LossSpikes(Callback):
    """A step whose mean loss of images or of videos (over all ranks) exceeds `factor` times its running mean goes to
    <run>/loss_spikes.jsonl, with the keys of the `samples` highest losses, and to the console. The first `warmup_steps` only measure."""

    def __init__(self, factor: float = 3.0, warmup_steps: int = 100, samples: int = 8, memory: float = 0.98) -> None:
        if not factor > 1:
            raise ValueError(f"callbacks.loss_spikes.factor is {factor}: it must be above 1; ~callbacks.loss_spikes logs none")
        self.factor, self.warmup_steps, self.samples, self.memory = factor, warmup_steps, samples, memory
        self.running: dict[str, float] = {}
        self.steps = 0
        self.last_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"running": dict(self.running), "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.running, self.steps = dict(state_dict["running"]), state_dict["steps"]

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.last_step:
            return
        self.last_step = step
        self.steps += 1
        for stream, mean in self._means(module.micro_batches, module.device).items():
            usual = self.running.setdefault(stream, mean)
            if self.steps > self.warmup_steps and mean > self.factor * usual:
                self._report(trainer, module.micro_batches, stream, mean, usual)
            self.running[stream] = self.memory * usual + (1 - self.memory) * min(mean, self.factor * usual)

    @staticmethod
    def _means(micro_batches: Sequence[MicroBatch], device: torch.device) -> dict[str, float]:
        table = torch.zeros(len(STREAMS), 2, device=device)  # sum and count
        for m in micro_batches:
            table[STREAMS.index(m.stream)] += torch.stack([m.losses.sum(), m.losses.new_tensor(len(m.losses))])
        if connected():
            dist.all_reduce(table)
        return {stream: total / count for stream, (total, count) in zip(STREAMS, table.tolist()) if count}

    def _report(self, trainer: Trainer, micro_batches: Sequence[MicroBatch], stream: str, mean: float, usual: float) -> None:
        """Every rank comes here or none."""
        mine = [m for m in micro_batches if m.stream == stream]
        rows = [row for m in mine for row in zip(m.losses.tolist(), m.keys, m.timestep[: len(m.keys)].tolist())]
        ranks = from_all(sorted(rows, reverse=True)[: self.samples])
        highest = sorted((row for rank in ranks for row in rank), reverse=True)[: self.samples]
        if trainer.is_global_zero:
            worst = [{"loss": loss, "key": key, "timestep": timestep} for loss, key, timestep in highest]
            record = {"step": trainer.global_step, "stream": stream, "loss": mean, "usual": usual, "samples": worst}
            path = Path(trainer.default_root_dir) / "loss_spikes.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            print(f"warning: step {trainer.global_step}: {stream} loss {mean:.3g}, usually {usual:.3g}; see {path}", file=sys.stderr)

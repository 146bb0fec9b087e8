"""Which samples made these weights: the keys of every optimizer step, for looking into a run and for proving a resume."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from t2v.batch import ClipBatch


class ConsumedSamples(Callback):
    """Appends a line {step, stream, indices, keys, starts} per micro-batch to <run>/consumed_rank<r>.jsonl: the optimizer step that it
    belongs to, from 1; global sample indices; seconds into the videos. A resumed run first takes back what came after its checkpoint.
    About 40 bytes a sample: 50 GB for the paper's training."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        for path in Path(trainer.default_root_dir).glob("consumed_rank*.jsonl"):
            rank = int(path.stem.removeprefix("consumed_rank"))
            if rank % trainer.world_size == trainer.global_rank:  # there may have been more ranks before
                take_back(path, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: dict[str, ClipBatch], batch_idx: int) -> None:
        """Before the step, so that no checkpoint can be newer than its lines."""
        path = Path(trainer.default_root_dir) / f"consumed_rank{trainer.global_rank}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            for stream, clips in batch.items():
                if len(clips) == 0:
                    continue
                line: dict[str, Any] = {"step": trainer.global_step + 1, "stream": stream}
                line |= {"indices": clips.indices, "keys": clips.keys, "starts": clips.starts}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def take_back(path: Path, step: int) -> None:
    """Cut the file off before the first line that is of a later step, or unfinished."""
    keep = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            keep += len(line)
    os.truncate(path, keep)

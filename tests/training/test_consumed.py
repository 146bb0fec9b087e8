"""The record of consumed samples follows a resume: what came after the checkpoint is taken back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from t2v.batch import ClipBatch
from t2v.training.callbacks.consumed import ConsumedSamples


def trainer(folder: Path, step: int, rank: int = 0, world: int = 1) -> Any:
    return SimpleNamespace(default_root_dir=str(folder), global_step=step, global_rank=rank, world_size=world)


def batch(*keys: str) -> dict[str, ClipBatch]:
    frames = torch.zeros(len(keys), 1, 2, 2, 3, dtype=torch.uint8)
    return {"video": ClipBatch(frames, list(keys), list(keys), ["s"] * len(keys), list(range(len(keys))), [0.5] * len(keys))}


def test_lines_and_what_is_taken_back(tmp_path: Path) -> None:
    callback, module = ConsumedSamples(), torch.nn.Module()
    for step, rank in ((0, 0), (0, 2), (1, 0), (2, 0), (2, 2)):
        callback.on_train_batch_start(trainer(tmp_path, step, rank), module, batch(f"{step}a", f"{step}b"), 0)  # type: ignore[arg-type]
        callback.on_train_batch_start(trainer(tmp_path, step, rank), module, batch(), 1)  # type: ignore[arg-type]
    first = tmp_path / "consumed_rank0.jsonl"
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert lines[0] == {"step": 1, "stream": "video", "indices": [0, 1], "keys": ["0a", "0b"], "starts": [0.5, 0.5]}
    assert [line["step"] for line in lines] == [1, 2, 3]
    with first.open("a") as file:
        file.write('{"step": 1, "str')  # killed while it wrote
    callback.on_train_start(trainer(tmp_path, 3), module)  # type: ignore[arg-type]
    assert len(first.read_text().splitlines()) == 3
    callback.on_train_start(trainer(tmp_path, 1, rank=0, world=2), module)  # type: ignore[arg-type]  # two ranks go on from step 1
    for name in ("consumed_rank0.jsonl", "consumed_rank2.jsonl"):
        assert [json.loads(line)["step"] for line in (tmp_path / name).read_text().splitlines()] == [1]
    callback.on_train_start(trainer(tmp_path, 0, rank=1, world=2), module)  # type: ignore[arg-type]  # the other rank's files stay
    assert first.read_text()

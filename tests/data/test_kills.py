"""kill -9 at any moment: what was consumed up to the last checkpoint, and after the resume, is what an undisturbed run consumes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from made_shards import tiny, write_images

from t2v.data.loader import ClipLoader
from t2v.data.progress import Progress


def consume(folder: str, checkpoint: str, steps: int, workers: int, pause: float) -> None:
    """Reads and checkpoints like a trainer: the file holds the keys consumed so far and the state, and changes at once."""
    path = Path(checkpoint)
    saved = json.loads(path.read_text()) if path.exists() else {"keys": [], "state": None}
    loader = ClipLoader(tiny(folder), global_batch=6, accumulate=2, num_workers=workers, state=saved["state"], timeout=60)
    progress = loader.progress()
    batches = iter(loader)
    while len(saved["keys"]) < steps:
        keys = []
        for _ in range(loader.accumulate):
            batch = next(batches)
            keys += [f"{index}:{key}@{cursor[0]}" for index, key, cursor in zip(batch.indices, batch.keys, batch.cursors)]
            progress.update(batch)
        time.sleep(pause)
        saved["keys"].append(keys)
        if len(saved["keys"]) % 3 == 0 or len(saved["keys"]) == steps:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(saved | {"state": Progress.merge([progress.state_dict()])}))
            partial.replace(path)


def run_with_kills(folder: Path, checkpoint: Path, steps: int, kills: int) -> list[list[str]]:
    context = multiprocessing.get_context("fork")
    rng = random.Random(kills)
    for kill in range(kills + 1):
        process = context.Process(target=consume, args=(str(folder), str(checkpoint), steps, 2, 0.02))
        process.start()
        if kill < kills:
            before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            limit = time.monotonic() + 60
            while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:  # it got further than the last one
                assert time.monotonic() < limit
                time.sleep(0.005)
            time.sleep(rng.random() * 0.08)
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if kill < kills else 0)
    return json.loads(checkpoint.read_text())["keys"]


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path: Path, kills: int) -> None:
    folder = write_images(tmp_path / "images", 11, 7)
    steps = 9 + 9 * kills
    consume(str(folder), str(tmp_path / "straight.json"), steps, workers=0, pause=0)
    straight = json.loads((tmp_path / "straight.json").read_text())["keys"]
    disturbed = run_with_kills(folder, tmp_path / "disturbed.json", steps, kills)
    assert disturbed == straight

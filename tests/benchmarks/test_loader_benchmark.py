"""What the loader benchmark says of good streams, and that it notices bad ones."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from t2v.benchmarks import loader
from t2v.data import order, readers


def unfine(rows: list[loader.Row]) -> list[str]:
    return [row["what"] for row in rows if not row.get("fine", True)]


def test_shuffling_is_good_and_measured() -> None:
    rows = loader.shuffle(shards=40, per_shard=25, num_readers=8)
    assert len(rows) == 6
    assert not unfine(rows)
    assert not unfine(loader.shuffle(shards=3, per_shard=60, num_readers=8))  # fewer shards than readers


def test_passes_in_one_order_and_readers_of_one_shard_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = loader.images(tmp_path, 40, 10, num_readers=4, buffer=1)
    good = order.parts_of
    monkeypatch.setattr(order, "parts_of", lambda shards, slot, slots, epoch, seed: good(shards, slot, slots, 0, seed))
    assert "rank correlation of two passes" in unfine(loader.quality(stream))
    monkeypatch.setattr(order, "parts_of", lambda shards, slot, slots, epoch, seed: good(shards, 0, slots, epoch, seed))
    assert any("two readers" in what for what in unfine(loader.quality(stream)))


@pytest.mark.parametrize(
    ("kind", "samples"),
    [
        ("images", 3000),
        ("latents", 1500),
        pytest.param("images", 50_000, marks=pytest.mark.slow),
        pytest.param("latents", 50_000, marks=pytest.mark.slow),
    ],
)
def test_memory_stays(kind: str, samples: int) -> None:
    rows = loader.memory(kind=kind, samples=samples)
    assert len(rows) == 4
    assert not unfine(rows), rows
    assert all(row["value"] > 20 for row in rows)  # no upper bound: what a worker inherits of this process depends on the tests before


def test_a_leak_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[mmap.mmap] = []
    take = readers.Host.take

    def leaking(host: readers.Host) -> list[dict[str, str]]:
        held.append(mmap.mmap(-1, 100_000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))  # pages of its own, wherever the heap has holes
        held[-1].write(b"\1" * 100_000)
        return take(host)

    monkeypatch.setattr(readers.Host, "take", leaking)
    assert "worker" in unfine(loader.memory(samples=1500))[0]
    with pytest.raises(ValueError, match="images, videos, latents"):
        loader.memory(kind="audio")

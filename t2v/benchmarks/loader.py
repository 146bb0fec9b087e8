"""The loader: what it adds to bare decoding, how much memory its workers hold, and how well it shuffles. Shards are made on the spot."""

from __future__ import annotations

import io
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from t2v.benchmarks.decode import contents, encoded, ours
from t2v.data.arrays import pack_moments
from t2v.data.laion import laion
from t2v.data.latents import MEMBER, LatentCard, webvid_latents
from t2v.data.loader import ClipLoader
from t2v.data.readers import ClipStream
from t2v.data.shard_writer import ShardWriter
from t2v.data.webvid import webvid
from t2v.video import write_mp4

Row = dict[str, Any]
KINDS = ("images", "videos", "latents")


def loader(rounds: int = 9, clips: int = 40) -> list[Row]:
    """Rows {what, value, unit}: the loader's overhead over bare decoding (in CPU time, in one process), windows of latents per second."""
    torch.set_num_threads(1)
    data = encoded(next(iter(contents(1))), 250)
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder) / "videos/00000.tar") as shard:
            for number in range(clips):
                shard.add(f"{number:08d}", {"mp4": data, "txt": b"a caption", "json": b'{"status": "success"}'})
        batches = iter(ClipLoader(webvid(f"{folder}/videos", num_readers=4), global_batch=8))
        next(batches)
        bare, loaded = [], []
        for _ in range(rounds):
            begin = time.process_time()
            batch = next(batches)
            loaded.append(time.process_time() - begin)
            begin = time.process_time()
            for start in batch.starts:
                ours(data, start)
            bare.append(time.process_time() - begin)
        overhead = statistics.median(a / b for a, b in zip(loaded, bare)) - 1
        windows = latent_windows(Path(folder) / "latents", rounds)
    return [
        {"what": "loader overhead over bare decoding", "value": 100 * overhead, "unit": "%"},
        {"what": "latent windows (16 of 90 frames) per core", "value": windows, "unit": "windows/s"},
    ]


def latent_windows(folder: Path, rounds: int) -> float:
    """Windows per second and core out of whole-clip moments of 256 pixels, 30 s at 3 fps."""
    batches = iter(ClipLoader(latents(folder, shards=1, per_shard=200, frames=90, size=256, num_readers=4), global_batch=50))
    next(batches)
    rates = []
    for _ in range(rounds):
        begin = time.process_time()
        next(batches)
        rates.append(50 / (time.process_time() - begin))
    return statistics.median(rates)


# Memory -------------------------------------------------------------------------------------------------------------------------------


def memory(kind: str = "images", samples: int = 50_000, workers: int = 2, growth: float = 16) -> list[Row]:
    """Rows {what, value, unit, fine}: private memory of the largest worker after a fifth of the samples and after all of them, and of this
    process; `fine` is false where either grew by more than `growth` MB in between."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind} is none of {', '.join(KINDS)}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stream = small(kind, Path(folder))
        batches = iter(ClipLoader(stream, global_batch=50, num_workers=workers, timeout=120))
        seen, early, at = 0, (0.0, 0.0), max(1, samples // 5)
        while seen < samples:
            before, seen = seen, seen + len(next(batches))
            if before < at <= seen:
                early = held()
        late = held()
    rows: list[Row] = []
    for what, first, last in zip(("the largest worker", "the process that trains"), early, late):
        rows.append({"what": f"{what} after {at} {kind}", "value": first, "unit": "MB"})
        rows.append({"what": f"{what} after {seen} {kind}", "value": last, "unit": "MB", "fine": last - first < growth})
    return rows


def held() -> tuple[float, float]:
    """MB that belong to a process alone: the largest of this one's children, and this one."""
    children = [anonymous_mb(child.pid) for child in multiprocessing.active_children() if child.pid is not None]
    return max(children, default=0.0), anonymous_mb(None)


def anonymous_mb(pid: int | None) -> float:
    lines = Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


# Shuffling ----------------------------------------------------------------------------------------------------------------------------


def shuffle(shards: int = 100, per_shard: int = 100, num_readers: int = 16, buffer: int = 1000) -> list[Row]:
    """Rows {what, value, fine} of `quality`, for images in shards made here. `fine` compares with what chance gives."""
    with tempfile.TemporaryDirectory() as folder:
        return quality(images(Path(folder), shards, per_shard, num_readers=num_readers, buffer=buffer))


def quality(stream: ClipStream) -> list[Row]:
    """How well two passes over a stream of one source are shuffled. Keys must count the samples as they lie on the disk."""
    passes: list[list[int]] = [[], []]
    readers: Counter[int] = Counter()
    for batch in ClipLoader(stream, global_batch=4 * stream.readers):
        for key, reader, cursor in zip(batch.keys, batch.readers, batch.cursors):
            if cursor[0] < 2:
                passes[cursor[0]].append(int(key))
            if cursor[0] == 0:
                readers[reader] += 1
        if min(cursor[0] for cursor in batch.cursors) >= 2:
            break
    first, second = (np.array(order) for order in passes)
    samples = max(first) + 1
    chance = 4 / len(stream.shards[0]) ** 0.5  # four standard deviations: a shard is read within a short span, so shards are what is mixed
    repeats = len(first) - len(set(first.tolist())) + len(second) - len(set(second.tolist()))
    missed = 2 * samples - len(set(first.tolist())) - len(set(second.tolist()))
    rows: list[Row] = [
        {"what": "samples that two readers read, or one read twice, in one pass", "value": repeats, "fine": repeats == 0},
        {"what": "samples that a pass missed", "value": missed, "fine": missed == 0},
    ]
    if repeats or missed:
        return rows
    one, two = np.argsort(first), np.argsort(second)  # place of each sample in a pass
    for what, a, b in (("two passes", one, two), ("a pass and the order on the disk", one, np.arange(samples))):
        correlation = float(np.corrcoef(a, b)[0, 1])
        rows.append({"what": f"rank correlation of {what}", "value": correlation, "fine": abs(correlation) < chance})
    apart = float(np.abs(np.diff(one)).mean() / (samples / 3))
    rows.append({"what": "distance of neighbours on the disk, in parts of a perfect shuffle's", "value": apart})
    spread = max(readers.values()) / min(readers.values())
    rows.append({"what": "samples of the busiest reader over those of the idlest in one pass", "value": spread, "fine": spread < 2})
    return rows


# The shards ---------------------------------------------------------------------------------------------------------------------------


def small(kind: str, folder: Path) -> ClipStream:
    """A stream of samples as small as they come, in 40 shards of 50."""
    if kind == "images":
        return images(folder, 40, 50)
    if kind == "latents":
        return latents(folder, shards=40, per_shard=50, frames=24, size=64)
    pictures = np.random.default_rng(0).integers(0, 255, (72, 8, 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    buffer = io.BytesIO()
    write_mp4(buffer, pictures, 12, preset="ultrafast")
    write(folder, 40, 50, lambda number: {"mp4": buffer.getvalue()})
    return webvid(str(folder), size=64)


def images(folder: Path, shards: int, per_shard: int, **options: Any) -> ClipStream:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(buffer, "PNG")
    write(folder, shards, per_shard, lambda number: {"png": buffer.getvalue()})
    return laion(str(folder), size=16, **options)


def latents(folder: Path, shards: int, per_shard: int, frames: int, size: int, **options: Any) -> ClipStream:
    LatentCard("0" * 64, 8, 4, size, 3.0).write(folder)
    side = size // 8
    generator = torch.Generator().manual_seed(0)
    packed = [pack_moments(torch.randn(frames, side, side, 8, generator=generator)) for _ in range(min(per_shard, 200))]
    write(folder, shards, per_shard, lambda number: {MEMBER: packed[number % len(packed)]})
    return webvid_latents(str(folder), size=size, **options)


def write(folder: Path, shards: int, per_shard: int, media: Callable[[int], dict[str, bytes]]) -> None:
    """Samples 0, 1, 2, ... in turn; their keys count them."""
    for number in range(shards):
        with ShardWriter(folder / f"{number:05d}.tar") as shard:
            for sample in range(number * per_shard, (number + 1) * per_shard):
                shard.add(f"{sample:08d}", media(sample) | {"txt": b"a caption", "json": b"{}"})

"""Shards for tests, written as img2dataset and video2dataset write them. A sample's picture carries its number, so that the pixels tell
what was read."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from t2v.data.laion import laion
from t2v.data.readers import ClipStream
from t2v.video import write_mp4


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    """Samples (key, {suffix: bytes}) in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def image_bytes(number: int = 0, size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    """An image whose red and green are the number's low and high byte."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 99)).save(buffer, kind)
    return buffer.getvalue()


def image_sample(number: int) -> tuple[str, dict[str, bytes]]:
    caption = f"picture {number}"
    fields = {"key": f"{number:09d}", "caption": caption, "status": "success", "number": number}
    return f"{number:09d}", {"png": image_bytes(number), "txt": caption.encode(), "json": json.dumps(fields).encode()}


def write_images(folder: Path, shards: int, per_shard: int) -> Path:
    """`shards` tars with samples 0, 1, 2, ... in turn."""
    for shard in range(shards):
        write_tar(folder / f"{shard:05d}.tar", (image_sample(shard * per_shard + k) for k in range(per_shard)))
    return folder


@lru_cache
def video_bytes(frames: int = 96, fps: float = 12, height: int = 32, width: int = 48) -> bytes:
    """A short video that changes with every frame."""
    ramp = np.arange(frames, dtype=np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(ramp * 2 + 20, (frames, height, width, 3))
    buffer = io.BytesIO()
    write_mp4(buffer, np.ascontiguousarray(pixels), fps, preset="ultrafast")
    return buffer.getvalue()


def video_sample(number: int) -> tuple[str, dict[str, bytes]]:
    caption = f"video {number}"
    fields = {"key": f"{number:08d}", "caption": caption, "status": "success"}
    return f"{number:08d}", {"mp4": video_bytes(), "txt": caption.encode(), "json": json.dumps(fields).encode()}


def tiny(folder: Path | str, **options: object) -> ClipStream:
    """A stream of 4 x 4 pictures from 8 readers."""
    return laion(str(folder), **{"size": 4, "num_readers": 8, "buffer": 5} | options)  # type: ignore[arg-type]


def running_in(session: int) -> list[int]:
    """Processes of that session which still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its) == session and state != "Z":
                found.append(int(stat.parent.name))
    return found

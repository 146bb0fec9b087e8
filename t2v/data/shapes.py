"""`shapes` as data sets: shards as img2dataset and video2dataset would have written them, and held-out clips for evaluation.

The readers for LAION and WebVid read these shards unchanged. Every sample is keyed by (seed, media, index), so the bytes depend neither on
the number of processes nor on the order of the work. Videos lie in the middle of 16:9 frames and last 6 s.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image
from torch import Tensor

from t2v.data.frames import decode_image
from t2v.data.shape_world import (
    BACKGROUNDS,
    DIRECTIONS,
    HELD_OUT_PAIRS,
    IMAGE_COLOURS,
    IMAGE_PAIRS,
    MOTION,
    SECONDS,
    SHAPES,
    SPEEDS,
    VIDEO_PAIRS,
    Pair,
    Spec,
    draw,
    draw_clip,
    place,
    random_image,
    random_motion,
    random_video,
)
from t2v.data.workers import end_with_parent
from t2v.video import decode_clip, write_mp4

T = TypeVar("T")
Media = Literal["image", "video"]
World = Literal["all", "motion"]
COMPLETE = "complete.json"  # written last; holds the settings
FORMAT = 2  # raise it whenever the same settings would give other bytes
SHAPE_OF_IMAGES = (4, 3)  # width : height of the JPEGs; the readers take the middle square
SHAPE_OF_VIDEOS = (16, 9)
SOURCE_FPS = 6


@dataclass(frozen=True)
class Settings:
    """What the bytes of one set of shards depend on. `height` in pixels, `fps` of the mp4 files."""

    media: Media
    count: int
    seed: int = 0
    height: int = 96
    fps: int = SOURCE_FPS
    samples_per_shard: int = 32
    world: World = "all"  # "motion": white circles on black, so that captions differ in direction and speed alone

    def __post_init__(self) -> None:
        if self.media not in ("image", "video"):
            raise ValueError(f"media is {self.media!r}: expected 'image' or 'video'")
        if self.world not in ("all", "motion"):
            raise ValueError(f"world is {self.world!r}: expected 'all' or 'motion'")
        for field in fields(self)[1:]:
            if field.name not in ("seed", "world") and getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}: expected at least 1")
        if self.height % 2:
            raise ValueError(f"height is {self.height}: H.264 with 4:2:0 colour needs an even one, such as {self.height + 1}")

    @property
    def folder(self) -> str:
        """Name of the folder that holds these shards: the settings' hash, so that different settings live side by side."""
        settings = {name: value for name, value in asdict(self).items() if (name, value) != ("world", "all")}  # older than `world`
        words = json.dumps([FORMAT, settings], sort_keys=True)
        return f"{self.media}-{hashlib.blake2b(words.encode(), digest_size=6).hexdigest()}"

    @property
    def num_shards(self) -> int:
        return math.ceil(self.count / self.samples_per_shard)

    @property
    def width(self) -> int:
        wide, high = SHAPE_OF_VIDEOS if self.media == "video" else SHAPE_OF_IMAGES
        return 2 * round(self.height * wide / high / 2)

    def spec(self, index: int) -> Spec:
        rng = random.Random(f"shapes/{self.seed}/{self.media}/{index}")
        if self.world == "motion":
            return random_motion(rng) if self.media == "video" else place(rng, *MOTION)
        return random_video(rng) if self.media == "video" else random_image(rng)


def shards(
    root: str | Path,
    media: Media,
    count: int,
    *,
    seed: int = 0,
    height: int = 96,
    fps: int = SOURCE_FPS,
    samples_per_shard: int = 32,
    processes: int | None = None,
    world: World = "all",
) -> list[str]:
    """Paths of the tar shards below `root`, made first if they are not there yet, by as many processes as this one may use cores
    (16 at most) if no number is given. Safe to call from several processes at once."""
    processes = min(16, len(os.sched_getaffinity(0))) if processes is None else processes
    folder = prepare(root, Settings(media, count, seed, height, fps, samples_per_shard, world), processes)
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def prepare(root: str | Path, settings: Settings, processes: int = 2) -> Path:
    """The folder of these shards, made if it is not whole yet: written under a temporary name and renamed when every shard is there.

    One process of a machine writes while the others wait; should machines that share `root` write at once, the first rename wins, and the
    bytes are the same anyway.
    """
    root = Path(root)
    folder = root / settings.folder
    if (folder / COMPLETE).is_file():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / f".{settings.folder}.lock"):
            if not (folder / COMPLETE).is_file():
                write_folder(folder, settings, processes)
    except OSError as error:
        raise OSError(f"cannot write the shapes shards to {folder}: {error}. Choose another place with paths.data=FOLDER") from error
    return folder


def write_folder(folder: Path, settings: Settings, processes: int) -> None:
    prefix = f".{folder.name}.{socket.gethostname()}."
    for left_over in folder.parent.glob(f"{prefix}*"):  # of a process of this machine that was killed: we hold the lock
        shutil.rmtree(left_over)
    temporary = folder.parent / f"{prefix}{os.getpid()}"
    temporary.mkdir()
    print(f"shapes   {settings.count} {settings.media} samples are drawn once, to {folder}", file=sys.stderr, flush=True)
    try:
        write = partial(write_shard, temporary, settings)
        if processes > 1 and settings.num_shards > 1:
            # spawn: the caller may have threads (torch), which a forked child would not
            with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
                list(pool.map(write, range(settings.num_shards)))
        else:
            for shard in range(settings.num_shards):
                write(shard)
        (temporary / COMPLETE).write_text(json.dumps(asdict(settings), indent=1) + "\n")
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / COMPLETE).is_file():  # otherwise another machine was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel releases it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_shard(folder: Path, settings: Settings, shard: int) -> None:
    """NNNNN.tar with KEY.jpg|mp4, KEY.txt and KEY.json for each sample, and NNNNN_stats.json, as img2dataset and video2dataset do.

    The parquet files beside them are left out: nothing reads them. Times are zero so that the bytes depend on the settings alone.
    """
    first, end = shard * settings.samples_per_shard, min((shard + 1) * settings.samples_per_shard, settings.count)
    digits = math.ceil(math.log10(settings.samples_per_shard)) if settings.samples_per_shard > 1 else 1
    with tarfile.open(folder / f"{shard:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in range(first, end):
            spec, key = settings.spec(index), f"{shard:05d}{index - first:0{digits}d}"
            media = video_bytes(spec, settings.fps, settings.height) if settings.media == "video" else image_bytes(spec, settings.height)
            facts = metadata(spec, settings, key, f"shapes://{settings.seed}/{settings.media}/{index}", media)
            members = {
                "mp4" if settings.media == "video" else "jpg": media,
                "txt": spec.caption.encode(),
                "json": json.dumps(facts).encode(),
            }
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    failed = "failed_to_subsample" if settings.media == "video" else "failed_to_resize"
    stats: dict[str, object] = {"count": end - first, "successes": end - first, "failed_to_download": 0, failed: 0}
    stats |= {"duration": 0.0, "start_time": 0.0, "end_time": 0.0, "status_dict": {"success": end - first}}
    (folder / f"{shard:05d}_stats.json").write_text(json.dumps(stats, indent=4))


def metadata(spec: Spec, settings: Settings, key: str, url: str, media: bytes) -> dict[str, object]:
    """The json beside a sample: the tool's own columns and, as additional columns, the attributes."""
    facts: dict[str, object] = {k: v for k, v in asdict(spec).items() if v is not None}
    if settings.media == "video":
        facts |= {"videoid": key, "page_dir": "shapes", "duration": f"PT00H00M{SECONDS:02.0f}S"}
    facts |= {"caption": spec.caption, "url": url, "key": key, "status": "success", "error_message": None}
    if settings.media == "image":
        size = {"width": settings.width, "height": settings.height, "original_width": settings.width, "original_height": settings.height}
        facts |= size | {"exif": "{}", "sha256": hashlib.sha256(media).hexdigest()}
    return facts


def image_bytes(spec: Spec, height: int, quality: int = 95) -> bytes:
    """The JPEG of an image."""
    wide, high = SHAPE_OF_IMAGES
    buffer = io.BytesIO()
    Image.fromarray(draw(spec, 0.0, height, 2 * round(height * wide / high / 2))).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def video_bytes(spec: Spec, fps: int, height: int) -> bytes:
    """The H.264 mp4 of a clip. x264's macroblock tree, part of all presets slower than superfast, makes the bytes depend on memory
    that was never written, so that the same clip is not always the same file."""
    wide, high = SHAPE_OF_VIDEOS
    buffer = io.BytesIO()
    write_mp4(buffer, draw_clip(spec, fps, height, 2 * round(height * wide / high / 2)), fps, crf=20, gop=2 * fps, preset="superfast")
    return buffer.getvalue()


def render(spec: Spec, num_frames: int = 16, fps: float = 3.0, size: int = 64, *, start: float = 0.5) -> Tensor:
    """uint8 (f h w c): the truth as the readers would show it, through H.264 (from `start` seconds on) or, for an image, through JPEG.

    The file is 96 pixels high, or more by a quarter than `size`, as those of `data=shapes` and `data=shapes_gpu_128`.
    """
    height = max(96, 2 * round(size * 5 / 8))
    if spec.is_video:
        frames, _ = decode_clip(video_bytes(spec, SOURCE_FPS, height), num_frames=num_frames, fps=fps, size=size, start=start)
        return frames
    return decode_image(image_bytes(spec, height), size=size)


HeldOut = Literal["seen", "unseen", "mixed", "image_only", "motion"]


def held_out_specs(n: int, seed: int = 0, kind: HeldOut = "mixed") -> list[Spec]:
    """n clips that no training shard holds, with prompts (`spec.caption`); every attribute is dealt as evenly as n allows.

    kind: "seen": (colour, shape) pairs of the videos. "unseen": pairs that no clip or image shows together. "mixed": both in one deck,
    so that every pair of a video colour and a video shape is equally likely (4 of 24 unseen; `spec.unseen_pair` tells). "image_only":
    pairs of which only images show the colour or the shape, here in motion: what images teach. "motion": of the world in which only
    direction and speed differ.
    """
    decks: dict[str, list[Pair]] = {
        "seen": list(VIDEO_PAIRS),
        "unseen": sorted(HELD_OUT_PAIRS),
        "mixed": [*VIDEO_PAIRS, *sorted(HELD_OUT_PAIRS)],
        "motion": [MOTION[0]],
        "image_only": [pair for pair in IMAGE_PAIRS if pair[0] in IMAGE_COLOURS or pair[1] not in SHAPES],
    }
    if kind not in decks:
        raise ValueError(f"kind is {kind!r}: expected one of {', '.join(decks)}")
    rng = random.Random(f"shapes/{seed}/held out/{kind}")
    pairs = deal(rng, decks[kind], n)
    motions = deal(
        rng,
        [(background, d, s) for background in ([MOTION[1]] if kind == "motion" else BACKGROUNDS) for d in DIRECTIONS for s in SPEEDS],
        n,
    )
    return [place(rng, pair, *motion) for pair, motion in zip(pairs, motions)]


def held_out_images(n: int, seed: int = 0) -> list[Spec]:
    """n images that no training shard holds, of every colour and shape."""
    rng = random.Random(f"shapes/{seed}/held out/image")
    return [random_image(rng) for _ in range(n)]


def deal(rng: random.Random, items: list[T], n: int) -> list[T]:
    """n items from shuffled decks, one deck after the other: counts differ by one at most."""
    dealt: list[T] = []
    while len(dealt) < n:
        dealt += rng.sample(items, len(items))
    return dealt[:n]

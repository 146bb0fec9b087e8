"""Which videos, which captions, which frames, which metrics: a protocol, and the manifest that it writes down.

Selection is by hash: videos are sorted by sha256("seed:video"), captions by sha256("seed:video:sentence"), so it depends neither on the
order of a file, nor on a library's random numbers, nor on the number of GPUs, and the first 256 are a part of the first 2,048.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

from torch import Tensor

MIN_VIDEOS = 8  # below this even a trend is noise


class Captioned(Interface):
    """What a data set's sentences look like from here (t2v.data.msrvtt.Sentence is one)."""

    @property
    def video_id(self) -> str: ...
    @property
    def sen_id(self) -> int: ...
    @property
    def caption(self) -> str: ...


class Dataset(Interface):
    """Real clips and their captions. `fingerprint` names the captions' content, `recipe` how pixels are taken from a file."""

    name: str
    recipe: str
    fingerprint: str

    @property
    def sentences(self) -> Sequence[Captioned]: ...

    def missing(self, video_ids: Sequence[str]) -> list[str]: ...

    def signature(self, video_ids: Sequence[str]) -> str:
        """Names the files behind these clips, so that another encoding of them is another reference."""
        ...

    def clip(self, video_id: str, *, num_frames: int, fps: float, size: int) -> Tensor: ...


@dataclass(frozen=True)
class Row:
    """One video to be generated and the real one beside it."""

    index: int
    video_id: str
    sen_id: int
    caption: str
    noise_seed: int  # 63 bits


@dataclass(frozen=True)
class Protocol:
    """`num_videos` None takes the whole split. `chunk` rows are generated and measured in one batch, on any number of ranks.

    `keep_videos`: keep every generated video as a lossless PNG strip; without it only features are kept. `companions`: the unbiased and
    extrapolated distances and the intervals too.
    """

    name: str
    metrics: tuple[str, ...]
    dataset: str = "msrvtt"
    num_videos: int | None = None
    captions: Literal["one", "all"] = "one"
    num_frames: int = 16
    fps: float = 3.0
    size: int = 256
    seed: int = 0
    chunk: int = 8
    keep_videos: bool = True
    companions: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if self.captions not in ("one", "all"):
            raise ValueError(f"captions={self.captions!r}: one caption a video, or all.")
        if self.num_videos is not None and self.num_videos < MIN_VIDEOS:
            raise ValueError(f"num_videos={self.num_videos}: a distance on fewer than {MIN_VIDEOS} videos says nothing.")
        for name in ("num_frames", "fps", "size", "chunk"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")


@dataclass(frozen=True)
class Manifest:
    """The rows of an evaluation and what fixes them. Two manifests with one `sha256` ask for the same videos."""

    header: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def text(self) -> str:
        lines = [self.header, *(asdict(row) for row in self.rows)]
        return "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def videos_sha256(self) -> str:
        """Of the real clips alone: captions do not change them, so that protocols can share features of the same clips."""
        header = {key: value for key, value in self.header.items() if key not in ("captions", "annotations")}
        return digest({"header": header, "videos": [row.video_id for row in self.rows]})

    @cached_property
    def clips(self) -> Manifest:
        """A row for each real clip, in order: a clip is read once, however many captions it has."""
        first = {row.video_id: row for row in reversed(self.rows)}
        return Manifest(self.header, tuple(replace(row, index=k) for k, row in enumerate(reversed(first.values()))))

    @cached_property
    def clip_of_row(self) -> list[int]:
        """The row of `clips` that belongs to each row."""
        places = {row.video_id: row.index for row in self.clips.rows}
        return [places[row.video_id] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, path: Path) -> None:
        replace_file(path, self.text.encode())

    @staticmethod
    def read(path: Path) -> Manifest:
        try:
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # captions may hold what else ends a line in Unicode
            header, *rows = map(json.loads, lines)
            return Manifest(header, tuple(Row(**row) for row in rows))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a manifest of an evaluation: {error}") from error


def select(dataset: Dataset, protocol: Protocol) -> Manifest:
    """The manifest of a protocol on a data set. ValueError where it has fewer videos than the protocol counts, or clips are missing."""
    by_video: dict[str, list[Captioned]] = {}
    for sentence in dataset.sentences:
        by_video.setdefault(sentence.video_id, []).append(sentence)
    if dataset.name != protocol.dataset:
        raise ValueError(f"protocol {protocol.name} is on {protocol.dataset}, it was given {dataset.name}.")
    seed, count = protocol.seed, protocol.num_videos or len(by_video)
    if len(by_video) < max(count, MIN_VIDEOS):
        raise ValueError(
            f"protocol {protocol.name} counts {count} videos, {dataset.name} has {len(by_video)}. Get the whole split, "
            f"or set protocol.num_videos={len(by_video)} (at least {MIN_VIDEOS}; the metrics' names will say so)."
        )
    videos = sorted(by_video, key=lambda video: hashed(seed, video))[:count]
    missing = dataset.missing(videos)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(videos)} videos that {protocol.name} needs are missing in {dataset.name}: "
            f"{', '.join(missing[:10])}{' ...' if len(missing) > 10 else ''}. Evaluation leaves no clip out."
        )
    rows: list[Row] = []
    for video in videos:
        sentences = sorted(by_video[video], key=lambda sentence: hashed(seed, video, sentence.sen_id))
        for sentence in sentences[: 1 if protocol.captions == "one" else None]:
            noise = int(hashed("noise", seed, video, sentence.sen_id)[:16], 16) >> 1
            rows.append(Row(len(rows), video, sentence.sen_id, sentence.caption, noise))
    header = {
        "dataset": dataset.name,
        "files": dataset.signature(videos),
        "annotations": dataset.fingerprint,
        "captions": protocol.captions,
        "seed": seed,
        "clip": {"frames": protocol.num_frames, "fps": protocol.fps, "size": protocol.size, "recipe": dataset.recipe},
    }
    return Manifest(header, tuple(rows))


def hashed(*key: object) -> str:
    """sha256 of "a:b:c" in hexadecimal."""
    return hashlib.sha256(":".join(map(str, key)).encode()).hexdigest()


def digest(content: Any) -> str:
    """sha256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

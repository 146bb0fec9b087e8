"""MSR-VTT (Xu et al. 2016): captions from its official JSON, clips from a folder of videos or from tar shards.

10,000 clips of 10 to 32 s, 20 captions each; train 6,513 / validate 497 / test 2,990 (video7010 to video9999). Section 4.1.1 of the paper.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from t2v.video import BadSample, decode_clip

TEST_VIDEOS = 2990
TEST_CAPTIONS = (59794, 59800)  # what papers counted; 20 each would be 59,800
SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
CLIP_RECIPE = "on-screen-at-time, middle square, swscale bilinear, 1"

Place = tuple[Path, int, int]
"""Where the bytes of a video lie: file, first byte, length."""

log = logging.getLogger(__name__)


class ClipError(ValueError):
    """A clip that an evaluation needs and cannot have. Nothing is measured without it."""


@dataclass(frozen=True)
class Sentence:
    """One caption of one video."""

    video_id: str
    sen_id: int
    caption: str


class MsrVtt:
    """Sentences of one split and the clips they describe. Exactly one of `videos` (folder) and `shards` (tar files, keys are video ids)."""

    name = "msrvtt"
    recipe = CLIP_RECIPE

    def __init__(
        self, annotations: str | Path, videos: str | Path | None = None, shards: Sequence[str | Path] | None = None, split: str = "test"
    ) -> None:
        if (videos is None) == (shards is None):
            raise ValueError("MSR-VTT's clips come from a folder (videos=DIR) or from tar files (shards=[...]): give exactly one of them.")
        path = Path(annotations)
        data = _existing(path, "annotation file").read_bytes()
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.split = split
        self.sentences = read_sentences(path, data, split)
        self.places = _folder(Path(videos)) if videos is not None else _tars([Path(shard) for shard in shards or ()])
        self.where = str(videos) if videos is not None else f"{len(shards or ())} shards"

    def missing(self, video_ids: Sequence[str]) -> list[str]:
        return [video_id for video_id in video_ids if video_id not in self.places]

    def signature(self, video_ids: Sequence[str]) -> str:
        """Names the files by their content: another encoding of the clips is another reference; folder or shards makes no difference."""
        whole = hashlib.sha256()
        for video_id in sorted(video_ids):
            path, first, length = self.places[video_id]
            with path.open("rb") as file:
                file.seek(first)
                whole.update(f"{video_id}:{hashlib.sha256(file.read(length)).hexdigest()},".encode())
        return whole.hexdigest()

    def clip(self, video_id: str, *, num_frames: int, fps: float, size: int) -> Tensor:
        """The middle frames: uint8 (f h w c). A clip that is missing, broken or too short raises ClipError, never a substitute."""
        place = self.places.get(video_id)
        if place is None:
            raise ClipError(f"{video_id} is not in {self.where}")
        path, first, length = place
        with path.open("rb") as file:
            file.seek(first)
            data = file.read(length)
        try:
            return middle_clip(data, num_frames=num_frames, fps=fps, size=size)
        except BadSample as error:
            raise ClipError(f"{video_id} in {self.where}: {error}. Evaluation leaves no clip out; replace the file.") from error


def middle_clip(data: bytes, *, num_frames: int, fps: float, size: int | None) -> Tensor:
    """The middle `num_frames` of those on screen at k / fps seconds (section 4.2.1): uint8 (f h w c). Of real clips none is left out for
    standing still, as training does with slide shows. Raises BadSample."""

    def start(slack: float) -> float:
        whole = int(slack * fps + 1e-6) + num_frames  # frames at k / fps that the video lasts for
        return (whole - num_frames) // 2 / fps

    return decode_clip(data, num_frames=num_frames, fps=fps, size=size, start=start, min_distinct=0)[0]


def read_sentences(path: Path, data: bytes, split: str) -> list[Sentence]:
    """The captions of a split, in a fixed order. ValueError where the file is not MSR-VTT's or lacks the split."""
    try:
        content = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): expected MSR-VTT's test_videodatainfo.json or MSRVTT_data.json.") from error
    lists: list[Any] = [content.get(key) if isinstance(content, dict) else None for key in ("videos", "sentences")]
    if not all(isinstance(entries, list) and entries for entries in lists):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} is no MSR-VTT annotation: it should hold lists 'videos' and 'sentences', it holds {found}.")
    try:
        splits: Counter[str] = Counter(video["split"] for video in lists[0])
        wanted = {video["video_id"] for video in lists[0] if video["split"] == split}
        rows: list[dict[str, Any]] = [row for row in lists[1] if row["video_id"] in wanted]
        sentences = [Sentence(row["video_id"], int(row["sen_id"]), str(row["caption"]).strip()) for row in rows]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no MSR-VTT annotation: an entry has no {error}.") from error
    if not wanted:
        raise ValueError(f"{path} has no '{split}' videos, only {dict(splits)}: test captions are in test_videodatainfo.json.")
    silent = wanted - {sentence.video_id for sentence in sentences}
    if silent or any(not sentence.caption for sentence in sentences):
        raise ValueError(f"{path}: {len(silent)} videos of '{split}' have no caption {sorted(silent)[:3]}, or a caption is empty.")
    if split == "test" and (len(wanted) != TEST_VIDEOS or len(sentences) not in TEST_CAPTIONS):
        log.warning("%s: %d videos and %d captions; MSR-VTT's test split has 2,990 and 59,794", path, len(wanted), len(sentences))
    return sorted(sentences, key=lambda sentence: (sentence.video_id, sentence.sen_id))


def _folder(folder: Path) -> dict[str, Place]:
    _existing(folder, "video folder")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    return {path.stem: (path, 0, path.stat().st_size) for path in files}


def _tars(paths: list[Path]) -> dict[str, Place]:
    """Video id -> its bytes inside a tar; only headers are read. A damaged tar raises."""
    places: dict[str, Place] = {}
    for path in paths:
        try:
            with tarfile.open(_existing(path, "shard"), "r:") as tar:
                for member in tar:
                    name = Path(member.name)
                    if member.isfile() and name.suffix.lower() in SUFFIXES:
                        if member.offset_data + member.size > path.stat().st_size:
                            raise tarfile.ReadError(f"{member.name} is cut off")
                        places[name.stem] = (path, member.offset_data, member.size)
        except tarfile.TarError as error:
            raise ClipError(f"{path}: {error}. Evaluation leaves no clip out; replace the shard.") from error
    return places


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"MSR-VTT's {what} {path} does not exist. MSR-VTT is for research only and cannot be downloaded from here.")
    return path

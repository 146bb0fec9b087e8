"""Files with captions, in whatever form they came -> tar shards: key.mp4 + key.txt + key.json, as video2dataset writes them.

Sources: a folder (searched through, zips in it included) with a csv, jsonl or json of captions, or with a .txt or .json beside each file;
or a folder of tar shards. Optionally each video is cut into segments and encoded again: a middle square of 256-320 pixels with keyframes
close together is decoded several times faster.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from t2v.data.errors import BadSample, ShardError
from t2v.data.folder import caption_of, read_table
from t2v.data.frames import decode_image
from t2v.data.laion import IMAGES
from t2v.data.raw import RawSample
from t2v.data.shard_writer import ShardWriter
from t2v.data.shards import LocalTar
from t2v.data.sources import clean
from t2v.data.webvid import VIDEOS
from t2v.video import decode_clip, probe, write_mp4

MEDIA = (*VIDEOS, *IMAGES)


@dataclass(frozen=True)
class Recode:
    """How videos are encoded again. Twelve frames a second keep any phase of a clip at 3."""

    size: int = 256  # pixels of the middle square; decoding is fastest where training takes it as it is
    fps: float = 12.0
    gop: int = 12  # frames between keyframes at most
    crf: int = 23
    preset: str = "medium"
    tune: str | None = "fastdecode"


@dataclass(frozen=True)
class Entry:
    """One file: `place` is a path, a member of a zip (zip, member), or a sample of a tar (tar, number)."""

    name: str
    place: Path | tuple[Path, str] | tuple[Path, int]
    fields: dict[str, Any]

    def read(self) -> RawSample:
        """Media, txt and json. Raises BadSample, ShardError."""
        if isinstance(self.place, Path):
            data = self.place.read_bytes()
        elif isinstance(self.place[1], int):
            return _tar(str(self.place[0])).read(self.place[1])
        else:
            try:
                data = _zip(str(self.place[0])).read(self.place[1])
            except zipfile.BadZipFile as error:
                raise BadSample("zip_damaged", str(error)) from error
        suffix = self.name.rpartition(".")[2].lower()
        return RawSample(self.name, {suffix: data, "txt": caption_of(self.fields).encode(), "json": json.dumps(self.fields).encode()})


@dataclass(frozen=True)
class Packed:
    """What became of one shard."""

    path: Path
    done: int
    of: int
    samples: int
    size: int  # bytes
    skipped: Counter[str]
    examples: list[str]
    was_there: bool


def find(source: Path, captions: Path | None = None) -> list[Entry]:
    """The files of `source` that have captions, in a fixed order. Raises ValueError where there are none, or a name is ambiguous."""
    if not source.is_dir():
        raise ValueError(f"source={source} is not a folder")
    tars = sorted(source.glob("*.tar"))
    if tars and captions is None:
        return [Entry(f"{tar.name}#{k}", (tar, k), {}) for tar in tars for k in range(len(_tar(str(tar))))]
    files = _files(source)
    if captions is None:
        entries = [Entry(name, place, fields) for name, place in files.items() if (fields := _beside(place))]
        if not entries:
            raise ValueError(
                f"{source}: {len(files)} media files, but no captions: give captions=FILE (csv, jsonl, json) or a .txt beside each"
            )
        return entries
    rows, column = read_table(str(captions))
    by_short_name: dict[str, list[str]] = {}
    for name in files:
        for short in {name.rpartition("/")[2], name.rpartition("/")[2].rpartition(".")[0]}:
            by_short_name.setdefault(short, []).append(name)
    entries = []
    for row in rows:
        wanted = str(row[column])
        names = [wanted] if wanted in files else by_short_name.get(wanted.rpartition("/")[2], [])
        if len(names) > 1:
            raise ValueError(f"{captions}: {wanted!r} may be {names[0]} or {names[1]}: give paths relative to {source}")
        if names:
            entries.append(Entry(names[0], files[names[0]], row | {"file": names[0]}))
    if not entries:
        raise ValueError(f"none of the {len(rows)} files that {captions} names (e.g. {rows[0][column] if rows else ''}) is in {source}")
    return entries


def repack(
    entries: list[Entry],
    output: Path,
    *,
    per_shard: int = 1000,
    recode: Recode | None = None,
    segment: float | None = None,
    workers: int = 1,
) -> Iterator[Packed]:
    """Write shards of `per_shard` files each, and yield after each; shards that are there are left alone. `segment` cuts longer videos
    into pieces of that many seconds (with `recode` only). Files that cannot be decoded are left out and counted."""
    if segment is not None and recode is None:
        raise ValueError("segment= cuts videos, which needs recode=true")
    shards = [entries[begin : begin + per_shard] for begin in range(0, len(entries), per_shard)]
    with ProcessPoolExecutor(workers) as pool:
        for number, chosen in enumerate(shards):
            path = output / f"{number:05d}.tar"
            if path.exists():
                yield Packed(path, number + 1, len(shards), 0, 0, Counter(), [], True)
                continue
            examples: list[str] = []
            with ShardWriter(path) as shard:
                for position, (entry, result) in enumerate(_ahead(pool, chosen, recode, segment, 4 * workers)):
                    if isinstance(result, BadSample):
                        shard.skip(result.reason)
                        examples = [*examples, f"{entry.name}: {result}"][:5]
                        continue
                    for piece, members in enumerate(result):
                        key = f"{number:05d}{position:05d}" + (f"_{piece:05d}" if segment is not None else "")
                        fields = json.loads(members["json"]) | {"key": key, "status": "success"}
                        shard.add(key, members | {"json": json.dumps(fields).encode()})
            yield Packed(path, number + 1, len(shards), shard.count, shard.size, shard.skipped, examples, False)


def prepare(entry: Entry, recode: Recode | None, segment: float | None) -> list[dict[str, bytes]] | BadSample:
    """The members of one file's samples: one, or one per segment; or why there is none."""
    try:
        sample = entry.read()
        suffix = next((suffix for suffix in MEDIA if sample.member(suffix) is not None), None)
        if suffix is None:
            return BadSample("missing_member", " ".join(sample.members))
        data = sample.member(suffix) or b""
        caption = clean((sample.member("txt") or b"").decode("utf-8", "replace"))
        fields = dict(sample.fields)
        if suffix in IMAGES:
            decode_image(data, size=8)
            return [_members(suffix, data, caption, fields)]
        info = probe(data)
        if recode is None:
            return [_members(suffix, data, caption, fields | {"duration": round(info.seconds, 3)})]
        pieces = []
        for begin, seconds in _segments(info.seconds, segment):
            count = max(1, int(seconds * recode.fps + 1e-6) + (segment is None))
            frames, _ = decode_clip(data, num_frames=count, fps=recode.fps, size=recode.size, start=begin, min_distinct=0)
            buffer = io.BytesIO()
            write_mp4(buffer, frames, recode.fps, crf=recode.crf, gop=recode.gop, preset=recode.preset, tune=recode.tune)
            cut = {"begin": begin} if segment is not None else {}
            pieces.append(_members("mp4", buffer.getvalue(), caption, fields | cut | {"duration": round((count - 1) / recode.fps, 3)}))
        return pieces
    except BadSample as error:
        return error
    except (ShardError, OSError) as error:
        return BadSample("unreadable", str(error))


def _segments(seconds: float, segment: float | None) -> list[tuple[float, float]]:
    """(begin, length): pieces of `segment` seconds; a rest shorter than half of one is left out."""
    if segment is None or seconds <= segment:
        return [(0.0, seconds)]
    whole = int(seconds // segment)
    rest = seconds - whole * segment
    return [(k * segment, segment) for k in range(whole)] + ([(whole * segment, rest)] if rest >= segment / 2 else [])


def _members(suffix: str, data: bytes, caption: str, fields: dict[str, Any]) -> dict[str, bytes]:
    return {suffix: data, "txt": caption.encode(), "json": json.dumps(fields).encode()}


def _ahead(
    pool: ProcessPoolExecutor, entries: Iterable[Entry], recode: Recode | None, segment: float | None, depth: int
) -> Iterator[tuple[Entry, list[dict[str, bytes]] | BadSample]]:
    """Results in order, `depth` files under way at most."""
    waiting: deque[tuple[Entry, Future[list[dict[str, bytes]] | BadSample]]] = deque()
    for entry in entries:
        waiting.append((entry, pool.submit(prepare, entry, recode, segment)))
        if len(waiting) >= depth:
            first, future = waiting.popleft()
            yield first, future.result()
    for first, future in waiting:
        yield first, future.result()


def _files(source: Path) -> dict[str, Path | tuple[Path, str] | tuple[Path, int]]:
    """Media files by their path below `source`, those in zips included."""
    found: dict[str, Path | tuple[Path, str] | tuple[Path, int]] = {}
    for path in sorted(source.rglob("*")):
        if path.suffix[1:].lower() in MEDIA:
            found[path.relative_to(source).as_posix()] = path
        elif path.suffix.lower() == ".zip":
            try:
                names = _zip(str(path)).namelist()
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(f"{path}: not a readable zip: {error}") from error
            found |= {name: (path, name) for name in sorted(names) if name.rpartition(".")[2].lower() in MEDIA}
    return found


def _beside(place: Path | tuple[Path, str] | tuple[Path, int]) -> dict[str, Any]:
    """The caption in a .txt or .json of the same name."""
    if not isinstance(place, Path):
        return {}
    text, fields = place.with_suffix(".txt"), place.with_suffix(".json")
    found: dict[str, Any] = {}
    if fields.exists():
        try:
            found = json.loads(fields.read_text("utf-8", "replace"))
        except ValueError as error:
            raise ValueError(f"{fields}: not json: {error}") from error
    if text.exists():
        found["caption"] = text.read_text("utf-8", "replace")
    return found | {"file": place.name} if found else {}


@lru_cache(maxsize=16)
def _zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=16)
def _tar(path: str) -> LocalTar:
    try:
        return LocalTar(path)
    except ShardError as error:
        raise ValueError(str(error)) from error

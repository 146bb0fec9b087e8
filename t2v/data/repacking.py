"""Files with captions, in whatever form they came -> tar shards: key.mp4 + key.txt + key.json, as video2dataset writes them.

Sources: a folder (searched through, zips in it included) with a csv, jsonl or json of captions, or with a .txt or .json beside each file;
or a folder of tar shards. Optionally each video is cut into segments and encoded again: a middle square of 256-320 pixels with keyframes
close together is decoded several times faster.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t2v.data.entries import MEDIA, Entry
from t2v.data.errors import BadSample, ShardError, refuse_full_process
from t2v.data.frames import decode_image
from t2v.data.laion import IMAGES
from t2v.data.shard_writer import ShardWriter, clear_partials, write_json
from t2v.data.sources import clean
from t2v.data.workers import end_with_parent
from t2v.video import decode_clip, probe, write_mp4

NOTE = "repack.json"


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
    keep_note(output, entries, per_shard, recode, segment)
    clear_partials(output)
    shards = [entries[begin : begin + per_shard] for begin in range(0, len(entries), per_shard)]
    with ProcessPoolExecutor(workers, initializer=end_with_parent) as pool:
        for number, chosen in enumerate(shards):
            path = output / f"{number:05d}.tar"
            if path.exists():
                yield Packed(path, number + 1, len(shards), 0, 0, Counter(), [], True)
                continue
            examples: list[str] = []
            with ShardWriter(path) as shard:
                for position, (entry, result) in enumerate(_ahead(pool, chosen, recode, segment, workers)):
                    if isinstance(result, BadSample):
                        shard.skip(result.reason)
                        examples = [*examples, f"{entry.name}: {result}"][:5]
                        continue
                    for piece, members in enumerate(result):
                        key = f"{number:05d}{position:05d}" + (f"_{piece:05d}" if segment is not None else "")
                        fields = json.loads(members["json"]) | {"key": key, "status": "success"}
                        shard.add(key, members | {"json": json.dumps(fields).encode()})
            yield Packed(path, number + 1, len(shards), shard.count, shard.size, shard.skipped, examples, False)


def keep_note(output: Path, entries: list[Entry], per_shard: int, recode: Recode | None, segment: float | None) -> None:
    """What makes the shards of a folder, so that no other command goes on with it. Raises ValueError."""
    files = hashlib.blake2b("\n".join(entry.name for entry in entries).encode(), digest_size=8).hexdigest()
    captions = hashlib.blake2b("\n".join(json.dumps(entry.fields) for entry in entries).encode(), digest_size=8).hexdigest()
    note = {"files": files, "captions": captions, "per_shard": per_shard, "recode": recode and asdict(recode), "segment": segment}
    path = output / NOTE
    if path.exists() and any(output.glob("*.tar")):
        before = json.loads(path.read_text())
        different = [f"{name} was {before.get(name)} and is {value}" for name, value in note.items() if before.get(name, value) != value]
        if different:
            raise ValueError(f"{output} holds shards of another repacking: {'; '.join(different)}. Choose another output=")
    elif there := sorted(output.glob("*.tar")):
        raise ValueError(f"{output} holds {there[0].name}, but no {NOTE}: it is not of a repacking. Choose another output=")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json(path, note)


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
        refuse_full_process(error)
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
    pool: ProcessPoolExecutor, entries: Sequence[Entry], recode: Recode | None, segment: float | None, workers: int
) -> Iterator[tuple[Entry, list[dict[str, bytes]] | BadSample]]:
    """Results in order, four files of each worker under way at most. Raises ChildProcessError where a worker is gone."""
    ahead: deque[Future[list[dict[str, bytes]] | BadSample]] = deque()
    try:
        for number, entry in enumerate(entries):
            while len(ahead) < min(4 * workers, len(entries) - number):
                ahead.append(pool.submit(prepare, entries[number + len(ahead)], recode, segment))
            yield entry, ahead.popleft().result()
    except BrokenProcessPool as error:
        names = ", ".join(entry.name for entry in entries[number : number + workers])
        raise ChildProcessError(
            f"a worker was killed, or crashed, over {names} or a file after: where memory is short, lower workers={workers}; a file that "
            "crashes it each time is left out, and counted, once it is empty"
        ) from error

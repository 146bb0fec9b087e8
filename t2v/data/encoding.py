"""Shards of videos -> shards of moments (latents.py): resumable shard by shard, divided among ranks, decoded by workers.

An output has the name of the shard that it was made of. encode.json beside them says where that lay, and what else decides what they hold.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from t2v.data.addresses import unsigned
from t2v.data.arrays import pack, pack_moments
from t2v.data.errors import BadSample, QualityGuard, QualityLimits, ShardError
from t2v.data.frames import VideoFrames
from t2v.data.latents import MEMBER, TEXT, HashedAutoencoder, HashedTextEncoder, LatentCard, write_empty_text
from t2v.data.loader import as_it_is, start_worker
from t2v.data.raw import RawSample
from t2v.data.readers import ClipStream, Host
from t2v.data.shard_writer import ShardWriter, clear_partials, write_json
from t2v.data.sources import Source
from t2v.data.workers import end_daemons_at_exit, hanging_is_an_error
from t2v.video import decode_clip

NOTE = "encode.json"


class EncodingAutoencoder(HashedAutoencoder, Protocol):
    def moments(self, frames: Tensor) -> Tensor: ...


@dataclass
class Decoded:
    """A whole clip at the stream's frame rate, or why there is none."""

    key: str
    caption: str = ""
    frames: Tensor | None = None  # uint8 (f h w c)
    reason: str = ""
    detail: str = ""
    lost: bool = False  # the shard was not read to its end, and perhaps could be another time


@dataclass(frozen=True)
class Encoded:
    """What became of one shard."""

    shard: Path
    done: int  # shards of this rank that are finished
    of: int
    clips: int
    frames: int
    skipped: Counter[str]
    was_there: bool
    lost: str = ""  # why it was not written: the shard of videos could not be read to its end


@dataclass(frozen=True)
class Job:
    """A shard of a source, and what becomes of it."""

    source: Source
    url: str
    output: Path

    @property
    def origin(self) -> str:
        """The same from every working folder and with every signature. One shard may be of two sources, which take different captions."""
        return f"{self.source.name} {unsigned(self.url) if '://' in self.url else os.path.abspath(self.url)}"


def jobs_of(stream: ClipStream, output: Path) -> list[Job]:
    """All shards of a stream. Names do not change when others come or go: a shard's own, or that with a hash where several have it; those
    that were given stay. Raises ValueError where `output` holds shards of something else."""
    given = {origin: name for name, origin in _note(output).get("shards", {}).items()}
    jobs = [Job(source, url, output) for source, urls in zip(stream.sources, stream.shards) for url in urls]
    stems = [re.sub(r"[^\w.-]", "_", unsigned(job.url).split("?")[0].rsplit("/", 1)[-1].removesuffix(".tar")) for job in jobs]
    times, named = Counter(stems), []
    for job, stem in zip(jobs, stems):
        mark = "" if times[stem] == 1 else f"_{hashlib.blake2b(job.origin.encode(), digest_size=4).hexdigest()}"
        named.append(replace(job, output=output / given.get(job.origin, f"{stem}{mark}.tar")))
    return named


def keep_note(output: Path, stream: ClipStream, jobs: list[Job], max_frames: int) -> None:
    """What the shards of a folder are made of, and how, so that no other data and no other choices go on with it. More shards may come.
    Raises ValueError."""
    there = _note(output)
    recipe, shards = _recipe(stream) | {"max_frames": max_frames}, {job.output.name: job.origin for job in jobs}
    for part, now, remedy in (
        ("recipe", recipe, ""),
        ("shards", shards, f", or write the new place into {output / NOTE} if the same shards were moved"),
    ):
        before = there.get(part, {})
        different = [f"{name} was {before[name]} and is {value}" for name, value in now.items() if before.get(name, value) != value]
        if different:
            more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
            raise ValueError(f"{output} holds shards of another encoding: {different[0]}{more}. Choose another output={remedy}")
    note = {"recipe": there.get("recipe", {}) | recipe, "shards": there.get("shards", {}) | shards}
    if note != there:
        write_json(output / NOTE, note)


def _recipe(stream: ClipStream) -> dict[str, Any]:
    """What decides which clips and captions there are, beside the autoencoder, size and frame rate, which are in dataset.json."""
    frames = stream.frames
    assert isinstance(frames, VideoFrames)
    recipe: dict[str, Any] = {name: getattr(frames, name) for name in ("short", "min_distinct", "max_pixels")} | {"seed": stream.seed}
    if frames.short != "skip":
        recipe["num_frames"] = frames.num_frames
    for source, urls in zip(stream.sources, stream.shards):
        for name in ("media", "caption", "filters", "keep_uncaptioned"):
            value = getattr(source, name)
            recipe[f"{source.name}.{name}"] = list(value) if isinstance(value, tuple) else value
        tables = {url.rpartition("#")[0] for url in urls if "#" in os.path.basename(url) and "://" not in url}
        for table in sorted(tables):  # its shards are runs of its rows
            data = Path(table).read_bytes()
            recipe[os.path.abspath(table)] = f"{len(data)} bytes ({hashlib.blake2b(data, digest_size=4).hexdigest()})"
    return recipe


def _note(output: Path) -> dict[str, Any]:
    path = output / NOTE
    if not path.exists():
        if any(output.glob("*.tar")):
            raise ValueError(f"{output} holds shards, but no {NOTE}, which says what they were made of: choose another output=")
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; choose another output=") from error


class WholeClips(IterableDataset):
    """The clips of one shard from their first frame to their last, `max_frames` at most; workers take turns."""

    def __init__(self, source: Source, url: str, recipe: VideoFrames, max_frames: int, seed: int) -> None:
        self.source, self.url, self.recipe, self.max_frames, self.seed = source, url, recipe, max_frames, seed

    def __iter__(self) -> Iterator[Decoded]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        host = Host(QualityLimits())
        damage: ShardError | None = None
        try:
            shard = host.indexed(self.url)
            if shard is None:
                samples = (sample for k, sample in enumerate(host.streamed(self.url)) if k % workers == worker)
            else:
                samples, damage = (shard.read(k) for k in range(worker, len(shard), workers)), shard.error
            for sample in samples:
                yield self._decode(sample)
        except ShardError as error:
            yield Decoded(self.url, reason="shard_error", detail=str(error), lost=True)
        if damage is not None and worker == 0:
            yield Decoded(self.url, reason="shard_error", detail=str(damage))

    def _decode(self, sample: RawSample) -> Decoded:
        try:
            _, data, caption = self.source.pick(sample, random.Random(f"{self.seed}/{self.source.name}/{sample.key}"))
            r = self.recipe
            decode = partial(
                decode_clip, data, fps=r.fps, size=r.size, min_distinct=r.min_distinct, max_pixels=r.max_pixels, backend=r.backend
            )
            try:
                frames, _ = decode(num_frames=self.max_frames)  # no more are decoded, and held, than are kept
            except BadSample as error:
                if error.reason != "video_too_short":
                    raise
                frames, _ = decode(num_frames=None)
            needed = min(r.num_frames, self.max_frames)
            if len(frames) < needed and r.short != "skip":  # looped or slowed now, as training on the video would
                frames, _ = decode(num_frames=needed, short=r.short)
        except BadSample as error:
            return Decoded(sample.key, reason=error.reason, detail=error.detail)
        return Decoded(sample.key, caption, frames)


def encode_shards(
    stream: ClipStream,
    autoencoder: EncodingAutoencoder,
    output: Path,
    *,
    text_encoder: HashedTextEncoder | None = None,
    rank: int = 0,
    world: int = 1,
    num_workers: int = 0,
    max_frames: int = 300,
    timeout: float = 300,
) -> Iterator[Encoded]:
    """Encode every rank-th shard of a webvid stream into `output`; what is already there is left alone. Yields after each shard.
    With `text_encoder` the captions' embeddings are stored beside the moments. A shard that could not be read to its end (a connection
    broke), or not at all, is not written, so that the same command does it again; of one that is damaged on a disk, what lies before the
    damage is.

    Raises ValueError where `output` holds other latents, or those of other shards, DataQualityError where too much is bad, TimeoutError
    where no worker answers for `timeout` seconds.
    """
    recipe = stream.frames
    if not isinstance(recipe, VideoFrames):
        raise ValueError(f"{stream.name}: only streams of videos can be encoded, not {type(recipe).__name__}")
    jobs = jobs_of(stream, output)
    text_sha256 = None if text_encoder is None else text_encoder.sha256()
    card = LatentCard(autoencoder.sha256(), autoencoder.factor, autoencoder.channels, recipe.size, float(recipe.fps), text_sha256)
    card.write(output)
    keep_note(output, stream, jobs, max_frames)
    clear_partials(output)
    if text_encoder is not None:
        write_empty_text(output, text_encoder)
    mine = jobs[rank::world]
    guard = QualityGuard(replace(stream.limits))
    if num_workers:
        end_daemons_at_exit()
    for done, job in enumerate(mine, start=1):
        source, url, path = job.source, job.url, job.output
        if path.exists():
            guard.shard(source.name, url, None)
            yield Encoded(path, done, len(mine), 0, 0, Counter(), True)
            continue
        frames, lost = 0, ""
        dataset = WholeClips(source, url, recipe, max_frames, stream.seed)
        clips = DataLoader(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=as_it_is,
            worker_init_fn=start_worker,
            prefetch_factor=2 if num_workers else None,
            timeout=timeout if num_workers else 0,
        )
        with hanging_is_an_error(stream.name, num_workers, timeout), ShardWriter(path) as shard:
            for clip in clips:
                if clip.frames is None:
                    shard.skip(clip.reason)
                    if clip.reason == "shard_error":
                        guard.shard(source.name, url, ShardError(clip.detail))
                        if clip.lost:
                            lost = clip.detail if url in clip.detail else f"{url}: {clip.detail}"
                            shard.give_up()
                            break
                    else:
                        guard.bad(source.name, clip.key, BadSample(clip.reason, clip.detail))
                    continue
                guard.good(source.name)
                members = {MEMBER: pack_moments(autoencoder.moments(clip.frames[None])[0])}  # (f h w 2c)
                if text_encoder is not None:
                    members[TEXT] = pack(text_encoder.encode([clip.caption])[0])  # (n d)
                fields = {
                    "source": source.name,
                    "shard": unsigned(url).rsplit("/", 1)[-1],
                    "key": clip.key,
                    "frames": len(clip.frames),
                    "fps": recipe.fps,
                }
                shard.add(_unused(clip.key, shard.keys), members | {"txt": clip.caption.encode(), "json": json.dumps(fields).encode()})
                frames += len(clip.frames)
        if not shard.skipped["shard_error"]:
            guard.shard(source.name, url, None)
        clips_and_frames = (0, 0) if lost else (shard.count, frames)
        yield Encoded(path, done, len(mine), *clips_and_frames, shard.skipped, False, lost)


def _unused(key: str, used: set[str]) -> str:
    """A key as readers take it, with a number where it is taken: a table may have several captions of one file, a/b.c and a_b_c are one,
    and ../a/b begins with what readers leave out."""
    plain = re.sub("^__+", "_", re.sub("[/.]", "_", key))
    return next(name for count in itertools.count(1) if (name := plain if count == 1 else f"{plain}_{count}") not in used)

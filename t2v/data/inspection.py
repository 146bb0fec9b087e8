"""What a stream is made of, looked at without training: members, captions, sizes, durations, what is bad, how fast it is read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from t2v.batch import Clip
from t2v.data.errors import BadSample, QualityLimits, ShardError
from t2v.data.frames import VideoFrames
from t2v.data.order import Draw
from t2v.data.raw import RawSample
from t2v.data.readers import ClipStream, Host
from t2v.data.sources import Source
from t2v.video import probe


@dataclass
class Inspection:
    """Counts over the samples that were looked at. Bytes are those of all members, seconds those of the videos."""

    stream: ClipStream
    samples: int = 0
    members: Counter[str] = field(default_factory=Counter)  # "mp4 txt json" -> samples
    fields: Counter[str] = field(default_factory=Counter)  # name in the json -> samples
    bad: Counter[str] = field(default_factory=Counter)  # source/reason -> samples
    examples: dict[str, str] = field(default_factory=dict)  # source/reason -> one of them
    sizes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    pictures: Counter[str] = field(default_factory=Counter)  # "596x336 h264" -> samples
    words: list[int] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)  # the first `keep`
    usable: int = 0
    decoding: float = 0.0  # seconds spent

    def report(self, rate: float | None = None) -> str:
        """Text for people. `rate` is the training's need in samples/s, for the prediction of bytes/s."""
        stream, lines = self.stream, []
        for source, shards in zip(stream.sources, stream.shards):
            share = stream.source_of_reader.count(stream.sources.index(source)) / stream.readers
            lines.append(f"source {source.name}: {len(shards)} shards, {share:.0%} of the samples, e.g. {shards[0]}")
        lines.append(f"looked at {self.samples} samples, {self.usable} usable ({self.usable / max(1, self.samples):.1%})")
        lines += [f"  members {names}: {count}" for names, count in self.members.most_common(6)]
        if self.fields:
            lines.append("  json: " + ", ".join(name for name, _ in self.fields.most_common(20)))
        lines += [f"  pictures {what}: {count}" for what, count in self.pictures.most_common(6)]
        lines += [f"  bad {reason}: {count}, e.g. {self.examples[reason]}" for reason, count in self.bad.most_common()]
        for name, values, unit in (("bytes", self.sizes, ""), ("duration", self.seconds, " s"), ("caption", self.words, " words")):
            if values:
                low, middle, high = quantiles([float(value) for value in values])
                lines.append(f"  {name}: median {middle:,.1f}{unit}, from {low:,.1f} to {high:,.1f} (5 % to 95 %)")
        lines += [f"  caption of {clip.key}: {clip.caption}" for clip in self.clips[:5]]
        if self.usable and self.decoding:
            per_core = self.usable / self.decoding
            mean = sum(self.sizes) / max(1, len(self.sizes)) * self.samples / self.usable
            lines.append(f"  decoding: {per_core:.1f} clips/s on one core, {mean / 1e6:.2f} MB read for each")
            if rate:
                lines.append(f"  at {rate:g} clips/s: {rate * mean / 1e6:.1f} MB/s and {rate / per_core:.1f} cores")
        return "\n".join(lines)


def inspect_stream(stream: ClipStream, count: int, keep: int = 16) -> Inspection:
    """Look at about `count` samples, spread over the shards of all sources."""
    found = Inspection(stream)
    per_source = max(1, count // len(stream.sources))
    for source, shards in zip(stream.sources, stream.shards):
        taken = 0
        chosen = shards if len(shards) <= 8 else [shards[k * len(shards) // 8] for k in range(8)]
        for position, url in enumerate(chosen):
            share = -(-(per_source - taken) // (len(chosen) - position))
            for sample in _first(url, share, found, source.name):
                _look(found, source, sample, keep)
                taken += 1
    return found


def _first(url: str, count: int, found: Inspection, name: str) -> Iterator[RawSample]:
    host = Host(QualityLimits())
    try:
        shard = host.indexed(url)
        if shard is not None:
            for k in range(min(count, len(shard))):
                yield shard.read(k)
            if shard.error is not None:
                raise shard.error
        else:
            for _, sample in zip(range(count), host.streamed(url)):
                yield sample
    except ShardError as error:
        found.bad[f"{name}/shard_error"] += 1
        found.examples[f"{name}/shard_error"] = str(error)


def _look(found: Inspection, source: Source, sample: RawSample, keep: int) -> None:
    found.samples += 1
    found.members[" ".join(sorted(sample.members))] += 1
    found.sizes.append(sum(map(len, sample.members.values())))
    begin = time.perf_counter()
    try:
        clip = found.stream.clip(source, Draw(sample, (0, 0, 0)))
    except BadSample as error:
        reason = f"{source.name}/{error.reason}"
        found.bad[reason] += 1
        found.examples.setdefault(reason, f"{sample.key}: {error.detail}")
        return
    finally:
        found.decoding += time.perf_counter() - begin
    found.usable += 1
    found.words.append(len(clip.caption.split()))
    if len(found.clips) < keep:
        found.clips.append(clip)
    try:
        found.fields.update(list(sample.fields))
    except BadSample as error:
        found.bad[f"{source.name}/{error.reason}"] += 1
        found.examples.setdefault(f"{source.name}/{error.reason}", f"{sample.key}: {error.detail}")
    if isinstance(found.stream.frames, VideoFrames):
        data = next(data for suffix in source.media if (data := sample.member(suffix)) is not None)
        info = probe(data)
        found.seconds.append(info.seconds)
        found.pictures[f"{info.width}x{info.height} {info.codec}"] += 1


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """5 %, 50 %, 95 %."""
    low, middle, high = torch.quantile(
        torch.tensor(values, dtype=torch.float64), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    ).tolist()
    return low, middle, high


def pictures(clips: list[Clip]) -> list[Tensor]:
    """The clips that can be shown: uint8 frames. Moments cannot."""
    return [clip.frames for clip in clips if clip.frames.dtype == torch.uint8]

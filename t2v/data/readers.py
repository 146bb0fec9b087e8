"""A stream of clips: sources -> virtual readers -> raw samples -> clips. It knows neither ranks nor workers; loader.py hosts its readers.

- sources.py: what a source is; shards.py, folder.py, remote.py: where raw samples come from; order.py: who reads what, and when
- frames.py: bytes -> uint8 frames; errors.py: bad samples and limits; loader.py: ranks, workers, batches, resume
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from t2v.batch import Clip, Cursor
from t2v.data.addresses import unsigned
from t2v.data.errors import BadSample, QualityGuard, QualityLimits, ShardError
from t2v.data.frames import FrameRecipe
from t2v.data.order import Draw, Indexed, VirtualReader
from t2v.data.raw import RawSample
from t2v.data.remote import Retry, open_remote
from t2v.data.shards import ShardCache, stream_tar
from t2v.data.sources import Source

START: Cursor = (0, 0, 0)


@dataclass
class ClipStream:
    """An endless sequence of clips in which sample i comes from virtual reader i mod `num_readers`.

    Sources share the readers by weight, so the weights are exact shares of the samples in steps of 1 / num_readers. `buffer` samples are
    shuffled at a time; local shards are indexed, so there the buffer costs no memory and may be as large as a shard. Streams are plain
    data and can be sent to workers by fork, forkserver and spawn.
    """

    name: str
    sources: Sequence[Source]
    frames: FrameRecipe
    readers: int = 64
    buffer: int = 1000  # samples
    seed: int = 0
    limits: QualityLimits = field(default_factory=QualityLimits)
    empty_text: Tensor | None = field(
        default=None, init=False, repr=False
    )  # (n d): the empty prompt's, where texts were embedded beforehand

    def __post_init__(self) -> None:
        self.sources = list(self.sources)
        names = [source.name for source in self.sources]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"{self.name}: sources need different names, and at least one, not {names}")
        if self.readers < len(names):
            raise ValueError(f"{self.name}: {len(names)} sources need at least as many readers, not num_readers={self.readers}")
        if self.buffer < 1:
            raise ValueError(f"{self.name}: the shuffle buffer holds at least 1 sample, not {self.buffer}")
        self.shards = [source.expand() for source in self.sources]
        self.source_of_reader = share(self.readers, [source.weight for source in self.sources], self.seed)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(f, h, w, c) of every clip."""
        return self.frames.shape

    @property
    def signature(self) -> str:
        """Names what the readers' cursors refer to: they mean nothing with other shards, readers, seed or buffer."""
        shards = [[source.name, *(unsigned(url).rsplit("/", 1)[-1] for url in urls)] for source, urls in zip(self.sources, self.shards)]
        text = repr((shards, self.source_of_reader, self.buffer, self.seed))
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def clips(self, reader: int, cursor: Cursor, host: Host) -> Iterator[Clip]:
        """The usable clips of one reader from `cursor` on; the others are counted in `host`."""
        which = self.source_of_reader[reader]
        source = self.sources[which]
        siblings = [index for index, other in enumerate(self.source_of_reader) if other == which]
        slot, slots = siblings.index(reader), len(siblings)
        virtual = VirtualReader(source.name, self.shards[which], slot, slots, self.seed, self.buffer, host, cursor)
        epoch, usable = -1, True
        for draw in virtual.draws():
            if draw.cursor[0] != epoch:
                if not usable:
                    host.guard.empty_pass(source.name)
                usable = epoch == -1 and cursor[1:] != (0, 0)  # the rest of a pass that was begun before a resume is not judged
                epoch = draw.cursor[0]
            try:
                clip = self.clip(source, draw)
            except BadSample as error:
                host.bad(source.name, draw.sample.key, error)
                continue
            usable = True
            host.guard.good(source.name)
            clip.reader, clip.cursor = reader, draw.cursor
            yield clip
        host.guard.empty_pass(source.name, nothing_there=True)

    def clip(self, source: Source, draw: Draw) -> Clip:
        """Decode one sample. All its randomness comes from (seed, source, epoch, key), so that it can be replayed. Raises BadSample."""
        rng = random.Random(f"{self.seed}/{source.name}/{draw.cursor[0]}/{draw.sample.key}")
        _, data, caption = source.pick(draw.sample, rng)
        try:
            fields = draw.sample.fields
        except BadSample:  # the source needs no json, so a broken one is no reason to skip
            fields = {}
        frames, start = self.frames(data, fields, rng)
        return Clip(frames, caption, draw.sample.key, source.name, start)


class Host:
    """What one worker shares among its readers: open shards, counters, and the bad samples since the last clip."""

    def __init__(self, limits: QualityLimits) -> None:
        self.guard = QualityGuard(limits)
        self.retry = Retry()
        self.cache = ShardCache()
        self.events: list[dict[str, str]] = []

    def indexed(self, url: str) -> Indexed | None:
        if "://" in url:
            return None
        return self.cache.open(url)

    def streamed(self, url: str) -> Iterator[RawSample]:
        with open_remote(url, self.retry) as file:
            yield from stream_tar(file)

    def report(self, source: str, url: str, error: ShardError | None) -> None:
        if error is not None:
            self.events.append({"source": source, "key": url, "reason": "shard_error", "detail": str(error)})
        self.guard.shard(source, url, error)

    def bad(self, source: str, key: str, error: BadSample) -> None:
        self.events.append({"source": source, "key": key, "reason": error.reason, "detail": error.detail})
        self.guard.bad(source, key, error)

    def take(self) -> list[dict[str, str]]:
        """The bad samples and shards since the last call."""
        events, self.events = self.events, []
        return events


def share(readers: int, weights: Sequence[float], seed: int) -> list[int]:
    """The source of each reader: shares in proportion to the weights (largest remainders, at least one each), spread evenly."""
    exact = [weight / sum(weights) * readers for weight in weights]
    counts = [max(1, int(value)) for value in exact]
    while sum(counts) != readers:
        step = 1 if sum(counts) < readers else -1
        gaps = [(value - count) * step if count + step >= 1 else float("-inf") for value, count in zip(exact, counts)]
        counts[gaps.index(max(gaps))] += step
    order = [source for source, count in enumerate(counts) for _ in range(count)]
    random.Random(f"share/{seed}").shuffle(order)
    return order

"""Virtual readers: a stream is R of them, and ranks and workers only host them, so that what is read depends on neither.

A reader owns a slot among the readers of its source. In every pass (epoch) the source's shards are permuted; slot s takes every S-th
shard, and the last, incomplete round (or all shards, if there are fewer than readers) is shared by sample stride. Slots change with the
passes. Within a shard the order is a seeded shuffle through a bounded buffer that drains at the shard's end. So a cursor (epoch, position
in the reader's shard order, samples drawn from that shard) says everything, and a resume re-reads at most that one shard.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from t2v.batch import Cursor
from t2v.data.errors import ShardError
from t2v.data.raw import RawSample

T = TypeVar("T")


class ShardOpener(Protocol):
    """Where a reader gets its shards from."""

    def indexed(self, url: str) -> Indexed | None:
        """A shard whose samples can be read in any order; None if it can only be streamed. Raises ShardError."""

    def streamed(self, url: str) -> Iterator[RawSample]:
        """The samples of a shard in the order in which they lie. Raises ShardError, perhaps after some of them."""

    def report(self, source: str, url: str, error: ShardError | None) -> None:
        """Told once per opened shard whether it was readable. May raise DataQualityError."""


class Indexed(Protocol):
    error: ShardError | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> RawSample: ...


@dataclass(frozen=True)
class Part:
    """What a reader takes from one shard: samples offset, offset + stride, ..."""

    shard: int
    offset: int = 0
    stride: int = 1


@dataclass
class Draw:
    sample: RawSample
    cursor: Cursor  # after this sample


def parts_of(shards: int, slot: int, slots: int, epoch: int, seed: str) -> list[Part]:
    """The shards of one slot in one pass. Over all slots every sample of every shard occurs exactly once."""
    order = list(range(shards))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    slot = (slot + epoch) % slots
    whole = shards // slots * slots
    parts = [Part(shard) for shard in order[slot:whole:slots]]
    rest = order[whole:]
    if rest:
        place = _place(slot, slots, epoch, seed)
        which = place % len(rest)
        sharers = len(range(which, slots, len(rest)))
        parts.append(Part(rest[which], place // len(rest), sharers))
    return parts


def _place(slot: int, slots: int, epoch: int, seed: str) -> int:
    """Who takes which part of shared shards: a one-to-one map of the slots, by chance. Where there are more readers than samples, most of
    them wait for a pass that has one for them, and must not all arrive at the same."""
    rng = random.Random(f"{seed}/{epoch}/places")
    factor = rng.randrange(slots)
    while math.gcd(factor, slots) != 1:
        factor = rng.randrange(slots)
    return (slot * factor + rng.randrange(slots)) % slots


def shuffled(items: Iterable[T], rng: random.Random, buffer: int) -> Iterator[T]:
    """A seeded shuffle through a buffer of at most `buffer` items, which drains at the end."""
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) >= buffer:
            yield _draw(held, rng)
    while held:
        yield _draw(held, rng)


def _draw(held: list[T], rng: random.Random) -> T:
    index = rng.randrange(len(held))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()


class VirtualReader:
    """An infinite, resumable sequence of raw samples from one source."""

    def __init__(
        self, source: str, shards: Sequence[str], slot: int, slots: int, seed: int, buffer: int, opener: ShardOpener, cursor: Cursor
    ) -> None:
        self.source, self.shards, self.slot, self.slots = source, shards, slot, slots
        self.seed = f"{seed}/{source}"
        self.buffer, self.opener, self.cursor = buffer, opener, cursor

    def draws(self) -> Iterator[Draw]:
        """Endless, unless 20 passes per slot in a row hold nothing at all: then it ends."""
        epoch, position, drawn = self.cursor
        idle = 0
        while idle < 20 * self.slots:
            idle += 1
            parts = parts_of(len(self.shards), self.slot, self.slots, epoch, self.seed)
            while position < len(parts):
                for sample in self._samples(parts[position], epoch, drawn):
                    idle = 0
                    drawn += 1
                    yield Draw(sample, (epoch, position, drawn))
                position, drawn = position + 1, 0
            epoch, position = epoch + 1, 0

    def _samples(self, part: Part, epoch: int, skip: int) -> Iterator[RawSample]:
        url = self.shards[part.shard]
        rng = random.Random(f"{self.seed}/{epoch}/{part}")
        failure: ShardError | None = None
        try:
            shard = self.opener.indexed(url)
            if shard is not None:
                failure = shard.error
                order = list(shuffled(range(part.offset, len(shard), part.stride), rng, self.buffer))
                for index in order[skip:]:
                    yield shard.read(index)
            else:
                mine = (sample for index, sample in enumerate(self._caught(url)) if index % part.stride == part.offset)
                for index, sample in enumerate(shuffled(mine, rng, self.buffer)):
                    if index >= skip:
                        yield sample
                failure = self.failure
        except ShardError as error:
            failure = error
        self.opener.report(self.source, url, failure)

    def _caught(self, url: str) -> Iterator[RawSample]:
        """The streamed samples up to the damage, if any; so that the shuffle buffer still drains."""
        self.failure: ShardError | None = None
        try:
            yield from self.opener.streamed(url)
        except ShardError as error:
            self.failure = error

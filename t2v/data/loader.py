"""Hosts a stream's readers on ranks and workers, cuts its samples into micro-batches, and keeps what a resume needs.

Sample i of the stream goes to rank i mod W. Reader j lives on rank j mod W, there in worker (j div W) mod K. Where W * K divides the number
of readers R, sample i comes from reader i mod R, so the global order depends on neither W nor K. Where it does not, each worker draws
round-robin among the readers that it hosts: still nothing is lost or repeated within a pass, but another W or K gives another order (the
log says so). State counts what the trainer consumed (`Progress`), so what workers have prefetched does not matter.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from t2v.batch import Clip, ClipBatch, Cursor
from t2v.data.errors import DataQualityError
from t2v.data.progress import Progress, check_state
from t2v.data.readers import START, ClipStream, Host
from t2v.data.workers import end_daemons_at_exit, end_with_parent, hanging_is_an_error

log = logging.getLogger(__name__)
NOTHING = torch.empty(0)
LOOK = 5.0  # seconds of waiting after which it is asked whether the workers live
EXAMPLES = 20  # bad samples that a batch names; the rest are only counted


CHUNK_BYTES, MAX_CHUNK = 1 << 20, 32  # what a worker sends at once: passing a tensor between processes costs about a millisecond


@dataclass
class Item:
    """What a worker sends: a clip, or the reason why there will be none, and the bad samples met on the way."""

    clip: Clip | None
    events: list[dict[str, str]]
    failure: str = ""


@dataclass
class Chunk:
    """Consecutive items of one worker; the frames of their clips travel as one tensor, and so do their texts' embeddings."""

    items: list[Item]
    frames: Tensor | None  # uint8 (clips f h w c)
    texts: Tensor | None  # (clips n d)

    @staticmethod
    def of(items: list[Item]) -> Chunk:
        clips = [item.clip for item in items if item.clip is not None]
        frames = torch.stack([clip.frames for clip in clips]) if clips else None
        embedded = [clip.text for clip in clips if clip.text is not None]
        for clip in clips:
            clip.frames, clip.text = NOTHING, None
        return Chunk(items, frames, torch.stack(embedded) if embedded else None)

    def unpack(self) -> list[Item]:
        clips = [item.clip for item in self.items if item.clip is not None]
        if self.frames is not None:
            for clip, frames in zip(clips, self.frames, strict=True):
                clip.frames = frames
        if self.texts is not None:
            for clip, text in zip(clips, self.texts, strict=True):
                clip.text = text
        return self.items


class ClipLoader:
    """An endless iterable of ClipBatch micro-batches, `accumulate` per optimizer step, without a length.

    Together the micro-batches of a step are this rank's share of `global_batch`: shares differ by at most one sample, and so do the
    micro-batches of a share; one may be empty. `rank` and `world` are those of the role (the ranks that read this stream). `state` is
    `Progress.state_dict()` merged over the ranks. `iter()` always starts from `state`.
    Raises DataQualityError when too much of the data is bad, and TimeoutError when no sample comes for `timeout` seconds.
    """

    def __init__(
        self,
        stream: ClipStream,
        *,
        global_batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        state: Mapping[str, Any] | None = None,
        timeout: float = 300.0,
        multiprocessing_context: str | None = None,
        prefetch: int = 8,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"{stream.name}: rank {rank} does not exist among {world} ranks")
        if world > stream.readers:
            raise ValueError(
                f"{stream.name}: {world} ranks need at least as many readers, not num_readers={stream.readers}; "
                f"set data.*.num_readers to a multiple of {world * max(1, num_workers)} before the first step of the run"
            )
        if global_batch < 1 or accumulate < 1:
            raise ValueError(f"{stream.name}: global_batch={global_batch} and accumulate={accumulate} must be at least 1")
        self.stream, self.rank, self.world = stream, rank, world
        self.global_batch, self.accumulate = global_batch, accumulate
        self.state = check_state(stream, state)
        local = len(range(rank, stream.readers, world))
        self.num_workers = min(num_workers, local)
        self.timeout, self.context, self.prefetch = timeout, multiprocessing_context, prefetch
        if multiprocessing_context not in (None, *multiprocessing.get_all_start_methods()):
            known = ", ".join(multiprocessing.get_all_start_methods())
            raise ValueError(f"{stream.name}: no start method {multiprocessing_context!r} here; there are {known}")
        if rank == 0:
            self._say_order(num_workers)

    def progress(self) -> Progress:
        """A counter for what is consumed from this loader."""
        return Progress(self.stream.readers, self.state, signature=self.stream.signature)

    def __iter__(self) -> Iterator[ClipBatch]:
        return self._batches(self._items())  # workers start now, in this thread, whichever then asks for batches

    def _batches(self, items: Iterator[Item]) -> Iterator[ClipBatch]:
        counts: Counter[tuple[str, str]] = Counter()
        examples: list[dict[str, str]] = []
        begin = int(self.state["samples"])
        while True:
            for size in split(owned(begin, begin + self.global_batch, self.rank, self.world), self.accumulate):
                clips: list[Clip] = []
                while len(clips) < size:
                    item = next(items)
                    counts.update((event["source"], event["reason"]) for event in item.events)
                    examples = (examples + item.events)[:EXAMPLES]
                    if item.clip is None:
                        raise DataQualityError(item.failure)
                    clips.append(item.clip)
                batch = ClipBatch.collate(clips) if clips else empty(self.stream.shape)
                batch.bad, batch.bad_examples = counts, examples
                batch.empty_text = self.stream.empty_text if batch.text is not None else None
                counts, examples = Counter(), []
                yield batch
            begin += self.global_batch

    def _items(self) -> Iterator[Item]:
        consumed = owned(0, int(self.state["samples"]), self.rank, self.world)
        hosting = Hosting(self.stream, self.rank, self.world, consumed, self.state["cursors"])
        if self.num_workers == 0:
            return hosting.items()
        end_daemons_at_exit()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: the user's choice
            loader = DataLoader(
                hosting,
                batch_size=None,
                num_workers=self.num_workers,
                collate_fn=as_it_is,
                worker_init_fn=start_worker,
                prefetch_factor=self.prefetch,
                timeout=min(self.timeout, LOOK),
                multiprocessing_context=self.context,
            )
            return self._in_turn(iter(loader))

    def _in_turn(self, chunks: Iterator[Chunk]) -> Iterator[Item]:
        with hanging_is_an_error(self.stream.name, self.num_workers, self.timeout):
            while True:  # a chunk of each worker, then their items in turn: the order of one item at a time
                round_of_chunks = [self._wait_for(chunks).unpack() for _ in range(self.num_workers)]
                for turn in zip_longest(*round_of_chunks):
                    yield from (item for item in turn if item is not None)

    def _wait_for(self, chunks: Iterator[Chunk]) -> Chunk:
        """The next chunk. DataLoader asks whether its workers live only where a wait ends, so each is short."""
        began = time.monotonic()
        while True:
            try:
                return next(chunks)
            except RuntimeError as error:
                if "DataLoader timed out" not in str(error) or time.monotonic() - began >= self.timeout:
                    raise

    def _say_order(self, asked: int) -> None:
        stream, hosts = self.stream, self.world * max(1, self.num_workers)
        if self.num_workers < asked:
            log.warning(
                "%s: %d of %d workers are used on each rank: with %d ranks num_readers=%d leaves no readers for more",
                stream.name, self.num_workers, asked, self.world, stream.readers,
            )  # fmt: skip
        if stream.readers % hosts:
            log.warning(
                "%s: the sample order depends on the number of ranks and workers, as %d ranks x %d workers do not divide num_readers=%d; "
                "nothing is lost or repeated within a pass, and resuming on the same number is exact",
                stream.name, self.world, max(1, self.num_workers), stream.readers,
            )  # fmt: skip


class Hosting(IterableDataset):
    """The readers of one rank, in the worker that iterates over it. Rank and world are given, never looked up."""

    def __init__(self, stream: ClipStream, rank: int, world: int, consumed: int, cursors: Mapping[int, Cursor]) -> None:
        self.stream, self.rank, self.world, self.consumed, self.cursors = stream, rank, world, consumed, dict(cursors)

    def __iter__(self) -> Iterator[Chunk]:
        size = max(1, min(MAX_CHUNK, CHUNK_BYTES // math.prod(self.stream.shape)))
        chunk: list[Item] = []
        for item in self.items():
            chunk.append(item)
            if len(chunk) == size or item.clip is None:
                yield Chunk.of(chunk)
                chunk = []

    def items(self) -> Iterator[Item]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        worker = (worker + self.consumed) % workers  # the torch worker that is asked first takes the next sample
        local = range(self.rank, self.stream.readers, self.world)[worker::workers]
        host = Host(self.stream.limits)
        clips = [self.stream.clips(reader, self.cursors.get(reader, START), host) for reader in local]
        turn = self.consumed + (worker - self.consumed) % workers  # this rank's next sample that falls to this worker
        while True:
            try:
                clip = next(clips[turn // workers % len(clips)])
            except DataQualityError as error:
                yield Item(None, host.take(), str(error))
                return
            clip.index = self.rank + self.world * turn
            yield Item(clip, host.take())
            turn += workers


def owned(begin: int, end: int, rank: int, world: int) -> int:
    """How many of the samples begin, ..., end - 1 go to `rank`."""
    return len(range(begin + (rank - begin) % world, end, world))


def split(count: int, parts: int) -> list[int]:
    """`count` in `parts` that differ by at most one."""
    return [count // parts + (part < count % parts) for part in range(parts)]


def empty(shape: tuple[int, int, int, int]) -> ClipBatch:
    return ClipBatch(frames=torch.zeros((0, *shape), dtype=torch.uint8), captions=[], keys=[], sources=[], indices=[])


def as_it_is(item: Any) -> Any:
    return item


def start_worker(_: int) -> None:
    end_with_parent()
    torch.set_num_threads(1)  # the workers are the parallelism
    # Signals that reach the whole process group or SLURM step are the trainer's to answer: it needs samples until it has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))  # a second one ends even a hanging worker

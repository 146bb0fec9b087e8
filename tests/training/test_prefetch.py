"""The thread that makes batches ready: the same batches, exact resumes, errors in their place, and nothing left behind."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_training import MadeUpData, fit, small_module

from t2v.batch import ClipBatch
from t2v.data import loader as data_loader
from t2v.data.laion import laion
from t2v.data.loader import ClipLoader
from t2v.data.progress import Progress
from t2v.data.shapes import shards
from t2v.training.datamodules import FirstStep
from t2v.training.graphs import RECORDING, record
from t2v.training.mixture import JointMixture
from t2v.training.prefetch import DEPTH, PREFETCH, Prefetched


class Counting:
    """A loader that counts what was asked of it, in which thread, and can fail."""

    def __init__(self, num_workers: int = 1, fails_at: int | None = None, batch: Callable[[int], Any] = lambda index: [index]) -> None:
        self.num_workers, self.fails_at, self.batch = num_workers, fails_at, batch
        self.stream = SimpleNamespace(name="counting")
        self.made, self.closed = 0, False
        self.threads: set[str] = set()

    def __iter__(self) -> Iterator[Any]:
        try:
            for index in itertools.count():
                self.threads.add(threading.current_thread().name)
                if index == self.fails_at:
                    raise ValueError(f"batch {index} is bad")
                self.made += 1
                yield self.batch(index)
        finally:
            self.closed = True


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(PREFETCH)]


def eventually(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + 30
    while not condition() and time.monotonic() < limit:
        time.sleep(0.01)
    return condition()


def test_a_bounded_number_is_made_ahead_and_closing_ends_everything() -> None:
    loader = Counting()
    batches = iter(Prefetched(loader))
    assert loader.made == 0  # the thread starts with the first question
    assert next(batches) == [0]
    assert eventually(lambda: loader.made == 1 + DEPTH)
    time.sleep(0.05)
    assert loader.made == 1 + DEPTH
    assert [next(batches) for _ in range(20)] == [[index] for index in range(1, 21)]
    assert len(threads()) == 1
    assert all(name.startswith(PREFETCH) for name in loader.threads)
    del batches  # as CombinedLoader lets go of it
    assert loader.closed
    assert threads() == []


def test_an_error_comes_in_its_turn_with_its_type_and_words() -> None:
    loader = Counting(fails_at=3)
    batches = iter(Prefetched(loader))
    assert [next(batches) for _ in range(3)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match=r"^batch 3 is bad$"):
        next(batches)
    assert threads() == []


@pytest.mark.parametrize(("workers", "ahead"), [(0, True), (2, False)])
def test_without_workers_or_without_being_asked_there_is_no_thread(workers: int, ahead: bool) -> None:
    loader = Counting(num_workers=workers)
    batches = iter(Prefetched(loader, ahead))
    assert [next(batches), next(batches)] == [[0], [1]]
    assert loader.made == 2
    assert loader.threads == {threading.current_thread().name}


def test_no_memory_is_pinned_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA would call the recording invalid. The thread works on this process's GPU, not on the first one."""
    pinned: list[bool] = []

    class Batch(list):
        def pin_memory(self) -> list[str]:
            pinned.append(RECORDING.locked())
            return ["pinned"]

    devices: list[tuple[int, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.current_thread().name)))
    batches = iter(Prefetched(Counting(batch=lambda index: Batch([index] * (index != 1)))))
    assert [next(batches), next(batches), next(batches)] == [["pinned"], [], ["pinned"]]  # of an empty one there is nothing to pin
    assert eventually(lambda: len(pinned) == 2 + DEPTH)
    with RECORDING:
        next(batches)  # which asks for one more
        time.sleep(0.05)
        assert len(pinned) == 2 + DEPTH
    assert eventually(lambda: len(pinned) == 3 + DEPTH)
    assert all(pinned)
    assert [device for device, _ in devices] == [3]
    assert devices[0][1].startswith(PREFETCH)


def test_recording_holds_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.random, "fork_rng", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_: RECORDING.locked())
    assert record(torch.nn.Identity(), (torch.zeros(1),))
    assert not RECORDING.locked()


def test_the_first_step_again_and_again() -> None:
    loader = Counting()
    batches = iter(FirstStep(Prefetched(loader), accumulate=2))
    assert [next(batches) for _ in range(5)] == [[0], [1], [0], [1], [0]]
    assert loader.closed
    assert threads() == []


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return shards(tmp_path_factory.mktemp("shapes"), media="image", count=64, samples_per_shard=8, height=32, processes=1)


def consume(urls: list[str], batches: int, state: dict[str, Any] | None = None, ahead: bool = True) -> tuple[list[Any], dict[str, Any]]:
    """What a trainer would get, and the state that it would save then: of what was consumed, while more lies ready."""
    loader = ClipLoader(laion(urls, size=16, num_readers=4), global_batch=7, accumulate=2, num_workers=2, state=state, timeout=60)
    progress, found, others = loader.progress(), [], set(multiprocessing.active_children())
    iterator = iter(Prefetched(loader) if ahead else loader)
    for _ in range(batches):
        batch = next(iterator)
        progress.update(batch)
        found.append((batch.indices, batch.keys, batch.captions, batch.frames.sum(dim=(1, 2, 3, 4)).tolist()))
    if ahead:
        assert eventually(lambda: len(set(multiprocessing.active_children()) - others) == 2)
    return found, Progress.merge([progress.state_dict()])


def test_the_same_batches_and_an_exact_resume_from_what_was_consumed(images: list[str]) -> None:
    others = set(multiprocessing.active_children())  # of other tests in this process
    straight, end = consume(images, 14, ahead=False)
    first, state = consume(images, 4)
    assert state["samples"] == 14
    second, again = consume(images, 10, state)
    assert first + second == straight
    assert again == end
    assert threads() == []
    assert eventually(lambda: set(multiprocessing.active_children()) <= others)


class Sleeping:
    shape = (1, 4, 4, 3)

    def __call__(self, *_: Any) -> Any:
        time.sleep(600)


def test_dead_workers_are_an_error_soon_though_samples_may_take_long(images: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread, too, gives up waiting for them, long before `timeout`."""
    monkeypatch.setattr(data_loader, "LOOK", 0.5)
    stream = laion(images, size=4, num_readers=4)
    stream.frames = Sleeping()  # type: ignore[assignment]
    others = set(multiprocessing.active_children())
    batches = iter(Prefetched(ClipLoader(stream, global_batch=4, num_workers=2, timeout=300)))
    for worker in set(multiprocessing.active_children()) - others:
        threading.Timer(0.5, worker.kill).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid"):
        next(batches)
    del batches
    assert time.monotonic() - began < 60
    assert threads() == []


class Failing(MadeUpData):
    """Made-up clips behind the thread; the third batch cannot be had."""

    def train_dataloader(self) -> Any:
        def batch(index: int) -> dict[str, ClipBatch]:
            return {"video": self.clips("video", [2 * index, 2 * index + 1])}

        return Prefetched(Counting(fails_at=self.fails_at, batch=batch))

    fails_at: int | None = None


@pytest.mark.parametrize("fails_at", [None, 2])
def test_a_training_ends_cleanly_or_with_the_loaders_error(tmp_path: Path, fails_at: int | None) -> None:
    data = Failing({"video": 2}, {"video": 2}, JointMixture(0.0))
    data.fails_at = fails_at
    if fails_at is None:
        fit(small_module(), data, tmp_path, steps=3)
        assert data.used == [("video", index) for index in range(6)]
    else:
        with pytest.raises(ValueError, match=r"^batch 2 is bad$"):
            fit(small_module(), data, tmp_path, steps=3)
        assert data.used == [("video", index) for index in range(2)]  # Lightning itself looks one batch ahead
    assert threads() == []


def test_an_error_of_the_training_ends_the_thread(tmp_path: Path) -> None:
    data = Failing({"video": 2}, {"video": 2}, JointMixture(0.0), bad=("video", 3))
    with pytest.raises(ValueError, match="video-3"):
        fit(small_module(), data, tmp_path, steps=3)
    assert eventually(lambda: threads() == [])

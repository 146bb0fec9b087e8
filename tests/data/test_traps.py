"""Ways in which other data pipelines go wrong without a word (those of WebDataset and Lightning that were found), each as a test that it
does not happen here. Order, ranks, start methods, resume and hanging workers are in test_loader.py."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from made_shards import image_sample, tiny, video_bytes, video_sample, write_images, write_tar

from t2v.batch import ClipBatch
from t2v.data import remote
from t2v.data.errors import BadSample, DataQualityError, QualityGuard, QualityLimits, ShardError
from t2v.data.laion import laion
from t2v.data.loader import ClipLoader
from t2v.data.order import Part, parts_of, shuffled
from t2v.data.readers import Host
from t2v.data.webvid import webvid


def read(stream, steps: int, batch: int = 8, **options) -> list[ClipBatch]:
    iterator = iter(ClipLoader(stream, global_batch=batch, **options))
    return [next(iterator) for _ in range(steps)]


def bad(batches: list[ClipBatch]) -> Counter:
    return sum((batch.bad for batch in batches), Counter())


# Order --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shards", "slots"), [(1, 1), (1, 8), (3, 8), (8, 8), (11, 8), (16, 8), (100, 64)])
def test_every_pass_covers_every_sample_once_and_in_another_order(shards: int, slots: int) -> None:
    seen = []
    for epoch in range(40):  # webdataset repeats its orders after 31 passes, and worker w replays worker w + 1
        parts = [part for slot in range(slots) for part in parts_of(shards, slot, slots, epoch, "s")]
        samples = Counter((part.shard, k) for part in parts for k in range(part.offset, 60, part.stride))
        assert len(samples) == 60 * shards
        assert max(samples.values()) == 1
        seen.append(tuple(tuple(parts_of(shards, slot, slots, epoch, "s")) for slot in range(slots)))
    if shards > 8:
        assert len(set(seen)) == 40
    assert all(len({tuple(parts) for parts in order}) == slots for order in seen)  # no two readers read the same


def test_shards_visit_all_readers() -> None:
    """A rank sees only its own shards for ever where splitting comes before shuffling."""
    readers = Counter(slot for epoch in range(64) for slot in range(8) if Part(3) in parts_of(16, slot, 8, epoch, "s"))
    assert len(readers) == 8
    assert max(readers.values()) < 25


def test_the_buffer_shuffles_within_its_reach_and_drains() -> None:
    order = list(shuffled(range(1000), random.Random(0), 50))
    assert sorted(order) == list(range(1000))
    assert all(item <= place + 50 for place, item in enumerate(order))
    assert sum(abs(item - place) for place, item in enumerate(order)) / 1000 > 20
    assert list(shuffled(range(5), random.Random(0), 1)) == list(range(5))


def test_two_passes_differ_within_a_shard(tmp_path: Path) -> None:
    write_images(tmp_path, 1, 40)
    keys = [key for batch in read(tiny(tmp_path, num_readers=1, buffer=1000), 10) for key in batch.keys]
    assert sorted(keys[:40]) == sorted(keys[40:])
    assert sum(a == b for a, b in zip(keys[:40], keys[40:])) < 6
    assert keys[:40] != sorted(keys[:40])


def test_other_seeds_give_other_orders(tmp_path: Path) -> None:
    write_images(tmp_path, 4, 10)
    one, two, again = ([key for batch in read(tiny(tmp_path, seed=seed), 5) for key in batch.keys] for seed in (0, 1, 0))
    assert one == again
    assert sum(a == b for a, b in zip(one, two)) < 10


def test_roles_read_all_their_shards(tmp_path: Path) -> None:
    """mixture=rank: ranks 1 to 7 of 8 read the videos. Splitting by the global rank would never read shards 0, 8, 16, ..."""
    write_images(tmp_path, 16, 2)
    seen = {key for rank in range(7) for batch in read(tiny(tmp_path, num_readers=14), 4, 35, rank=rank, world=7) for key in batch.keys}
    assert len(seen) == 32


def test_environment_variables_are_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, 4, 5)
    plain = read(tiny(tmp_path), 2, 10)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "NODE_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert [batch.keys for batch in read(tiny(tmp_path), 2, 10, num_workers=2, timeout=60)] == [batch.keys for batch in plain]


def test_there_is_no_length(tmp_path: Path) -> None:
    """Lightning hangs in set-up where one rank's loader has a length and another's has none."""
    write_images(tmp_path, 1, 2)
    with pytest.raises(TypeError):
        len(ClipLoader(tiny(tmp_path), global_batch=1))  # type: ignore[arg-type]


# Damage -------------------------------------------------------------------------------------------------------------------------------


def test_a_broken_shard_ends_neither_the_stream_nor_the_pass(tmp_path: Path) -> None:
    write_images(tmp_path, 30, 4)
    (tmp_path / "00007.tar").write_bytes(b"<html>403</html>")
    path = tmp_path / "00011.tar"
    path.write_bytes(path.read_bytes()[: 3 * 3 * 1024 + 100])
    stream = tiny(tmp_path, limits={"max_unreadable_shards": 0.2})
    batches = read(stream, 24, 10)
    seen = {int(key) for batch in batches for key in batch.keys}
    assert seen == set(range(120)) - set(range(28, 32)) - {46, 47}  # the sample before the cut may be incomplete
    assert sum(count for (_, reason), count in bad(batches).items() if reason == "shard_error") >= 2
    assert any(example["source"] == "laion" and example["key"].endswith("00007.tar") for batch in batches for example in batch.bad_examples)


def test_unreadable_shards_stop_the_training(tmp_path: Path) -> None:
    write_images(tmp_path, 40, 3)
    for shard in range(0, 40, 10):
        (tmp_path / f"{shard:05d}.tar").write_bytes(b"nothing")
    with pytest.raises(DataQualityError, match=r"shards are unreadable \(limit max_unreadable_shards=0.05\).*shard_error"):
        read(tiny(tmp_path), 100)


@contextmanager
def files_left(count: int) -> Iterator[None]:
    """This process may open no more than `count` further files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [number for number in range(1000) if not os.path.exists(f"/proc/self/fd/{number}")]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_open_files_than_a_process_may_have_are_no_bad_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "tars", 100, 2)
    (tmp_path / "one.png").write_bytes(image_sample(0)[1]["png"])
    (tmp_path / "captions.csv").write_text("file,caption\none.png,a picture\n")
    remedy = "Too many open files.*a process may have [0-9]+ files open.*ulimit -n.*num_readers"
    few, many = (laion(str(tmp_path / "tars"), size=4, num_readers=readers) for readers in (1, 100))
    assert not bad(read(few, 1, 8))
    with files_left(30), pytest.raises(DataQualityError, match=remedy):
        read(many, 1, 100)
    shard = Host(QualityLimits()).indexed(f"{tmp_path}/captions.csv#0:1")
    assert shard is not None
    assert "png" in shard.read(0).members
    with files_left(0), pytest.raises(DataQualityError, match=remedy):
        shard.read(0)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    with files_left(0), pytest.raises(DataQualityError, match=remedy):
        next(Host(QualityLimits()).streamed(f"file://{tmp_path}/tars/00000.tar"))


def test_missing_shards_of_a_brace_list_count_as_unreadable(tmp_path: Path) -> None:
    write_images(tmp_path, 4, 3)
    batches = read(laion(f"{tmp_path}/{{00000..00004}}.tar", size=4, num_readers=5), 1, 5)
    assert set(bad(batches)) == {("laion", "shard_error")}
    assert {example["key"] for batch in batches for example in batch.bad_examples} == {str(tmp_path / "00004.tar")}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_without_a_usable_sample_stops_soon(tmp_path: Path, workers: int) -> None:
    """Elsewhere: next() never returns, half a second of sleep per sample, or an empty epoch."""
    samples = [image_sample(number) for number in range(50)]
    for _, members in samples:
        members["png"] = b"nothing"
    write_tar(tmp_path / "00000.tar", samples)
    begin = time.monotonic()
    with pytest.raises(DataQualityError, match=r"200 samples are bad|200 samples in a row"):
        read(tiny(tmp_path), 1, num_workers=workers, timeout=60 * workers)
    with pytest.raises(DataQualityError, match="no usable sample"):
        read(laion(str(write_images(tmp_path / "good", 2, 20)), size=4, filters=["number > 1000"]), 1)
    write_tar(tmp_path / "empty/00000.tar", [])
    with pytest.raises(DataQualityError, match="no usable sample"):
        read(tiny(tmp_path / "empty"), 1)
    assert time.monotonic() - begin < 30


def test_limits_of_the_guard() -> None:
    guard = QualityGuard(QualityLimits(max_consecutive_bad=5))
    for _ in range(4):
        guard.bad("s", "k", BadSample("video_open", "why"))
    guard.good("s")
    for _ in range(1000):
        guard.bad("s", "k", BadSample("filtered"))  # expected: counts towards no limit
        guard.good("s")
    for _ in range(4):
        guard.bad("s", "k", BadSample("video_open", "why"))
    with pytest.raises(DataQualityError, match=r"5 samples in a row.*video_open 9.*Last: s/k: video_open: why.*t2v.inspect"):
        guard.bad("s", "k", BadSample("video_open", "why"))
    guard = QualityGuard(QualityLimits(max_unreadable_shards=0.5))
    for number in range(40):
        guard.shard("s", "u", ShardError("x") if number % 2 else None)
    guard = QualityGuard(QualityLimits())
    for _ in range(5000):
        guard.good("s")

    def one_in_four_is_bad() -> None:
        for number in range(4000):
            guard.bad("s", "k", BadSample("x")) if number % 4 == 0 else guard.good("s")

    with pytest.raises(DataQualityError, match="401 of the last 2000 samples"):
        one_in_four_is_bad()


def test_failed_downloads_are_counted_but_stop_nothing(tmp_path: Path) -> None:
    """video2dataset keeps txt and json of failed downloads; a third of a list of old links is dead."""
    samples = []
    for number in range(400):
        key, members = image_sample(number)
        if number % 2:
            members = {"txt": members["txt"], "json": json.dumps({"status": "failed_to_download", "error_message": "404"}).encode()}
        samples.append((key, members))
    write_tar(tmp_path / "00000.tar", samples)
    batches = read(tiny(tmp_path), 60)
    assert bad(batches)[("laion", "download_failed")] > 300


def test_http_errors_stored_as_videos(tmp_path: Path) -> None:
    """video2dataset never looks at the HTTP status: a 404 page becomes an mp4 of 335 bytes with status success."""
    samples = [video_sample(number) for number in range(40)]
    for number, data in ((3, b"<html>404</html>" * 21), (8, b""), (9, video_bytes()[:5000])):
        samples[number][1]["mp4"] = data
    write_tar(tmp_path / "00000.tar", samples)
    batches = read(webvid(str(tmp_path), num_frames=4, size=16, num_readers=4), 12)
    assert {reason for _, reason in bad(batches)} >= {"video_open", "video_empty"}
    assert all(len(batch) == 8 and batch.frames.float().std() > 0 for batch in batches)


def test_pickles_in_shards_are_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    samples = [image_sample(number) for number in range(4)]
    for _, members in samples:
        members.update(pyd=pickle.dumps(Trap()), pkl=pickle.dumps(Trap()), pth=pickle.dumps(Trap()))
    write_tar(tmp_path / "00000.tar", samples)
    read(tiny(tmp_path), 2, 4)
    assert not (tmp_path / "sprung").exists()


def test_upper_case_suffixes_and_wrong_ones(tmp_path: Path) -> None:
    samples = [(key, {"JPG": members["png"], "TXT": members["txt"]}) for key, members in map(image_sample, range(4))]  # PNG bytes named JPG
    write_tar(tmp_path / "00000.tar", samples)
    assert set(read(tiny(tmp_path), 2, 4)[0].captions) <= {f"picture {number}" for number in range(4)}


# Object stores ------------------------------------------------------------------------------------------------------------------------


class Flaky(MemoryFileSystem):
    """Every third opening fails, and every opened file breaks after 40 kB."""

    protocol = "flaky"
    opened = 0
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def open(self, path, mode="rb", **options):
        Flaky.opened += 1
        if Flaky.opened % 3 == 0:
            raise ConnectionResetError("no connection")
        return Breaking(self.cat_file(path))


class Breaking(io.BytesIO):
    begin: int | None = None

    def read(self, count: int | None = -1) -> bytes:
        self.begin = self.tell() if self.begin is None else self.begin
        if self.tell() - self.begin > 40_000:
            raise RuntimeError("the library's own error")
        return super().read(min(count or 0, 20_000))


def test_connections_that_break_are_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    write_images(tmp_path, 4, 60)
    for path in tmp_path.iterdir():
        MemoryFileSystem().pipe(f"/flaky-bucket/{path.name}", path.read_bytes())
    urls = [f"flaky://flaky-bucket/{shard:05d}.tar" for shard in range(4)]
    local, shaky = (read(laion(source, size=4, num_readers=4), 3, 80) for source in (str(tmp_path), urls))
    assert [batch.keys for batch in shaky] == [batch.keys for batch in local]
    assert not bad(shaky)
    assert Flaky.opened > 12


def test_what_stays_broken_is_a_shard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)

    def fail() -> None:
        raise ConnectionResetError("gone")

    with pytest.raises(ShardError, match="ConnectionResetError: gone, 4 times"):
        remote.Retry()("s3://x", fail)
    assert waits == [1, 2, 4]
    host = Host(QualityLimits())
    with pytest.raises(ShardError, match="FileNotFoundError"):
        list(host.streamed("memory://none/00000.tar"))
    assert waits == [1, 2, 4]  # not asked again

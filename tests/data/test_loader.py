"""Order, shares, exact and elastic resume: what is consumed depends on neither ranks nor workers nor kills."""

from __future__ import annotations

import json
import logging
import multiprocessing
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist
from made_shards import image_sample, tiny, video_sample, write_images, write_tar

from t2v.batch import ClipBatch
from t2v.data.errors import DataQualityError
from t2v.data.frames import ImageFrames, VideoFrames
from t2v.data.laion import laion
from t2v.data.latents import LatentFrames
from t2v.data.loader import MAX_CHUNK, ClipLoader, Hosting, owned, split
from t2v.data.progress import Progress
from t2v.data.readers import ClipStream, Host
from t2v.data.webvid import webvid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), shards=11, per_shard=7)


def take(loader: ClipLoader, steps: int) -> tuple[list[ClipBatch], dict]:
    """The batches of `steps` optimizer steps, and the progress after them."""
    progress, iterator = loader.progress(), iter(loader)
    batches = [next(iterator) for _ in range(steps * loader.accumulate)]
    for batch in batches:
        progress.update(batch)
    iterator.close()
    return batches, progress.state_dict()


def keys(batches: list[ClipBatch]) -> dict[int, str]:
    """Global sample index -> key."""
    pairs = [(index, f"{key}@{cursor[0]}") for batch in batches for index, key, cursor in zip(batch.indices, batch.keys, batch.cursors)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def run(
    folder: Path, steps: int, world: int = 1, workers: int = 0, state: dict | None = None, batch: int = 10, **options
) -> tuple[dict[int, str], dict]:
    """All ranks one after the other: global index -> key, and the merged state."""
    found: dict[int, str] = {}
    states = []
    for rank in range(world):
        loader = ClipLoader(
            tiny(folder),
            global_batch=batch,
            rank=rank,
            world=world,
            num_workers=workers,
            state=state,
            timeout=60 * (workers > 0),
            **options,
        )
        batches, progress = take(loader, steps)
        assert not found.keys() & keys(batches).keys()
        found |= keys(batches)
        states.append(json.loads(json.dumps(progress)))
    return found, Progress.merge(states)


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[int, str]:
    return run(folder, steps=20)[0]


def test_indices_count_and_readers_take_turns(folder: Path) -> None:
    batches, state = take(ClipLoader(tiny(folder), global_batch=5, accumulate=2), 8)
    assert [index for batch in batches for index in batch.indices] == list(range(40))
    assert [reader for batch in batches for reader in batch.readers] == [index % 8 for index in range(40)]
    assert [len(batch) for batch in batches] == [3, 2] * 8
    assert (state["samples"], state["consumed"]) == (0, 40)


def test_pictures_captions_and_keys_belong_together(folder: Path) -> None:
    for batch in take(ClipLoader(tiny(folder), global_batch=20), 4)[0]:
        assert batch.frames.shape == (20, 1, 4, 4, 3)
        assert batch.frames.dtype == torch.uint8
        assert batch.frames[:, 0, 0, 0, 0].tolist() == [int(key) for key in batch.keys]
        assert batch.captions == [f"picture {int(key)}" for key in batch.keys]


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 2), (8, 1)])
def test_the_global_order_depends_on_neither_ranks_nor_workers(folder: Path, straight: dict, world: int, workers: int) -> None:
    assert run(folder, steps=6, world=world, workers=workers)[0] == {index: key for index, key in straight.items() if index < 60}


def test_a_pass_holds_every_sample_once_and_passes_differ(folder: Path) -> None:
    found, _ = run(folder, steps=30)
    passes = [[key.split("@")[0] for key in found.values() if key.endswith(f"@{epoch}")] for epoch in (0, 1)]
    assert sorted(passes[0]) == [f"{number:09d}" for number in range(77)]
    assert sorted(passes[1]) == sorted(passes[0])
    assert sum(a == b for a, b in zip(*passes)) < 10


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 0), (3, 2)])
@pytest.mark.parametrize("done", [1, 4, 9])
def test_resume_is_exact(folder: Path, world: int, workers: int, done: int) -> None:
    if workers and done != 4:
        pytest.skip("one is enough with processes")
    whole, _ = run(folder, steps=12, world=world, workers=workers)
    first, state = run(folder, steps=done, world=world, workers=workers)
    second, _ = run(folder, steps=12 - done, world=world, workers=workers, state=state)
    assert first | second == whole
    assert not first.keys() & second.keys()


def test_another_number_of_ranks_and_workers_continues_the_same_order(folder: Path, straight: dict) -> None:
    found: dict[int, str] = {}
    state = None
    for world, workers in ((2, 0), (8, 0), (1, 4), (4, 0), (2, 2)):
        more, state = run(folder, steps=3, world=world, workers=workers, state=state)
        assert not found.keys() & more.keys()
        found |= more
    assert found == {index: key for index, key in straight.items() if index < 150}
    assert state is not None
    assert state["samples"] == 150


def test_uneven_ranks_lose_and_repeat_nothing_within_a_pass(folder: Path) -> None:
    found: list[str] = []
    state = None
    for world, workers in ((3, 0), (5, 0), (2, 3), (3, 0)):
        more, state = run(folder, steps=4, world=world, workers=workers, state=state)
        found += more.values()
    while not all(f"{number:09d}@0" in found for number in range(77)):
        assert len(found) < 2000
        more, state = run(folder, steps=1, world=3, state=state)
        found += more.values()
    assert max(Counter(found).values()) == 1


def test_the_state_is_small(folder: Path) -> None:
    _, state = run(folder, steps=30)
    assert len(json.dumps(state)) < 150 + 30 * len(state["cursors"])


def test_a_resume_reads_at_most_one_shard_of_each_reader_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    streamed = Host.streamed
    monkeypatch.setattr(Host, "streamed", lambda host, url: opened.append(url) or streamed(host, url))
    memory = fsspec.filesystem("memory")
    for path in sorted(folder.iterdir()):
        memory.pipe(f"/resumed/{path.name}", path.read_bytes())
    urls = [f"memory://resumed/{path.name}" for path in sorted(folder.iterdir())]

    def stream() -> ClipStream:
        return laion(urls, size=4, num_readers=4, buffer=3)

    whole, _ = take(ClipLoader(stream(), global_batch=8), 30)
    first, progress = take(ClipLoader(stream(), global_batch=8), 25)
    opened.clear()
    second, _ = take(ClipLoader(stream(), global_batch=4, state=Progress.merge([progress])), 1)
    assert len(opened) <= 2 * 4  # the shard that each reader was in, and where that was used up the next
    assert [batch.keys for batch in first] + [batch.keys + whole[25].keys[4:] for batch in second] == [batch.keys for batch in whole[:26]]


def test_what_travels_between_processes_is_small_and_stays_in_bytes(folder: Path, tmp_path: Path) -> None:
    """/dev/shm: chunks of a megabyte, or of one clip, instead of batches of some hundred megabytes."""
    write_tar(tmp_path / "00000.tar", [video_sample(number) for number in range(6)])
    big = webvid(str(tmp_path), num_frames=8, size=256, num_readers=2)  # 1.6 MB a clip
    for stream, clips in ((big, 1), (tiny(folder), MAX_CHUNK)):
        chunk = next(iter(Hosting(stream, rank=0, world=1, consumed=0, cursors={})))
        assert chunk.frames is not None
        assert chunk.frames.dtype == torch.uint8
        assert chunk.frames.shape == (clips, *stream.shape)


def test_state_refuses_what_it_does_not_describe(folder: Path, tmp_path: Path) -> None:
    batches, own = take(ClipLoader(tiny(folder), global_batch=4), 1)
    assert len(batches) == 1
    state = Progress.merge([own])
    with pytest.raises(ValueError, match="num_readers=8"):
        ClipLoader(tiny(folder, num_readers=4), global_batch=4, state=state)
    for other in (tiny(write_images(tmp_path, 3, 4)), tiny(folder, seed=1), tiny(folder, buffer=6)):
        with pytest.raises(ValueError, match="other data"):
            ClipLoader(other, global_batch=4, state=state)
    with pytest.raises(ValueError, match="merge"):
        ClipLoader(tiny(folder), global_batch=4, state=own)
    with pytest.raises(ValueError, match="belong together"):
        Progress.merge([own, own | {"samples": 4}])
    ClipLoader(tiny(folder), global_batch=4, state=state)


@pytest.mark.parametrize("world", [8, 64, 80])
@pytest.mark.parametrize("batch", [1400, 3200])
def test_the_papers_batches_split_exactly(world: int, batch: int) -> None:
    for begin in (0, batch, 7 * batch):
        shares = [owned(begin, begin + batch, rank, world) for rank in range(world)]
        assert sum(shares) == batch
        assert max(shares) - min(shares) <= 1
        micro = [split(share, 7) for share in shares]
        assert all(sum(parts) == share and max(parts) - min(parts) <= 1 for parts, share in zip(micro, shares))


def test_a_share_may_be_smaller_than_the_number_of_micro_batches(folder: Path) -> None:
    batches, _ = take(ClipLoader(tiny(folder), global_batch=4, accumulate=3, rank=1, world=3), 2)
    assert [batch.indices for batch in batches] == [[1], [], [], [4], [7], []]
    assert batches[1].frames.shape == (0, 1, 4, 4, 3)


def test_more_readers_than_samples(tmp_path: Path) -> None:
    write_images(tmp_path, shards=1, per_shard=3)
    batches, _ = take(ClipLoader(tiny(tmp_path), global_batch=8), 10)
    assert set(Counter(key for batch in batches for key in batch.keys)) == {f"{number:09d}" for number in range(3)}


def test_few_samples_are_mixed_among_many_readers(tmp_path: Path) -> None:
    """Somebody's 30 clips under the paper's configuration: no sample crowds a batch or comes much more often than others."""
    write_images(tmp_path, shards=1, per_shard=30)
    batches, _ = take(ClipLoader(tiny(tmp_path, num_readers=480), global_batch=32), 30)
    assert min(len(set(batch.keys)) for batch in batches) > 12  # of 32 drawn at random from 30, about 20 differ
    counts = Counter(key for batch in batches for key in batch.keys)
    assert len(counts) == 30
    assert max(counts.values()) < 3 * min(counts.values())


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_start_methods_read_the_same(folder: Path, straight: dict, method: str) -> None:
    """Elsewhere, workers that are not forked do not know their rank, and every rank reads everything."""
    loader = ClipLoader(tiny(folder), global_batch=10, rank=1, world=2, num_workers=2, multiprocessing_context=method, timeout=100)
    assert keys(take(loader, 4)[0]) == {index: key for index, key in straight.items() if index < 40 and index % 2 == 1}


def rank_main(rank: int, world: int, port: int, folder: str, queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    loader = ClipLoader(tiny(folder), global_batch=10, accumulate=2, rank=rank, world=world, num_workers=2, timeout=60)
    batches, state = take(loader, 5)
    states = [None] * world
    dist.all_gather_object(states, state)
    queue.put((rank, keys(batches), Progress.merge(states)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_under_gloo(folder: Path, straight: dict, world: int, unused_port) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=rank_main, args=(rank, world, unused_port, str(folder), queue)) for rank in range(world)]
    for process in ranks:
        process.start()
    answers = [queue.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    found: dict[int, str] = {}
    for _, part, _ in answers:
        assert not found.keys() & part.keys()
        found |= part
    assert sorted(found) == list(range(50))
    assert all(state == answers[0][2] and state["samples"] == 50 for _, _, state in answers)
    if world == 2:
        assert found == {index: key for index, key in straight.items() if index < 50}
    resumed, _ = run(folder, steps=3, world=1, state=answers[0][2])
    assert not set(resumed.values()) & set(found.values())


def test_the_log_says_when_the_order_depends_on_the_ranks(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ClipLoader(tiny(folder), global_batch=4, world=4, num_workers=2)
        assert not caplog.records
        ClipLoader(tiny(folder), global_batch=4, world=3)
        assert "order depends" in caplog.text
        ClipLoader(tiny(folder), global_batch=4, world=8, num_workers=2)
        assert "1 of 2 workers" in caplog.text
    with pytest.raises(ValueError, match="num_readers=8"):
        ClipLoader(tiny(folder), global_batch=4, world=9)


def test_bad_samples_are_skipped_counted_and_shown(tmp_path: Path) -> None:
    samples = [image_sample(number) for number in range(60)]
    samples[7][1]["png"] = b"nothing"
    del samples[20][1]["png"]
    samples[31][1].update(txt=b" ", json=b"{}")
    write_tar(tmp_path / "00000.tar", samples)
    for workers in (0, 2):
        batches, _ = take(ClipLoader(tiny(tmp_path), global_batch=8, num_workers=workers, timeout=60 * (workers > 0)), 12)
        bad = sum((batch.bad for batch in batches), Counter())
        assert all(("laion", reason) in bad for reason in ("image_open", "missing_member", "caption_empty"))
        assert {example["key"] for batch in batches for example in batch.bad_examples} == {f"{number:09d}" for number in (7, 20, 31)}
        assert all(int(key) not in (7, 20, 31) for batch in batches for key in batch.keys)
        assert all(len(batch) == 8 for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_stops_when_too_much_is_bad(tmp_path: Path, workers: int) -> None:
    samples = [image_sample(number) for number in range(300)]
    for _, members in samples[::3]:
        members["png"] = b"nothing"
    write_tar(tmp_path / "00000.tar", samples)
    with pytest.raises(DataQualityError, match=r"of the last \d+ samples are bad.*max_bad_fraction=0.2.*image_open") as caught:
        take(ClipLoader(tiny(tmp_path), global_batch=8, num_workers=workers, timeout=60 * (workers > 0)), 100)
    assert "Traceback" not in str(caught.value)


def test_a_hanging_worker_is_noticed(folder: Path) -> None:
    stream = tiny(folder)
    stream.frames = Sleeper()
    loader = ClipLoader(stream, global_batch=4, num_workers=1, timeout=2)
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="no sample came"):
        next(iter(loader))
    assert time.monotonic() - begin < 20


class Sleeper:
    shape = (1, 4, 4, 3)

    def __call__(self, *_):
        time.sleep(15)


class Broken:
    shape = (1, 4, 4, 3)

    def __call__(self, *_):
        raise KeyError("a bug")


def test_a_process_that_fails_beside_its_workers_ends(folder: Path) -> None:
    """They let its SIGTERM pass, as a scheduler's, and multiprocessing would wait for them for ever."""
    program = f"""
from t2v.data.loader import ClipLoader
from t2v.data.laion import laion
batches = iter(ClipLoader(laion({str(folder)!r}, size=4, num_readers=8, buffer=5), global_batch=4, num_workers=2))
next(batches)
raise SystemExit(7)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert ended.returncode == 7, ended.stderr


def test_numbers_of_clips_are_above_zero() -> None:
    for kind, wrong in ((VideoFrames, "num_frames"), (VideoFrames, "fps"), (VideoFrames, "size"), (ImageFrames, "size")):
        with pytest.raises(ValueError, match=f"{wrong}=0 of the clips to read must be above 0"):
            kind(**{wrong: 0})
    with pytest.raises(ValueError, match="num_frames=0"):
        LatentFrames(None, num_frames=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_bugs_are_not_bad_data(folder: Path, workers: int) -> None:
    stream = tiny(folder)
    stream.frames = Broken()
    with pytest.raises(KeyError, match="a bug"):
        next(iter(ClipLoader(stream, global_batch=4, num_workers=workers, timeout=60 * workers)))


def test_crops_survive_a_resume(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [video_sample(number) for number in range(12)])

    def starts(steps: int, state: dict | None = None, seed: int = 0) -> tuple[list, dict]:
        stream = webvid(str(tmp_path), num_frames=4, size=16, num_readers=4, buffer=3, seed=seed)
        batches, progress = take(ClipLoader(stream, global_batch=4, state=state), steps)
        clips = [
            (key, start, frame.tolist())
            for batch in batches
            for key, start, frame in zip(batch.keys, batch.starts, batch.frames[:, 0, 0, 0, 0])
        ]
        return clips, Progress.merge([progress])

    whole, _ = starts(6)
    first, state = starts(2)
    assert first + starts(4, state)[0] == whole
    assert len({start for _, start, _ in whole + starts(6, seed=1)[0]}) == 2 * len(whole)  # a new one in every pass and for every seed

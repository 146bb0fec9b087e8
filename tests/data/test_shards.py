"""Tars as they are: any order of members, long names, truncation, damage. Local and streamed reading agree."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from made_shards import image_sample, write_images, write_tar

from t2v.data.errors import ShardError
from t2v.data.raw import RawSample
from t2v.data.shard_writer import ShardWriter
from t2v.data.shards import LocalTar, ShardCache, stream_tar


def local(path: Path) -> tuple[list[RawSample], str]:
    try:
        tar = LocalTar(str(path))
    except ShardError as error:
        return [], str(error)
    return [tar.read(k) for k in range(len(tar))], str(tar.error or "")


def streamed(path: Path) -> tuple[list[RawSample], str]:
    samples = []
    try:
        with path.open("rb") as file:
            for sample in stream_tar(file):
                samples.append(sample)
    except ShardError as error:
        return samples, str(error)
    return samples, ""


def both(path: Path) -> tuple[list[RawSample], bool]:
    (one, first), (other, second) = local(path), streamed(path)
    assert one == other
    assert bool(first) == bool(second), (first, second)
    return one, bool(first)


def test_samples_as_written(tmp_path: Path) -> None:
    samples, broken = both(write_images(tmp_path, 1, 9) / "00000.tar")
    assert [(sample.key, sample.members) for sample in samples] == [image_sample(k) for k in range(9)]
    assert not broken


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        names = [
            "sub/a.MP4",
            "sub/a.json",
            "sub/b.video.mp4",
            "__meta__",
            "README",
            "c.txt",
            "d" * 150 + ".txt",
            "d" * 150 + ".mp4",
            "é.txt",
            "z.txt",
        ]
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    samples, _ = both(path)
    assert [(sample.key, list(sample.members)) for sample in samples] == [
        ("sub/a", ["mp4", "json"]),
        ("sub/b", ["video.mp4"]),
        ("c", ["txt"]),
        ("d" * 150, ["txt", "mp4"]),
        ("é", ["txt"]),
        ("z", ["txt"]),
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats(tmp_path: Path, form: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for k in range(30):
            info = tarfile.TarInfo(f"{'folder' * 12}/{k:05d}{'x' * 60}.txt" if k % 3 == 1 else f"{k:05d}.txt")
            info.size, info.mtime = k, 0.5 if form == tarfile.PAX_FORMAT and k == 20 else 0
            tar.addfile(info, io.BytesIO(bytes([k]) * k))
    samples, broken = both(path)
    assert [sample.members["txt"] for sample in samples] == [bytes([k]) * k for k in range(30)]
    assert not broken


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.71, 0.95])
def test_truncated_tars_give_whole_samples_and_an_error(tmp_path: Path, keep: float) -> None:
    path = write_images(tmp_path, 1, 20) / "00000.tar"
    data = path.read_bytes()
    length = data.rindex(b"000000019.json") + 1024  # without the end blocks
    path.write_bytes(data[: int(length * keep)])
    samples, broken = both(path)
    assert broken
    assert all(list(sample.members) == ["png", "txt", "json"] for sample in samples)
    assert abs(len(samples) - int(20 * keep)) <= 1


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_cut_at_any_block_is_noticed(tmp_path: Path, form: int) -> None:
    """Between members, too, where long names or fractions of a second make tarfile read them."""
    path, whole = tmp_path / "a.tar", {}
    with tarfile.open(path, "w", format=form) as tar:
        for k in range(6):
            key = f"{'folder' * 12}/{k:05d}{'x' * 60}"
            whole[key] = {"txt": bytes([k + 1]) * 700, "json": b"{}"}
            for suffix, data in whole[key].items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mtime = len(data), 0.5 if form == tarfile.PAX_FORMAT else 0
                tar.addfile(info, io.BytesIO(data))
        end = tar.offset
    data = path.read_bytes()
    assert local(path) == ([RawSample(key, members) for key, members in whole.items()], "")
    for length in range(0, end, 256):
        path.write_bytes(data[:length])
        samples, error = local(path)
        assert error, length
        assert all(sample.members == whole[sample.key] for sample in samples), length
        assert bool(streamed(path)[1]), length


def test_not_a_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for data in (b"<html>" * 200, bytes(range(256)) * 9):
        path.write_bytes(data)
        assert both(path) == ([], True)
    path.write_bytes(b"")
    assert both(path) == ([], True)
    with pytest.raises(ShardError, match="none"):
        LocalTar(str(tmp_path / "none.tar"))


def test_members_of_a_sample_must_be_adjacent(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("e.mp4", "f.mp4", "e.txt", "__f.txt", "e.mp4"):
            tar.addfile(tarfile.TarInfo(name))
    samples, _ = both(tmp_path / "a.tar")
    assert [(sample.key, *sample.members) for sample in samples] == [("e", "mp4"), ("f", "mp4"), ("e", "txt"), ("e", "mp4")]


def test_samples_that_readers_would_not_find_are_not_written(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.tar") as shard:
        shard.add("1", {"txt": b"one"})
        shard.add("2", {"txt": b"two"})
        with pytest.raises(ValueError, match=r"a.tar: the key '1' was there before"):
            shard.add("1", {"txt": b"three"})
        for key in ("3.5", "__3"):
            with pytest.raises(ValueError, match=f"the key '{key}'"):
                shard.add(key, {"txt": b"three"})
    assert [sample.key for sample in both(tmp_path / "a.tar")[0]] == ["1", "2"]


def test_the_cache_keeps_the_latest(tmp_path: Path) -> None:
    paths = [str(path) for path in sorted(write_images(tmp_path, 4, 1).iterdir())]
    cache = ShardCache(capacity=2)
    first = cache.open(paths[0])
    assert cache.open(paths[0]) is first
    for path in paths[1:]:
        cache.open(path)
    assert cache.open(paths[0]) is not first
    assert len(first) == 1
    assert first.read(0).key == "000000000"  # still readable by those who hold it
    write_tar(tmp_path / "new.tar", [])
    assert len(cache.open(str(tmp_path / "new.tar"))) == 0

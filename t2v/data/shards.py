"""Tar shards. Local ones are indexed (one int64 per sample) and read at random, so that readers share them at no cost; others are streamed
through webdataset's tar iterator. Both group members by the text before the first dot, as webdataset does, and both give what lies before
the damage of a truncated shard.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from webdataset.tariterators import base_plus_ext, tar_file_iterator

from t2v.data.errors import ShardError, refuse_full_process
from t2v.data.folder import FolderRows
from t2v.data.raw import RawSample

BLOCK = 512  # bytes: the unit of the tar format
REGULAR, SKIPPED = b"0\0", b"5g"  # type flags: files; directories and global pax headers


class LocalTar:
    """A tar on a local or network disk: `len(tar)` samples, `tar.read(k)` is the k-th. `error` says what ended the index too early."""

    def __init__(self, path: str) -> None:
        self.error: ShardError | None = None
        try:
            self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        except OSError as error:
            refuse_full_process(error)
            raise ShardError(str(error)) from error
        starts: list[int] = []
        end, last = 0, ""
        try:
            for name, start, stop in _members(self.file):
                key, suffix = base_plus_ext(name)
                if suffix is None or name.startswith("__"):
                    last = ""
                    continue
                if key != last:
                    starts.append(start)
                    last = key
                end = stop
        except (tarfile.TarError, ShardError, OSError) as error:
            self.error = ShardError(f"{path}: {error}")
            if len(starts) < 2:
                raise self.error from error
            end = starts.pop()  # the sample before the damage may lack members
        self.bounds = np.array([*starts, end] if starts else [0], np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def read(self, index: int) -> RawSample:
        start, stop = int(self.bounds[index]), int(self.bounds[index + 1])
        try:
            data = os.pread(self.file.fileno(), stop - start, start)
        except OSError as error:
            raise ShardError(f"{self.file.name}: {error}") from error
        sample = next(_group((name, data[begin:end]) for name, begin, end in _contents(data)), None)
        if sample is None:
            raise ShardError(f"{self.file.name}: it changed while it was read")
        return sample


class ShardCache:
    """The local shards that a worker has open, the least recently used dropped first."""

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.shards: OrderedDict[str, LocalTar | FolderRows] = OrderedDict()

    def open(self, path: str) -> LocalTar | FolderRows:
        """Raises ShardError."""
        if path in self.shards:
            self.shards.move_to_end(path)
            return self.shards[path]
        shard = FolderRows(path) if "#" in os.path.basename(path) else LocalTar(path)
        self.shards[path] = shard
        if len(self.shards) > self.capacity:
            self.shards.popitem(last=False)
        return shard


def stream_tar(file: BinaryIO) -> Iterator[RawSample]:
    """Samples of a tar that can only be read forwards. Raises ShardError at the damage, after what lies before it."""

    watched = _Watched(file)

    def members() -> Iterator[tuple[str, bytes]]:
        for member in tar_file_iterator(watched, skip_meta=None):  # type: ignore[arg-type]
            yield member["fname"], member["data"]
        if watched.ended and watched.tail != bytes(BLOCK):  # tarfile takes a cut between members for the end
            raise ShardError("unexpected end of data")

    try:
        yield from _group(members())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardError(str(error)) from error


class _Watched:
    """A file that remembers how it ended."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.tail, self.ended = file, b"", False

    def read(self, count: int) -> bytes:
        data = self.file.read(count)
        self.ended = self.ended or len(data) < count
        self.tail = (self.tail + data)[-BLOCK:] if len(data) < BLOCK else data[-BLOCK:]
        return data


def _group(members: Iterable[tuple[str, bytes]]) -> Iterator[RawSample]:
    """Adjacent members with one key are a sample; of two with one suffix the first counts. An unfinished sample is dropped on an error."""
    current: tuple[str, dict[str, bytes]] | None = None
    for name, data in members:
        key, suffix = base_plus_ext(name)
        if suffix is None or name.startswith("__"):
            if current:
                yield RawSample(*current)
            current = None
            continue
        if current is None or current[0] != key:
            if current:
                yield RawSample(*current)
            current = (key, {})
        current[1].setdefault(suffix.lower(), data)
    if current:
        yield RawSample(*current)


def _members(file: io.RawIOBase | io.FileIO) -> Iterator[tuple[str, int, int]]:
    """(name, first byte of the header, last byte of the padded data) of every file in a tar. Plain headers are read here, 10 times faster
    than by tarfile; archives with long names or other extensions go through tarfile."""
    size = os.fstat(file.fileno()).st_size
    offset = 0
    while True:
        header = os.pread(file.fileno(), BLOCK, offset)
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK:  # every complete tar ends with empty blocks
            raise ShardError(f"unexpected end of data at byte {offset}")
        plain = _plain(header)
        if plain is None:
            break
        name, length, regular = plain
        stop = offset + BLOCK + (length + BLOCK - 1) // BLOCK * BLOCK
        if offset + BLOCK + length > size:
            raise ShardError(f"unexpected end of data: {name} should end at byte {offset + BLOCK + length} of {size}")
        if regular:
            yield name, offset, stop
        offset = stop
    rest = io.FileIO(file.fileno(), closefd=False)
    rest.seek(offset)  # tarfile counts from where it finds the file
    with tarfile.open(fileobj=rest, mode="r:") as tar:
        for member in tar:
            if member.offset_data + member.size > size:
                raise ShardError(f"unexpected end of data: {member.name} should end at byte {member.offset_data + member.size} of {size}")
            if member.isreg():
                yield member.name, member.offset, member.offset_data + (member.size + BLOCK - 1) // BLOCK * BLOCK
        if os.pread(file.fileno(), BLOCK, tar.offset) != bytes(BLOCK):  # tarfile takes a cut, or anything else, between members for the end
            raise ShardError(f"unexpected end of data at byte {tar.offset}")


def _contents(data: bytes) -> Iterator[tuple[str, int, int]]:
    """(name, begin, end) of the files in a piece of a tar."""
    offset = 0
    while offset + BLOCK <= len(data):
        plain = _plain(data[offset : offset + BLOCK])
        if plain is None:
            with tarfile.open(fileobj=io.BytesIO(data[offset:]), mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        yield member.name, offset + member.offset_data, offset + member.offset_data + member.size
            return
        name, length, regular = plain
        if regular:
            yield name, offset + BLOCK, offset + BLOCK + length
        offset += BLOCK + (length + BLOCK - 1) // BLOCK * BLOCK


def _plain(header: bytes) -> tuple[str, int, bool] | None:
    """(name, size, is a file) of a plain ustar header; None where tarfile must look at it. Raises ShardError on a wrong checksum."""
    kind = header[156:157]
    if header[124] & 0x80 or (kind not in REGULAR and kind not in SKIPPED):
        return None
    try:
        checksum, length = int(header[148:156].split(b"\0")[0], 8), int(header[124:136].split(b"\0")[0], 8)
    except ValueError as error:
        raise ShardError("not a tar archive") from error
    if checksum != sum(header) - sum(header[148:156]) + 256:
        raise ShardError("not a tar archive, or a damaged one: wrong checksum in a header")
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" and header[262:264] != b" \0" else b""
    full = (prefix + b"/" + name if prefix else name).decode("utf-8", "replace")
    return full, length, kind in REGULAR

"""Writes tar shards as img2dataset and video2dataset do: adjacent members of one key, _stats.json beside the tar. A shard appears whole."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import tarfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


class ShardWriter:
    """`with ShardWriter(path) as shard: shard.add(key, {suffix: bytes})`. On an error nothing is left behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = partial_of(path)
        self.skipped: Counter[str] = Counter()
        self.count = self.size = 0  # samples, bytes
        self.keys: set[str] = set()
        self.given_up = False
        self.begin = time.time()

    def __enter__(self) -> ShardWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.partial.open("wb")
        self.tar = tarfile.open(fileobj=self.file, mode="w", format=tarfile.GNU_FORMAT)
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        if "." in key.rsplit("/", 1)[-1]:
            raise ValueError(f"the key {key!r} holds a dot: readers end keys at the first one")
        if key.startswith("__"):
            raise ValueError(f"the key {key!r} begins with two underscores: readers leave such members out")
        if key in self.keys:
            raise ValueError(f"{self.path}: the key {key!r} was there before: readers take samples of one key for one")
        self.keys.add(key)
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
            self.size += len(data)
        self.count += 1

    def skip(self, reason: str) -> None:
        """Count a sample that does not get in."""
        self.skipped[reason] += 1

    def give_up(self) -> None:
        """Leave nothing behind, as on an error."""
        self.given_up = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        whole = kind is None and not self.given_up
        try:
            try:
                if whole:
                    self.tar.close()
                    self.file.flush()
                    os.fsync(self.file.fileno())
            finally:
                self.file.close()  # on a full disk it raises, too
            if whole:
                write_json(self.path.with_name(f"{self.path.stem}_stats.json"), self.stats())
                self.partial.replace(self.path)
        finally:
            self.partial.unlink(missing_ok=True)

    def stats(self) -> dict[str, object]:
        """In the words of img2dataset's _stats.json; `successes` is the number of samples in the tar."""
        return {
            "count": self.count + self.skipped.total(),
            "successes": self.count,
            "bytes": self.size,
            "start_time": self.begin,
            "end_time": time.time(),
            "status_dict": {"success": self.count, **self.skipped},
        }


def write_json(path: Path, value: object) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """At once or not at all."""
    partial = partial_of(path)
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_of(path: Path) -> Path:
    """Where this process writes what will be `path`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def clear_partials(folder: Path) -> None:
    """Remove what processes of this machine that were killed had not finished."""
    for path in folder.glob(".*.partial"):
        match = re.search(rf"\.{re.escape(socket.gethostname())}\.(\d+)\.partial$", path.name)
        if match and not _lives(int(match[1])):
            path.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True

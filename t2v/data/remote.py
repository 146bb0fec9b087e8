"""Shards on object stores, through fsspec (s3://, gs://, https://, memory://, ...): read forwards, with retries. No shell pipes."""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar, cast

import fsspec

from t2v.data.errors import ShardError, refuse_full_process

log = logging.getLogger(__name__)
T = TypeVar("T")
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)  # asking again does not help
CHUNK = 4 << 20  # bytes per request


@dataclass(frozen=True)
class Retry:
    """`attempts` in all; before the k-th repetition `backoff` * 2^(k-1) seconds pass."""

    attempts: int = 4
    backoff: float = 1.0  # seconds

    def __call__(self, what: str, action: Callable[[], T]) -> T:
        """Raises ShardError when the last attempt fails. Stores raise errors of every kind (aiohttp's, botocore's), so any of them counts;
        the last one is the cause of the ShardError, so none gets lost."""
        for attempt in range(self.attempts):
            try:
                return action()
            except FINAL as error:
                raise ShardError(f"{what}: {type(error).__name__}: {error}") from error
            except Exception as error:
                refuse_full_process(error)
                if attempt + 1 == self.attempts:
                    raise ShardError(f"{what}: {type(error).__name__}: {error}, {self.attempts} times") from error
                log.info("%s: %r, trying again", what, error)
                time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")


class RemoteFile(io.RawIOBase):
    """A remote file read forwards; after a broken connection it is reopened where it stopped."""

    def __init__(self, url: str, retry: Retry) -> None:
        super().__init__()
        self.url, self.retry = url, retry
        self.file: Any = None
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.retry(self.url, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        try:
            if self.file is None:
                system, path = fsspec.url_to_fs(self.url)
                self.file = system.open(path, "rb", block_size=CHUNK, cache_type="readahead")
                if self.position:
                    self.file.seek(self.position)
            return self.file.read(count)
        except Exception:
            self._drop()
            raise

    def _drop(self) -> None:
        file, self.file = self.file, None
        if file is not None:
            file.close()

    def close(self) -> None:
        self._drop()
        super().close()


def open_remote(url: str, retry: Retry) -> BinaryIO:
    """A buffered, forward-only file. Raises ShardError while reading."""
    return cast(BinaryIO, io.BufferedReader(RemoteFile(url, retry), buffer_size=1 << 20))

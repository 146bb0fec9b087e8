"""Writing while training goes on: a copy of the tensors in host memory, and a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from t2v.checkpoint import Piece

WRITER = "checkpoint writer"  # the thread's name


class HostCopies:
    """This rank's pieces as they are now, in host memory: pinned where they come from a GPU, and kept for the next checkpoint, since
    giving out gigabytes of it takes longer than filling them."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}

    @torch.no_grad()
    def of(self, files: Mapping[str, Mapping[str, Piece]]) -> dict[str, dict[str, Piece]]:
        copies = {
            file: {name: replace(piece, rows=self._copy((file, name), piece.rows)) for name, piece in pieces.items()}
            for file, pieces in files.items()
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copies

    def _copy(self, key: tuple[str, str], rows: Tensor) -> Tensor:
        memory = self._memory.get(key)
        if memory is None or (memory.shape, memory.dtype) != (rows.shape, rows.dtype):
            memory = self._memory[key] = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=rows.is_cuda)
        return memory.copy_(rows, non_blocking=True)


class Background:
    """One job at a time in a thread, or at once in this one. What it raises is raised by `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None], in_thread: bool) -> None:
        self.wait()
        if not in_thread:
            job()
            return

        def run() -> None:
            try:
                job()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True, name=WRITER)  # a training that dies does not wait for it
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> None:
        self.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

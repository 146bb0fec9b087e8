"""What processes that prepare data, and those that started them, do so that none outlives the other."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import multiprocessing.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def end_with_parent() -> None:
    """In a worker: end when the process that started it is gone, however it went, instead of holding memory and pipes for ever."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


@functools.cache  # once is enough
def end_daemons_at_exit() -> None:
    """In a process whose daemonic workers let a SIGTERM pass: multiprocessing sends one at exit, and then waits for them for ever."""

    def end() -> None:
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()

    multiprocessing.util.get_temp_dir()  # made now, workers share this process's: those that are killed would leave their own behind
    atexit.register(end)


@contextmanager
def hanging_is_an_error(name: str, workers: int, timeout: float) -> Iterator[None]:
    """DataLoader's report that no worker answered -> a TimeoutError for users."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader timed out" not in str(error):
            raise
        raise TimeoutError(
            f"{name}: no sample came from {workers} workers for {timeout:g} s. A file system or an object store may hang; "
            "raise the timeout if it is only slow"
        ) from error

"""Commands whose processes a test leaves behind in no case."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def process_group(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Started as a group of its own, stderr in stdout; at the end nothing of it is alive, however the test ends."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        for pid in descendants(process.pid):  # torchrun gives each of its ranks a group of its own
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # those whose parent is gone, too
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def descendants(pid: int) -> list[int]:
    """Of a process that lives; none of one that has ended."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found

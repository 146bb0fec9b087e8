"""Ranks whose first one is gone.

The first rank of a host starts the others (torchrun's agent does, where there is one) and ends them if one of them fails. If it fails
itself, in an exchange that NCCL then never ends, they would hold their GPUs until that exchange times out.
"""

from __future__ import annotations

import os
import threading
import time

LAST_WORDS = 5.0  # seconds


def end_with_what_started_this() -> None:
    """From now on, a rank that another process of this host started ends soon after that one, whatever it waits for."""
    if int(os.environ.get("LOCAL_RANK", "0")) > 0:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="orphan watch").start()


def _watch(started_by: int) -> None:
    while os.getppid() == started_by:
        time.sleep(1)
    time.sleep(LAST_WORDS)
    os._exit(1)

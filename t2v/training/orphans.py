"""Ranks whose first one is gone.

The first rank of a host starts the others (torchrun's agent starts all, where there is one) and ends them if one of them fails. If it dies
itself, they would hold their GPUs until the exchange in which they wait times out, or train on without anyone to end them.
"""

from __future__ import annotations

import os
import threading
import time

LAST_WORDS = 5.0  # seconds
STARTER = "T2V_FIRST_RANK"  # in the environment of the other ranks: the process that started them


def end_with_what_started_this() -> None:
    """From now on, a rank that the first one or torchrun started ends soon after that, whatever it waits for.

    Ranks that something else started, such as a shell that has no reason to stay, are left alone.
    """
    by_first_rank = "LOCAL_RANK" in os.environ and os.environ.get(STARTER) == str(os.getppid())
    if by_first_rank or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(os.getppid(),), daemon=True, name="orphan watch").start()
    else:
        os.environ[STARTER] = str(os.getpid())


def _watch(started_by: int) -> None:
    while os.getppid() == started_by:
        time.sleep(1)
    time.sleep(LAST_WORDS)
    os._exit(1)

"""A bad sample's fate: skipped, counted, and the end of the training when there are too many of them.

Anything that is not a BadSample (or an unreadable shard) is a bug and propagates.
"""

from __future__ import annotations

import errno
import resource
from collections import Counter, deque
from dataclasses import dataclass

from t2v.video import BadSample as BadSample

EXPECTED = frozenset({"filtered", "download_failed"})
"""Reasons that are counted and logged but are nobody's fault: the source's own filters, and links that were dead at download time."""


class DataQualityError(ValueError):
    """So much of the data is bad, or cannot be opened here, that training on the rest would be silently training on something else."""


class ShardError(Exception):
    """A shard that cannot be opened, or not be read to its end."""


def refuse_full_process(error: BaseException | None) -> None:
    """To be asked before a file counts as bad. Raises DataQualityError where it is the process that may not open another one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise DataQualityError(
                f"{error}: a process may have {limit} files open, and each of its readers keeps a shard open. Raise the limit "
                "(`ulimit -n`), or let each process have fewer readers: more workers, or a smaller data.*.num_readers"
            ) from error
        error = error.__cause__ or error.__context__


@dataclass(frozen=True)
class QualityLimits:
    """When to stop, per worker. Fractions count only what is bad beyond EXPECTED."""

    max_bad_fraction: float = 0.2  # of the samples in the window
    window: int = 2000  # samples
    min_samples: int = 200  # no fraction is judged before
    max_consecutive_bad: int = 200
    max_unreadable_shards: float = 0.05  # of the shards opened
    min_shards: int = 20  # opened before that fraction is judged


class QualityGuard:
    """Counts what one worker reads and raises DataQualityError beyond the limits."""

    def __init__(self, limits: QualityLimits) -> None:
        self.limits = limits
        self.window: deque[bool] = deque(maxlen=limits.window)  # was it bad?
        self.bad_in_window = 0
        self.consecutive = 0
        self.shards = self.unreadable = 0
        self.reasons: Counter[str] = Counter()
        self.last = ""
        self.idle: Counter[str] = Counter()  # source -> samples drawn since its last usable one, whatever the reason

    def good(self, source: str) -> None:
        self.consecutive = self.idle[source] = 0
        self._push(False)

    def bad(self, source: str, key: str, error: BadSample) -> None:
        self.idle[source] += 1
        if error.reason in EXPECTED:
            return
        self.consecutive += 1
        self.reasons[f"{source}/{error.reason}"] += 1
        self.last = f"{source}/{key}: {error}"
        self._push(True)
        if self.consecutive >= self.limits.max_consecutive_bad:
            self._stop(f"{self.consecutive} samples in a row are bad (limit max_consecutive_bad={self.limits.max_consecutive_bad})")
        seen, limit = len(self.window), self.limits.max_bad_fraction
        if seen >= self.limits.min_samples and self.bad_in_window > limit * seen:
            self._stop(f"{self.bad_in_window} of the last {seen} samples are bad (limit max_bad_fraction={limit})")

    def shard(self, source: str, url: str, error: ShardError | None) -> None:
        """One shard was opened and read (error None) or failed."""
        self.shards += 1
        if error is None:
            return
        self.unreadable += 1
        self.reasons[f"{source}/shard_error"] += 1
        self.last = f"{url}: {error}"
        limit = self.limits.max_unreadable_shards
        if self.shards >= self.limits.min_shards and self.unreadable > limit * self.shards:
            self._stop(f"{self.unreadable} of {self.shards} shards are unreadable (limit max_unreadable_shards={limit})")

    def empty_pass(self, source: str, nothing_there: bool = False) -> None:
        """A reader went through all its shards and no sample was usable. Its part of a small source may be a handful of samples, so the
        whole worker must have seen `window` samples without a usable one, too."""
        if nothing_there or self.idle[source] >= self.limits.window:
            self._stop(f"a pass over the shards of {source!r} gave no usable sample ({self.idle[source]} looked at since the last one)")

    def _push(self, bad: bool) -> None:
        if len(self.window) == self.window.maxlen:
            self.bad_in_window -= self.window[0]
        self.window.append(bad)
        self.bad_in_window += bad

    def _stop(self, what: str) -> None:
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common(5)) or "none counted"
        raise DataQualityError(
            f"{what}. Reasons: {reasons}. Last: {self.last or 'none'}. "
            "Look at them with `python -m t2v.inspect data=...`; mend the shards, filter them, or raise the limit in conf/data."
        )

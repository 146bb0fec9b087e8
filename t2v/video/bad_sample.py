"""Why a sample cannot be used."""

from __future__ import annotations


class BadSample(Exception):
    """A sample that cannot become a clip. `reason` is one of a small set of names that are counted; `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason

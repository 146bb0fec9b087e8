"""The ranks of a training or an evaluation that are connected, and what each of them says."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def connected() -> bool:
    """Whether this process is one of several ranks that exchange tensors; a single one may be, too."""
    return dist.is_available() and dist.is_initialized()


def from_all(mine: T) -> list[T]:
    """What every rank hands in, by rank: collective. This process's alone where ranks are not connected."""
    if not connected():
        return [mine]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    return ranks

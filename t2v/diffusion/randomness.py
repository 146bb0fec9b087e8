"""Random numbers keyed per sample, so that a result depends on neither batch size, nor GPU count, nor device.

A key is a tuple of ints and strings that names one draw: in training (seed, purpose, optimizer step, stream, global sample index),
in sampling (purpose, seed, prompt index). Everything is drawn on the CPU: the bits are the same whatever device uses them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from hashlib import blake2b
from typing import SupportsIndex

import torch
from torch import Tensor

Key = Sequence[SupportsIndex | str]


def seed_of(*key: SupportsIndex | str) -> int:
    """A 64-bit seed from the key, the same in every process, Python and machine (unlike `hash`). (1, 2) and ("1", 2) differ.

    torch's CPU generator uses the lower 32 bits of it.
    """
    text = ",".join(repr(part) if isinstance(part, str) else str(operator.index(part)) for part in key)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def generator_of(*key: SupportsIndex | str) -> torch.Generator:
    """A fresh CPU generator for one sample, for draws that come one after another (the steps of a stochastic sampler)."""
    return torch.Generator().manual_seed(seed_of(*key))


def normal(keys: Sequence[Key], shape: Sequence[int]) -> Tensor:
    """Standard normal noise for b samples, each from its own seed: (b *shape) float32 on the CPU."""
    noise = torch.empty((len(keys), *shape))
    generator = torch.Generator()  # seeded anew for each, in a third of the time that a new one takes
    for row, key in zip(noise, keys, strict=True):
        row.normal_(generator=generator.manual_seed(seed_of(*key)))
    return noise


def uniform(keys: Sequence[Key]) -> Tensor:
    """One number in [0, 1) a key: (b,) float32. Taken from the hash itself, whose upper 24 bits a float32 holds exactly."""
    return torch.tensor([(seed_of(*key) >> 40) * 2.0**-24 for key in keys], dtype=torch.float32)


def integers(keys: Sequence[Key], high: int) -> Tensor:
    """One integer in [0, high) a key: (b,) int64. From 64 bits of hash: the bias is below high / 2^64."""
    if high < 1:
        raise ValueError(f"integers below {high} were asked for; the bound must be 1 or more")
    return torch.tensor([seed_of(*key) % high for key in keys], dtype=torch.int64)

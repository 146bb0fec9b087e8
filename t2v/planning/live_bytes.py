"""Counts bytes and floating point operations while code runs on tensors without data, so that a laptop can run base_256.

Autograd keeps and frees storages of such tensors exactly as it does on a GPU; only the numbers in them are missing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

GRANULE = 512  # bytes: CUDA's caching allocator rounds every tensor up to a multiple


class LiveBytes(TorchDispatchMode):
    """Inside `with`, every new storage counts from its creation until it is freed.

    `now` and `at_peak` are bytes by kind of content, `peak` the most that was alive at once, `operations` the floating point operations of
    matrix products, convolutions and attention.
    """

    def __init__(self, already_there: Iterable[Tensor] = (), granule: int = GRANULE) -> None:
        """Views of tensors that are `already_there`, such as weights, are nothing new."""
        super().__init__()
        self.granule = granule
        self._there = {tensor.untyped_storage()._cdata for tensor in already_there}
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.live = self.peak = self.operations = 0
        self._kind = "work"
        self._known: dict[int, tuple[str, int]] = {}  # storage -> kind, bytes

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """What is created inside counts as `kind`."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._there:
            return
        size = -(-storage.nbytes() // self.granule) * self.granule
        self._known[key] = (self._kind, size)
        self.now[self._kind] += size
        self.live += size
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, self.now.copy()
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.now[kind] -= size
        self.live -= size

    def rename(self, tensor: Tensor, kind: str) -> None:
        """From now on the storage of `tensor` counts as `kind`."""
        key = tensor.untyped_storage()._cdata
        if key in self._known:
            before, size = self._known[key]
            self._known[key] = (kind, size)
            self.now[before] -= size
            self.now[kind] += size

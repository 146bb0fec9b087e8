"""Triton kernels for NVIDIA GPUs, one a file, each beside a plain twin in torch that says what it computes and runs everywhere else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

INSTALLED = find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class PlannedGPU:
    """A GPU that is not here. `autocast`: the type that autocast would use there, None without."""

    autocast: torch.dtype | None


planned_gpu: ContextVar[PlannedGPU | None] = ContextVar("planned_gpu", default=None)
"""Where set, tensors on the meta device go the kernels' way, so that t2v.plan counts what a GPU would keep; nothing is launched."""


class Fusable(nn.Module):
    """A layer that has a kernel, and computes the same without. `fused_kernels` of the network allows it."""

    fused_kernels = True

    def fused(self, x: Tensor) -> bool:
        """Whether the kernel runs: for tensors on a CUDA device, of at most 32 bits, where triton is installed."""
        here = (x.is_cuda and INSTALLED) or (x.is_meta and planned_gpu.get() is not None)
        return self.fused_kernels and here and x.dtype in DTYPES


def power_of_two(n: int) -> int:
    """The one at or above n, as Triton wants its tiles."""
    return 1 << (n - 1).bit_length()


def width_of_tile(size: int, *widths: int) -> int:
    """The first of the widths that divides the size, so that no lane is idle; else the first."""
    return next((width for width in widths if size % width == 0), widths[0])


def launch(kernel: Any, programs: int, on: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of the tensor `on`."""
    if not on.is_meta:
        with torch.cuda.device_of(on) if on.is_cuda else nullcontext():  # Triton's interpreter runs on the CPU
            kernel[(programs,)](*arguments, **options)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a layer's output is stored in: autocast's type where that is on, else the input's own."""
    planned = planned_gpu.get()
    if x.is_meta and planned is not None:
        return planned.autocast or x.dtype
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and x.dtype != torch.float64 else x.dtype


# Recomputation: what a kernel made is made again in the backward pass instead of being kept there for the matrix product that it fed.


class _Recipes:
    """During a forward pass: storage -> how its content is made, for as long as the storage lives."""

    def __init__(self) -> None:
        self.of_storage: dict[int, Callable[[], Tensor]] = {}

    def add(self, y: Tensor, recipe: Callable[[], Tensor]) -> None:
        storage = y.untyped_storage()
        self.of_storage[storage._cdata] = _Once(recipe)
        weakref.finalize(storage, self.of_storage.pop, storage._cdata)

    def pack(self, x: Tensor) -> Any:
        recipe = self.of_storage.get(x.untyped_storage()._cdata)
        return x if recipe is None else (recipe, x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        recipe, *view = packed
        return recipe().as_strided(*view)


class _Once:
    """A recipe whose result is shared by all who ask while one of them holds it."""

    def __init__(self, recipe: Callable[[], Tensor]) -> None:
        self.recipe = recipe
        self.made: Callable[[], Tensor | None] = lambda: None

    def __call__(self) -> Tensor:
        y = self.made()
        if y is None:
            y = self.recipe()
            self.made = weakref.ref(y)
        return y


_recipes: ContextVar[_Recipes | None] = ContextVar("recipes", default=None)


@contextmanager
def recomputed(active: bool) -> Iterator[None]:
    """Within, if `active`, the backward pass makes the kernels' outputs again: norms, activations and their dropout, no matrix product."""
    if not active:
        yield
        return
    recipes = _Recipes()
    token = _recipes.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, recipes.unpack):
            yield
    finally:
        _recipes.reset(token)


def remember(y: Tensor, recipe: Callable[[Tensor], None]) -> None:
    """`recipe` writes the content of y into a tensor like it."""
    recipes = _recipes.get()
    if recipes is not None:
        shape, dtype, device = y.shape, y.dtype, y.device

        def again() -> Tensor:
            made = torch.empty(shape, dtype=dtype, device=device)
            recipe(made)
            return made

        recipes.add(y, again)

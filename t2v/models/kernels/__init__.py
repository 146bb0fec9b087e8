"""Triton kernels for NVIDIA GPUs, one a file, each beside a plain twin in torch that says what it computes and runs everywhere else."""

from __future__ import annotations

from contextlib import nullcontext
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

"""The network's blocks through torch.compile, one by one: blocks of equal shapes share their code, so that the first step comes soon, and
sharding, hooks and recomputation stay outside."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from t2v.models.spatio_temporal import blocks_of

SHAPES_OF_A_KIND = 256
"""Kinds of blocks differ in width, streams in frames, micro-batches in size; torch's limit, 8, is below what one network needs."""


def compile_blocks(network: Any, backend: str) -> None:
    """In place, before the network is divided between ranks. Names of modules and weights do not change. The code is made when a block
    first sees a shape; what cannot be compiled whole raises an error then."""
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, SHAPES_OF_A_KIND)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 4 * SHAPES_OF_A_KIND)
    settings.optimize_ddp = False  # it would cut code where DDP's buckets end; blocks are small enough to exchange gradients in between
    blocks: list[nn.Module] = [network.transformer_in] if network.transformer_in is not None else []
    for block in (*blocks, *blocks_of(network)):
        # not block.compile(), which takes the hooks that gather and release weights (FSDP2) into the compiled code
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)


def require_compilable(network: Any, backend: str) -> None:
    """ValueError for what cannot go together with compiled blocks."""
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        raise ValueError(f"module.compile={backend} is unknown; torch.compile has {', '.join(torch.compiler.list_backends())}")
    for key, plain in (("fused_kernels", False), ("attention_backend", "sdpa")):
        if (value := network.config[key]) != plain:
            raise ValueError(
                f"module.compile={backend} makes its kernels from plain torch, which unet.{key}={str(value).lower()} is not: "
                f"set unet.{key}={str(plain).lower()}"
            )
    if network.gradient_checkpointing == "elementwise":
        raise ValueError(
            f"unet.gradient_checkpointing=elementwise recomputes what fused kernels write, and module.compile={backend} has none: "
            "use none, attention or all"
        )


def require_compiler(backend: str, device: torch.device) -> None:
    """ValueError where inductor's code cannot be made. It is C++ on a CPU; on a GPU Triton, which compiles its launcher as C."""
    if backend != "inductor":
        return
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(
            "module.compile=inductor needs triton on a GPU, which is not installed: pip install triton, or module.compile=null"
        )
    variable, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++",))
    wanted = (os.environ[variable],) if os.environ.get(variable) else usual
    if not any(shutil.which(name.split()[0]) for name in wanted):
        raise ValueError(
            f"module.compile=inductor needs a compiler, and this machine has no {' or '.join(wanted)}: install one, say where it is with "
            f"{variable}=PROGRAM, or module.compile=null"
        )

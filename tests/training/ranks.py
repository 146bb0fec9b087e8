"""Several ranks on one machine over gloo, forked from the test: no second start of Python, no command line."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {name: str(value) for name, value in values.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def start_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any) -> list[Any]:
    """Fork `world` processes that call `function(*arguments)`; what they return lands in <folder>/rank<N>.pt."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = [
        context.Process(target=_rank, args=(function, rank, world, port, folder, arguments), name=f"rank {rank}") for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def on_ranks(function: Callable[..., Any], world: int, folder: Path, *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(*arguments)` on every rank at once; what each returned. Fails with the ranks' tracebacks."""
    processes = start_ranks(function, world, folder, *arguments)
    for process in processes:
        process.join(timeout)
    hung = [process.name for process in processes if process.is_alive()]
    for process in processes:
        process.kill()
    failures = [path.read_text() for path in sorted(folder.glob("rank*.txt"))]
    assert not hung, f"{hung} did not end; {failures}"
    assert not failures, "\n".join(failures)
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(function: Callable[..., Any], rank: int, world: int, port: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment(rank, world, port))
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), folder / f"rank{rank}.pt")
    except BaseException:
        (folder / f"rank{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

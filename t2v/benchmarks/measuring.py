"""How this machine is timed: rounds, medians and spread, counted operations, measured ceilings, peak memory, a table of kernels.

A GPU's rounds are timed by CUDA events between one call and the next, without waiting in between, as in a training loop.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2v.training.operations import ceiling_tflop_per_s

Row = dict[str, Any]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_peer(versus: str | None, compile_peer: bool) -> None:
    """ValueError for a peer that does not exist."""
    if versus not in (None, "diffusers"):
        raise ValueError(f"versus={versus} is unknown; the peer is diffusers")
    if compile_peer and versus is None:
        raise ValueError("compile_peer=true has no peer to compile: add versus=diffusers")


@dataclass(frozen=True)
class Timing:
    milliseconds: tuple[float, ...]  # of each round
    first_s: float  # of the very first call, with all compiling and choosing of kernels

    @property
    def median_ms(self) -> float:
        return statistics.median(self.milliseconds)

    @property
    def row(self) -> Row:
        """Median and quartiles."""
        times = sorted(self.milliseconds)
        low, high = times[(len(times) - 1) // 4], times[-1 - (len(times) - 1) // 4]
        return {"median_ms": self.median_ms, "low_ms": low, "high_ms": high, "rounds": len(times), "first_s": self.first_s}


def timed(call: Callable[[], Any], device: torch.device, *, rounds: int, seconds: float, warmup: int = 2) -> Timing:
    """One call, `warmup` more, then at most `rounds` until `seconds` are over, which begin after the first call; at least one."""
    if rounds < 1 or seconds <= 0:
        raise ValueError(f"rounds={rounds} and seconds={seconds} must be above 0")
    began = time.perf_counter()
    call()
    synchronize(device)
    first_s = time.perf_counter() - began
    deadline = time.perf_counter() + seconds
    for _ in range(warmup):
        if time.perf_counter() < deadline:
            call()
    synchronize(device)
    marks = [_mark(device)]
    while len(marks) == 1 or (len(marks) <= rounds and time.perf_counter() < deadline):
        call()
        marks.append(_mark(device))
    synchronize(device)
    if device.type == "cuda":
        return Timing(tuple(a.elapsed_time(b) for a, b in itertools.pairwise(marks)), first_s)
    return Timing(tuple(1e3 * (b - a) for a, b in itertools.pairwise(marks)), first_s)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def attempt(known: Row, measure: Callable[[], Row], may_fail: bool = False) -> Row:
    """`known` and what `measure` adds. Too little GPU memory is a result, as is any error of a peer's (`may_fail`). Frees everything."""
    free()
    try:
        return known | measure()
    except torch.OutOfMemoryError:
        outcome: Row = {"out_of_memory": True}
    except RuntimeError as error:
        if not may_fail:
            raise
        outcome = {"failed": " ".join(str(error).split())[:200]}
    finally:
        free()
    return known | outcome


def free() -> None:
    """GPU memory that nothing holds, or only cycles, and compiled code; the count of the peak begins anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # so that the next shape is compiled for itself, not for all shapes
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device) -> Row:
    """The most that tensors held since `free`; torch does not know it for a CPU."""
    return {"peak_GB": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def ceilings(device: torch.device, rounds: int = 20) -> dict[str, float]:
    """What this GPU reaches at best: a bf16 product of random 8192 x 8192 matrices, and copying 2 GiB (read and written). {} on a CPU."""
    if device.type != "cuda":
        return {}
    source = torch.empty(2**31, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, rounds=rounds, seconds=5, warmup=5).median_ms
    best = ceiling_tflop_per_s(device)
    assert best is not None
    return {"tflop_per_s": best, "copy_TB_per_s": 2 * source.numel() / copy / 1e9}


def speed(timing: Timing, items: int, tflop_per_item: float, best: Mapping[str, float], unit: str = "clips") -> Row:
    """Rate, TFLOP/s and the share of the ceiling for a call on `items` clips or images."""
    seconds = timing.median_ms / 1e3
    rate = items * tflop_per_item / seconds
    row: Row = {f"{unit}_per_s": items / seconds, **timing.row, "tflop_per_s": rate}
    return row | ({"of_ceiling": f"{rate / best['tflop_per_s']:.1%}"} if best else {})


def write_profile(call: Callable[[], Any], device: torch.device, path: Path) -> None:
    """One call under torch's profiler, as text: all kernels of a GPU by time, then operators by the shapes they work on."""
    from torch.profiler import ProfilerActivity, profile

    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])], record_shapes=True) as prof:
        call()
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    if gpu:
        kernels = [event for event in prof.key_averages() if str(event.device_type).endswith("CUDA")]
        kernels.sort(key=lambda event: -event.self_device_time_total)
        total = sum(event.self_device_time_total for event in kernels)
        parts.append(f"{total / 1e3:.2f} ms of kernels\n{'ms':>10} {'share':>7} {'calls':>7}  kernel")
        parts += [
            f"{e.self_device_time_total / 1e3:10.3f} {e.self_device_time_total / max(total, 1e-9):7.1%} {e.count:7d}  {e.key[:200]}"
            for e in kernels[:150]
        ]
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    averages = prof.key_averages(group_by_input_shape=True)
    parts.append(averages.table(sort_by=order, row_limit=80, max_name_column_width=60, max_shapes_column_width=90))
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")

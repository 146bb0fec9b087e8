"""Measure: speed, memory, and whether numbers are right.

    python -m t2v.benchmark what=train versus=diffusers      optimizer steps of the full-size network (a small one without a GPU)
    python -m t2v.benchmark what=image versus=diffusers      the same on images
    python -m t2v.benchmark what=sample|encode               prompts to videos; frames to latents and back
    python -m t2v.benchmark what=sample unet=shapes versus=diffusers +options.size=8      on a laptop
    python -m t2v.benchmark what=parity                      is the network diffusers' network, are the attention backends exact
    python -m t2v.benchmark what=unet +options.threads=2     forward and backward against diffusers' class
    python -m t2v.benchmark what=decode                      how fast clips are read
    python -m t2v.benchmark what=loader|memory|shuffle       what the loader adds, holds, and how well it mixes

Each `what` is a function of t2v/benchmarks whose result is rows; its arguments are `+options.NAME=VALUE`. See conf/benchmark.yaml.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import logging
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from t2v.configuration import entry

WHAT = {
    "train": "train:train",
    "image": "train:image",
    "sample": "sample:sample",
    "encode": "encode:encode",
    "parity": "parity:parity",
    "unet": "unet:unet",
    "decode": "decode:decode",
    "loader": "loader:loader",
    "memory": "loader:memory",
    "shuffle": "loader:shuffle",
}  # module of t2v.benchmarks:function
COLUMN = 9  # characters at least, as in "diffusers" and most numbers


def benchmark(cfg: DictConfig) -> None:
    if cfg.what not in WHAT:
        raise ValueError(f"what={cfg.what} is unknown; there are {', '.join(WHAT)}")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    module, name = WHAT[cfg.what].split(":")
    function = getattr(importlib.import_module(f"t2v.benchmarks.{module}"), name)
    options: Any = OmegaConf.to_container(cfg.options, resolve=True)
    if cfg.get("unet") is not None:
        options["config"] = {name: value for name, value in OmegaConf.to_container(cfg.unet, resolve=True).items() if name != "_target_"}  # type: ignore[union-attr]
    if cfg.versus is not None:
        options["versus"] = cfg.versus
    signature = inspect.signature(function)
    unknown = sorted(options.keys() - signature.parameters.keys())
    if unknown:
        raise ValueError(f"what={cfg.what} has no option {unknown[0]}; it has {', '.join(signature.parameters)}")
    for name, value in options.items():
        check_numbers(name, value, signature.parameters[name].default)
    if cfg.output is not None:
        from t2v.checkpoint import require_writable

        require_writable(Path(cfg.output).parent)  # before anything is measured
    here = machine()
    print("  ".join(f"{name} {version}" for name, version in here.items()), flush=True)
    rows: list[dict[str, Any]] = []
    for row in function(**options):
        print(line(row, rows[-1] if rows else {}), flush=True)  # at once: what was measured before an error cost as much time
        rows.append(row)
    if cfg.output is not None:
        given = {name: parameter.default for name, parameter in signature.parameters.items()} | options
        Path(cfg.output).write_text(json.dumps({"what": cfg.what, "options": given, "machine": here, "rows": rows}, indent=1) + "\n")
    if not all(row.get("fine", True) for row in rows):
        raise ValueError("a bound is not kept: see the rows with fine False")


def check_numbers(name: str, value: Any, default: Any) -> None:
    """Raise ValueError for an option that is no list, switch or number where its default is one, and for numbers that are not above 0."""
    if isinstance(default, tuple) and not isinstance(value, list):
        raise ValueError(f"options.{name}={value} is to be a list: options.{name}=[{value}]")
    if isinstance(default, bool) != isinstance(value, bool) and default is not None:
        raise ValueError(f"options.{name}={value} is to be {'true or false' if isinstance(default, bool) else 'no switch'}")
    for number in value if isinstance(value, list) else [value]:
        is_number = isinstance(number, int | float)
        if (is_number and not isinstance(number, bool) and number <= 0) or (isinstance(default, int | float) and not is_number):
            raise ValueError(f"options.{name}={value} is to be a number above 0")


def line(row: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """A row under its columns' names, which are said anew wherever they are not those of the row before."""
    widths = [max(len(name), COLUMN) for name in row]
    said = [] if tuple(row) == tuple(before) else [list(row)]
    cells = [*said, [shown(value) for value in row.values()]]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(some, widths, strict=True)).rstrip() for some in cells)


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, str]:
    """Hardware and versions."""
    import torch

    gpu = torch.cuda.is_available()
    found = {
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
    }
    if gpu:
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in ("diffusers", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


main = entry("benchmark")(benchmark)

if __name__ == "__main__":
    main()

"""Measure: speed, memory, and whether numbers are right.

    python -m t2v.benchmark what=parity                      is the network diffusers' network, are the attention backends exact
    python -m t2v.benchmark what=unet +options.threads=2     forward and backward against diffusers' class
    python -m t2v.benchmark what=decode                      how fast clips are read
    python -m t2v.benchmark what=loader|memory|shuffle       what the loader adds, holds, and how well it mixes

Each `what` is a function of t2v/benchmarks that returns rows; its arguments are `+options.NAME=VALUE`. See conf/benchmark.yaml.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import os
import platform
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from t2v.configuration import entry

WHAT = {
    "parity": "parity:parity",
    "unet": "unet:unet",
    "decode": "decode:decode",
    "loader": "loader:loader",
    "memory": "loader:memory",
    "shuffle": "loader:shuffle",
}  # module of t2v.benchmarks:function


def benchmark(cfg: DictConfig) -> None:
    if cfg.what not in WHAT:
        raise ValueError(f"what={cfg.what} is unknown; there are {', '.join(WHAT)}")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    module, name = WHAT[cfg.what].split(":")
    function = getattr(importlib.import_module(f"t2v.benchmarks.{module}"), name)
    options: Any = OmegaConf.to_container(cfg.options, resolve=True)
    unknown = sorted(options.keys() - inspect.signature(function).parameters.keys())
    if unknown:
        raise ValueError(f"what={cfg.what} has no option {unknown[0]}; it has {', '.join(inspect.signature(function).parameters)}")
    rows = function(**options)
    for row in rows:
        print("  ".join(f"{key} {shown(value)}" for key, value in row.items()))
    if cfg.output is not None:
        path = Path(cfg.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"what": cfg.what, "options": options, "machine": machine(), "rows": rows}, indent=1) + "\n")
    if not all(row.get("fine", True) for row in rows):
        raise ValueError("a bound is not kept: see the rows with fine False")


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, str]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "python": platform.python_version(), "gpu": gpu, "threads": str(torch.get_num_threads())}


main = entry("benchmark")(benchmark)

if __name__ == "__main__":
    main()

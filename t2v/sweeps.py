"""The table of a sweep: one row per job with its overrides and its metric, by any launcher.

Jobs may run in other processes or on other machines, so each leaves a small file in the sweep's folder; the process that started the sweep
reads them at its end.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

FOLDER = "T2V_SWEEP"  # environment variable: SLURM hands it on to the jobs, queued again or not


class SweepTable(Callback):
    """Hydra's callback: hydra.callbacks.sweep_table."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir) / "sweeps" / time.strftime("%Y-%m-%d_%H-%M-%S")
        os.environ[FOLDER] = str(folder.absolute())

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if FOLDER not in os.environ or os.environ.get("SLURM_PROCID", "0") != "0":
            return
        folder = Path(os.environ[FOLDER])
        folder.mkdir(parents=True, exist_ok=True)
        finished = job_return.status == JobStatus.COMPLETED
        row = {
            "job": int(config.hydra.job.num),
            "overrides": " ".join(job_return.overrides or []),
            "metric": str(config.get("metric")),
            "value": job_return.return_value if finished else None,
            "result": "" if finished else type(getattr(job_return, "_return_value", None)).__name__,
            "folder": str(config.hydra.runtime.output_dir),
        }
        path = folder / f"job-{row['job']:04}.json"
        path.with_suffix(".writing").write_text(json.dumps(row))
        path.with_suffix(".writing").replace(path)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(os.environ.pop(FOLDER))
        rows = [json.loads(path.read_text()) for path in sorted(folder.glob("job-*.json"))]
        if rows:
            (folder / "table.md").write_text(table(rows) + "\n")
            print(f"\n{table(rows)}\n\nsweep    {folder / 'table.md'}", flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown. Overrides that all jobs share are left out."""
    sets = [set(row["overrides"].split()) for row in rows]
    shared = set.intersection(*sets) if len(rows) > 1 else set()
    lines = [f"| job | overrides | {rows[0]['metric']} | run |", "|---|---|---|---|"]
    for row in rows:
        own = " ".join(part for part in row["overrides"].split() if part not in shared)
        value = row["value"]
        shown = f"{value:.4g}" if isinstance(value, (int, float)) else (row["result"] or "-")
        lines.append(f"| {row['job']} | {own} | {shown} | {row['folder']} |")
    return "\n".join(lines)

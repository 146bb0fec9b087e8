"""The table of a sweep: one row per job with its overrides and its metrics, by any launcher; means over seeds, and how far they are from
those of a reference; curves over training.

Jobs may run in other processes or on other machines, so each leaves a small file in the sweep's folder; the process that started the sweep
reads them at its end.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from t2v.plots import Curve, figure, mean, scores_of

FOLDER = "T2V_SWEEP"  # environment variable: SLURM hands it on to the jobs, queued again or not


class SweepTable(Callback):
    """Hydra's callback: hydra.callbacks.sweep_table. `columns` are metrics beside the sweep's own, such as score/sign; of those that
    scores.jsonl holds at several steps a figure is drawn. `reference`: the override with whose jobs the others are
    compared, such as optimizer.lr=1e-3."""

    def __init__(self, columns: Sequence[str] = (), reference: str | None = None) -> None:
        self.columns = list(columns)
        self.reference = reference

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
            "metric": str(config.get("metric") or "no metric"),
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
        if not rows:
            return
        text = table(rows, self.columns)
        if self.reference is not None:
            text += f"\n\n{comparison(rows, self.columns, self.reference)}"
        (folder / "table.md").write_text(text + "\n")
        print(f"\n{text}\n\nsweep    {folder / 'table.md'}", flush=True)
        if panels := curves(rows, self.columns):
            (folder / "curves.svg").write_text(figure(panels), encoding="utf-8")
            print(f"curves   {folder / 'curves.svg'}", flush=True)


def own_overrides(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What tells each job from the others: overrides that all of them share are left out."""
    every = [row["overrides"].split() for row in rows]
    shared = set.intersection(*map(set, every)) if len(rows) > 1 else set()
    return [[part for part in parts if part not in shared] for parts in every]


def without_seed(parts: Sequence[str]) -> str:
    return " ".join(part for part in parts if not part.startswith("seed="))


def measured(row: Mapping[str, Any], columns: Sequence[str]) -> list[float | None]:
    """The sweep's metric, then the columns, of a finished job."""
    path = Path(row["folder"]) / "results.json"
    metrics = json.loads(path.read_text())["metrics"] if columns and not row["result"] and path.is_file() else {}
    return [row["value"], *(metrics.get(name) for name in columns)]


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and not math.isnan(value) else "-"


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Markdown: the jobs, then means (lowest to highest) over seeds where jobs differ in nothing else."""
    columns = [name for name in columns if name != rows[0]["metric"]]
    names = [rows[0]["metric"], *columns]
    lines = [f"| job | overrides | {' | '.join(names)} | run |", "|" + "---|" * (len(names) + 3)]
    groups: dict[str, list[list[float | None]]] = {}
    for row, own in zip(rows, own_overrides(rows)):
        values = measured(row, columns)
        cells = [shown(value) for value in values]
        cells[0] = row["result"] or cells[0]
        lines.append(f"| {row['job']} | {' '.join(own)} | {' | '.join(cells)} | {row['folder']} |")
        groups.setdefault(without_seed(own), []).append(values)
    if len(groups) < len(rows):
        lines += ["", f"| overrides | seeds | {' | '.join(names)} |", "|" + "---|" * (len(names) + 2)]
        for group, jobs in groups.items():
            cells = [spread([value for value in column if value is not None]) for column in zip(*jobs)]
            lines.append(f"| {group or 'all'} | {len(jobs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{sum(values) / len(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def comparison(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], reference: str) -> str:
    """Markdown: each mean over seeds with its standard error, and its distance from that of the jobs which differ in `reference` alone, in
    standard errors of that distance: of two independent means, and of the differences between jobs of one seed (paired)."""
    every = own_overrides(rows)
    if not any(reference in own for own in every):
        return f"No job is {reference}: there is nothing to compare the others with."
    names = [rows[0]["metric"], *(name for name in columns if name != rows[0]["metric"])]
    key = reference.split("=")[0] + "="
    groups: dict[str, dict[str, list[float | None]]] = {}  # overrides -> seed -> metrics
    partner: dict[str, str] = {}
    for row, own in zip(rows, every):
        group, seed = without_seed(own), next((part for part in own if part.startswith("seed=")), "")
        groups.setdefault(group, {})[seed] = measured(row, columns)
        partner[group] = without_seed([reference if part.startswith(key) else part for part in own])
    heads = ("overrides", "metric", "mean", "standard error", "difference", "in standard errors", "paired by seed")
    lines = [f"Differences are from {reference}.", "", f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for k, name in enumerate(names):
        of_seed = {group: {seed: x for seed, values in jobs.items() if (x := values[k]) is not None} for group, jobs in groups.items()}
        for group, own_values in of_seed.items():
            own_mean, error = mean_and_error(list(own_values.values()))
            cells = [shown(own_mean), shown(error), "", "", ""]
            if group != partner[group]:
                others = of_seed.get(partner[group], {})
                other_mean, other_error = mean_and_error(list(others.values()))
                paired = mean_and_error([own_values[seed] - others[seed] for seed in own_values if seed in others])
                difference = own_mean - other_mean
                cells[2:] = [shown(difference), in_errors(difference, math.hypot(error, other_error)), in_errors(*paired)]
            lines.append(f"| {' | '.join([group, name, *cells])} |")
    return "\n".join(lines)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; not a number where there are too few values."""
    mean = fmean(values) if values else math.nan
    return mean, stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def in_errors(difference: float, error: float) -> str:
    """A difference in standard errors; equal is 0, whatever the error."""
    if difference == 0:
        return "0"
    return f"{difference / error:+.2f}" if error > 0 else "-"


def curves(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Metric -> jobs, those that differ in their seed alone as their mean -> curve. Metrics that were measured once are left out."""
    panels: dict[str, dict[str, Curve]] = {}
    for metric in dict.fromkeys([rows[0]["metric"], *columns]):
        name, _, attribute = metric.rpartition("/")
        groups: dict[str, list[Curve]] = {}
        for row, own in zip(rows, own_overrides(rows)):
            try:
                curve = scores_of(Path(row["folder"]), name).get(attribute, [])
            except ValueError:  # a job that failed, or scores of another name only
                continue
            if len(curve) > 1:
                groups.setdefault(without_seed(own) or "all", []).append(curve)
        if groups:
            panels[metric] = {label: mean(jobs) for label, jobs in groups.items()}
    return panels

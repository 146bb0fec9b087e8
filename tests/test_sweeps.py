"""The table, the means over seeds and the curves that end a sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from t2v.sweeps import comparison, curves, table


def job(folder: Path, number: int, overrides: str, **metrics: float) -> dict[str, Any]:
    """A finished job: its row, its results and its scores at two steps."""
    folder = folder / str(number)
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
    lines = [{"step": step, "score": {"sign": {"accuracy": metrics["score/sign"] * step / 20}}} for step in (10, 20)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"job": number, "overrides": f"experiment=shapes {overrides}", "metric": "score/all", "result": "", "folder": str(folder)}
    return row | {"value": metrics["score/all"]}


def test_table_of_two_jobs_one_of_which_failed() -> None:
    rows = [
        {"job": 0, "overrides": "experiment=shapes unet=a", "metric": "score/all", "value": 0.25, "result": "", "folder": "a"},
        {"job": 1, "overrides": "experiment=shapes unet=b", "metric": "score/all", "value": None, "result": "ValueError", "folder": "b"},
    ]
    assert table(rows).splitlines() == [
        "| job | overrides | score/all | run |",
        "|---|---|---|---|",
        "| 0 | unet=a | 0.25 | a |",
        "| 1 | unet=b | ValueError | b |",
    ]


def test_columns_and_means_over_seeds(tmp_path: Path) -> None:
    values = ((0.1, 0.5), (0.3, 0.7), (0.5, 1.0))
    rows = [job(tmp_path, k, f"unet={'ab'[k // 2]} seed={k % 2}", **{"score/all": a, "score/sign": s}) for k, (a, s) in enumerate(values)]
    lines = table(rows, ["score/all", "score/sign", "val/none"]).splitlines()
    assert lines[0] == "| job | overrides | score/all | score/sign | val/none | run |"
    assert lines[2] == f"| 0 | unet=a seed=0 | 0.1 | 0.5 | - | {tmp_path / '0'} |"
    assert lines[-2:] == [
        "| unet=a | 2 | 0.2 (0.1 to 0.3) | 0.6 (0.5 to 0.7) | - |",
        "| unet=b | 1 | 0.5 (0.5 to 0.5) | 1 (1 to 1) | - |",
    ]
    assert curves(rows, ["score/sign"]) == {"score/sign": {"unet=a": [(10, 0.3), (20, 0.6)], "unet=b": [(10, 0.5), (20, 1.0)]}}


def test_means_are_compared_with_those_of_a_reference(tmp_path: Path) -> None:
    values = {"plain": (1.0, 2.0, 3.0), "same": (1.0, 2.0, 3.0), "higher": (1.1, 2.3, 3.2), "failed": (0.5, 9.0, 9.0)}
    rows = [
        job(tmp_path, 3 * k + seed, f"how={how} seed={seed}", **{"score/all": value, "score/sign": 0.5})
        for k, (how, of_seed) in enumerate(values.items())
        for seed, value in enumerate(of_seed)
    ]
    for row in rows[-2:]:
        row["value"] = None
    lines = comparison(rows, ["score/sign"], "how=plain").splitlines()
    assert lines[4:8] == [
        "| how=plain | score/all | 2 | 0.5774 |  |  |  |",
        "| how=same | score/all | 2 | 0.5774 | 0 | 0 | 0 |",
        "| how=higher | score/all | 2.2 | 0.6083 | 0.2 | +0.24 | +3.46 |",  # 0.2 / hypot(0.577, 0.608), 0.2 / (0.1 / 3 ** 0.5)
        "| how=failed | score/all | 0.5 | - | -1.5 | - | - |",
    ]
    assert lines[8] == "| how=plain | score/sign | 0.5 | 0 |  |  |  |"
    assert "No job is how=other" in comparison(rows, [], "how=other")


def test_jobs_without_a_metric_show_their_columns(tmp_path: Path) -> None:
    rows = [
        job(tmp_path, k, f"unet={'ab'[k]}", **{"score/all": 0.0, "score/sign": 0.5}) | {"metric": "no metric", "value": None}
        for k in range(2)
    ]
    assert table(rows, ["score/sign"]).splitlines()[2].startswith("| 0 | unet=a | - | 0.5 |")

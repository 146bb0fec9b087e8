"""Curves from scores.jsonl, as SVG."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from t2v.plots import HEIGHT, WIDTH, figure, mean, scores_of, ticks

SVG = "{http://www.w3.org/2000/svg}"


def run(folder: Path, *records: tuple[str, int, dict[str, float]]) -> Path:
    folder.mkdir(parents=True)
    lines = [{"name": name, "step": step, "score": {k: {"accuracy": v} for k, v in score.items()}} for name, step, score in records]
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(svg).iter(f"{SVG}polyline")
    return [[tuple(map(float, point.split(","))) for point in line.attrib["points"].split()] for line in lines]  # type: ignore[misc]


def test_scores_are_read_by_name_and_in_the_order_of_steps(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", ("score", 20, {"sign": 0.5}), ("other", 20, {"sign": 1.0}), ("score", 10, {"sign": 0.1}))
    assert scores_of(folder) == {"sign": [(10, 0.1), (20, 0.5)]}
    with pytest.raises(ValueError, match="no score named 'none'"):
        scores_of(folder, "none")
    with pytest.raises(ValueError, match="does not exist"):
        scores_of(tmp_path)


def test_lines_lie_where_their_values_are() -> None:
    svg = figure({"sign": {"a < b": [(0, 0.0), (50, 0.25), (100, 1.0)], "gap": [(0, 1.0), (50, math.nan), (100, 1.0)]}})
    assert points(svg) == [[(0, HEIGHT), (WIDTH / 2, 0.75 * HEIGHT), (WIDTH, 0)], [(0, 0), (WIDTH, 0)]]
    texts = [element.text for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]
    assert "a < b" in texts
    assert "100" in texts


def test_means_and_ticks() -> None:
    assert mean([[(1, 0.0), (2, 0.5)], [(2, 1.0), (3, 1.0)]]) == [(2, 0.75)]
    for last in (1, 7, 10, 54, 56, 860, 9999, 10_000):
        marks = ticks(last)
        assert 3 <= len(marks) <= 6, (last, marks)
        assert marks[-1] <= last


def test_the_command_draws_runs_and_attributes(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, ("score", 10, {"axis": 0.5, "sign": 0.5}), ("score", 20, {"axis": 1.0, "sign": 0.5})) for name in "ab"]
    root = str(Path(__file__).parents[1])

    def draw(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "t2v.plots", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=root)

    assert draw(tmp_path / "plot.svg", *runs).returncode == 0
    assert len(points((tmp_path / "plot.svg").read_text())) == 4
    assert draw(tmp_path / "plot.svg", *runs, "sign").returncode == 0
    assert len(points((tmp_path / "plot.svg").read_text())) == 2
    assert draw(runs[0]).stderr.startswith("error: say where to draw")

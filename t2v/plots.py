"""Curves of scores over a training, drawn as SVG; no plotting library is needed, and a browser or a README shows it.

    python -m t2v.plots plot.svg experiments/shapes_gpu/runs/*                  one panel a run, one line an attribute
    python -m t2v.plots plot.svg experiments/shapes_gpu/runs/* axis sign        one panel an attribute, one line a run

Reads the runs' scores.jsonl, as callbacks.score writes them.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

SCORES = "scores.jsonl"
ATTRIBUTES = ("colour", "shape", "background", "direction", "speed", "axis", "sign", "steady", "all")
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#555555", "#bcbd22")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 330, 200, 44, 30, 38, 150  # pixels of a panel's axes and of what is around them

Curve = Sequence[tuple[float, float]]  # (step, value), by step


def scores_of(run: Path, name: str = "score") -> dict[str, list[tuple[int, float]]]:
    """Attribute -> [(step, share that is right)] of the scores of that name. A step that was scored twice counts as it was the last time.

    Raises ValueError where the run has none.
    """
    path = run / SCORES
    if not path.is_file():
        raise ValueError(f"{path} does not exist: give runs that were scored (callbacks=shapes)")
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record.get("name", "score") == name:
            for attribute, row in record["score"].items():
                curves[attribute][record["step"]] = row["accuracy"]
    if not curves:
        raise ValueError(f"{path} holds no score named {name!r}")
    return {attribute: sorted(points.items()) for attribute, points in curves.items()}


def mean(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """Of several seeds, at the steps that all of them have."""
    values = [dict(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(value) for value in values)))
    return [(step, sum(value[step] for value in values) / len(values)) for step in shared]


def figure(panels: Mapping[str, Mapping[str, Curve]], columns: int = 3) -> str:
    """SVG: a panel for each title, in it a line for each label over steps, all from 0 to 1; one legend for all."""
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    colour = {label: COLOURS[k % len(COLOURS)] for k, label in enumerate(labels)}
    columns = min(columns, len(panels))
    wide, high = LEFT + WIDTH + 16, TOP + HEIGHT + BOTTOM
    right = columns * wide
    legend = max([LEGEND, *(40 + 7 * len(label) for label in labels)])
    height = max(-(-len(panels) // columns) * high, TOP + 18 * len(labels))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + legend}" height="{height}" font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for k, (title, lines) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({k % columns * wide + LEFT},{k // columns * high + TOP})">')
        parts += [*panel(title, lines, colour), "</g>"]
    for k, label in enumerate(labels):
        y = TOP + 18 * k
        parts.append(f'<path d="M{right} {y}h22" stroke="{colour[label]}" stroke-width="2"/>')
        parts.append(f'<text x="{right + 28}" y="{y + 4}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(title: str, lines: Mapping[str, Curve], colour: Mapping[str, str]) -> list[str]:
    last = max((step for curve in lines.values() for step, _ in curve), default=1) or 1
    parts = [f'<text x="{WIDTH / 2}" y="-10" text-anchor="middle" font-weight="bold">{escape(title)}</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = HEIGHT * (1 - share)
        parts.append(f'<path d="M0 {y:g}h{WIDTH}" stroke="#ddd"/><text x="-6" y="{y + 4:g}" text-anchor="end">{share:g}</text>')
    for step in ticks(last):
        x = WIDTH * step / last
        parts.append(
            f'<path d="M{x:.1f} {HEIGHT}v4" stroke="black"/><text x="{x:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{step:g}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 31}" text-anchor="middle">optimizer steps</text>')
    for label, curve in lines.items():
        points = [(WIDTH * step / last, HEIGHT * (1 - value)) for step, value in curve if not math.isnan(value)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour[label]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour[label]}"/>' for x, y in points]
    return parts


def ticks(last: float) -> list[float]:
    """Three to six round numbers from 0 to `last`."""
    unit = 10 ** math.floor(math.log10(last))
    step = next(unit * part for part in (0.2, 0.5, 1, 2) if last / (unit * part) <= 5.5)
    return [step * k for k in range(int(last / step + 1e-9) + 1)]


def main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2 or not arguments[0].endswith(".svg"):
        raise ValueError("say where to draw and what: python -m t2v.plots plot.svg RUN [RUN ...] [attribute ...]")
    attributes = [argument for argument in arguments[1:] if argument in ATTRIBUTES]
    runs = {Path(argument).name: scores_of(Path(argument)) for argument in arguments[1:] if argument not in ATTRIBUTES}
    if attributes:
        panels = {attribute: {name: curves[attribute] for name, curves in runs.items()} for attribute in attributes}
    else:
        panels = dict(runs)
    Path(arguments[0]).write_text(figure(panels), encoding="utf-8")


if __name__ == "__main__":
    if {"--help", "-h"} & set(sys.argv[1:]):
        sys.exit(print(__doc__))
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""results.json, tables, and the published numbers that stand beside ours. What is not comparable does not get into one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from t2v.evaluation.protocol import replace_file
from t2v.evaluation.scores import Score

NETWORK_UNKNOWN = "network not named"

PUBLISHED: dict[str, dict[str, tuple[float, str]]] = {  # MSR-VTT, zero-shot; (value, what differs or is not known)
    "ModelScopeT2V, the paper's Table 1": {
        "fid_vid": (11.09, NETWORK_UNKNOWN),
        "fvd": (550, "2,048 videos"),
        "clipsim": (0.2930, "CLIP not named, all captions"),
    },
    "the same weights, measured by VideoDirectorGPT": {
        "fid_vid": (12.32, NETWORK_UNKNOWN),
        "fvd": (683, "2,990 prompts"),
        "clipsim": (0.2909, "2,990 prompts"),
    },
    "the same weights, measured by FETV": {"fid_vid": (68.9, "Inception, 1,024 other videos"), "fvd": (674, "1,024 other videos")},
    "Make-A-Video": {"fid_vid": (13.17, NETWORK_UNKNOWN), "clipsim": (0.3049, "all captions")},
    "Video LDM": {"clipsim": (0.2929, "ViT-B/32, 2,990 prompts")},
    "CogVideo (English)": {"fid_vid": (23.59, NETWORK_UNKNOWN), "fvd": (1294, ""), "clipsim": (0.2631, "")},
    "CogVideo (Chinese)": {"fid_vid": (24.78, NETWORK_UNKNOWN), "clipsim": (0.2614, "")},
    "MagicVideo": {"fvd": (1290, "")},
    "NUWA": {"fid_vid": (47.68, NETWORK_UNKNOWN), "clipsim": (0.2439, "")},
}
COLUMNS = {"fid_vid": "FID-vid (its network in brackets)", "fvd": "FVD", "clipsim": "CLIPSIM"}


class NotComparable(ValueError):
    """Numbers of different videos, weights or recipes."""


@dataclass(frozen=True)
class Results:
    """One evaluation. `subject` says what was measured, `unverified` which weights nobody vouched for."""

    subject: str
    protocol: Mapping[str, Any]
    manifest: str
    scores: tuple[Score, ...]
    details: Mapping[str, Any]
    unverified: tuple[str, ...] = ()

    def write(self, path: Path) -> None:
        content = {"format": 1, "subject": self.subject, "protocol": dict(self.protocol), "manifest": self.manifest}
        content |= {"scores": [score.plain() for score in self.scores], "details": dict(self.details), "unverified": list(self.unverified)}
        replace_file(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())

    @staticmethod
    def read(path: Path) -> Results:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {field.name for field in fields(Score)}
            scores = tuple(Score(**{key: value for key, value in score.items() if key in names}) for score in content["scores"])
            return Results(
                content["subject"], content["protocol"], content["manifest"], scores, content["details"], tuple(content["unverified"])
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold the results of an evaluation: {error!r}") from error

    def value(self, name: str) -> float:
        return next(score.value for score in self.scores if score.name == name)


def compare(results: Sequence[Results]) -> str:
    """A markdown table, one row per subject. NotComparable where a metric was not measured alike everywhere."""
    marks: dict[str, dict[str, list[str]]] = {}
    for result in results:
        for score in result.scores:
            marks.setdefault(score.metric, {}).setdefault(score.fingerprint, []).append(result.subject)
    for metric, found in marks.items():
        if len(found) > 1:
            groups = "; ".join(f"{mark[:12]}: {', '.join(subjects)}" for mark, subjects in found.items())
            raise NotComparable(
                f"{metric} was measured on different videos, with different weights or by different recipes ({groups}). "
                "Measure all subjects with one protocol, one data set and one set of weights."
            )
    names = list(dict.fromkeys(score.name for result in results for score in result.scores))
    rows = [[_marked(result, results), *(_cell(result, name) for name in names)] for result in results]
    return markdown(["", *names], rows)


def _marked(result: Results, among: Sequence[Results]) -> str:
    """The subject, with what sets its numbers apart though they may stand in one table; of namesakes also what they differ in."""
    chosen = [f"{key}={result.details[key]}" for key in ("take", "fit") if result.details.get(key, "error") != "error"]
    lossy = ["lossy"] if result.details.get("lossless") is False else []
    namesakes = [_flat(other.details) for other in among if other.subject == result.subject]
    own = {name: value for name, value in _flat(result.details).items() if not name.startswith(("weights.", "environment."))}
    apart = [f"{name}={value}" for name, value in own.items() if any(other.get(name) != value for other in namesakes)]
    marks = dict.fromkeys([*(f"unverified {name}" for name in result.unverified), *lossy, *chosen, *apart])
    return f"{result.subject} ({', '.join(marks)})" if marks else result.subject


def _flat(details: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots: sampler.guidance.scale."""
    flat: dict[str, Any] = {}
    for name, value in details.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _cell(result: Results, name: str) -> str:
    return next((show(score) for score in result.scores if score.name == name), "-")


def show(score: Score) -> str:
    """A value with its 95 % half-width, to as many digits as it deserves."""
    digits = 4 if abs(score.value) < 2 else 2
    text = f"{score.value:.{digits}f}"
    return text if score.error is None else f"{text} ± {1.96 * score.error:.{digits}f}"


def summary(result: Results) -> str:
    """The markdown page of one evaluation: its scores, and, on MSR-VTT, the published numbers, which are not ours to compare."""
    lines = [f"# {result.subject}", "", f"Protocol {result.protocol['name']}, manifest {result.manifest[:12]}. ± is 1.96 standard errors."]
    if result.protocol.get("note"):
        lines.append(str(result.protocol["note"]))
    if "sampler" in result.details:
        sampled = ", ".join(f"{name} {value}" for name, value in _flat(result.details["sampler"]).items())
        lines.append(f"Sampled with {sampled}.")
    if result.unverified:
        lines += ["", f"**Unverified weights: {', '.join(result.unverified)}.** These numbers are not to be published."]
    better = {True: "higher", False: "lower", None: "near the real"}
    rows = [[score.name, show(score), better[score.higher_is_better], score.note] for score in result.scores]
    lines += ["", markdown(["metric", "value", "better", ""], rows)]
    if result.details.get("dataset") == "msrvtt":
        lines += ["", "## Published on MSR-VTT", "", published(result), ""]
        lines.append("Protocols of others are not fully known: for orientation only. The paper does not name the network of its FID-vid.")
    return "\n".join(lines) + "\n"


def published(result: Results) -> str:
    """Table 1 with the replications, ours first; each of our FID-vid numbers under its own name."""
    ours = {"fid_vid": "fid_vid_", "fvd": "fvd_n", "clipsim": "clipsim_n"}
    cells = []
    for prefix in ours.values():
        found = [score for score in result.scores if score.name.startswith(prefix) and "extrapolated" not in score.name]
        label = {score.name: f" ({score.metric.removeprefix('fid_vid_')})" if prefix == "fid_vid_" else "" for score in found}
        cells.append("; ".join(show(score) + label[score.name] for score in found) or "-")
    rows = [[f"**{result.subject}**, n = {max((s.n for s in result.scores), default=0)}", *cells]]
    for who, numbers in PUBLISHED.items():
        rows.append([who, *(_published_cell(numbers.get(column)) for column in COLUMNS)])
    return markdown(["", *COLUMNS.values()], rows)


def _published_cell(entry: tuple[float, str] | None) -> str:
    if entry is None:
        return "-"
    value, remark = entry
    return f"{value:g} ({remark})" if remark else f"{value:g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

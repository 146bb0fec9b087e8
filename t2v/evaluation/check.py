"""`python -m t2v.evaluate check=true`: for each network of the metrics, which file was found where, is it the right one, its licence, and
whether it gives the published numbers. Nothing is generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from t2v.evaluation.results import markdown
from t2v.metrics import golden, weights
from t2v.metrics.features import ClipFeatures, Extractor, I3dFeatures
from t2v.weights import WeightsError


@dataclass(frozen=True)
class Line:
    name: str
    file: str
    status: str
    golden: str
    licence: str
    good: bool


def check(
    names: Sequence[str],
    paths: Mapping[str, str | None] | None = None,
    download: bool = False,
    allow_unverified: bool = False,
    slow: bool = False,
    device: torch.device | str = "cpu",
) -> list[Line]:
    """One line per network. `slow`: also the golden tests that take minutes without a GPU."""
    return list(_lines(names, paths or {}, download, allow_unverified, slow, device))


def _lines(
    names: Sequence[str], paths: Mapping[str, str | None], download: bool, allow_unverified: bool, slow: bool, device: torch.device | str
) -> Iterator[Line]:
    for name in names:
        if name == "motion":
            yield Line(name, "none needed", "ok", "-", "-", True)
            continue
        if name == "shapes":
            try:
                from t2v.metrics.shapes_features import SHIPPED, ShapesFeatures

                yield Line(name, str(SHIPPED), f"ok, {ShapesFeatures.shipped().weights[:12]}", "-", "as t2v", True)
            except ValueError as error:
                yield Line(name, "-", str(error), "-", "-", False)
            continue
        licence = weights.KNOWN[name].licence
        try:
            found = weights.verify(name, weights.find(name, paths.get(name), download))
        except WeightsError as error:
            yield Line(name, "-", f"NOT USABLE: {error}", "-", licence, False)
            continue
        status = f"{'verified' if found.verified else 'UNVERIFIED'}: {found.how}, sha256 {found.sha256[:12]}"
        if not found.verified and not allow_unverified:
            yield Line(name, str(found.path), status, "not opened", licence, False)
            continue
        extractors, _ = weights.load([name], {name: str(found.path)}, allow_unverified=True, device=device)
        text, good = _golden(extractors[name], slow, device)
        yield Line(name, str(found.path), status, text, licence, good)


def _golden(extractor: Extractor, slow: bool, device: torch.device | str) -> tuple[str, bool]:
    if isinstance(extractor, I3dFeatures):
        value = golden.zeros_and_ones(extractor, device)
        good = abs(value - golden.ZEROS_AND_ONES) < 1.0  # its author: it fluctuates by 1 between versions of PyTorch
        text = f"zeros and ones {value:.4f} (published {golden.ZEROS_AND_ONES})"
        if slow:
            value = golden.random_tensors(extractor, device)
            good = good and abs(value - golden.RANDOM_TENSORS) < 1e-3
            text += f", random tensors {value:.6f} (published {golden.RANDOM_TENSORS})"
        return text, good
    if isinstance(extractor, ClipFeatures):
        good = golden.colours(extractor.clip)
        return f"red and blue told apart: {'yes' if good else 'NO'} (no published value)", good
    return "none published", True


def table(lines: Sequence[Line]) -> str:
    return markdown(
        ["network", "file", "weights", "golden test", "licence"], [[x.name, x.file, x.status, x.golden, x.licence] for x in lines]
    )

"""The plan as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from t2v.planning.findings import Finding
from t2v.planning.memory import GIB


def memory_table(parts: Mapping[str, int], limit: int) -> list[str]:
    """GiB by part, largest first, and whether they fit."""
    total = sum(parts.values())
    rows = [f"  {name:<32}{size / GIB:8.2f}" for name, size in sorted(parts.items(), key=lambda item: -item[1]) if size >= GIB / 200]
    small = total - sum(size for size in parts.values() if size >= GIB / 200)
    rows += [f"  {'all the rest':<32}{small / GIB:8.2f}"] if small >= GIB / 200 else []
    return [*rows, f"  {'total':<32}{total / GIB:8.2f}   of {limit / GIB:.1f} to use: {'fits' if total <= limit else 'does not fit'}"]


def counted(number: float) -> str:
    """123, 1.2 k, 3.4 M, 5.6 G."""
    for scale, letter in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if number >= scale:
            return f"{number / (1e3 if letter == ' k' else scale):.4g}{letter}"
    return f"{number:.4g}"


def duration(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.3g} seconds"


def problems(found: Sequence[Finding]) -> list[str]:
    """Errors first, each with what mends it."""
    lines = []
    for finding in sorted(found, key=lambda finding: not finding.error):
        lines += [f"{'error' if finding.error else 'note':<9}{finding.problem}", f"         mend: {finding.mend}"]
    return lines or ["nothing  no set-up error found"]

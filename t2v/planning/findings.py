"""Set-up errors that can be seen before anything is built, each with the override that mends it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2v.training.mixture import JointMixture, RankMixture


@dataclass(frozen=True)
class Finding:
    """`problem` in one line with both values, `mend` what to type. An error stops the training; the others cost time or exactness."""

    problem: str
    mend: str
    error: bool = True


def attempt(action: Callable[[], object], mend: str) -> Iterator[Finding]:
    """What the training itself would refuse: its own message."""
    try:
        action()
    except (ValueError, OSError) as error:
        yield Finding(" ".join(str(error).split()), mend)


def readers_and_shards(
    stream: str, shards: Sequence[str], readers: int, ranks: int, workers: int, missing_in: Callable[[str], bool]
) -> Iterator[Finding]:
    """`ranks` are those that read the stream; `missing_in` tells whether a shard that is named is not there."""
    absent = [shard for shard in shards if missing_in(shard)]
    if absent:
        yield Finding(
            f"{stream}s: {len(absent)} of {len(shards)} shards are not there, {absent[0]} the first",
            f"paths.data=FOLDER, or data.{stream}.urls=",
        )
    hosts = ranks * max(1, workers)
    if readers < ranks:
        yield Finding(f"{stream}s: {ranks} ranks cannot share {readers} virtual readers", f"data.{stream}.num_readers={hosts}")
    elif readers % hosts:
        divisors = [count for count in range(1, workers + 1) if readers % (ranks * count) == 0]
        what = (
            f"loader.num_workers={max(divisors)}"
            if divisors
            else f"data.{stream}.num_readers={-(-readers // hosts) * hosts} (before step 1)"
        )
        yield Finding(
            f"{stream}s: {ranks} ranks x {workers} workers do not divide {readers} virtual readers, so another number of GPUs would read "
            "in another order",
            what,
            error=False,
        )
    if 0 < len(shards) < min(readers, hosts):
        yield Finding(
            f"{stream}s: {len(shards)} shards for {ranks} ranks x {workers} workers: several of them read each",
            f"python -m t2v.repack into at least {hosts} shards",
            error=False,
        )


def ranks_of_the_mixture(mixture: JointMixture, ranks: int) -> Iterator[Finding]:
    if isinstance(mixture, RankMixture) and ranks >= 2 and ranks % mixture.PERIOD:
        images = mixture.world_of("image", ranks)
        yield Finding(
            f"mixture=rank gives {images} of {ranks} ranks to images, {images / ranks:.3f} instead of 1/{mixture.PERIOD}",
            f"a number of GPUs that {mixture.PERIOD} divides, or mixture=joint",
            error=False,
        )


def sizes(name: str, pixels: Mapping[str, int], factor: int) -> Iterator[Finding]:
    """`pixels`: the key that sets a size -> the size."""
    for key, size in pixels.items():
        if size % factor:
            yield Finding(
                f"{name}: {size} pixels cannot be encoded, the autoencoder's factor is {factor}",
                f"{key}={max(1, round(size / factor)) * factor}",
            )


def run_folder(folder: Path, needed: int) -> Iterator[Finding]:
    """The run's folder, or the nearest that exists above it, must be writable and hold the checkpoints of `needed` bytes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Finding(f"the run's folder {folder} cannot be made: {place} is not writable", "paths.experiments=FOLDER")
        return
    free = shutil.disk_usage(place).free
    if free < needed:
        yield Finding(
            f"{place} has {free / 2**30:.1f} GiB free, the checkpoints need {needed / 2**30:.1f}",
            "paths.experiments=FOLDER, or callbacks.checkpoints.keep=1",
        )


def memory(total: int, limit: int, where: str, mends: Sequence[str]) -> Iterator[Finding]:
    if total > limit:
        yield Finding(
            f"a step needs {total / 2**30:.1f} GiB, {where} has {limit / 2**30:.1f} to use",
            " or ".join(mends) or "strategy=fsdp on more GPUs",
        )

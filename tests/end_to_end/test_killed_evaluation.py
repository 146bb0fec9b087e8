"""`python -m t2v.evaluate` as users start it: killed between two videos and started again, or on two ranks, it gives the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from process_groups import process_group

pytestmark = pytest.mark.slow
NINE = (
    "protocol=shapes",
    "protocol.num_videos=9",
    "protocol.num_frames=4",
    "protocol.size=32",
    "protocol.chunk=2",
    "datasets.shapes.videos=9",
)


class Evaluations:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, output: str, *more: str) -> AbstractContextManager[subprocess.Popen[str]]:
        command = [sys.executable, "-m", "t2v.evaluate", *NINE, "steps=4", "device=cpu", "cache=cache", f"output={output}", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return process_group(command, cwd=self.folder, env=environment)

    def run(self, output: str, *more: str) -> dict[str, Any]:
        with self.start(output, *more) as process:
            said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said
        return json.loads((self.folder / output / "results.json").read_text())

    def kill_after_chunk(self, chunk: int, output: str, *more: str, rank: int | None = None) -> int:
        """SIGKILL as soon as a chunk is measured, to the command or to one of its ranks; its exit status."""
        with self.start(output, *more) as process:
            while not (self.folder / output / "features" / "shapes" / f"{chunk:05d}.safetensors").exists():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.005)
            os.kill(process.pid if rank is None else rank_of(process, rank), signal.SIGKILL)
            process.communicate(timeout=60)
        assert not (self.folder / output / "results.json").exists()
        return process.returncode

    def made(self, output: str) -> dict[str, int]:
        """When each kept video was written."""
        return {path.name: path.stat().st_mtime_ns for path in sorted((self.folder / output / "videos").glob("*.png"))}


def rank_of(process: subprocess.Popen[str], rank: int) -> int:
    """The process of a rank that torchrun started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(child) for child in children if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"))


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory) -> Evaluations:
    return Evaluations(tmp_path_factory.mktemp("evaluations"))


@pytest.fixture(scope="module")
def straight(evaluations: Evaluations) -> dict[str, Any]:
    return evaluations.run("straight")


def test_killed_it_continues_and_ends_alike(evaluations: Evaluations, straight: dict[str, Any]) -> None:
    """What a whole chunk left behind is kept, the rest is made, and every number is that of an undisturbed run."""
    assert evaluations.kill_after_chunk(1, "killed") == -signal.SIGKILL
    before = evaluations.made("killed")
    assert 4 <= len(before) < 9
    assert evaluations.run("killed") == straight
    after = evaluations.made("killed")
    assert len(after) == 9
    kept = sorted(before)[:4]  # two chunks of two
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_two_ranks_share_the_work_also_after_a_kill(evaluations: Evaluations, straight: dict[str, Any]) -> None:
    """devices=2, over gloo where there is no GPU; a rank that is killed ends the other, and one rank continues."""
    assert evaluations.run("two", "devices=2") == straight
    assert evaluations.kill_after_chunk(1, "two killed", "devices=2", rank=1) == 1
    assert evaluations.run("two killed") == straight

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from process_groups import descendants, process_group

FAMILY = """
import os, subprocess, sys, time
last = sys.argv[1] == "0"
child = None if last else subprocess.Popen([sys.executable, __file__, str(int(sys.argv[1]) - 1)], start_new_session=sys.argv[1] == "2")
if last:
    print("all there", flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"  # ended, but nobody has asked
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_failing_test_leaves_no_process_behind(tmp_path: Path) -> None:
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    pids: list[int] = []

    def fails() -> None:
        with process_group([sys.executable, script, "2"]) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "all there\n"
            pids.extend([process.pid, *descendants(process.pid)])
            raise KeyError("of the test")

    with pytest.raises(KeyError, match="of the test"):
        fails()
    assert len(pids) == 3
    until = time.monotonic() + 10  # children of nobody take a moment
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, pids))

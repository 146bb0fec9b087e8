"""A rank whose first one is gone ends, though nothing tells it so."""

from __future__ import annotations

import sys
from pathlib import Path

from process_groups import process_group

RANKS = """
import os, subprocess, sys, time
from t2v.training import orphans
orphans.LAST_WORDS = 0
orphans.end_with_what_started_this()
if "LOCAL_RANK" in os.environ:
    print("waits", flush=True)
    time.sleep(600)
second = subprocess.Popen([sys.executable, __file__], env=os.environ | {"LOCAL_RANK": "1"}, stdout=subprocess.PIPE)
second.stdout.readline()
sys.exit(3)
"""


def test_a_rank_ends_with_the_one_that_started_it(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    with process_group([sys.executable, script]) as first:
        output, _ = first.communicate(timeout=60)  # until the second, which holds stderr, has ended, too
    assert (first.returncode, output) == (3, "")

"""A rank whose first one, or whose torchrun, is gone ends, though nothing tells it so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from process_groups import process_group

from t2v.training.orphans import STARTER

RANKS = """
import os, subprocess, sys, time
from t2v.training import orphans
orphans.LAST_WORDS = 0
orphans.end_with_what_started_this()
if "LOCAL_RANK" in os.environ:
    print("waits", flush=True)
    time.sleep(600)
second = subprocess.Popen([sys.executable, __file__], env=os.environ | {another}, stdout=subprocess.PIPE)
second.stdout.readline()
sys.exit(3)
"""


@pytest.mark.parametrize("another", [{"LOCAL_RANK": "1"}, {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}])
def test_a_rank_ends_with_what_started_it(another: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS.replace("{another}", repr(another)))
    with process_group([sys.executable, script]) as first:
        output, _ = first.communicate(timeout=60)  # until the second, which holds stderr, has ended, too
    assert (first.returncode, output) == (3, "")


def test_a_rank_that_a_shell_started_outlives_the_shell() -> None:
    code = "import threading; from t2v.training.orphans import *; end_with_what_started_this(); print(threading.active_count())"
    # a training inside this very process may have left its mark
    environment = {key: value for key, value in os.environ.items() if key not in ("TORCHELASTIC_RUN_ID", STARTER)} | {"LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"

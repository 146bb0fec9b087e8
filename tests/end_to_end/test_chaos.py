"""Two ranks, killed by three kinds of signals at three kinds of moments, end with the weights of the undisturbed run, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import torment


@pytest.mark.slow
def test_twelve_kills_change_no_bit(shapes_data: Path, tmp_path: Path) -> None:
    different, sent, run = torment(tmp_path, shapes_data, kills=12)
    assert different == []
    assert set(sent.values()) == {4}
    said = run.log.read_text()
    assert "stopped by SIGTERM" in said
    assert "stopped by SIGUSR1" in said
    assert said.count("resume   step") >= 6

"""A small MSR-VTT on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_evaluation import VIDEOS, annotations, moving

from t2v.data.msrvtt import MsrVtt
from t2v.video import write_mp4


@pytest.fixture(scope="session")
def msrvtt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """test_videodatainfo.json and videos/ of 6 s at 10 fps, 64 x 48."""
    folder = tmp_path_factory.mktemp("msrvtt")
    (folder / "test_videodatainfo.json").write_text(json.dumps(annotations()))
    (folder / "videos").mkdir()
    for k in range(VIDEOS):
        write_mp4(folder / "videos" / f"video{7010 + k}.mp4", moving(k, 60, 64), 10, preset="ultrafast")
    return folder


@pytest.fixture
def msrvtt(msrvtt_folder: Path) -> MsrVtt:
    return MsrVtt(msrvtt_folder / "test_videodatainfo.json", msrvtt_folder / "videos")

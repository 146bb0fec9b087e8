"""The commands as users type them: repack a folder, look at it; one clear line where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from made_shards import video_bytes


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_repack_then_inspect(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(3):
        (tmp_path / f"clips/{number}.mp4").write_bytes(video_bytes())
    (tmp_path / "clips/captions.jsonl").write_text("".join(f'{{"file": "{k}.mp4", "caption": "a dog, {k}"}}\n' for k in range(3)))
    code, text = run(tmp_path, "t2v.repack", "source=clips", "captions=clips/captions.jsonl", "output=shards", "workers=1")
    assert (code, "3 new samples" in text) == (0, True), text
    code, text = run(tmp_path, "t2v.inspect", "data=webvid", "paths.webvid=shards", "output=looked")
    assert (code, "3 usable (100.0%)" in text, "a dog, 1" in text) == (0, True, True), text
    assert (tmp_path / "looked/video.webp").stat().st_size > 1000


def test_one_line_for_a_mistake(tmp_path: Path) -> None:
    code, text = run(tmp_path, "t2v.inspect", "data=webvid", "paths.webvid=none")
    assert code == 1
    assert text.strip().startswith("error: webvid: none does not exist")
    assert len(text.strip().splitlines()) == 1

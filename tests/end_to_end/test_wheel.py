"""The wheel holds all that it needs: configuration, pretrained parts; it works from an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "conf", "t2v"):
        subprocess.run(["cp", "-r", REPOSITORY / name, source / name], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_every_file_is_in_the_wheel(site: Path) -> None:
    for kind, root in (("**/*.py", "t2v"), ("**/*.yaml", "conf"), ("pretrained/**/*.*", "t2v"), ("**/*.json", "t2v")):
        here = {path.relative_to(REPOSITORY / root) for path in (REPOSITORY / root).glob(kind)}
        there = site / ("t2v/conf" if root == "conf" else "t2v")
        missing = [path for path in here if not (there / path).is_file()]
        assert not missing, f"not in the wheel: {missing}; add the package or its data to pyproject.toml"


def test_commands_work_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(site)}
    code = "import t2v, sys; assert t2v.__file__.startswith(sys.argv[1]), t2v.__file__"
    subprocess.run([sys.executable, "-c", code, str(site)], cwd=tmp_path, env=environment, check=True)
    command = [sys.executable, "-m", "t2v.train", "--cfg", "job", "experiment=shapes"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "TextToVideoModule" in result.stdout

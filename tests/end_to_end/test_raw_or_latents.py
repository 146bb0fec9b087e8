"""The same experiment on raw shards and on what t2v.encode made of them: same samples, same windows, same loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from short_training import losses

from t2v.configuration import config_dir
from t2v.data.shapes import shards
from t2v.encode import encode
from t2v.models.autoencoder import Autoencoder
from t2v.models.text_encoder import TextEncoder


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shards(tmp_path_factory.mktemp("shapes"), "video", count=24, samples_per_shard=6, seed=3, processes=1)[0]).parent


@pytest.fixture(scope="module")
def latents(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "shards"
    of_the_experiment = ["data.video.size=64", "data.video.fps=1.5", "autoencoder=shapes", "text_encoder=shapes_wide"]
    overrides = ["data=webvid", f"paths.webvid={raw}", *of_the_experiment, "num_workers=0"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        encode(compose("encode", overrides=[*overrides, f"output={folder}", "device=cpu"]))
    assert len(list(folder.glob("*.tar"))) == 4
    return folder


def test_same_windows_same_loss(raw: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_raw = losses(tmp_path / "raw", "data=webvid", f"paths.webvid={raw}", "data.video.starts=grid")
    for encoder, work in ((Autoencoder, "moments"), (TextEncoder, "encode")):  # all of it was done beforehand, half of the captions dropped
        monkeypatch.setattr(encoder, work, None)
    on_latents = losses(tmp_path / "latents", "data=webvid_latents", f"data.video.urls={latents}")
    assert len(set(on_raw)) == 3
    assert on_latents == pytest.approx(on_raw, abs=1e-3)


@pytest.mark.slow
def test_other_windows_another_loss(raw: Path, tmp_path: Path) -> None:
    """So 1e-3 tells them apart."""
    grid, anywhere = (
        losses(tmp_path / starts, "data=webvid", f"paths.webvid={raw}", f"data.video.starts={starts}") for starts in ("grid", "any")
    )
    assert max(abs(a - b) for a, b in zip(grid, anywhere)) > 1e-3


def test_another_text_encoder_is_refused_before_the_first_step(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another text encoder.*stored_text=false"):
        losses(tmp_path / "run", "data=webvid_latents", f"data.video.urls={latents}", "text_encoder.seed=1")

"""The same experiment on raw shards and on what t2v.encode made of them: same samples, same windows, same loss."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2v.configuration import config_dir
from t2v.data.shapes import shards
from t2v.encode import encode
from t2v.models.autoencoder import Autoencoder
from t2v.models.text_encoder import TextEncoder
from t2v.train import run

SAME = (
    "experiment=shapes",
    "unet.block_out_channels=[32,64]",
    "mixture.image_weight=0",
    "batch.video=4",
    "micro_batch.video=3",
    "module.caption_dropout=0.5",
    "data.video={size: 64, num_frames: 8, name: clips, buffer: 10, num_readers: 8}",
    "trainer={max_steps: 3, accelerator: cpu}",
    "lr_schedule.warmup_steps=1",
    "loader.num_workers=0",
    "callbacks.training_log.every_n_steps=1",
    "callbacks.score=null",
    "callbacks.samples=null",
    "metric=null",
)


def losses(folder: Path, *overrides: str) -> list[float]:
    """Of each step of a short training in this process."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[*SAME, "name=same", f"run={folder.name}", f"paths.experiments={folder.parent}", *overrides])
    run(cfg, folder)
    events = EventAccumulator(str(next((folder / "tensorboard").glob("events*")))).Reload()
    return [event.value for event in events.Scalars("loss/video")]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shards(tmp_path_factory.mktemp("shapes"), "video", count=24, samples_per_shard=6, seed=3, processes=1)[0]).parent


@pytest.fixture(scope="module")
def latents(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "shards"
    overrides = ["data=webvid", "data.video.size=64", f"paths.webvid={raw}", "autoencoder=shapes", "text_encoder=shapes", "num_workers=0"]
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

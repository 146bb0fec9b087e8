"""A training of a few steps on videos, in this process."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from t2v.configuration import config_dir
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

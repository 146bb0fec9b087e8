from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.loggers.logger import DummyLogger
from ranks import on_ranks
from small_training import MadeUpData, fit, small_module
from tiny_model import UNET
from torch import nn

from t2v.batch import ClipBatch, LatentBatch
from t2v.checkpoint import step_folder
from t2v.diffusion.objective import DenoisingLoss
from t2v.models.autoencoder import SD_CONFIG
from t2v.training.callbacks import training_log
from t2v.training.callbacks.training_log import TrainingLog
from t2v.training.checkpoints import Checkpoints
from t2v.training.learning_rate import cosine
from t2v.training.mixture import JointMixture
from t2v.training.nan_watch import MicroBatch, NanWatch
from t2v.training.operations import autoencoder_tflop, ceiling_tflop_per_s, unet_tflop

KL: dict[str, Any] = {**SD_CONFIG, "block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}


class Clock:
    """Steps of 2 seconds each, half a second of it waiting for data; before each, other callbacks take 3 seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(training_log.time, "perf_counter", lambda: self.now)


def step(log: TrainingLog, trainer: Any, clock: Clock, batch: dict[str, ClipBatch]) -> None:
    micro_batches = []
    for stream, clips in reversed(batch.items()):  # videos first, as training_step does
        latents = torch.zeros(len(clips), 4, clips.frames.shape[1], 4, 4)
        encoded = LatentBatch(latents, torch.zeros(len(clips), 7, 32), clips.indices)
        timestep = torch.zeros(len(clips), dtype=torch.long)
        micro_batches.append(MicroBatch(stream, clips.keys, encoded, timestep, latents, torch.ones(len(clips))))
    module: Any = SimpleNamespace(
        device=torch.device("cpu"),
        unet=SimpleNamespace(config=UNET),
        frozen=SimpleNamespace(autoencoder=SimpleNamespace(model=SimpleNamespace(config=KL))),
        objective=DenoisingLoss(),
        watch=NanWatch(),
        micro_batches=micro_batches,
        callbacks_done_at=clock.now + (3 if trainer.global_step else 8),
    )
    if trainer.global_step == 0:
        log.setup(trainer, module, "fit")
        clock.now += 5
        log.on_train_start(trainer, module)
    clock.now += 3.5
    log.on_train_batch_start(trainer, module, batch, 0)
    clock.now += 1.5
    trainer.global_step += 1
    log.on_before_optimizer_step(trainer, module, trainer.optimizers[0])
    log.on_train_batch_end(trainer, module, None, batch, 0)


def clips(number: int, frames: int, pixels: bool) -> ClipBatch:
    shape = (number, frames, 32, 32, 3) if pixels else (number, frames, 4, 4, 8)
    names = [str(i) for i in range(number)]
    return ClipBatch(torch.zeros(shape, dtype=torch.uint8 if pixels else torch.float32), names, names, names, list(range(number)))


def test_speed_for_each_gpu_beside_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, float]] = []
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "name": "all"}])
    trainer: Any = SimpleNamespace(
        global_step=0,
        world_size=2,
        optimizers=[optimizer],
        logger=SimpleNamespace(log_metrics=lambda scalars, step: logged.append(scalars)),
        callback_metrics={},
        is_global_zero=True,
        default_root_dir=".",
    )
    log, clock = TrainingLog(every_n_steps=2, ceiling=1e-3), Clock(monkeypatch)
    batch = {"image": clips(3, 1, pixels=True), "video": clips(2, 2, pixels=False)}
    counted: list[Any] = []
    monkeypatch.setattr(training_log, "unet_tflop", lambda *shapes: (counted.append(shapes), unet_tflop(*shapes))[1])
    for _ in range(4):
        step(log, trainer, clock, batch)
    image = 3 * unet_tflop(UNET, (4, 1, 4, 4), (7, 32)) + autoencoder_tflop(KL, (4, 1, 4, 4))[0]
    video = 3 * unet_tflop(UNET, (4, 2, 4, 4), (7, 32))  # its moments were computed beforehand
    assert len(logged) == 2
    for scalars in logged:
        assert scalars["speed/clips_per_second"] == pytest.approx(1.0)
        assert (scalars["speed/data_wait"], scalars["speed/callbacks"]) == (0.25, 0.6)
        assert scalars["speed/clips_per_second_per_gpu"] == pytest.approx(0.5)
        assert scalars["speed/images_per_second_per_gpu"] == pytest.approx(0.75)
        assert scalars["speed/tflop_per_second_per_gpu"] == pytest.approx((3 * image + 2 * video) / 2 / 2)
        assert scalars["speed/of_ceiling"] == pytest.approx((3 * image + 2 * video) / 2 / 2 / 1e-3)
    assert len(counted) == 2  # once a shape
    assert logged[0]["speed/startup_seconds"] == pytest.approx(7)
    assert logged[0]["speed/first_step_seconds"] == pytest.approx(2)
    assert "speed/startup_seconds" not in logged[1]


def test_without_a_gpu_there_is_no_ceiling_but_one_may_be_given() -> None:
    assert ceiling_tflop_per_s(torch.device("cpu")) is None
    with pytest.raises(ValueError, match="ceiling is 0"):
        TrainingLog(ceiling=0)


@pytest.mark.slow
def test_operations_are_those_of_the_paper() -> None:
    assert unet_tflop({}, (4, 16, 32, 32), (77, 1024)) == pytest.approx(4.83, rel=1e-2)  # diffusers' 4.887, less text projected per frame


def test_operations_of_the_encoder_and_of_images() -> None:
    assert autoencoder_tflop(SD_CONFIG, (4, 1, 32, 32))[0] == pytest.approx(4.36 / 16, rel=1e-2)
    assert unet_tflop(UNET, (4, 1, 4, 4), (7, 32)) < unet_tflop(UNET, (4, 4, 4, 4), (7, 32)) / 4


def logged_on_two_ranks(folder: Path, resume: bool) -> dict[str, float]:
    """Each rank skips two more samples than the one before, in each of two steps."""

    class Skipping(MadeUpData):
        def clips(self, stream: str, indices: list[int]) -> ClipBatch:
            rank = dist.get_rank()
            return replace(super().clips(stream, indices), bad=Counter({("source", "broken"): (1 + 2 * rank) * (stream == "video")}))

    logged: dict[str, float] = {}
    logger = DummyLogger()
    logger.log_metrics = lambda metrics, step=None: logged.update(metrics)  # type: ignore[method-assign]
    log = TrainingLog(every_n_steps=1, ceiling=1.0)
    module = small_module(lr_schedule=cosine(8), optimizer=partial(torch.optim.AdamW, lr=1.0))
    data = Skipping({"image": 2, "video": 2}, {"image": 2, "video": 2}, JointMixture())
    latest = step_folder(folder, 2) if resume else None
    setup = {"strategy": "ddp", "world": 2, "steps": 4 if resume else 2, "resume": latest, "callbacks": [log, Checkpoints(every_n_steps=1)]}
    fit(module, data, folder, logger=logger, **setup)
    return {name: value for name, value in logged.items() if name.startswith(("skipped", "memory", "optimizer/lr"))}


def test_skipped_samples_and_memory_are_of_all_ranks_and_the_rate_of_the_step(tmp_path: Path) -> None:
    for resume, steps in ((False, 2), (True, 4)):
        one, other = on_ranks(logged_on_two_ranks, 2, tmp_path, tmp_path, resume)
        assert one == other
        assert one["skipped/source/broken"] == steps * (1 + 3)
        assert one["optimizer/lr_spatial"] == pytest.approx(cosine(8)(steps - 1))

"""The real module with a small network on made-up moments: a training without files, workers or a command."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.plugins.precision import DoublePrecision
from tiny_model import TinyAutoencoder, TinyTextEncoder, tiny_unet
from torch import Tensor

from t2v.batch import ClipBatch
from t2v.data.loader import split
from t2v.diffusion.objective import DenoisingLoss
from t2v.diffusion.randomness import normal
from t2v.diffusion.sampling import Sampler
from t2v.diffusion.schedule import NoiseSchedule
from t2v.models.unet import VideoUNet
from t2v.training.checkpoints import FolderCheckpointIO
from t2v.training.ema import EMA
from t2v.training.learning_rate import constant
from t2v.training.mixture import JointMixture, StepPlan
from t2v.training.module import TextToVideoModule

SHAPES = {"image": (1, 4, 4, 8), "video": (3, 4, 4, 8)}  # moments (f h w 2c)


class Moments(TinyAutoencoder):
    """Takes precomputed moments, as t2v.encode stores them."""

    def sample(self, moments: Tensor, noise: Tensor) -> Tensor:
        mean, log_variance = moments.permute(0, 4, 1, 2, 3).chunk(2, dim=1)  # (b c f h w)
        return mean + (0.5 * log_variance).exp() * noise


class MadeUpData(LightningDataModule):
    """Sample i of a stream is the same on any number of ranks; `bad` is the (stream, index) of one that is not a number."""

    def __init__(
        self, batch: dict[str, int], micro_batch: dict[str, int], mixture: JointMixture, bad: tuple[str, int] | None = None
    ) -> None:
        super().__init__()
        self.batch, self.micro_batch, self.mixture, self.bad = batch, micro_batch, mixture, bad
        self.used: list[tuple[str, int]] = []

    def plan(self, world: int) -> StepPlan:
        return StepPlan.of(self.mixture, self.batch, self.micro_batch, world)

    def check(self, autoencoder: Any) -> None:
        pass

    def consumed(self, batch: dict[str, ClipBatch]) -> None:
        self.used += [(stream, index) for stream, clips in batch.items() for index in clips.indices]

    def clips(self, stream: str, indices: list[int]) -> ClipBatch:
        frames = normal([(stream, index) for index in indices], SHAPES[stream])  # (b f h w 2c)
        if self.bad is not None and self.bad[0] == stream and self.bad[1] in indices:
            frames[indices.index(self.bad[1])] = float("nan")
        names = [f"{stream}-{index}" for index in indices]
        return ClipBatch(frames=frames, captions=names, keys=names, sources=names, indices=indices)

    def train_dataloader(self) -> Iterator[dict[str, ClipBatch]]:
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        roles, accumulate = self.mixture.roles(rank, world), self.plan(world).accumulate
        return MicroBatches(self, roles, accumulate, self.trainer.global_step)  # type: ignore[return-value]


class MicroBatches:
    def __init__(self, data: MadeUpData, roles: Any, accumulate: int, first_step: int) -> None:
        self.data, self.roles, self.accumulate, self.first_step = data, roles, accumulate, first_step

    def __iter__(self) -> Iterator[dict[str, ClipBatch]]:
        for step in itertools.count(self.first_step):
            parts: dict[str, list[list[int]]] = {}
            for stream, role in self.roles.items():
                whole = range(step * self.data.batch[stream], (step + 1) * self.data.batch[stream])
                mine = iter([index for index in whole if index % role.world == role.rank])
                sizes = split(sum(index % role.world == role.rank for index in whole), self.accumulate)
                parts[stream] = [list(itertools.islice(mine, size)) for size in sizes]
            for number in range(self.accumulate):
                yield {stream: self.data.clips(stream, pieces[number]) for stream, pieces in parts.items()}


def small_unet(**changes: Any) -> VideoUNet:
    """One level with all four kinds of blocks, float64, no dropout."""
    one_level = {
        "block_out_channels": [16],
        "down_block_types": ["CrossAttnDownBlock3D"],
        "up_block_types": ["CrossAttnUpBlock3D"],
        "temporal_dropout": 0.0,
    }
    return tiny_unet(**{**one_level, **changes}).double()


def small_module(**changes: Any) -> TextToVideoModule:
    schedule = NoiseSchedule()
    arguments: dict[str, Any] = {
        "unet": small_unet(),
        "autoencoder": Moments(),
        "text_encoder": TinyTextEncoder(),
        "objective": DenoisingLoss(schedule),
        "sampler": Sampler("ddim", num_steps=2, schedule=schedule),
        "optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "lr_schedule": constant(),
        "ema": EMA(0.5),
        "sample": {"frames": 3, "height": 32, "width": 32, "fps": 3},
    }
    return TextToVideoModule(**{**arguments, **changes})


def fit(
    module: TextToVideoModule,
    data: MadeUpData,
    folder: Path,
    *,
    steps: int = 2,
    strategy: Any = "auto",
    world: int = 1,
    resume: Path | None = None,
    precision: Any = None,
    logger: Any = False,
    **options: Any,
) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        plugins=[FolderCheckpointIO(lambda: module.describe(trainer.global_step)), precision or DoublePrecision()],
        **options,
    )
    trainer.accumulate_grad_batches = data.plan(world).accumulate
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return trainer

"""What one step draws, by which key, and what follows it: the rate, the average, the pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import MadeUpData, fit, small_module, small_unet

from t2v.diffusion import schedule, timesteps
from t2v.diffusion.objective import DenoisingLoss
from t2v.diffusion.randomness import seed_of
from t2v.diffusion.schedule import NoiseSchedule
from t2v.diffusion.timesteps import ShiftedTimesteps
from t2v.training import module as training_module
from t2v.training.ema import EMA
from t2v.training.learning_rate import constant
from t2v.training.mixture import JointMixture

VIDEOS = MadeUpData({"video": 2}, {"video": 1}, JointMixture(0))  # two micro-batches a step


def test_every_draw_has_a_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    for place, name in ((training_module, "normal"), (training_module, "uniform"), (schedule, "normal"), (timesteps, "uniform")):
        draw = getattr(place, name)
        monkeypatch.setattr(place, name, lambda keys, *shape, draw=draw: drawn.extend(keys) or draw(keys, *shape))
    module = small_module(unet=small_unet().float(), seed=3, timesteps=ShiftedTimesteps(8.0))
    monkeypatch.setattr(type(module), "global_step", 7)
    module.predict("video", VIDEOS.clips("video", [4, 5]))
    assert sorted(drawn) == [(3, use, 7, "video", index) for use in ("caption", "noise", "posterior", "timestep") for index in (4, 5)]


def test_dropout_differs_between_steps_micro_batches_and_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(training_module, "seed_of", lambda *key: seeds.append(seed_of(*key)) or seeds[-1])
    for rank in (0, 1):
        monkeypatch.setattr(training_module.TextToVideoModule, "global_rank", rank)
        fit(small_module(), VIDEOS, tmp_path, steps=2)
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 2


def test_rate_and_average_follow_the_optimizer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[int] = []
    monkeypatch.setattr(EMA, "update", lambda self, average, network, step: averaged.append(step))
    module = small_module(optimizer=partial(torch.optim.SGD, lr=1.0), lr_schedule=constant(9))
    trainer = fit(module, VIDEOS, tmp_path, steps=3)
    assert averaged == [1, 2, 3]
    assert trainer.optimizers[0].param_groups[0]["lr"] == constant(9)(3)


def test_what_is_sampled_is_the_average_on_the_schedule_of_the_training() -> None:
    velocity = NoiseSchedule(prediction="velocity")
    module = small_module(objective=DenoisingLoss(velocity))
    assert module.pipeline().unet is module.ema_unet
    assert module.pipeline().sampler.schedule is module.pipeline(small_module().sampler).sampler.schedule is velocity

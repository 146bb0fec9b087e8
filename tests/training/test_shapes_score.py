"""What a score callback asks of the model, and what it writes."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small_training import MadeUpData, fit, small_module
from torch import Tensor, nn

from t2v.data.shapes import held_out_specs, render
from t2v.diffusion.sampling import Sampler
from t2v.training.callbacks.shapes_score import ShapesScore
from t2v.training.mixture import JointMixture
from t2v.training.strategies import GATHER, FullyShardedStrategy


class RealClips:
    """In place of a pipeline: the truth, and a note of how it was asked."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.sampler, self.asked = unet, Sampler("ddim", 2), SimpleNamespace()
        self.clips = {spec.caption: spec for spec in held_out_specs(6, kind="unseen")}

    def __call__(self, captions: list[str], num_frames: int | None, **options: Any) -> Tensor:
        self.asked = SimpleNamespace(scale=self.sampler.guidance.scale, unet=self.unet, training=self.unet.training, frames=num_frames)
        return torch.stack([render(self.clips[caption], num_frames or 8) for caption in captions])


@pytest.fixture
def module() -> Any:
    trained, average = nn.Linear(1, 1), nn.Linear(1, 1).eval()
    pipeline = RealClips(average)
    return SimpleNamespace(unet=trained, ema_unet=average, sample={"fps": 3}, pipeline=lambda sampler: pipeline, made=pipeline)


def trainer(folder: Path) -> Any:
    rank = {"global_rank": 0, "world_size": 1, "is_global_zero": True}
    places = {"default_root_dir": folder, "logger": None, "loggers": [], "callback_metrics": {}, "global_step": 5}
    return SimpleNamespace(**rank, **places, max_steps=9, callbacks=[], precision_plugin=SimpleNamespace(forward_context=nullcontext))


def test_real_clips_score_one_under_the_callback_s_name(tmp_path: Path, module: Any) -> None:
    run = trainer(tmp_path)
    result = ShapesScore(6, kind="unseen", name="unseen", num_frames=8).evaluate(run, module)
    assert result["all"].accuracy == result["all"].ceiling == 1.0
    assert str(result).startswith("unseen: unseen prompts, 8 frames\n")
    assert run.callback_metrics["unseen/all"] == 1.0
    record = json.loads((tmp_path / "scores.jsonl").read_text())
    assert (record["name"], record["step"], record["kind"], record["frames"], record["ema"]) == ("unseen", 5, "unseen", 8, True)
    assert module.made.asked.unet is module.ema_unet


def test_another_guidance_and_the_trained_weights(tmp_path: Path, module: Any) -> None:
    ShapesScore(6, kind="unseen", guidance=3.0, ema=False).evaluate(trainer(tmp_path), module)
    assert module.made.asked.scale == 3.0
    assert module.made.asked.unet is module.unet
    assert not module.made.asked.training  # dropout is off while it samples ...
    assert module.unet.training  # ... and on again afterwards


def test_the_start_is_scored_where_asked_and_only_there(tmp_path: Path, module: Any) -> None:
    score = ShapesScore(6, kind="unseen", at_start=True)
    resumed, fresh = trainer(tmp_path), trainer(tmp_path)
    fresh.global_step = 0
    score.on_train_start(resumed, module)
    assert not (tmp_path / "scores.jsonl").exists()
    score.on_train_start(fresh, module)
    assert json.loads((tmp_path / "scores.jsonl").read_text())["step"] == 0


BATCH = {"image": 2, "video": 2}


def trained_weights_scored(folder: Path, gather: str, scored: bool) -> list[float]:
    """The trained network's weights after two steps under FSDP, scored before the first and between them, or never."""
    module, scores = small_module(), [ShapesScore(2, every_n_steps=1, ema=False, at_start=True)] if scored else []
    fit(module, MadeUpData(BATCH, BATCH, JointMixture()), folder, strategy=FullyShardedStrategy(gather=gather), world=2, callbacks=scores)
    return [float(parameter.detach().full_tensor().sum()) for parameter in module.unet.parameters()]  # type: ignore[operator]


@pytest.mark.parametrize("gather", GATHER)
def test_a_training_under_fsdp_does_not_see_that_its_weights_were_scored(gather: str, tmp_path: Path) -> None:
    quiet, scored = (on_ranks(trained_weights_scored, 2, tmp_path, tmp_path, gather, scored) for scored in (False, True))
    assert [json.loads(line)["step"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()] == [0, 1]
    assert scored == quiet

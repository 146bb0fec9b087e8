"""From the command: strategies, their change on the way, debug presets, the autoencoder's training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainings import Trainings, losses

from t2v.checkpoint import MARKER, AutoencoderCard, read_card

pytestmark = pytest.mark.slow
SAME = ("loader.num_workers=0", "unet.temporal_dropout=0.0", "callbacks.checkpoints.every_n_steps=2")


def test_fsdp_goes_on_alone_and_alone_goes_on_in_fsdp(trainings: Trainings) -> None:
    """Samples, scores, accumulation and the average under FSDP; both orders come to where one process comes."""
    fsdp = ("strategy=fsdp", "trainer.devices=2")
    for run, first, second in (("alone", (), ()), ("joined", fsdp, ()), ("divided", (), fsdp)):
        for steps, how in ((2, first), (4, second)):
            code, output = trainings.run(f"run={run}", f"trainer.max_steps={steps}", *SAME, *how)
            assert code == 0, output
            assert ("on 2 ranks" in output) == bool(how), output
            assert f"trained  {steps} steps" in output
    runs = trainings.folder / "shapes" / "runs"
    expected = losses(runs / "alone")
    assert len(expected) == 8
    for run in ("joined", "divided"):
        found = losses(runs / run)
        assert found.keys() == expected.keys()
        assert all(found[key] == pytest.approx(expected[key], rel=1e-3) for key in expected), (found, expected)
        assert (runs / run / "samples" / "step-00000004" / "00.mp4").stat().st_size > 0
        before, weights, others = (
            load_file(trainings.checkpoint(name, step) / "ema.safetensors") for name, step in (("alone", 2), ("alone", 4), (run, 4))
        )
        moved, apart = (sum(float((weights[name] - those[name]).square().sum()) for name in weights) ** 0.5 for those in (before, others))
        assert apart < 0.01 * moved, (apart, moved)


def test_divided_ranks_and_gradient_checkpointing_under_fsdp(trainings: Trainings) -> None:
    code, output = trainings.run(
        "run=divided",
        "trainer.max_steps=2",
        "strategy=fsdp",
        "trainer.devices=2",
        "mixture=rank",
        "mixture.image_weight=0.5",
        "unet.gradient_checkpointing=all",
        "trainer.gradient_clip_val=0.5",
        *SAME,
    )
    assert code == 0, output
    assert "on 2 ranks" in output
    assert len(losses(trainings.folder / "shapes" / "runs" / "divided")) == 4


@pytest.mark.parametrize(
    ("preset", "steps", "more"), [("one_batch", 2, ()), ("profiler", 20, ()), ("overfit", 12, ("trainer.max_steps=12",))]
)
def test_debug_presets(trainings: Trainings, preset: str, steps: int, more: tuple[str, ...]) -> None:
    code, output = trainings.run(f"debug={preset}", "loader.num_workers=0", "~callbacks.score", "metric=null", *more)
    assert code == 0, output
    (run,) = (trainings.folder / "shapes" / "runs").iterdir()
    assert run.name.startswith(f"debug_{preset}_")
    assert json.loads((run / "results.json").read_text())["step"] == steps
    config = (run / "config.yaml").read_text()
    if preset == "profiler":
        assert any("training_step" in path.read_text() for path in run.glob("*profile*"))
    if preset == "overfit":
        assert "caption_dropout: 0.0" in config
        states = json.loads((run / "checkpoints" / f"step-{steps:08}" / "data" / "readers.json").read_text())
        cursors = [cursor for state in states.values() for cursor in state["cursors"].values()]
        assert max(cursor[2] for cursor in cursors) <= 5  # twelve steps, and no further in the data than the first


def test_the_autoencoders_training_continues(trainings: Trainings) -> None:
    """Step 3 straight and by way of step 2: the same weights."""
    small = (
        "experiment=shapes_autoencoder",
        "data.image.urls={_target_: t2v.data.shapes.shards, root: '${paths.data}/shapes', media: image, count: 128}",
        "data.video.urls={_target_: t2v.data.shapes.shards, root: '${paths.data}/shapes', media: video, count: 32}",
        "lr_schedule={total_steps: 3, warmup_steps: 1}",
        "callbacks.score.clips=4",
        "callbacks.score.images=8",
        "callbacks.checkpoints.keep=9",
        "callbacks.checkpoints.every_n_steps=2",
        "loader.num_workers=0",
        "trainer.accelerator=cpu",
    )
    runs = trainings.folder / "shapes_autoencoder" / "runs"
    for run, steps in (("straight", 3), ("resumed", 2), ("resumed", 3)):
        code, output = trainings.run(f"run={run}", f"trainer.max_steps={steps}", base=small)
        assert code == 0, output
    assert "resume   step 2 " in output
    straight, resumed = (runs / run / "checkpoints" / "step-00000003" for run in ("straight", "resumed"))
    assert (resumed / MARKER).exists()
    assert read_card(resumed, AutoencoderCard).step == 3
    for file in ("autoencoder.safetensors", "average.safetensors"):
        expected, found = load_file(straight / file), load_file(resumed / file)
        assert all(torch.equal(expected[name], found[name]) for name in expected), file
    assert not (Path(resumed) / "unet.safetensors").exists()

"""Three ranks do what one does; what cannot go on ends in one line."""

from __future__ import annotations

import subprocess

import pytest
from safetensors.torch import load_file
from trainings import Trainings


def test_three_ranks_make_the_update_of_one(trainings: Trainings) -> None:
    """Sizes that 3 does not divide, accumulation on one side only, dropout off, plain SGD: the same weights to rounding."""
    same = ("trainer.max_steps=2", "unet.temporal_dropout=0.0", "batch.video=4", "loader.num_workers=0", "~callbacks.score", "metric=null")
    plain = ("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1", "~optimizer.betas", "~optimizer.eps")
    code, output = trainings.run("run=one", *same, *plain)
    assert code == 0, output
    code, output = trainings.run("run=three", *same, *plain, "strategy=ddp", "trainer.devices=3")
    assert code == 0, output
    assert "on 3 ranks" in output
    start, one, three = (
        load_file(trainings.checkpoint(run, 2) / f"{name}.safetensors")
        for run, name in (("one", "ema"), ("one", "unet"), ("three", "unet"))
    )
    moved = max(float((one[name] - start[name]).abs().max()) for name in one)
    worst = max(float((one[name] - three[name]).abs().max()) for name in one)
    assert worst < 1e-3 * moved, (worst, moved)


def test_not_a_number_names_step_samples_and_layer(trainings: Trainings) -> None:
    code, output = trainings.run(
        "run=nan", "trainer.max_steps=8", "optimizer.lr=1e30", "loader.num_workers=0", "lr_schedule.warmup_steps=0"
    )
    assert code == 1
    line = output.strip().splitlines()[-1]
    assert line.startswith("error: step "), output
    assert "first in" in line or "gradient of" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("data=laion_webvid", "paths.laion=nowhere"), "nowhere"),
        (("autoencoder.source=nowhere",), "nowhere"),
        (("batch.image=0",), "batch"),
        (("callbacks.score=null",), "metric=score/all"),
        (("mixture=rank",), "at least 2 ranks"),
        (("paths.experiments=/proc/nothing",), "paths.experiments"),
    ],
)
def test_bad_input_ends_in_one_line(trainings: Trainings, overrides: tuple[str, ...], expected: str) -> None:
    base = [
        argument for argument in trainings.command(*overrides) if not (argument.startswith("data.") and overrides[0] == "data=laion_webvid")
    ]
    result = subprocess.run(base, capture_output=True, text=True, cwd=trainings.folder)
    assert result.returncode == 1, result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert expected in last, last
    assert "Traceback" not in result.stderr

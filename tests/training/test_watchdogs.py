"""A rank that stops, a rank that hangs, a loss that jumps, a value that is not a number: each is named, and nobody waits."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.plugins.precision import MixedPrecision
from ranks import on_ranks, start_ranks
from small_training import MadeUpData, fit, small_module, small_unet

from t2v.diffusion.objective import DenoisingLoss
from t2v.training.callbacks.loss_spikes import LossSpikes
from t2v.training.callbacks.rank_watch import Beat, Judge, RankWatch
from t2v.training.mixture import JointMixture
from t2v.training.nan_watch import NonFiniteError
from t2v.training.strategies import FullyShardedStrategy

BATCH = {"image": 4, "video": 4}
MICRO = {"image": 2, "video": 2}


class Misfortune(Callback):
    """Befalls one rank in step 2."""

    def __init__(self, rank: int, event: str) -> None:
        self.rank, self.event = rank, event

    def on_train_batch_start(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 2 and self.event in ("stop", "hang"):
            if self.event == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(120)

    def on_before_backward(self, trainer: Any, module: Any, loss: torch.Tensor) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 2:
            if self.event == "begin of backward":
                loss.register_hook(lambda gradient: time.sleep(120))
            if self.event == "end of backward":
                module.unet.conv_in.weight.register_hook(lambda gradient: time.sleep(120))


def watched(folder: Path, rank: int, event: str, strategy: str) -> None:
    data = MadeUpData(BATCH, MICRO, JointMixture())
    how: Any = FullyShardedStrategy() if strategy == "fsdp" else strategy
    fit(small_module(), data, folder, strategy=how, world=2, steps=9, callbacks=[RankWatch(5.0), Misfortune(rank, event)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "event", "strategy", "place"),
    [
        (1, "stop", "ddp", "does not answer"),
        (0, "stop", "ddp", "does not answer"),
        (1, "hang", "ddp", "before its backward pass"),
        (1, "begin of backward", "ddp", "in its backward pass"),
        (0, "end of backward", "ddp", "in its backward pass"),
        (1, "begin of backward", "fsdp", "in its backward pass"),
    ],
)
def test_a_rank_that_stops_ends_the_run_by_name(
    rank: int, event: str, strategy: str, place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    processes = start_ranks(watched, 2, tmp_path, tmp_path, rank, event, strategy)
    try:
        for process in processes:
            process.join(60)
        assert [process.is_alive() for process in processes] == [False, False]
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - rank].exitcode == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    assert f"rank {rank} " in lines[0]
    assert f"pid {processes[rank].pid}" in lines[0]
    assert place in lines[0]


@pytest.mark.slow
def test_the_watch_ends_with_the_training(tmp_path: Path) -> None:
    on_ranks(undisturbed, 2, tmp_path, tmp_path)


def undisturbed(folder: Path) -> None:
    fit(small_module(), MadeUpData(BATCH, MICRO, JointMixture()), folder, strategy="ddp", world=2, steps=2, callbacks=[RankWatch(2.0)])
    time.sleep(3)  # nobody beats any more, and nobody is accused


def test_the_judge_tells_the_silent_from_the_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def after(seconds: float, *said: tuple[int, ...]) -> tuple[int, str] | None:
        """`said` by each rank: beats, points passed and, if they are to be told, whether it computes and whether it exchanges."""
        clock[0] += seconds
        beats = {rank: Beat(one[0], one[1], f"point {one[1]}", *map(bool, one[2:])) for rank, one in enumerate(said)}
        return judge.hear(beats)

    judge = Judge(seconds=10)
    assert after(0, (0, 0), (0, 0), (0, 0)) is None
    assert after(11, (1, 0), (1, 0), (1, 0)) is None  # all live and none moves: an evaluation
    assert after(1, (2, 0, 0, 1), (2, 0, 0, 0), (2, 0, 0, 1)) is None  # of which one rank makes more than the others
    accused = after(1, (3, 1), (3, 0), (3, 1))  # the others have gone on
    assert accused is not None
    assert accused[0] == 1
    assert "stuck in point 0" in accused[1]
    judge = Judge(seconds=10)
    assert after(0, (0, 1), (0, 0), (0, 1)) is None
    assert after(9, (1, 1), (1, 1), (0, 1)) is None
    accused = after(2, (2, 1), (2, 1), (0, 1))
    assert accused is not None
    assert accused[0] == 2
    assert "does not answer" in accused[1]
    judge = Judge(seconds=10)
    assert after(0, (0, 5, 1, 1), (0, 5, 1, 0)) is None
    accused = after(11, (1, 5, 1, 1), (1, 5, 1, 0))  # in a backward pass, both at the same point, but one of them waits there
    assert accused is not None
    assert accused[0] == 1
    judge = Judge(seconds=10)
    assert after(0, (0, 5, 1, 1), (0, 5, 1, 1)) is None
    assert after(11, (1, 5, 1, 1), (1, 5, 1, 1)) is None  # both wait: a slow network is nobody's fault
    with pytest.raises(ValueError, match="above 0"):
        RankWatch(0)


class Jump(Callback):
    """Makes the losses of step 4 ten times as large, as the log sees them."""

    def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
        if trainer.global_step == 4:
            for m in module.micro_batches:
                if m.stream == "video" and "video-13" in m.keys:
                    m.losses.mul_(50)


def test_spikes_are_logged_with_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spikes = LossSpikes(factor=3, warmup_steps=2, samples=3)
    fit(small_module(), MadeUpData(BATCH, MICRO, JointMixture()), tmp_path, steps=6, callbacks=[Jump(), spikes])
    (record,) = [json.loads(line) for line in (tmp_path / "loss_spikes.jsonl").read_text().splitlines()]
    assert (record["step"], record["stream"]) == (4, "video")
    assert record["loss"] > 3 * record["usual"]
    assert record["samples"][0]["key"] in ("video-12", "video-13")
    assert len(record["samples"]) == 3
    assert "step 4: video loss" in capsys.readouterr().err
    with pytest.raises(ValueError, match="above 1"):
        LossSpikes(factor=1)


def not_a_number(folder: Path, strategy: str) -> str:
    data = MadeUpData(BATCH, MICRO, JointMixture(), bad=("video", 7))
    with pytest.raises(NonFiniteError) as caught:
        fit(small_module(), data, folder, strategy=FullyShardedStrategy() if strategy == "fsdp" else "ddp", world=2, steps=5)
    return str(caught.value)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_all_ranks_name_the_sample_of_the_one_that_has_it(strategy: str, tmp_path: Path) -> None:
    one, other = on_ranks(not_a_number, 2, tmp_path, tmp_path, strategy)
    assert one == other
    assert one.startswith("step 1: the loss of video video-7 is not finite; first in ")
    assert one.endswith("(rank 1)")


def test_a_bad_gradient_names_its_parameter(tmp_path: Path) -> None:
    module = small_module()
    module.unet.conv_out.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteError, match=r"the gradient of conv_out\.bias is not; samples video-0"):
        fit(module, MadeUpData(BATCH, MICRO, JointMixture()), tmp_path)
    assert torch.isfinite(module.unet.conv_out.bias).all()


@pytest.mark.parametrize("steps", [2, 5])  # the bad step is the last one, or training has gone on before the verdict is read
def test_a_fused_optimizer_passes_over_the_bad_step(steps: int, tmp_path: Path) -> None:
    before: dict[str, torch.Tensor] = {}

    class Remember(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *arguments: Any) -> None:
            if trainer.global_step == 1:
                before.update({name: value.clone() for name, value in module.unet.state_dict().items()})

    module = small_module(optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    data = MadeUpData(BATCH, MICRO, JointMixture(), bad=("video", 7))
    with pytest.raises(NonFiniteError, match="step 1: the loss of video video-7 is not finite; first in "):
        fit(module, data, tmp_path, steps=steps, callbacks=[Remember()])
    assert all(torch.equal(value, before[name]) for name, value in module.unet.state_dict().items())
    (optimizer,) = [module.trainer.optimizers[0]]
    assert all(float(state["step"]) == 1 and torch.isfinite(state["exp_avg"]).all() for state in optimizer.state.values())
    assert all(torch.isfinite(value).all() for value in module.ema_unet.state_dict().values())


def test_what_loss_spikes_know_survives_a_resume(tmp_path: Path) -> None:
    first, second = LossSpikes(), LossSpikes()
    first.running, first.steps = {"video": 0.25}, 120
    second.load_state_dict(first.state_dict())
    assert (second.running, second.steps) == ({"video": 0.25}, 120)


def test_the_search_runs_in_the_precision_of_the_training(tmp_path: Path) -> None:
    """On a GPU the text is bfloat16, which float32 weights cannot be multiplied with outside of autocast."""
    mixed: list[bool] = []

    class Watched(DenoisingLoss):
        def __call__(self, *inputs: Any) -> torch.Tensor:
            mixed.append(torch.is_autocast_enabled("cpu"))
            return super().__call__(*inputs)

    module = small_module(unet=small_unet().float(), objective=Watched())
    data = MadeUpData(BATCH, MICRO, JointMixture(), bad=("video", 1))
    with pytest.raises(NonFiniteError, match="the loss of video video-1 is not finite"):
        fit(module, data, tmp_path, precision=MixedPrecision("bf16-mixed", "cpu"))
    trained = 2 * -(-BATCH["video"] // MICRO["video"])
    assert mixed == [True] * (trained + 1)

"""A run from its command to its report, killed, stopped, continued, refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import Trainings

from t2v.checkpoint import MARKER
from t2v.pipeline import TextToVideoPipeline


def losses(run: Path) -> dict[tuple[str, int], float]:
    found = {}
    for file in sorted((run / "tensorboard").glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in ("loss/image", "loss/video"):
            found |= {(tag, event.step): event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
    return found


def test_killed_run_continues_bit_for_bit(trainings: Trainings) -> None:
    """Straight to step 8, against SIGKILL after step 4 and again: 2 workers, both streams, dropout on, shuffle buffers part used."""
    same = ("trainer.max_steps=8", "loader.num_workers=2", "callbacks.checkpoints.every_n_steps=4")
    code, output = trainings.run("run=straight", *same)
    assert code == 0, output
    wanted = trainings.checkpoint("killed", 4) / MARKER
    code, _ = trainings.stop_when(wanted.exists, signal.SIGKILL, "run=killed", *same)
    assert code == -signal.SIGKILL
    assert not trainings.checkpoint("killed", 8).exists()
    code, output = trainings.run("run=killed", *same)
    assert code == 0, output
    assert "resume   step 4 " in output
    for name in ("unet.safetensors", "ema.safetensors"):
        straight, killed = (load_file(trainings.checkpoint(run, 8) / name) for run in ("straight", "killed"))
        assert all(torch.equal(straight[key], killed[key]) for key in straight), name
    runs = trainings.folder / "shapes" / "runs"
    straight_losses, killed_losses = losses(runs / "straight"), losses(runs / "killed")
    assert len(straight_losses) == 16
    assert straight_losses == killed_losses
    readers = [json.loads((trainings.checkpoint(run, 8) / "data" / "readers.json").read_text()) for run in ("straight", "killed")]
    assert readers[0] == readers[1]


def test_whole_run_report_and_refusals(trainings: Trainings) -> None:
    code, output = trainings.run("run=whole", "trainer.max_steps=2", "loader.num_workers=0")
    assert code == 0, output
    run = trainings.folder / "shapes" / "runs" / "whole"
    assert "| colour | " in output
    assert "python -m t2v.generate" in output
    assert not [line for line in output.splitlines() if "warn" in line.lower()], output  # no third-party warnings in a normal run
    samples = run / "samples" / "step-00000002"
    assert (samples / "00.mp4").stat().st_size > 0
    assert (samples / "contact_sheet.gif").stat().st_size > 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    scalars = events.Tags()["scalars"]
    for tag in ("loss/image", "loss/video", "optimizer/lr_spatial", "optimizer/gradient_norm", "optimizer/update_to_weight_temporal"):
        assert tag in scalars
    for tag in (
        "speed/clips_per_second",
        "speed/images_per_second",
        "speed/data_wait",
        "speed/tflop_per_second_per_gpu",
        "speed/startup_seconds",
        "memory/peak_gb",
        "score/colour",
    ):
        assert tag in scalars
    assert any(tag.startswith("loss_by_timestep/video_q") for tag in scalars)
    assert "samples" in events.Tags()["images"]
    assert "config/text_summary" in events.Tags()["tensors"]
    # its weights alone are a checkpoint too
    small = trainings.folder / "small"
    command = [sys.executable, "-m", "t2v.export", f"checkpoint={run}", "format=t2v", "dtype=float16", f"output={small}"]
    subprocess.run(command, check=True, cwd=trainings.folder, capture_output=True)
    assert (
        sum(file.stat().st_size for file in small.iterdir()) < 0.55 * (trainings.checkpoint("whole", 2) / "ema.safetensors").stat().st_size
    )
    video = TextToVideoPipeline.from_pretrained(small, device="cpu")("a red circle", num_frames=1)
    assert video.shape == (1, 64, 64, 3)
    # the same command again only reports
    code, output = trainings.run("run=whole", "trainer.max_steps=2", "loader.num_workers=0")
    assert code == 0
    assert "finished before" in output
    assert "| colour | " in output
    # a fresh start in a used folder, another architecture, and a damaged checkpoint are refused
    code, output = trainings.run("run=whole", "trainer.max_steps=3", "resume=none")
    assert code == 1
    assert "resume=none" in output.strip().splitlines()[-1]
    code, output = trainings.run("run=whole", "trainer.max_steps=3", "unet.block_out_channels=[64,64]")
    assert code == 1
    assert "Traceback" not in output, output
    weights = trainings.checkpoint("whole", 2) / "unet.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    code, output = trainings.run("run=other", "trainer.max_steps=3", f"resume={weights.parent}")
    assert code == 1
    assert "unet.safetensors" in output.strip().splitlines()[-1]


def test_ctrl_c_saves_and_a_second_writer_is_refused(trainings: Trainings) -> None:
    command = ("run=stopped", "trainer.max_steps=500", "lr_schedule.total_steps=500", "loader.num_workers=0")
    process = trainings.start(*command, "callbacks.checkpoints.every_n_steps=2")
    first = trainings.checkpoint("stopped", 2)
    try:
        while not first.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        code, output = trainings.run(*command)
        assert code == 1
        assert f"pid {process.pid}" in output.strip().splitlines()[-1]
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopped by SIGINT after step" in output
    step = int(output.split("after step ")[1].split(";")[0])
    assert trainings.checkpoint("stopped", step).exists()


def test_sigterm_to_the_whole_group_saves_and_continues(trainings: Trainings) -> None:
    """Data workers hear it too, but go on until the trainer has what it needs to save."""
    same = ("run=stopped", "trainer.max_steps=400", "loader.num_workers=2", "callbacks.checkpoints.every_n_steps=2")
    code, output = trainings.stop_when((trainings.checkpoint("stopped", 2) / MARKER).exists, signal.SIGTERM, *same)
    assert code == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output
    assert "Traceback" not in output
    saved = max(path.parent.name for path in trainings.checkpoint("stopped", 0).parent.glob(f"step-*/{MARKER}"))
    assert f"stopped by SIGTERM after step {int(saved.removeprefix('step-'))};" in output


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


def test_sweep_returns_its_metric(trainings: Trainings) -> None:
    code, output = trainings.run("-m", "seed=0,1", "trainer.max_steps=1", "loader.num_workers=0", "~callbacks.samples")
    assert code == 0, output
    runs = sorted((trainings.folder / "shapes" / "runs").glob("*/results.json"))
    assert len(runs) == 2
    assert all("score/all" in json.loads(path.read_text())["metrics"] for path in runs)


def test_evaluation_during_training(trainings: Trainings) -> None:
    """FVD's machinery on shapes, at a step and at the end; names carry the number of videos."""
    code, output = trainings.run(
        "run=measured",
        "callbacks=shapes_fvd",
        "callbacks.evaluation.protocol.num_videos=16",
        "callbacks.evaluation.every_n_steps=1",
        "trainer.max_steps=2",
        "loader.num_workers=0",
    )
    assert code == 0, output
    assert "val/fvd_shapes_n16" in output
    events = EventAccumulator(str(trainings.folder / "shapes" / "runs" / "measured" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("val/fvd_shapes_n16")] == [1, 2]

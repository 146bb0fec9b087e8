"""A run from its command to its report, measured on the way and in a sweep."""

from __future__ import annotations

import json
import subprocess
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trainings import Trainings

from t2v.pipeline import TextToVideoPipeline


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
        "speed/callbacks",
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

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from t2v.benchmark import line
from t2v.benchmarks import measuring
from t2v.benchmarks import train as module
from t2v.benchmarks.measuring import attempt, timed
from t2v.benchmarks.random_parts import SMALL
from t2v.benchmarks.train import OPTIMIZER, image, train
from t2v.configuration import config_dir
from t2v.training.operations import unet_tflop

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"batches": [1], "size": 8, "rounds": 1, "seconds": 5, "device": "cpu"}


def test_a_row_for_each_network_and_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged: list[float] = []
    update = module.EMA.update
    monkeypatch.setattr(module.EMA, "update", lambda self, *rest, **more: (averaged.append(self.decay), update(self, *rest, **more)))
    rows = list(train(**QUICK | {"batches": [2]}, frames=2, versus="diffusers", profile=str(tmp_path / "kernels.txt")))
    assert [(row["network"], row["batch"]) for row in rows] == [("t2v", 2), ("diffusers", 2)]
    work = 3 * unet_tflop(SMALL, (4, 2, 8, 8), (77, 64))
    for row in rows:
        assert row["clips_per_s"] == pytest.approx(row["batch"] / (row["median_ms"] / 1e3))
        assert row["tflop_per_s"] == pytest.approx(row["clips_per_s"] * work)
        assert 0.3 < row["loss"] < 3  # of a network that knows nothing: about 1
    assert len(averaged) >= 4  # each step of ours
    assert "convolution_backward" in (tmp_path / "kernels.txt").read_text()


def test_images_and_pixels() -> None:
    (row,) = image(**QUICK, fed="pixels", channels_last=True, gradient_checkpointing="all")
    assert row["frames"] == 1
    assert row["images_per_s"] > 0


def test_options_that_cannot_take_effect_are_errors() -> None:
    for options, words in (
        ({"versus": "others"}, "versus=others"),
        ({"fed": "audio"}, "fed=audio"),
        ({"compile_peer": True}, "no peer"),
        ({"attention_backend": "triton"}, "NVIDIA GPU"),
        ({"versus": "diffusers", "config": {**SMALL, "num_temporal_convs": 2}}, "num_temporal_convs=2"),
        ({"cuda_graphs": True}, "cuda_graphs=true needs an NVIDIA GPU"),
    ):
        with pytest.raises(ValueError, match=words):
            list(train(**QUICK, **options))


def test_the_optimizer_is_the_configured_one() -> None:
    configured = yaml.safe_load((config_dir() / "optimizer" / "adamw.yaml").read_text())
    configured["betas"] = tuple(configured["betas"])
    assert configured == {"_target_": "torch.optim.AdamW", "_partial_": True, **OPTIMIZER}


def test_rounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def call() -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)
    timing = timed(call, CPU, rounds=1000, seconds=2)  # after the first call: two to warm up, then six
    assert (timing.milliseconds, timing.first_s) == ((250,) * 6, 0.25)
    assert timing.row["low_ms"] == timing.median_ms == timing.row["high_ms"] == 250
    assert len(timed(call, CPU, rounds=3, seconds=50).milliseconds) == 3
    assert len(timed(call, CPU, rounds=3, seconds=0.1).milliseconds) == 1  # not even the warm-up has time


def test_out_of_memory_is_a_result_and_other_errors_are_ours() -> None:
    def fail(error: Exception) -> Any:
        raise error

    assert attempt({"batch": 8}, lambda: fail(torch.OutOfMemoryError("x"))) == {"batch": 8, "out_of_memory": True}
    assert attempt({}, lambda: fail(RuntimeError("invalid\nargument")), may_fail=True) == {"failed": "invalid argument"}
    with pytest.raises(RuntimeError):
        attempt({}, lambda: fail(RuntimeError("x")))


def test_columns_are_named_where_they_change() -> None:
    rows = [{"a": 1.23456, "b": "x"}, {"a": 2.0, "b": "yy"}, {"c": 3}]
    printed = [line(row, before) for before, row in zip([{}, *rows], rows)]
    assert printed == ["a          b\n1.235      x", "2          yy", "c\n3"]

"""The evaluation during a training on two ranks: as many videos as neither ranks nor chunks divide, one rank's numbers, and no wait for a
rank that fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trainings import SMALL, Trainings

import t2v

pytestmark = pytest.mark.slow
NINE = (
    "callbacks=shapes_fvd",
    "callbacks.evaluation.protocol={num_videos: 9, chunk: 2, size: 32, num_frames: 4, companions: false}",
    "callbacks.evaluation.dataset.videos=9",
    "callbacks.evaluation.every_n_steps=1",
    "trainer.max_steps=2",
    "callbacks.score=null",
    "callbacks.samples=null",
    "metric=null",
    "loader.num_workers=0",
    "callbacks.training_log.every_n_steps=1",
    "trainer.accelerator=cpu",
)
STRATEGIES = {"one": (), "ddp": ("strategy=ddp", "trainer.devices=2"), "fsdp": ("strategy=fsdp", "trainer.devices=2")}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{Path(t2v.__file__).parents[1]}")


def base() -> tuple[str, ...]:
    return (*(line for line in SMALL if not line.startswith("callbacks.")), *NINE)


def test_two_ranks_measure_what_one_measures(trainings: Trainings) -> None:
    """Weights that do not move, so that they are the same everywhere: then so are the numbers, amid a training and at its end."""
    measured = {}
    for run, how in STRATEGIES.items():
        witness = "+callbacks.witness={_target_: witness.Witness}"
        code, output = trainings.run(f"run={run}", witness, "optimizer.lr=0", *how, base=base())
        assert code == 0, output
        assert ("on 2 ranks" in output) == bool(how), output
        files = sorted((trainings.folder / "shapes" / "runs" / run).glob("measured-*.json"))
        measured[run] = [json.loads(file.read_text()) for file in files]
    assert [len(values) for values in measured.values()] == [1, 2, 2]
    (one,) = measured["one"]
    assert {"val/fvd_shapes_n9", "val/kvd_shapes_n9", "val/all_attributes_right_n9", "val/dynamics_n9"} <= set(one)
    assert one["val/fvd_shapes_n9"] > 0
    assert measured["ddp"] == measured["fsdp"] == [one, one]


@pytest.mark.parametrize(
    ("strategy", "where", "rank", "said"),
    [
        ("ddp", "extractor", 1, "the evaluation failed on rank 1: ValueError: no memory for this chunk"),
        ("fsdp", "extractor", 1, "the evaluation failed on rank 1: ValueError: no memory for this chunk"),
        (
            "fsdp",
            "generate",
            1,
            "rank 1 stopped inside a network that is divided between ranks, and the others with it: no memory in this block",
        ),
        (
            "fsdp",
            "generate",
            0,  # which started the other
            "rank 0 stopped inside a network that is divided between ranks, and the others with it: no memory in this block",
        ),
    ],
)
def test_a_rank_that_fails_ends_all(trainings: Trainings, strategy: str, where: str, rank: int, said: str) -> None:
    """Long before an exchange times out, which takes half an hour: `run` waits four minutes for the end of all."""
    how = {"where": where, "rank": rank, "deaf": rank == 0}
    breaks = ("callbacks.evaluation._target_=witness.BreaksOnOneRank", *(f"+callbacks.evaluation.{key}={how[key]}" for key in how))
    code, output = trainings.run("run=broken", *breaks, *STRATEGIES[strategy], base=base())
    assert code == 1, output
    assert said in output

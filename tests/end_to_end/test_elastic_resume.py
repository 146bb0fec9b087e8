"""A run that goes on with another number of ranks consumes what one rank would have: the same samples in the same steps."""

from __future__ import annotations

import json

import pytest
from trainings import Trainings

Consumed = dict[tuple[int, str, int], tuple[str, float]]


def consumed(trainings: Trainings, run: str) -> Consumed:
    """(step, stream, global sample index) -> (key, start), of all ranks; nothing is there twice."""
    found: Consumed = {}
    for path in (trainings.folder / "shapes/runs" / run).glob("consumed_rank*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            for index, key, start in zip(line["indices"], line["keys"], line["starts"], strict=True):
                assert (line["step"], line["stream"], index) not in found
                found[line["step"], line["stream"], index] = key, start
    return found


@pytest.mark.slow
def test_two_ranks_then_one_then_four(trainings: Trainings) -> None:
    same = ("debug=consumed", "batch={image: 5, video: 4}", "loader.num_workers=1", "data.video.num_frames=2", "metric=null")
    same += ("callbacks.score=null", "callbacks.samples=null")
    code, output = trainings.run("run=straight", "trainer.max_steps=6", *same)
    assert code == 0, output
    for ranks, steps in ((2, 2), (1, 4), (4, 6)):
        code, output = trainings.run(
            "run=elastic", f"trainer.max_steps={steps}", *same, *(["strategy=ddp", f"trainer.devices={ranks}"] if ranks > 1 else [])
        )
        assert code == 0, output
        assert f"on {ranks} rank" in output
        assert "depends on the number of ranks" not in output
    straight, elastic = consumed(trainings, "straight"), consumed(trainings, "elastic")
    assert len(straight) == 6 * (5 + 4)
    assert elastic == straight

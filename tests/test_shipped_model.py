"""The shapes model that comes with the package does what its record says: 16 prompts that it never saw, 20 steps, on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from t2v.data.checker import NONE, Score, Seen, compare, look, truths
from t2v.data.shape_world import Spec
from t2v.data.shapes import held_out_specs
from t2v.pipeline import TextToVideoPipeline

# Colour right in 13 of the 16 videos or more, motion in 15 or more, and direction as good as experiments/shapes_gpu/README.md says of this
# model, within its interval.
COLOUR, MOVING = 13, 15
DIRECTION = 15  # the record says .998 (.989-1.000) of 512: at .989, fewer than 15 of 16 come in one of 75 draws

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made() -> tuple[list[Spec], list[Seen], Score]:
    pipeline = TextToVideoPipeline.from_pretrained("package:shapes", device="cpu")
    pipeline.sampler = replace(pipeline.sampler, num_steps=20)
    specs, fps, frames = held_out_specs(16, seed=11), float(pipeline.sample["fps"]), int(pipeline.sample["frames"])
    videos = pipeline([spec.caption for spec in specs], batch_size=16)
    seen = look(list(videos), fps)
    return specs, seen, compare(seen, specs, truths(specs, frames, fps, videos.shape[2]))


def test_colours_are_those_of_the_prompts(made: tuple[list[Spec], list[Seen], Score]) -> None:
    specs, seen, score = made
    assert score["colour"].right >= COLOUR, score
    of_others = compare(seen, specs[5:] + specs[:5], seen)  # the very same videos, against prompts that they do not come from
    assert of_others["colour"].right < COLOUR, "a model that ignores its text would pass"


def test_most_videos_move(made: tuple[list[Spec], list[Seen], Score]) -> None:
    _, seen, score = made
    assert sum(what.direction != NONE for what in seen) >= MOVING, score


def test_directions_are_as_good_as_the_record_says(made: tuple[list[Spec], list[Seen], Score]) -> None:
    _, _, score = made
    assert score["direction"].right >= DIRECTION, score

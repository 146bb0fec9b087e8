from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from t2v.data.checker import NONE, VIDEO_ATTRIBUTES, Seen, check, look, matches, score, truths, wilson
from t2v.data.shape_world import ALL_COLOURS, ALL_SHAPES, BACKGROUNDS, Spec, draw, place
from t2v.data.shapes import held_out_images, held_out_specs, render

SPEC = Spec("red", "circle", "black", "left", "quickly", radius=0.15, x=0.7, y=0.5)


def clip(spec: Spec, frames: int = 16, fps: float = 3.0, size: int = 64) -> np.ndarray:
    """The spec without codec."""
    return np.stack([draw(spec, k / fps, size, size) for k in range(frames)])


def blurred(frames: Tensor, sigma: float) -> Tensor:
    reach = torch.arange(-6, 7)
    kernel = torch.exp(-(reach**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = frames.movedim(-1, 1).float()
    for shape in ((1, -1), (-1, 1)):
        weight = kernel.reshape(1, 1, *shape).expand(3, 1, *(13 if n == -1 else 1 for n in shape))
        pad = (6, 6, 0, 0) if shape[1] == -1 else (0, 0, 6, 6)
        x = torch.nn.functional.conv2d(torch.nn.functional.pad(x, pad, mode="replicate"), weight, groups=3)
    return x.round().to(torch.uint8).movedim(1, -1)


@pytest.mark.parametrize("frames", [16, 8])
@pytest.mark.parametrize("kind", ["mixed", "image_only"])
def test_real_clips_are_all_right(frames: int, kind: str) -> None:
    specs = held_out_specs(48, seed=5, kind=kind)  # type: ignore[arg-type]
    result = score([render(spec, frames) for spec in specs], specs, real=[clip(spec, frames) for spec in specs])
    for name in ("colour", "background", "direction", "speed", "axis", "sign"):
        assert result[name].accuracy == 1.0, name
    assert result["shape"].right >= 47
    assert result["all"].ceiling == 1.0


@pytest.mark.slow
def test_the_ceiling_on_many_clips() -> None:
    specs = held_out_specs(600, seed=6)
    real = [render(spec, 16) for spec in specs]
    result = score(real, specs, real=real)
    assert all(result[name].accuracy == 1.0 for name in ("colour", "background", "direction", "speed"))
    assert result["shape"].accuracy >= 0.995


def test_images_are_all_right() -> None:
    specs = held_out_images(150, seed=5)
    real = [render(spec) for spec in specs]
    result = score(real, specs, real=real)
    assert list(result.rows) == ["colour", "shape", "background", "all"]
    assert result["all"].right >= 149


def test_every_colour_stands_out_from_every_background_and_every_shape_from_the_others() -> None:
    rng = __import__("random").Random(0)
    for colour in ALL_COLOURS:
        for background in BACKGROUNDS:
            for shape in ALL_SHAPES:
                seen = check(clip(place(rng, (colour, shape), background), frames=1))
                assert (seen.colour, seen.shape, seen.background) == (colour, shape, background)


def test_time_reversed_turns_the_sign_and_nothing_else() -> None:
    forward, backward = check(clip(SPEC)), check(clip(SPEC)[::-1])
    assert (forward.direction, backward.direction) == ("left", "right")
    assert replace(forward, direction="", velocity=None) == replace(backward, direction="", velocity=None)
    right = matches(backward, SPEC)
    assert right["axis"]
    assert not right["sign"]
    assert not right["all"]


def test_frozen_motion_has_no_direction() -> None:
    seen = check(np.repeat(clip(SPEC)[:1], 16, axis=0))
    assert (seen.colour, seen.shape, seen.direction, seen.speed) == ("red", "circle", NONE, NONE)
    assert "sign" not in matches(seen, SPEC)  # there is no axis to have a sign


def test_speed_is_in_seconds_not_in_frames() -> None:
    assert check(clip(SPEC, frames=8, fps=3), fps=3).speed == "quickly"
    assert check(clip(SPEC, frames=16, fps=6), fps=6).speed == "quickly"
    assert check(clip(SPEC, frames=16, fps=3), fps=1.2).speed == "slowly"  # the same frames, shown slower


def test_blur_and_noise_leave_most_right() -> None:
    specs = held_out_specs(48, seed=2)
    noise = torch.Generator().manual_seed(0)
    damaged = []
    for spec in specs:
        soft = blurred(render(spec, 8), sigma=1.5)
        damaged.append((soft + torch.randn(soft.shape, generator=noise) * 6).clamp(0, 255).to(torch.uint8))
    result = score(damaged, specs, real=damaged)
    for name in ("colour", "background", "direction", "speed"):
        assert result[name].right >= 46, result
    assert result["shape"].right >= 40, result


def test_a_frame_that_jumps_away_does_not_turn_the_motion() -> None:
    frames = clip(SPEC)
    frames[3] = clip(replace(SPEC, x=0.2, y=0.8, direction=None, speed=None), frames=1)
    assert check(frames).direction == "left"
    assert check(frames).speed == "quickly"


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((16, 64, 64, 3), np.uint8),
        np.full((1, 64, 64, 3), 255, np.uint8),
        np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8),
        np.random.default_rng(0).integers(100, 120, (2, 32, 32, 3), dtype=np.uint8),
        np.pad(clip(SPEC)[:2], ((0, 6), (0, 0), (0, 0), (0, 0))),  # gone in most frames
        np.eye(64, dtype=np.uint8)[None, :, :, None].repeat(3, axis=3) * 255,
        np.zeros((3, 1, 1, 3), np.uint8),
    ],
)
def test_nothing_to_see_is_none_and_no_crash(frames: np.ndarray) -> None:
    seen = check(frames)
    assert NONE in (seen.colour, seen.shape)
    assert seen.direction == NONE


def test_what_is_not_a_square_video_is_refused() -> None:
    for shape in ((16, 64, 48, 3), (64, 64, 3), (0, 64, 64, 3), (4, 64, 64, 1)):
        with pytest.raises(ValueError, match="square"):
            check(np.zeros(shape, np.uint8))


def test_score_counts_what_is_wrong_and_states_ceiling_chance_and_interval() -> None:
    specs = held_out_specs(48, seed=3)
    real = [clip(spec, 4) for spec in specs]
    repainted = [clip(replace(spec, colour="red" if spec.colour != "red" else "blue"), 4) for spec in specs[:12]] + real[12:]
    result = score(repainted, specs, real=real)
    assert result["colour"].right == 36
    assert result["all"].right == 36
    assert result["colour"].ceiling == 1.0
    assert result["colour"].interval == wilson(36, 48)
    for name in ("shape", "background", "direction", "speed"):
        assert result[name].right == 48, name
    chance = {
        "colour": 1 / 8,
        "shape": 1 / 3,
        "background": 1 / 3,
        "direction": 1 / 4,
        "speed": 1 / 2,
        "axis": 1 / 2,
        "sign": 1 / 2,
        "all": 0,
    }
    for name, expected in chance.items():
        assert result[name].chance == pytest.approx(expected, abs=0.08), name
    lines = str(result).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [*VIDEO_ATTRIBUTES, "axis", "sign", "steady", "all"]
    assert result.as_dict()["colour"]["accuracy"] == 0.75


def test_a_coin_for_the_sign_scores_one_half_and_the_right_axis_one() -> None:
    specs = held_out_specs(48, seed=4)
    videos = [clip(spec, 8)[:: -1 if k % 2 else 1] for k, spec in enumerate(specs)]
    result = score(videos, specs, real=videos)
    assert result["axis"].accuracy == 1.0
    assert result["sign"].accuracy == 0.5
    assert result["direction"].accuracy == 0.5


def test_score_renders_the_real_clips_itself_and_refuses_unequal_lists() -> None:
    specs = held_out_specs(2)
    result = score([np.zeros((8, 64, 64, 3), np.uint8)] * 2, specs)
    assert result["all"].ceiling == 1.0
    assert result["all"].right == 0
    assert result["sign"].n == 0
    with pytest.raises(ValueError, match="1 videos for 2 specs"):
        score([np.zeros((8, 64, 64, 3), np.uint8)], specs)


def test_wilson_against_published_values() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson(263, 263)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)


def test_seen_knows_its_axis() -> None:
    assert Seen(direction="up").axis == "vertical"
    assert Seen().axis == NONE


def test_steady_is_what_moves_straight_in_every_frame() -> None:
    frames = clip(SPEC)
    assert check(frames).steady
    shuffled = frames[np.random.default_rng(0).permutation(16)]  # frames that know nothing of each other's place
    assert not check(shuffled).steady
    flickering = frames.copy()
    flickering[5] = flickering[5, 0, 0]
    assert not check(flickering).steady
    assert all(check(clip(spec, fps=3)).steady for spec in held_out_specs(24, seed=9))


def test_processes_see_what_one_sees() -> None:
    specs = held_out_specs(8, seed=3)
    videos = [clip(spec, frames=4, size=32) for spec in specs]
    assert look(videos, processes=2) == look(videos)
    long, usual = truths(specs[:2], 32, 3, 64), truths(specs[:2], 16, 3, 64)
    assert long == usual  # a real clip has no more frames than 6 s hold

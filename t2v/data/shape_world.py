"""The small world of `shapes`: what can be seen in it, how it is put into words, and how it is drawn. numpy only.

A coloured shape stands on (image) or moves over (video) a plain background. Lengths and positions are fractions of the side of the middle
square, which is what the readers crop; speeds are such fractions a second. Nothing here knows about files or codecs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RGB = tuple[int, int, int]
Floats = NDArray[np.floating[Any]]
Pair = tuple[str, str]  # (colour, shape)

COLOURS: dict[str, RGB] = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 70, 220),
    "yellow": (235, 215, 40),
    "magenta": (215, 40, 200),
    "cyan": (40, 205, 215),
    "white": (240, 240, 240),
    "orange": (240, 130, 20),
}
IMAGE_COLOURS: dict[str, RGB] = {"purple": (115, 25, 150), "brown": (125, 70, 20), "pink": (255, 165, 190), "teal": (15, 125, 120)}
ALL_COLOURS = COLOURS | IMAGE_COLOURS  # images know more than the videos
BACKGROUNDS: dict[str, RGB] = {"black": (16, 16, 16), "gray": (110, 110, 110), "navy": (20, 26, 84)}
SHAPES = ("circle", "square", "triangle")
IMAGE_SHAPES = ("cross", "star")
ALL_SHAPES = SHAPES + IMAGE_SHAPES
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y grows downwards
SPEEDS: dict[str, float] = {"slowly": 0.04, "quickly": 0.09}  # sides of the square a second: .20 and .45 over 16 frames at 3 fps
SECONDS = 6.0  # length of every clip: 16 frames at 3 fps span 5 s, so a window may start within the first second
RADIUS = (0.11, 0.18)
EDGE = 0.02  # clear border that no shape touches

HELD_OUT_PAIRS: frozenset[Pair] = frozenset({("green", "triangle"), ("yellow", "circle"), ("blue", "square"), ("magenta", "triangle")})
VIDEO_PAIRS: tuple[Pair, ...] = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT_PAIRS)
IMAGE_PAIRS: tuple[Pair, ...] = tuple((c, s) for c in ALL_COLOURS for s in ALL_SHAPES if (c, s) not in HELD_OUT_PAIRS)

MOTION = (("white", "circle"), "black")  # pair and background of the world in which captions differ in direction and speed alone

VIDEO_TEMPLATES = (
    "{a} {colour} {shape} moving {direction} {speed} on a {background} background",
    "{a} {colour} {shape} moves {speed} {direction} over a {background} background",
    "on a {background} background, {a} {colour} {shape} is {speed} moving {direction}",
)
IMAGE_TEMPLATES = ("{a} {colour} {shape} on a {background} background", "a picture of {a} {colour} {shape}, {background} background")


@dataclass(frozen=True)
class Spec:
    """One clip or image, fully described. `direction` and `speed` are None for an image."""

    colour: str
    shape: str
    background: str
    direction: str | None
    speed: str | None
    radius: float
    x: float  # centre at time 0
    y: float
    template: int = 0

    @property
    def is_video(self) -> bool:
        return self.direction is not None

    @property
    def caption(self) -> str:
        words = {
            "a": "an" if self.colour[0] in "aeiou" else "a",
            "colour": self.colour,
            "shape": self.shape,
            "background": self.background,
            "direction": self.direction,
            "speed": self.speed,
        }
        return (VIDEO_TEMPLATES if self.is_video else IMAGE_TEMPLATES)[self.template].format(**words)

    @property
    def unseen_pair(self) -> bool:
        """True if no clip or image shows this colour and shape together."""
        return (self.colour, self.shape) in HELD_OUT_PAIRS

    @property
    def image_only(self) -> bool:
        """True if no clip shows this colour, or none this shape: only images teach it."""
        return self.colour in IMAGE_COLOURS or self.shape in IMAGE_SHAPES

    def centre(self, seconds: float) -> tuple[float, float]:
        """Where the centre stands after so many seconds, as (x, y)."""
        if self.direction is None or self.speed is None:
            return self.x, self.y
        dx, dy = DIRECTIONS[self.direction]
        way = SPEEDS[self.speed] * seconds
        return self.x + dx * way, self.y + dy * way


def place(rng: random.Random, pair: Pair, background: str, direction: str | None = None, speed: str | None = None) -> Spec:
    """A spec with random size, place and wording; a moving shape stays inside the middle square for the whole clip."""
    radius = rng.uniform(*RADIUS)
    low, high = radius + EDGE, 1 - radius - EDGE
    dx, dy = DIRECTIONS[direction] if direction else (0, 0)
    way = SPEEDS[speed] * SECONDS if speed else 0.0
    x = rng.uniform(low + way * (dx < 0), high - way * (dx > 0))
    y = rng.uniform(low + way * (dy < 0), high - way * (dy > 0))
    template = rng.randrange(len(VIDEO_TEMPLATES if direction else IMAGE_TEMPLATES))
    return Spec(*pair, background, direction, speed, radius, x, y, template)


def random_video(rng: random.Random, pairs: Sequence[Pair] = VIDEO_PAIRS) -> Spec:
    return place(rng, rng.choice(pairs), rng.choice(list(BACKGROUNDS)), rng.choice(list(DIRECTIONS)), rng.choice(list(SPEEDS)))


def random_motion(rng: random.Random) -> Spec:
    return place(rng, *MOTION, rng.choice(list(DIRECTIONS)), rng.choice(list(SPEEDS)))


def random_image(rng: random.Random, pairs: Sequence[Pair] = IMAGE_PAIRS) -> Spec:
    return place(rng, rng.choice(pairs), rng.choice(list(BACKGROUNDS)))


def inside(shape: str, dx: Floats, dy: Floats, radius: float) -> Floats:
    """Signed distance in pixels from the shape's outline, positive inside; dx and dy are offsets from its centre."""
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return radius - np.sqrt(dx * dx + dy * dy)
    if shape == "square":
        return radius - np.maximum(ax, ay)
    if shape == "triangle":  # point upwards, base and height 2 radius
        return np.minimum(radius - dy, (dy + radius - 2 * ax) / np.float32(5**0.5))
    if shape == "cross":  # upright, arms as wide as 0.8 radius
        arm = 0.4 * radius
        return np.maximum(np.minimum(radius - ax, arm - ay), np.minimum(arm - ax, radius - ay))
    if shape == "star":  # five points, one upwards; each tenth is bounded by the line from a point to a notch
        fifth = 2 * np.pi / 5
        turn = np.abs((np.arctan2(dx, -dy) + fifth / 2) % fifth - fifth / 2)
        distance = np.sqrt(dx * dx + dy * dy)
        notch = 0.5 * radius
        edge = np.array([notch * np.cos(fifth / 2) - radius, notch * np.sin(fifth / 2)])  # from the point at (radius, 0) to the notch
        normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)  # outwards
        return (normal[0] * (radius - distance * np.cos(turn)) - normal[1] * distance * np.sin(turn)).astype(np.float32)
    raise ValueError(f"unknown shape {shape!r}: expected one of {', '.join(ALL_SHAPES)}")


def coverage(shape: str, height: int, width: int, cx: float, cy: float, radius: float) -> Floats:
    """(h w) in [0, 1]: how much of each pixel the shape covers (one pixel of antialiasing). Centre and radius in pixels."""
    y, x = np.ogrid[:height, :width]
    dx, dy = np.broadcast_arrays((x + 0.5 - cx).astype(np.float32), (y + 0.5 - cy).astype(np.float32))
    return np.clip(inside(shape, dx, dy, radius) + 0.5, 0, 1)


def draw(spec: Spec, seconds: float, height: int, width: int) -> NDArray[np.uint8]:
    """(h w c): the frame at that time. Only the shape's surroundings are computed; the rest is plain background."""
    side = min(height, width)
    x, y = spec.centre(seconds)
    cx, cy, radius = (width - side) / 2 + x * side, (height - side) / 2 + y * side, spec.radius * side
    frame = np.empty((height, width, 3), np.uint8)
    background, colour = np.asarray(BACKGROUNDS[spec.background], np.float32), np.asarray(ALL_COLOURS[spec.colour], np.float32)
    frame[:] = BACKGROUNDS[spec.background]
    top, bottom = max(0, int(cy - radius - 2)), min(height, int(cy + radius + 3))
    left, right = max(0, int(cx - radius - 2)), min(width, int(cx + radius + 3))
    alpha = coverage(spec.shape, bottom - top, right - left, cx - left, cy - top, radius)[..., None]
    frame[top:bottom, left:right] = background + alpha * (colour - background) + 0.5
    return frame


def draw_clip(spec: Spec, fps: float, height: int, width: int, seconds: float = SECONDS) -> NDArray[np.uint8]:
    """(f h w c): the whole clip."""
    return np.stack([draw(spec, k / fps, height, width) for k in range(round(seconds * fps))])

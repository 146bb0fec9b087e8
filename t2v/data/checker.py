"""What a video of `shapes` shows, read from its pixels with numpy alone: no learned weights, so a score means the same everywhere.

Background: the border. Colour: the pixels that differ most from it. Shape: the best of the templates, drawn with the measured area and
centre. Motion: the median slope of the centre over all pairs of frames. What cannot be told is "none", which counts as wrong.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from t2v.data.shape_world import ALL_COLOURS, ALL_SHAPES, BACKGROUNDS, DIRECTIONS, SECONDS, SPEEDS, Floats, Spec, coverage
from t2v.data.shapes import render
from t2v.data.workers import end_with_parent

T = TypeVar("T")
R = TypeVar("R")
Video = NDArray[np.uint8] | Tensor

NONE = "none"
MIN_CONTRAST = 40.0  # Euclidean RGB distance from the background at which a pixel belongs to something; the palest pair is 96 apart
MIN_AREA = 0.004  # of the picture; the smallest shape, a star, covers 0.018
MAX_BACKGROUND_ERROR = 60.0  # RGB distance beyond which no name fits; black and navy are 69 apart
MAX_COLOUR_ERROR = 90.0
MAX_SHAPE_ERROR = 0.5  # squared error of the best template relative to the shape's area; real clips stay below 0.1
BORDER = 0.02  # of the side
STILL = 0.4 * SPEEDS["slowly"]  # sides a second: slower is no motion
FAST = math.sqrt(SPEEDS["slowly"] * SPEEDS["quickly"])
SHAKE = 0.03  # of the side, root mean square about a straight path at even speed; real clips stay below 0.01

VIDEO_ATTRIBUTES = ("colour", "shape", "background", "direction", "speed")
IMAGE_ATTRIBUTES = VIDEO_ATTRIBUTES[:3]


@dataclass(frozen=True)
class Seen:
    """What was recognised. `velocity` (x, y) in sides a second is None where no motion can be measured: one frame, or no shape.

    Below 0.016 sides a second there is no direction and no speed: frozen motion is wrong motion. `steady`: the shape is in every frame, and
    on a straight path at even speed; frames that know nothing of each other are not.
    """

    colour: str = NONE
    shape: str = NONE
    background: str = NONE
    direction: str = NONE
    speed: str = NONE
    velocity: tuple[float, float] | None = None
    steady: bool = False

    @property
    def axis(self) -> str:
        return NONE if self.direction == NONE else axis_of(self.direction)


def axis_of(direction: str) -> str:
    return "horizontal" if DIRECTIONS[direction][0] else "vertical"


def check(frames: NDArray[np.uint8] | Tensor, fps: float = 3.0) -> Seen:
    """Recognise one video, uint8 (f h w c) with h = w, shown at `fps`; one frame is an image. Never raises for what the pixels hold."""
    pixels = np.asarray(frames).astype(np.float32)
    if pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape or pixels.shape[1] != pixels.shape[2]:
        raise ValueError(f"frames have shape {tuple(pixels.shape)}: expected (f h w 3), square, with at least one frame")
    side = pixels.shape[1]
    edge = max(1, round(BORDER * side))
    border = [pixels[:, :edge], pixels[:, -edge:], pixels[:, :, :edge], pixels[:, :, -edge:]]
    backdrop = np.median(np.concatenate([part.reshape(-1, 3) for part in border]), axis=0)
    background = nearest(backdrop, BACKGROUNDS, MAX_BACKGROUND_ERROR)

    contrast = np.linalg.norm(pixels - backdrop, axis=-1)  # (f h w)
    there = contrast > MIN_CONTRAST
    if there.mean() < MIN_AREA / 2:
        return Seen(background=background)
    core = contrast > 0.85 * np.percentile(contrast[there], 80)  # inner pixels: those of the outline are mixed
    paint = np.median(pixels[core], axis=0)
    colour = nearest(paint, ALL_COLOURS, MAX_COLOUR_ERROR)

    towards = (paint - backdrop) / np.square(paint - backdrop).sum()
    alpha = np.clip((pixels - backdrop) @ towards, 0, 1)  # (f h w): how much of each pixel the shape covers
    alpha[alpha < 0.15] = 0
    area = alpha.sum((1, 2))
    found = np.flatnonzero(area >= MIN_AREA * side * side)
    if len(found) < max(1, math.ceil(len(pixels) / 2)):
        return Seen(colour=colour, background=background)
    ticks = np.arange(side, dtype=np.float32) + 0.5
    x = (alpha.sum(1) @ ticks)[found] / area[found]
    y = (alpha.sum(2) @ ticks)[found] / area[found]
    shape = best_shape(alpha[found], area[found], x, y)
    if len(found) < 2:
        return Seen(colour, shape, background)
    times = found / fps
    velocity = vx, vy = slope(times, x / side), slope(times, y / side)
    steady = len(found) == len(pixels) and math.hypot(shake(times, x / side, vx), shake(times, y / side, vy)) < SHAKE
    fastest = max(abs(vx), abs(vy))
    if fastest < STILL:
        return Seen(colour, shape, background, velocity=velocity, steady=steady)
    direction = ("right" if vx > 0 else "left") if abs(vx) >= abs(vy) else ("down" if vy > 0 else "up")
    return Seen(colour, shape, background, direction, "quickly" if fastest > FAST else "slowly", velocity, steady)


def nearest(rgb: Floats, names: Mapping[str, tuple[int, int, int]], limit: float) -> str:
    distances = {name: float(np.linalg.norm(rgb - np.asarray(colour, np.float32))) for name, colour in names.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= limit else NONE


def slope(times: Floats, values: Floats) -> float:
    """Theil and Sen's line: the median of the slopes between all pairs, which a few wild frames do not move."""
    first, second = np.triu_indices(len(times), 1)
    return float(np.median((values[second] - values[first]) / (times[second] - times[first])))


def shake(times: Floats, values: Floats, speed: float) -> float:
    """Root mean square distance from the path at that speed."""
    return float(np.std(values - speed * times))


@cache
def unit_moments(shape: str) -> tuple[float, float]:
    """(area, height of the centroid below the centre) of the shape with radius 1."""
    radius, side = 100.0, 256
    cover = coverage(shape, side, side, side / 2, side / 2, radius)
    below = np.arange(side) + 0.5 - side / 2
    return float(cover.sum()) / radius**2, float(cover.sum(1) @ below / cover.sum()) / radius


def best_shape(alpha: Floats, area: Floats, x: Floats, y: Floats) -> str:
    """The template with the least squared error over all frames. alpha (f h w); areas and centroids (f,) in pixels."""
    side = alpha.shape[1]
    errors = dict.fromkeys(ALL_SHAPES, 0.0)
    for cover, total, cx, cy in zip(alpha, area, x, y):
        for shape in ALL_SHAPES:
            unit, below = unit_moments(shape)
            radius = math.sqrt(total / unit)
            template = coverage(shape, side, side, float(cx), float(cy) - below * radius, radius)
            errors[shape] += float(np.square(cover - template).sum() / total) / len(area)
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= MAX_SHAPE_ERROR else NONE


@dataclass(frozen=True)
class Row:
    """One attribute's score: `right` of `n`; the checker's own score on real clips of the same prompts, and on shuffled captions."""

    n: int
    right: int
    ceiling: float
    chance: float

    @property
    def accuracy(self) -> float:
        return self.right / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval."""
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class Score:
    """Rows by attribute: those of the prompt, the direction taken apart (axis; sign, of those whose axis is right), "steady" (whether the
    frames belong together), and "all" of the prompt's."""

    rows: dict[str, Row]
    title: str = ""

    def __getitem__(self, attribute: str) -> Row:
        return self.rows[attribute]

    def __str__(self) -> str:
        """A Markdown table."""
        lines = [self.title, ""] if self.title else []
        lines += ["| attribute | n | right | 95 % interval | real clips | shuffled captions |", "|---|---|---|---|---|---|"]
        for name, row in self.rows.items():
            low, high = row.interval
            lines.append(f"| {name} | {row.n} | {row.accuracy:.3f} | {low:.3f}-{high:.3f} | {row.ceiling:.3f} | {row.chance:.3f} |")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers, for json and loggers."""
        return {
            k: asdict(row) | {"accuracy": row.accuracy, "low": row.interval[0], "high": row.interval[1]} for k, row in self.rows.items()
        }


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (95 % unless z says otherwise)."""
    if n == 0:
        return 0.0, 1.0
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def score(
    videos: Sequence[Video] | Tensor, specs: Sequence[Spec], fps: float = 3.0, *, real: Sequence[Video | Seen] | None = None
) -> Score:
    """Compare videos, each uint8 (f h w c) at `fps`, with the specs whose captions prompted them.

    `real` are the truths of the same specs for the ceiling, or what was seen in them; rendered here if None.
    """
    if len(videos) != len(specs) or not specs:
        raise ValueError(f"{len(videos)} videos for {len(specs)} specs: expected one each, and at least one")
    if real is None:
        real = truths(specs, videos[0].shape[0], fps, videos[0].shape[1])
    return compare(look(videos, fps), specs, [what if isinstance(what, Seen) else check(what, fps) for what in real])


def look(videos: Sequence[Video] | Tensor, fps: float = 3.0, processes: int = 1) -> list[Seen]:
    """What is in each video; 11 ms each for 16 frames of 64 x 64 on one core."""
    return in_parallel(partial(check, fps=fps), [np.asarray(video) for video in videos], processes)


def truths(specs: Sequence[Spec], num_frames: int, fps: float, size: int, processes: int = 1) -> list[Seen]:
    """What is seen in the real clip of each spec, as the readers would show it; 40 ms each on one core. A real clip ends after 6 s."""
    longest = int((SECONDS - 1) * fps) + 1
    return in_parallel(partial(truth, num_frames=min(num_frames, longest), fps=fps, size=size), list(specs), processes)


@cache
def truth(spec: Spec, num_frames: int, fps: float, size: int) -> Seen:
    return check(render(spec, num_frames, fps, size), fps)


def in_parallel(function: Callable[[T], R], items: Sequence[T], processes: int) -> list[R]:
    if processes <= 1 or len(items) < 2 * processes:
        return [function(item) for item in items]
    # spawn: the caller may have threads and a GPU, which a forked child would share
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        return list(pool.map(function, items, chunksize=-(-len(items) // (4 * processes))))


def compare(seen: Sequence[Seen], specs: Sequence[Spec], truth: Sequence[Seen]) -> Score:
    """The score of what was seen, of as many specs, beside what was seen in their real clips."""
    n = len(specs)
    right = [matches(what, spec) for what, spec in zip(seen, specs, strict=True)]
    ceiling = [matches(what, spec) for what, spec in zip(truth, specs, strict=True)]
    shifts = sorted({1 + k * (n - 1) // min(32, n - 1) for k in range(min(32, n - 1))}) if n > 1 else []
    shuffled = [matches(seen[k], specs[(k + shift) % n]) for shift in shifts for k in range(n)]
    rows = {}
    for name in dict.fromkeys(key for verdict in ceiling for key in verdict):
        verdicts = [verdict[name] for verdict in right if name in verdict]
        rows[name] = Row(len(verdicts), sum(verdicts), share(name, ceiling), share(name, shuffled))
    return Score(rows)


def share(name: str, verdicts: Sequence[Mapping[str, bool]]) -> float:
    """How many of those that have a verdict on `name` are right; nan if none has."""
    asked = [verdict[name] for verdict in verdicts if name in verdict]
    return sum(asked) / len(asked) if asked else math.nan


def matches(seen: Seen, spec: Spec) -> dict[str, bool]:
    """Which attributes of the spec were seen. "sign" is asked only where the axis is right, so that a coin scores one half."""
    names = VIDEO_ATTRIBUTES if spec.direction is not None else IMAGE_ATTRIBUTES
    right = {name: getattr(seen, name) == getattr(spec, name) for name in names}
    everything = all(right.values())
    if spec.direction is not None:
        right["axis"] = seen.axis == axis_of(spec.direction)
        if right["axis"]:
            right["sign"] = right["direction"]
        right["steady"] = seen.steady
    return right | {"all": everything}

"""Which frames of a video make a clip: those on screen at start + k / fps seconds."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from fractions import Fraction

from t2v.video.bad_sample import BadSample

Start = float | Callable[[float], float]
"""Seconds after the first frame, or a function that is given the slack (seconds that a start may move) and returns them."""


def wanted_times(
    times: list[int], time_base: Fraction, num_frames: int | None, fps: float | None, start: Start, short: str
) -> tuple[list[int], float]:
    """Presentation times of the frames on screen at start + k / fps, and the start in seconds."""
    span = (times[-1] - times[0]) * time_base
    if fps is None:
        begin = _start(start, 0.0)
        first = max(0, bisect_right(times, times[0] + begin // time_base) - 1)
        chosen = times[first:] if num_frames is None else times[first : first + num_frames]
        if num_frames is not None and len(chosen) < num_frames:
            raise BadSample("video_too_few_frames", f"{len(chosen)} of {num_frames}")
        return chosen, float(begin)
    step = 1 / Fraction(fps).limit_denominator(1000)
    if num_frames is None:
        begin = min(_start(start, 0.0), span)
        num_frames = int((span - begin) / step) + 1
    needed = (num_frames - 1) * step
    if needed > span:
        if short == "skip":
            raise BadSample("video_too_short", f"{float(span):.2f} s of {float(needed):.2f} s")
        if short == "slow":
            step, needed = span / max(1, num_frames - 1), span
    slack = max(Fraction(0), span - needed)
    begin = _start(start, float(slack))
    if short == "skip" and begin > slack:
        if begin > slack + Fraction(1, 1000):  # more than rounding
            raise BadSample("video_too_short", f"{float(span):.2f} s of {float(begin + needed):.2f} s")
        begin = slack
    chosen = []
    for k in range(num_frames):
        offset = begin + k * step
        if offset > span:  # short == "loop": the last frame stays for one more step, then it starts again
            offset = offset % (span + step)
        time = times[0] + offset // time_base
        chosen.append(times[max(0, bisect_right(times, time) - 1)])  # bisect: the frame on screen, also at variable frame rates
    return chosen, float(begin)


def _start(start: Start, slack: float) -> Fraction:
    seconds = start(slack) if callable(start) else start
    return max(Fraction(0), Fraction(seconds).limit_denominator(10**6))

"""WebVid and its like: videos as video2dataset writes them, KEY.mp4 + KEY.txt + KEY.json (section 4.1.1: WebVid, 16 frames at 3 fps)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from t2v.data.errors import QualityLimits
from t2v.data.frames import VideoFrames
from t2v.data.laion import describe
from t2v.data.readers import ClipStream

VIDEOS = ("mp4", "webm", "mkv", "mov", "avi")


def webvid(
    urls: str | Sequence[str] | None = None,
    *,
    num_frames: int = 16,
    fps: float = 3.0,
    size: int = 256,
    short: Literal["skip", "loop", "slow"] = "skip",
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "webvid",
    media: Sequence[str] = VIDEOS,
    caption: Sequence[str] = ("txt", "json:caption"),
    filters: Sequence[str] = (),
    keep_uncaptioned: bool = False,
    min_distinct: float = 0.75,
    max_pixels: int = 4096 * 2304,
    backend: Literal["pyav", "torchcodec"] = "pyav",
    starts: Literal["any", "grid"] = "any",
    num_readers: int = 64,
    buffer: int = 100,
    seed: int = 0,
    limits: Mapping[str, Any] | None = None,
) -> ClipStream:
    """A stream of clips uint8 (num_frames size size 3) from random starts. `sources` as in t2v.data.laion.laion."""
    if short not in ("skip", "loop", "slow"):
        raise ValueError(f"{name}: short={short!r} is none of skip, loop, slow")
    if backend not in ("pyav", "torchcodec"):
        raise ValueError(f"{name}: backend={backend!r} is neither pyav nor torchcodec")
    if starts not in ("any", "grid"):
        raise ValueError(f"{name}: starts={starts!r} is neither any nor grid")
    defaults = {"media": media, "caption": caption, "filters": filters, "keep_uncaptioned": keep_uncaptioned}
    frames = VideoFrames(num_frames, fps, size, short, min_distinct, max_pixels, backend, starts)
    return ClipStream(name, describe(name, urls, sources, defaults), frames, num_readers, buffer, seed, QualityLimits(**(limits or {})))

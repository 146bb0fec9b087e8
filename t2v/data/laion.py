"""LAION and its like: images as img2dataset writes them, KEY.jpg|png|webp + KEY.txt + KEY.json (section 4.1.1: LAION-2B-en)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2v.data.errors import QualityLimits
from t2v.data.frames import ImageFrames
from t2v.data.readers import ClipStream
from t2v.data.sources import Source

IMAGES = ("jpg", "jpeg", "png", "webp")


def laion(
    urls: str | Sequence[str] | None = None,
    *,
    size: int = 256,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "laion",
    media: Sequence[str] = IMAGES,
    caption: Sequence[str] = ("txt", "json:caption"),
    filters: Sequence[str] = (),
    keep_uncaptioned: bool = False,
    min_size: int = 0,
    max_pixels: int = 50_000_000,
    num_readers: int = 64,
    buffer: int = 1000,
    seed: int = 0,
    limits: Mapping[str, Any] | None = None,
) -> ClipStream:
    """A stream of one-frame clips, uint8 (1 size size 3). `urls` is one source; `sources` (name -> Source's arguments, of which media,
    caption, filters and keep_uncaptioned default to those given here) mixes several by weight."""
    defaults = {"media": media, "caption": caption, "filters": filters, "keep_uncaptioned": keep_uncaptioned}
    frames = ImageFrames(size, min_size, max_pixels)
    return ClipStream(name, describe(name, urls, sources, defaults), frames, num_readers, buffer, seed, QualityLimits(**(limits or {})))


def describe(
    name: str, urls: str | Sequence[str] | None, sources: Mapping[str, Mapping[str, Any]] | None, defaults: Mapping[str, Any]
) -> list[Source]:
    """The sources of a stream: one from `urls`, or several. Raises ValueError where it is neither or both."""
    if bool(urls) == bool(sources):
        raise ValueError(f"{name}: give either urls or sources, not {'both' if urls else 'neither'}")
    if urls:
        return [Source(name=name, urls=urls, **defaults)]
    return [Source(**({"name": source} | dict(defaults) | dict(arguments))) for source, arguments in (sources or {}).items()]

"""Encoded media -> uint8 frames (f h w 3): pure functions, and the two recipes that a stream is given."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from t2v.data.errors import BadSample
from t2v.video import decode_clip

BROKEN_IMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow's decoders raise on damaged files (SyntaxError: PNG chunks)."""

# img2dataset drops the EXIF tag from the picture without applying it, and keeps its text in the json (in the words of `exifread`).
TURNS = {
    "Mirrored horizontal": [Image.Transpose.FLIP_LEFT_RIGHT],
    "Rotated 180": [Image.Transpose.ROTATE_180],
    "Mirrored vertical": [Image.Transpose.FLIP_TOP_BOTTOM],
    "Mirrored horizontal then rotated 90 CCW": [Image.Transpose.TRANSPOSE],
    "Rotated 90 CW": [Image.Transpose.ROTATE_270],
    "Mirrored horizontal then rotated 90 CW": [Image.Transpose.TRANSVERSE],
    "Rotated 90 CCW": [Image.Transpose.ROTATE_90],
}


class FrameRecipe(Protocol):
    """How a stream turns media bytes into frames of one shape."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(f, h, w, c) of every clip."""

    def __call__(self, data: bytes, fields: Mapping[str, Any], rng: random.Random) -> tuple[Tensor, float]:
        """(uint8 (f h w c), start in seconds). Raises BadSample."""


def above_zero(**numbers: float) -> None:
    """Raise ValueError for those that are not."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name}={number} of the clips to read must be above 0")


@dataclass(frozen=True)
class ImageFrames:
    """An image as a clip of one frame (section 3.3): the middle square, scaled."""

    size: int = 256
    min_size: int = 0  # pixels of the shorter side; smaller images are skipped
    max_pixels: int = 50_000_000

    def __post_init__(self) -> None:
        above_zero(size=self.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return 1, self.size, self.size, 3

    def __call__(self, data: bytes, fields: Mapping[str, Any], rng: random.Random) -> tuple[Tensor, float]:
        orientation = exif_orientation(fields) if "exif" in fields else ""
        return decode_image(data, size=self.size, orientation=orientation, min_size=self.min_size, max_pixels=self.max_pixels), 0.0


@dataclass(frozen=True)
class VideoFrames:
    """`num_frames` at `fps` from a random start, the middle square (section 4.1.1: 16 frames at 3 fps). `starts="grid"` draws the start
    from the multiples of 1 / fps, in the way that LatentFrames draws its windows: the same seed gives the same ones."""

    num_frames: int = 16
    fps: float = 3.0
    size: int = 256
    short: Literal["skip", "loop", "slow"] = "skip"
    min_distinct: float = 0.75
    max_pixels: int = 4096 * 2304
    backend: Literal["pyav", "torchcodec"] = "pyav"
    starts: Literal["any", "grid"] = "any"

    def __post_init__(self) -> None:
        above_zero(num_frames=self.num_frames, fps=self.fps, size=self.size)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.num_frames, self.size, self.size, 3

    def __call__(self, data: bytes, fields: Mapping[str, Any], rng: random.Random) -> tuple[Tensor, float]:
        return decode_clip(
            data,
            num_frames=self.num_frames,
            fps=self.fps,
            size=self.size,
            start=lambda slack: self._start(slack, rng),
            short=self.short,
            min_distinct=self.min_distinct,
            max_pixels=self.max_pixels,
            backend=self.backend,
        )

    def _start(self, slack: float, rng: random.Random) -> float:
        if self.starts == "any":
            return rng.random() * slack
        return rng.randrange(int(slack * self.fps + 1e-6) + 1) / self.fps


def decode_image(data: bytes, *, size: int, orientation: str = "", min_size: int = 0, max_pixels: int = 50_000_000) -> Tensor:
    """JPEG, PNG, WebP, GIF, ... by their bytes, not their name -> uint8 (1 size size 3): upright, on white, the middle square.

    `orientation` is used where the file has none of its own.
    Raises BadSample: image_empty, image_open, image_too_large, image_too_small, image_truncated.
    """
    if not data:
        raise BadSample("image_empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            image: Image.Image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", str(error)) from error
    except (UnidentifiedImageError, *BROKEN_IMAGE) as error:
        raise BadSample("image_open", str(error)) from error
    if image.width * image.height > max_pixels:
        raise BadSample("image_too_large", f"{image.width}x{image.height}")
    if min(image.size) < max(1, min_size):
        raise BadSample("image_too_small", f"{image.width}x{image.height}")
    try:
        if image.format == "JPEG":
            image.draft("RGB", (2 * size, 2 * size))  # the decoder itself halves what is at least twice too large
        image.load()
        tagged = image.getexif().get(0x0112)
        picture = _rgb(image)
        if tagged:
            picture.getexif()[0x0112] = tagged
            ImageOps.exif_transpose(picture, in_place=True)
    except BROKEN_IMAGE as error:
        raise BadSample("image_truncated", str(error)) from error
    for turn in [] if tagged else TURNS.get(orientation, []):
        picture = picture.transpose(turn)
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    square = picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return torch.from_numpy(np.array(square))[None]  # (1 h w 3)


def exif_orientation(fields: Mapping[str, Any]) -> str:
    """The orientation that img2dataset kept in json["exif"], itself a json text; "" if there is none."""
    try:
        exif = json.loads(fields.get("exif") or "{}")
    except (TypeError, ValueError):
        return ""
    return str(exif.get("Image Orientation", "")) if isinstance(exif, dict) else ""


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16 bits to 8, transparency on white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float32)
        deep = image.mode.startswith("I;16") or values.max(initial=0) > 255
        return Image.fromarray((values / 257 if deep else values).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    return image.convert("RGB") if image.mode != "RGB" else image.copy()

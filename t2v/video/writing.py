"""uint8 frames -> mp4."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]


def write_mp4(
    target: str | os.PathLike[str] | BinaryIO,
    frames: Tensor | Pixels,
    fps: float,
    *,
    crf: int = 18,
    gop: int | None = None,
    preset: str = "veryfast",
    tune: str | None = None,
    rotation: int = 0,
) -> None:
    """Write uint8 frames (f h w c) as H.264 in yuv420p, which every player knows. Odd sizes are padded to even ones by repeating the last
    row or column. A path appears only when the file is whole. One thread, so that the bytes do not depend on the machine's cores.
    `tune` is one of x264's (fastdecode). `rotation` (90, 180, 270) only sets the display tag; `gop` is the
    largest distance between keyframes (x264's 250 if None)."""
    pixels = as_pixels(frames)
    chosen = {"crf": str(crf), "preset": preset, "g": None if gop is None else str(gop), "tune": tune}
    options = {name: value for name, value in chosen.items() if value is not None}
    if isinstance(target, str | os.PathLike):
        path = Path(target)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            _encode(str(partial), pixels, fps, options, rotation)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    else:
        _encode(target, pixels, fps, options, rotation)


def _encode(target: str | BinaryIO, pixels: Pixels, fps: float, options: dict[str, str], rotation: int) -> None:
    height, width = pixels.shape[1:3]
    pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    movflags = {"movflags": "+faststart"} if isinstance(target, str) else {}  # it reopens the file by its name
    with av.open(target, mode="w", format="mp4", options=movflags) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def as_pixels(frames: Tensor | Pixels) -> Pixels:
    pixels = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) == 0:
        raise ValueError(f"frames must be uint8 (f h w 3) with at least one frame, not {pixels.dtype} {tuple(pixels.shape)}")
    return np.ascontiguousarray(pixels)

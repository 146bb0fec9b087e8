"""A clip out of a video file (section 4.1.1: 16 frames at 3 fps from a random start, middle square).

It is exact: a frame is what is on screen at its time, whatever the frame rate does. Two things make it fast: seeking to the keyframe
before the clip, and not decoding frames that are neither wanted nor needed by others (decoding.py).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import av
import numpy as np
import torch
from torch import Tensor

from t2v.video.bad_sample import BadSample
from t2v.video.decoding import decode
from t2v.video.timing import Start, wanted_times
from t2v.video.torchcodec_backend import decode_torchcodec

MAX_PIXELS = 4096 * 2304  # larger frames are refused before anything is decoded
MAX_PACKETS = 200_000  # about 1.8 hours at 30 fps


@dataclass(frozen=True)
class VideoInfo:
    """What the packets of a video say, without decoding: `seconds` is from the first frame to the last."""

    width: int
    height: int
    frames: int
    keyframes: int
    seconds: float
    codec: str


def decode_clip(
    data: bytes,
    *,
    num_frames: int | None = 16,
    fps: float | None = 3.0,
    size: int | None = 256,
    start: Start = 0.0,
    short: Literal["skip", "loop", "slow"] = "skip",
    min_distinct: float = 0.75,
    max_pixels: int = MAX_PIXELS,
    backend: Literal["pyav", "torchcodec"] = "pyav",
) -> tuple[Tensor, float]:
    """The frames on screen at start + k / fps seconds: (uint8 (f h w c), start in seconds after the first frame).

    `num_frames=None` takes all that fit after `start`; `fps=None` takes every frame as it is. `size` crops the middle square and
    scales it to size x size; None keeps the picture whole. Rotation tags are applied. `short` says what becomes of a video that does
    not last (num_frames - 1) / fps seconds: refused, played again from its start, or slowed down to last. `backend="torchcodec"` decodes
    the same frames with that library (optional; its scaling differs by about 1/255).
    Raises BadSample: video_empty, _open, _no_stream, _no_dims, _too_large, _too_long, _demux, _too_short, _too_few_frames (fewer than
    `min_distinct` of the frames differ: a slide show), _corrupt_frame, _missing_frames, _decode, _seek, _size_change.
    """
    with _open(data) as container:
        stream = _video_stream(container, max_pixels)
        stream.codec_context.thread_count = 1  # workers are the parallelism; FFmpeg's own threads only oversubscribe
        times, keyframes = _timestamps(container, stream)
        wanted, begin = wanted_times(times, stream.time_base, num_frames, fps, start, short)
        distinct = set(wanted)
        if short == "skip" and fps is not None and len(distinct) < min_distinct * len(wanted):
            raise BadSample("video_too_few_frames", f"{len(distinct)} distinct of {len(wanted)}")
        if backend == "torchcodec":
            return decode_torchcodec(data, [float(time * stream.time_base) for time in wanted], size), begin
        pictures = decode(container, stream, distinct, keyframes, size)
        frames = np.stack([pictures[time] for time in wanted])  # (f h w c)
    return torch.from_numpy(frames), begin


def probe(data: bytes) -> VideoInfo:
    """Size, length and codec from the packets alone. Raises BadSample as decode_clip does."""
    with _open(data) as container:
        stream = _video_stream(container, max_pixels=2**31)
        times, keyframes = _timestamps(container, stream)
        context = stream.codec_context
        seconds = float((times[-1] - times[0]) * stream.time_base)
        return VideoInfo(context.width, context.height, len(times), len(keyframes), seconds, context.name)


def _open(data: bytes) -> Any:
    if len(data) < 32:
        raise BadSample("video_empty", f"{len(data)} bytes")
    try:
        return av.open(io.BytesIO(data), mode="r", metadata_errors="replace")
    except av.FFmpegError as error:
        raise BadSample("video_open", repr(error)) from error


def _video_stream(container: Any, max_pixels: int) -> Any:
    streams = [stream for stream in container.streams.video if not stream.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        raise BadSample("video_no_stream")
    context = streams[0].codec_context
    if context is None or not context.width or not context.height:
        raise BadSample("video_no_dims")
    if context.width * context.height > max_pixels:
        raise BadSample("video_too_large", f"{context.width}x{context.height}")
    return streams[0]


def _timestamps(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Sorted presentation times of the frames that are shown and of all keyframes, in the stream's time base, from the packets (no
    decoding). What an edit list cuts off is not shown, but may be what shown frames are decoded from."""
    times, keyframes, count = set(), set(), 0
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            count += 1
            if count > MAX_PACKETS:
                raise BadSample("video_too_long", f"over {MAX_PACKETS} packets")
            if packet.is_corrupt or packet.pts is None:
                continue
            if not packet.is_discard:
                times.add(packet.pts)
            if packet.is_keyframe:
                keyframes.add(packet.pts)
    except av.FFmpegError as error:
        raise BadSample("video_demux", repr(error)) from error
    if not times:
        raise BadSample("video_too_few_frames", "no frame has a time")
    return sorted(times), sorted(keyframes)

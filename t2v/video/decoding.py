"""The wanted frames of an open video with as little work as possible (PyAV): seek to the keyframe before, and skip frames that nobody
refers to (`skip_frame`, bit-equal to a full decode for H.264 and HEVC)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from typing import Any

import av
import av.filter
import numpy as np
from numpy.typing import NDArray

from t2v.video.bad_sample import BadSample

Pixels = NDArray[np.uint8]
SKIPPABLE = ("h264", "hevc")  # libdav1d (AV1) drops wanted frames when frames are skipped by packet


def decode(container: Any, stream: Any, wanted: set[int], keyframes: list[int], size: int | None) -> dict[int, Pixels]:
    """Frames that share a keyframe are decoded together; what lies between the last of them and the next such keyframe is not touched."""
    groups: dict[int, set[int]] = {}
    for time in sorted(wanted):
        groups.setdefault(bisect_right(keyframes, time), set()).add(time)
    pictures: dict[int, Pixels] = {}
    convert: _Converter | None = None
    try:
        for group in groups.values():
            for frame in _frames(container, stream, group, keyframes):
                if frame.pts not in group or frame.pts in pictures:
                    continue
                if frame.is_corrupt:
                    raise BadSample("video_corrupt_frame", f"pts {frame.pts}")
                convert = convert or _Converter(frame, size)
                pictures[frame.pts] = convert(frame)
    except av.FFmpegError as error:
        raise BadSample("video_decode", repr(error)) from error
    if len(pictures) < len(wanted):
        raise BadSample("video_missing_frames", f"{len(pictures)} of {len(wanted)}")
    return pictures


def _frames(container: Any, stream: Any, wanted: set[int], keyframes: list[int]) -> Iterator[Any]:
    """Decoded frames, the wanted ones among them. A frame's references precede it in the file, so once the packets of all wanted frames
    are in, the decoder is drained."""
    context = stream.codec_context
    skippable = context.name in SKIPPABLE
    missing = set(wanted)
    for packet in _packets_from(container, stream, min(wanted), keyframes):
        if skippable:
            context.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
        yield from packet.decode()
        missing.discard(packet.pts)
        if not missing:
            yield from context.decode(None)
            return


def _packets_from(container: Any, stream: Any, time: int, keyframes: list[int]) -> Iterator[Any]:
    """Packets from a keyframe at or before `time`. mov seeks by decoding time: a target between a keyframe's decoding and presentation
    time lands on the keyframe after it. So the first packet is checked, and the seek is repeated further back."""
    at = bisect_right(keyframes, time)
    for target in [*reversed(keyframes[max(0, at - 2) : at]), None]:
        with suppress(av.FFmpegError):  # a failed seek is answered by the next candidate
            container.seek(target or 0, stream=None if target is None else stream, backward=True, any_frame=False)
            stream.codec_context.flush_buffers()
            packets = container.demux(stream)
            first = next(packets, None)
            if first is not None and (target is None or (first.pts is not None and first.pts <= time)):
                break
    else:
        raise BadSample("video_seek", f"no way to pts {time}")
    yield first
    yield from packets


class _Converter:
    """FFmpeg's crop, scale and rotate for frames of one size: a frame -> uint8 (h w c)."""

    def __init__(self, frame: Any, size: int | None) -> None:
        self.layout = (frame.width, frame.height, frame.format.name)
        self.graph = av.filter.Graph()  # the filters hold weak links only: dropping the graph would crash the process
        self.graph.threads = 1
        self.source = self.graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1, 1000)
        )
        steps = []
        if size is not None:
            side = max(2, min(frame.width, frame.height) // 2 * 2)
            left, top = (frame.width - side) // 2 & ~1, (frame.height - side) // 2 & ~1  # even: chroma is subsampled
            steps += [self.graph.add("crop", f"{side}:{side}:{left}:{top}"), self.graph.add("scale", f"{size}:{size}:flags=bilinear")]
            if frame.format.name in ("yuv420p", "yuvj420p"):  # first the size, then the colours: nearer to exact, and 2 times faster
                steps += [self.graph.add("format", f"pix_fmts={frame.format.name}"), self.graph.add("scale", "flags=bilinear")]
        turns = round(frame.rotation / 90) % 4
        if turns == 2:
            steps += [self.graph.add("hflip"), self.graph.add("vflip")]
        elif turns:
            steps += [self.graph.add("transpose", {1: "cclock", 3: "clock"}[turns])]
        self.sink = self.graph.add("buffersink")
        steps += [self.graph.add("format", "pix_fmts=rgb24"), self.sink]
        last = self.source
        for step in steps:
            last.link_to(step)
            last = step
        self.graph.configure()

    def __call__(self, frame: Any) -> Pixels:
        if (frame.width, frame.height, frame.format.name) != self.layout:
            raise BadSample("video_size_change", f"{self.layout[0]}x{self.layout[1]} became {frame.width}x{frame.height}")
        self.source.push(frame)
        picture: Any = self.sink.pull()
        return picture.to_ndarray()

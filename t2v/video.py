"""Encoded bytes <-> uint8 frames (f h w c). The only file that knows the codec libraries: PyAV (FFmpeg) for video, Pillow for animations.

Reading (section 4.1.1 of the paper: 16 frames at 3 fps from a random start, middle square) is exact: a frame is what is on screen at
its time, whatever the frame rate does. Two things make it fast: seeking to the keyframe before the clip, and not decoding frames that
are neither wanted nor needed by others (`skip_frame`, bit-equal to a full decode for H.264 and HEVC).
"""

from __future__ import annotations

import io
import math
import os
import textwrap
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import av.filter
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Pixels = NDArray[np.uint8]
Start = float | Callable[[float], float]
"""Seconds after the first frame, or a function that is given the slack (seconds that a start may move) and returns them."""

MAX_PIXELS = 4096 * 2304  # larger frames are refused before anything is decoded
MAX_PACKETS = 200_000  # about 1.8 hours at 30 fps
SKIPPABLE = ("h264", "hevc")  # libdav1d (AV1) drops wanted frames when frames are skipped by packet


class BadSample(Exception):
    """A sample that cannot become a clip. `reason` is one of a small set of names that are counted; `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class VideoInfo:
    """What the packets of a video say, without decoding: `seconds` is from the first frame to the last."""

    width: int
    height: int
    frames: int
    keyframes: int
    seconds: float
    codec: str


# Reading ------------------------------------------------------------------------------------------------------------------------------


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
        wanted, begin = _wanted(times, stream.time_base, num_frames, fps, start, short)
        distinct = set(wanted)
        if short == "skip" and fps is not None and len(distinct) < min_distinct * len(wanted):
            raise BadSample("video_too_few_frames", f"{len(distinct)} distinct of {len(wanted)}")
        if backend == "torchcodec":
            return _decode_torchcodec(data, [float(time * stream.time_base) for time in wanted], size), begin
        pictures = _decode(container, stream, distinct, keyframes, size)
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
    """Sorted presentation times of all frames and of the keyframes, in the stream's time base, from the packets (no decoding)."""
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
            times.add(packet.pts)
            if packet.is_keyframe:
                keyframes.add(packet.pts)
    except av.FFmpegError as error:
        raise BadSample("video_demux", repr(error)) from error
    if not times:
        raise BadSample("video_too_few_frames", "no frame has a time")
    return sorted(times), sorted(keyframes)


def _wanted(
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


def _decode(container: Any, stream: Any, wanted: set[int], keyframes: list[int], size: int | None) -> dict[int, Pixels]:
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


def _decode_torchcodec(data: bytes, seconds: list[float], size: int | None) -> Tensor:
    """The frames at presentation times `seconds`: uint8 (f h w c)."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            "backend=torchcodec: torchcodec is not installed, or finds no FFmpeg: pip install 't2v[torchcodec]' and FFmpeg 4 to 8, "
            f"or take backend=pyav ({str(error).splitlines()[0]})"
        ) from error
    try:
        decoder = VideoDecoder(data, dimension_order="NCHW", num_ffmpeg_threads=1)
        frames = decoder.get_frames_played_at([time + 1e-5 for time in seconds]).data  # (f c h w); past the rounding of the times
    except (RuntimeError, ValueError, IndexError) as error:  # all that it raises on damaged files
        raise BadSample("video_decode", f"torchcodec: {str(error).splitlines()[0]}") from error
    if size is not None:
        side = min(frames.shape[2:])
        top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
        square = frames[:, :, top : top + side, left : left + side]
        frames = torch.nn.functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
    return frames.permute(0, 2, 3, 1).contiguous()


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


# Writing ------------------------------------------------------------------------------------------------------------------------------


def write_mp4(
    target: str | os.PathLike[str] | BinaryIO,
    frames: Tensor | Pixels,
    fps: float,
    *,
    crf: int = 18,
    gop: int | None = None,
    preset: str = "medium",
    tune: str | None = None,
    rotation: int = 0,
) -> None:
    """Write uint8 frames (f h w c) as H.264 in yuv420p, which every player knows. Odd sizes are padded to even ones by repeating the last
    row or column. A path appears only when the file is whole. One thread, so that the bytes do not depend on the machine's cores.
    `tune` is one of x264's (fastdecode). `rotation` (90, 180, 270) only sets the display tag; `gop` is the
    largest distance between keyframes (x264's 250 if None)."""
    pixels = _pixels(frames)
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


def write_animation(path: str | os.PathLike[str], frames: Tensor | Pixels, fps: float) -> None:
    """Write uint8 frames (f h w c) as an endless animated .gif or .webp, by the path's suffix."""
    path = Path(path)
    writers = {".gif": gif_bytes, ".webp": webp_bytes}
    if path.suffix.lower() not in writers:
        raise ValueError(f"{path}: an animation ends in .gif or .webp, not in {path.suffix!r}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(writers[path.suffix.lower()](frames, fps))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def gif_bytes(frames: Tensor | Pixels, fps: float) -> bytes:
    """uint8 frames (f h w c) -> an endless GIF. Fast octree: 10 times faster than Pillow's median cut, and it keeps flat colours flat."""
    images = [Image.fromarray(picture).quantize(256, method=Image.Quantize.FASTOCTREE) for picture in _pixels(frames)]
    return _animation(images, "GIF", _durations(len(images), fps, unit=10), disposal=1)


def webp_bytes(frames: Tensor | Pixels, fps: float, *, quality: int = 80) -> bytes:
    """uint8 frames (f h w c) -> an endless animated WebP."""
    images = [Image.fromarray(picture) for picture in _pixels(frames)]
    return _animation(images, "WEBP", _durations(len(images), fps, unit=1), quality=quality, method=2)


def _animation(images: list[Image.Image], kind: str, durations: list[int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    images[0].save(buffer, format=kind, save_all=True, append_images=images[1:], duration=durations, loop=0, **options)
    return buffer.getvalue()


def _durations(count: int, fps: float, unit: int) -> list[int]:
    """Milliseconds per frame in multiples of `unit` (GIF: 10) that do not drift from count / fps."""
    ends = [round(1000 * (k + 1) / fps / unit) * unit for k in range(count)]
    return [max(unit, end - begin) for begin, end in zip([0, *ends[:-1]], ends)]


def contact_sheet(
    videos: Sequence[Tensor | Pixels],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    lines: int = 2,
    margin: int = 4,
    background: int = 255,
) -> Tensor:
    """Videos uint8 (f h w c) side by side, each over its caption: uint8 (f H W c). Shorter ones hold their last frame."""
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"a contact sheet needs as many captions as videos, and at least one: {len(videos)} videos, {len(captions)} captions"
        )
    clips = [_pixels(video) for video in videos]
    columns = columns or math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)
    height, width = max(clip.shape[1] for clip in clips), max(clip.shape[2] for clip in clips)
    letters = max(9, min(16, width // 16))  # pixels high
    font = ImageFont.load_default(size=letters)
    text_height = lines * (letters + 3)
    cell_height, cell_width = height + text_height + margin, width + margin
    canvas = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), (background,) * 3)
    draw = ImageDraw.Draw(canvas)
    corners = [(margin + k // columns * cell_height, margin + k % columns * cell_width) for k in range(len(clips))]
    for (top, left), caption in zip(corners, captions):
        per_line = max(8, int(width / max(1.0, font.getlength("n"))))
        text = "\n".join(textwrap.wrap(caption, per_line, max_lines=lines, placeholder=" ..."))
        draw.multiline_text((left, top + height + 1), text, font=font, fill=(0 if background > 127 else 255,) * 3, spacing=2)
    sheet = np.repeat(np.asarray(canvas)[None], max(len(clip) for clip in clips), axis=0)  # (f H W c)
    for (top, left), clip in zip(corners, clips):
        held = clip[np.minimum(np.arange(len(sheet)), len(clip) - 1)]
        sheet[:, top : top + clip.shape[1], left : left + clip.shape[2]] = held
    return torch.from_numpy(sheet)


def _pixels(frames: Tensor | Pixels) -> Pixels:
    pixels = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or len(pixels) == 0:
        raise ValueError(f"frames must be uint8 (f h w 3) with at least one frame, not {pixels.dtype} {tuple(pixels.shape)}")
    return np.ascontiguousarray(pixels)

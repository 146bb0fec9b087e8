"""Where the videos of an evaluation come from: real clips, a generate function, or a folder made by any other model.

Generated videos are kept as lossless PNG strips, frames one below the other: any viewer opens them, and what is measured after a resume is
what was generated before it. H.264 previews never feed a metric.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from t2v.evaluation.features import Videos, in_threads
from t2v.evaluation.protocol import Dataset, Manifest, Protocol, Row, replace_file
from t2v.video import BadSample, decode_clip
from t2v.weights import sha256

Generate = Callable[[list[str], list[int]], Tensor]
"""(captions, noise seeds) -> uint8 (b f h w c). One seed gives one noise, whatever is in the batch beside it."""

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif", ".png")


def generator(pipeline: Callable[..., Tensor], protocol: Protocol) -> Generate:
    """A pipeline (t2v.pipeline, or any callable with its arguments) that makes the protocol's clips, a chunk at once."""

    def generate(captions: list[str], seeds: list[int]) -> Tensor:
        return pipeline(
            captions,
            seed=protocol.seed,
            indices=seeds,
            num_frames=protocol.num_frames,
            height=protocol.size,
            width=protocol.size,
            batch_size=protocol.chunk,
        )

    return generate


def real_videos(dataset: Dataset, manifest: Manifest, protocol: Protocol) -> Videos:
    def load(index: int) -> Tensor:
        video = manifest.rows[index].video_id
        return dataset.clip(video, num_frames=protocol.num_frames, fps=protocol.fps, size=protocol.size)

    return in_threads(load)


def generated_videos(generate: Generate, manifest: Manifest, protocol: Protocol, folder: Path, keep: int) -> Videos:
    """Videos of a model; the first `keep` are kept in `folder` one by one. A chunk of which any is missing is generated as a whole, so
    that a resumed run has the bits of a straight one; chunk=1 loses nothing at a kill."""
    frames, size = protocol.num_frames, protocol.size
    shape = (frames, size, size, 3)
    writers = ThreadPoolExecutor(8)

    def videos(rows: range) -> Tensor:
        kept = [read_strip(strip_path(folder, index), size, frames) if index < keep else None for index in rows]
        if all(video is not None for video in kept):
            return torch.stack([video for video in kept if video is not None])
        chosen = [manifest.rows[index] for index in rows]
        made = generate([row.caption for row in chosen], [row.noise_seed for row in chosen]).cpu()  # (b f h w c)
        if made.dtype != torch.uint8 or tuple(made.shape) != (len(chosen), *shape):
            raise ValueError(
                f"The model made {made.dtype} {tuple(made.shape)}; protocol {protocol.name} measures uint8 videos of "
                f"{(len(chosen), *shape)} (b f h w c). Set the sample's size, or protocol.num_frames and protocol.size."
            )
        saved = [(strip_path(folder, index), video) for index, video in zip(rows, made) if index < keep]
        list(writers.map(lambda pair: write_strip(*pair), saved))  # compression does not hold Python's lock
        return made

    return videos


def strip_path(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def write_strip(path: Path, video: Tensor) -> None:
    """uint8 (f h w c) -> one PNG of (f*h w), there once it is whole."""
    buffer = io.BytesIO()
    Image.fromarray(video.flatten(0, 1).numpy()).save(buffer, "PNG", compress_level=1)
    replace_file(path, buffer.getvalue())


def read_strip(path: Path, size: int, frames: int | None = None) -> Tensor | None:
    """uint8 (f size size c), None if there is no whole file. A picture does not say where it is to be cut, so any other width or length
    raises ValueError; without `frames` any whole number of them will do."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError):  # Pillow says SyntaxError for a broken PNG
        return None
    height, width = pixels.shape[:2]
    if width != size or height % size or frames not in (None, height // size):
        raise ValueError(
            f"{path} is {width} x {height} pixels, not a strip of {frames or 'whole'} frames of {size} x {size} one below the other. "
            "Remove it; or give frames of another size as a video file (mp4, mkv, avi), for which fit=crop works, as it cannot for strips."
        )
    return torch.from_numpy(pixels).unflatten(0, (-1, size))


class VideoFolder:
    """Videos of another model, one file per row of the manifest, named by its index (000012), `<video_id>_<sen_id>`, or `<video_id>`.

    `take`: which frames of a longer video are measured: error (it must have exactly as many), first, middle, or uniform. `fit`: error
    (it must have the protocol's size) or crop (middle square, scaled). PNG strips hold frames of the protocol's size, whatever `fit`.
    """

    def __init__(self, folder: Path, manifest: Manifest, protocol: Protocol, take: str = "error", fit: str = "error") -> None:
        if take not in ("error", "first", "middle", "uniform") or fit not in ("error", "crop"):
            raise ValueError(f"take={take!r} must be error, first, middle or uniform; fit={fit!r} must be error or crop.")
        if not folder.is_dir():
            raise ValueError(f"videos={folder} is not a folder.")
        self.protocol, self.take, self.fit = protocol, take, fit
        files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in VIDEO_SUFFIXES}
        found = [next((files[name] for name in names(row, protocol) if name in files), None) for row in manifest.rows]
        missing = [names(row, protocol)[-1] for row, path in zip(manifest.rows, found) if path is None]
        if missing:
            have = f"{len(files)} videos ({', '.join(list(files)[:3])} ...)" if files else "no videos"
            raise ValueError(
                f"{len(missing)} of {len(found)} videos are missing in {folder}, which has {have}. Expected for example "
                f"{', '.join(missing[:3])} with one of {', '.join(VIDEO_SUFFIXES)}; manifest.jsonl in the output folder lists all."
            )
        self.paths = [path for path in found if path is not None]
        self.lossless = all(path.suffix.lower() == ".png" for path in self.paths)

    def sha256(self) -> str:
        """Names the content of all videos, so that the features of earlier ones are not taken for theirs."""
        return hashlib.sha256("\n".join(f"{path.name}:{sha256(path)}" for path in self.paths).encode()).hexdigest()

    def videos(self) -> Videos:
        return in_threads(self.load)

    def load(self, index: int) -> Tensor:
        path, p = self.paths[index], self.protocol
        size = p.size if self.fit == "crop" else None
        try:
            if path.suffix.lower() == ".png":
                video = read_strip(path, p.size)
                if video is None:
                    raise ValueError(f"{path} is not a readable PNG strip.")
            else:
                video = decode_clip(path.read_bytes(), num_frames=None, fps=None, size=size)[0]
        except BadSample as error:
            raise ValueError(f"{path} cannot be measured: {error}.") from error
        video = self._frames(video, path)
        if tuple(video.shape[1:3]) != (p.size, p.size):
            raise ValueError(
                f"{path} has {video.shape[2]} x {video.shape[1]} pixels, protocol {p.name} measures {p.size} x {p.size}: "
                "fit=crop takes the middle square and scales it (and is written into the results)."
            )
        return video

    def _frames(self, video: Tensor, path: Path) -> Tensor:
        have, want = len(video), self.protocol.num_frames
        if have < want or (have > want and self.take == "error"):
            remedy = "generate longer videos" if have < want else "take=first, middle or uniform chooses among them"
            raise ValueError(f"{path} has {have} frames, protocol {self.protocol.name} measures {want}: {remedy}.")
        if self.take == "uniform":
            return video[uniform(have, want)]
        first = (have - want) // 2 if self.take == "middle" else 0
        return video[first : first + want]


def names(row: Row, protocol: Protocol) -> list[str]:
    """File names that a row's video may have, without suffix; by video alone only where each has one caption."""
    alone = [row.video_id] if protocol.captions == "one" else []
    return [f"{row.index:06d}", f"{row.video_id}_{row.sen_id}", *alone]


def uniform(have: int, want: int) -> list[int]:
    """`want` places spread evenly over `have` frames, first and last included."""
    return [round(i * (have - 1) / max(1, want - 1)) for i in range(want)]

"""Precomputed latents: shards of moments in place of videos, about 100 times faster to read.

The autoencoder works frame by frame, so the moments of a whole clip at 3 fps hold every window of 16 frames exactly. A shard holds
KEY.moments.npy, float16 (f h w 2c), mean and log variance, not scaled, + KEY.txt + KEY.json; dataset.json beside the shards says which
autoencoder made them. A latent stream is an ordinary ClipStream whose "frames" are moments (f h w 2c); the posterior is sampled in
training. Written by `python -m t2v.encode`.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import torch
from torch import Tensor

from t2v.data.errors import BadSample, QualityLimits
from t2v.data.laion import describe
from t2v.data.readers import ClipStream
from t2v.data.shard_writer import write_json

MEMBER = "moments.npy"
SIDECAR = "dataset.json"
FORMAT = 1


class HashedAutoencoder(Protocol):
    """What is asked of an autoencoder here (t2v.models.autoencoder.Autoencoder)."""

    factor: int
    channels: int

    def sha256(self) -> str: ...


@dataclass(frozen=True)
class LatentCard:
    """The sidecar: what the moments of a folder are."""

    autoencoder_sha256: str
    factor: int  # pixels per latent pixel
    channels: int  # of the latents: c
    size: int  # pixels of the square that was encoded
    fps: float
    format: int = FORMAT

    @staticmethod
    def read(folder: str) -> LatentCard:
        """Raises ValueError where the folder has none, or one of another format."""
        path = folder.rstrip("/") + "/" + SIDECAR
        try:
            with fsspec.open(path, "r") as file:
                fields = json.load(file)
            card = LatentCard(**fields)
        except FileNotFoundError as error:
            raise ValueError(
                f"{path} is missing: shards of latents are made by `python -m t2v.encode data=webvid output={folder}`"
            ) from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe latents: {error}") from error
        if card.format != FORMAT:
            raise ValueError(f"{path}: latents of format {card.format}, this version reads format {FORMAT}: encode them again")
        return card

    def write(self, folder: Path) -> None:
        """Raises ValueError where the folder already holds other latents."""
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / SIDECAR).exists():
            there = LatentCard.read(str(folder))
            if there != self:
                raise ValueError(f"{folder} holds other latents: {there}, not {self}; choose another output=")
        else:
            write_json(folder / SIDECAR, asdict(self))

    def check(self, autoencoder: HashedAutoencoder) -> None:
        """Raises ValueError where the latents were made by another autoencoder."""
        if autoencoder.sha256() != self.autoencoder_sha256:
            raise ValueError(
                f"the latents were made by another autoencoder: sha256 {self.autoencoder_sha256[:16]}..., the model's is "
                f"{autoencoder.sha256()[:16]}...; encode them again with `python -m t2v.encode`"
            )


@dataclass(frozen=True)
class LatentFrames:
    """A random window of `num_frames` out of the stored ones: the FrameRecipe of latents."""

    card: LatentCard
    num_frames: int = 16

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(f, h, w, 2c)"""
        side = self.card.size // self.card.factor
        return self.num_frames, side, side, 2 * self.card.channels

    def __call__(self, data: bytes, fields: Mapping[str, Any], rng: random.Random) -> tuple[Tensor, float]:
        moments = read_moments(data)
        if moments.shape[1:] != self.shape[1:]:
            raise BadSample("latent_shape", f"{moments.shape}, not (f, {', '.join(map(str, self.shape[1:]))})")
        spare = len(moments) - self.num_frames
        if spare < 0:
            raise BadSample("video_too_short", f"{len(moments)} of {self.num_frames} frames")
        first = rng.randrange(spare + 1)
        return torch.from_numpy(moments[first : first + self.num_frames].copy()), first / self.card.fps


class LatentStream(ClipStream):
    """A stream of moments. `check(autoencoder)` must be called before training on it."""

    def check(self, autoencoder: HashedAutoencoder) -> None:
        assert isinstance(self.frames, LatentFrames)
        self.frames.card.check(autoencoder)


def webvid_latents(
    urls: str | Sequence[str] | None = None,
    *,
    num_frames: int = 16,
    fps: float = 3.0,
    size: int = 256,
    sources: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "webvid_latents",
    caption: Sequence[str] = ("txt",),
    filters: Sequence[str] = (),
    keep_uncaptioned: bool = False,
    num_readers: int = 64,
    buffer: int = 1000,
    seed: int = 0,
    limits: Mapping[str, Any] | None = None,
) -> LatentStream:
    """A stream of windows of moments, float16 (num_frames h w 2c). Raises ValueError where the shards hold another size or frame rate."""
    defaults = {"media": (MEMBER,), "caption": caption, "filters": filters, "keep_uncaptioned": keep_uncaptioned}
    described = describe(name, urls, sources, defaults)
    cards = {
        folder: LatentCard.read(folder) for source in described for folder in {url.rpartition("/")[0] or "." for url in source.expand()}
    }
    card = next(iter(cards.values()))
    for folder, other in cards.items():
        if other != card:
            raise ValueError(f"{name}: latents of different kinds cannot be mixed: {folder} holds {other}, others {card}")
    if (card.size, card.fps) != (size, float(fps)):
        raise ValueError(f"{name}: the latents are of {card.size} pixels at {card.fps:g} fps, not of {size} at {fps:g}: encode them again")
    return LatentStream(name, described, LatentFrames(card, num_frames), num_readers, buffer, seed, QualityLimits(**(limits or {})))


def pack_moments(moments: Tensor) -> bytes:
    """Moments (f h w 2c) -> the bytes of a float16 .npy. Raises ValueError where they do not fit."""
    mean, log_variance = moments.float().cpu().chunk(2, dim=-1)
    half = torch.cat([mean, log_variance.clamp(-30, 20)], dim=-1).half()
    if not torch.isfinite(half).all():
        raise ValueError("the moments are not finite in float16: the autoencoder is broken, or its precision too low; try float32")
    buffer = io.BytesIO()
    np.save(buffer, half.numpy(), allow_pickle=False)
    return buffer.getvalue()


def read_moments(data: bytes) -> np.ndarray:
    """The inverse: float16 (f h w 2c). Raises BadSample."""
    try:
        moments = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSample("latent_open", str(error)) from error
    if moments.dtype != np.float16 or moments.ndim != 4:
        raise BadSample("latent_shape", f"{moments.dtype} {moments.shape}")
    return moments

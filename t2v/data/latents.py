"""Precomputed latents: shards of moments in place of videos, about 100 times faster to read.

The autoencoder works frame by frame, so the moments of a whole clip at 3 fps hold every window of 16 frames exactly. A shard holds
KEY.moments.npy, float16 (f h w 2c), mean and log variance, not scaled, + KEY.txt + KEY.json, and if wanted KEY.text.npy, the caption's
embedding, float16 (n d). dataset.json beside the shards says which autoencoder and text encoder made them, empty_text.npy is the empty
prompt's embedding (captions are dropped in training, not here). A latent stream is an ordinary ClipStream whose "frames" are moments
(f h w 2c); the posterior is sampled in training. Written by `python -m t2v.encode`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import fsspec
import torch
from torch import Tensor

from t2v.batch import Clip
from t2v.data.arrays import pack, read_moments, unpack
from t2v.data.errors import BadSample, QualityLimits
from t2v.data.frames import above_zero
from t2v.data.laion import describe
from t2v.data.order import Draw
from t2v.data.raw import RawSample
from t2v.data.readers import ClipStream
from t2v.data.shard_writer import write_json, write_whole
from t2v.data.sources import Source

MEMBER = "moments.npy"
TEXT = "text.npy"
SIDECAR = "dataset.json"
EMPTY_TEXT = "empty_text.npy"
FORMAT = 1


class HashedAutoencoder(Protocol):
    """What is asked of an autoencoder here (t2v.models.autoencoder.Autoencoder)."""

    factor: int
    channels: int

    def sha256(self) -> str: ...


class HashedTextEncoder(Protocol):
    """What is asked of a text encoder here (t2v.models.text_encoder.TextEncoder)."""

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def sha256(self) -> str: ...


@dataclass(frozen=True)
class LatentCard:
    """The sidecar: what the moments of a folder are."""

    autoencoder_sha256: str
    factor: int  # pixels per latent pixel
    channels: int  # of the latents: c
    size: int  # pixels of the square that was encoded
    fps: float
    text_encoder_sha256: str | None = None  # of the captions' embeddings, if there are any
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
            there = asdict(LatentCard.read(str(folder)))
            different = [f"{name} was {there[name]} and is {value}" for name, value in asdict(self).items() if there[name] != value]
            if different:
                raise ValueError(f"{folder} holds other latents: {'; '.join(different)}. Choose another output=")
        else:
            write_json(folder / SIDECAR, asdict(self))

    def check(self, autoencoder: HashedAutoencoder, text_encoder: HashedTextEncoder) -> None:
        """Raises ValueError where the latents were made by another autoencoder, or the embeddings by another text encoder."""
        if autoencoder.sha256() != self.autoencoder_sha256:
            raise ValueError(
                f"the latents were made by another autoencoder: sha256 {self.autoencoder_sha256[:16]}..., the model's is "
                f"{autoencoder.sha256()[:16]}...; encode them again with `python -m t2v.encode`"
            )
        if self.text_encoder_sha256 not in (None, text_encoder.sha256()):
            raise ValueError(
                f"the stored text embeddings were made by another text encoder: sha256 {str(self.text_encoder_sha256)[:16]}..., "
                f"the model's is {text_encoder.sha256()[:16]}...; encode them again, or leave them unread with data.video.stored_text=false"
            )


@dataclass(frozen=True)
class LatentFrames:
    """A random window of `num_frames` out of the stored ones: the FrameRecipe of latents."""

    card: LatentCard
    num_frames: int = 16

    def __post_init__(self) -> None:
        above_zero(num_frames=self.num_frames)

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
    """A stream of moments, with the captions' embeddings where `empty_text` is set. Call `check` before training on it."""

    def clip(self, source: Source, draw: Draw) -> Clip:
        clip = super().clip(source, draw)
        if self.empty_text is not None:
            clip.text = read_text(draw.sample, self.empty_text.shape)
        return clip

    def check(self, autoencoder: HashedAutoencoder, text_encoder: HashedTextEncoder) -> None:
        assert isinstance(self.frames, LatentFrames)
        self.frames.card.check(autoencoder, text_encoder)


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
    stored_text: bool = True,
    num_readers: int = 64,
    buffer: int = 1000,
    seed: int = 0,
    limits: Mapping[str, Any] | None = None,
) -> LatentStream:
    """A stream of windows of moments, float16 (num_frames h w 2c), with the captions' embeddings where the shards hold them, unless
    `stored_text` is false. Raises ValueError where the shards hold another size or frame rate."""
    defaults = {"media": (MEMBER,), "caption": caption, "filters": filters, "keep_uncaptioned": keep_uncaptioned}
    described = describe(name, urls, sources, defaults)
    cards = {
        folder: LatentCard.read(folder) for source in described for folder in {url.rpartition("/")[0] or "." for url in source.expand()}
    }
    if not stored_text:
        cards = {folder: replace(card, text_encoder_sha256=None) for folder, card in cards.items()}
    card = next(iter(cards.values()))
    for folder, other in cards.items():
        if other != card:
            raise ValueError(f"{name}: latents of different kinds cannot be mixed: {folder} holds {other}, others {card}")
    if (card.size, card.fps) != (size, float(fps)):
        raise ValueError(f"{name}: the latents are of {card.size} pixels at {card.fps:g} fps, not of {size} at {fps:g}: encode them again")
    stream = LatentStream(name, described, LatentFrames(card, num_frames), num_readers, buffer, seed, QualityLimits(**(limits or {})))
    if card.text_encoder_sha256 is not None:
        for source in described:
            if source.caption != ("txt",):
                raise ValueError(
                    f"{source.name}: the stored text embeddings are of the txt members, not of caption={list(source.caption)}; "
                    "set stored_text=false"
                )
        stream.empty_text = read_empty_text(next(iter(cards)))
    return stream


def write_empty_text(folder: Path, text_encoder: HashedTextEncoder) -> None:
    write_whole(folder / EMPTY_TEXT, pack(text_encoder.encode([""])[0]))


def read_empty_text(folder: str) -> Tensor:
    """(n d). Raises ValueError where it is missing."""
    path = folder.rstrip("/") + "/" + EMPTY_TEXT
    try:
        with fsspec.open(path, "rb") as file:
            return torch.from_numpy(unpack(file.read()))
    except (FileNotFoundError, BadSample) as error:
        raise ValueError(
            f"{path}: the empty prompt's embedding is missing or damaged: run the same `python -m t2v.encode` again"
        ) from error


def read_text(sample: RawSample, shape: tuple[int, ...]) -> Tensor:
    """The caption's embedding, float16 (n d). Raises BadSample."""
    data = sample.member(TEXT)
    if data is None:
        raise BadSample("missing_member", f"no {TEXT} among {', '.join(sample.members)}")
    text = unpack(data)
    if text.shape != tuple(shape):
        raise BadSample("text_shape", f"{text.shape}, not {tuple(shape)}")
    return torch.from_numpy(text)

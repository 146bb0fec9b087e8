"""A whole text-to-video model that builds in milliseconds, for the tests of whatever needs one."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from t2v.checkpoint import ModelCard, Part, card
from t2v.models.frozen import Frozen
from t2v.models.unet import VideoUNet

UNET: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
    "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


def tiny_unet(seed: int = 0, **changes: Any) -> VideoUNet:
    """Random weights, also where a fresh network has zeros, so that every layer matters."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = VideoUNet(**{**UNET, **changes})
        with torch.no_grad():
            for parameter in unet.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
    return unet.eval()


class TinyAutoencoder:
    """The first three latent channels, blown up."""

    factor, channels = 8, 4
    config: ClassVar = {"source": "package:shapes_autoencoder"}

    @classmethod
    def from_pretrained(cls, source: str) -> TinyAutoencoder:
        return cls()

    def sha256(self) -> str:
        return hashlib.sha256(b"tiny autoencoder").hexdigest()

    def to(self, device: Any = None, dtype: Any = None) -> TinyAutoencoder:
        return self

    def decode(self, latents: Tensor) -> Tensor:
        pixels = (latents[:, :3].float().tanh() * 127.5 + 127.5).round().byte()  # (b 3 f h w)
        return pixels.repeat_interleave(8, 3).repeat_interleave(8, 4).permute(0, 2, 3, 4, 1)


class TinyTextEncoder:
    """Each prompt's hash, as numbers; a token is a word."""

    kind = "TextEncoder.random"

    def __init__(self, seed: int = 0, width: int = 32) -> None:
        self.seed, self.width = seed, width
        self.config = {"seed": seed, "width": width}

    def to(self, device: Any = None, dtype: Any = None) -> TinyTextEncoder:
        return self

    @classmethod
    def random(cls, seed: int = 0, width: int = 32) -> TinyTextEncoder:
        return cls(seed, width)

    def sha256(self) -> str:
        return hashlib.sha256(f"{self.seed} {self.width}".encode()).hexdigest()

    def token_counts(self, prompts: list[str]) -> list[int]:
        return [len(prompt.split()) + 2 for prompt in prompts]

    def encode(self, prompts: list[str]) -> Tensor:
        seeds = [int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "little") for prompt in prompts]
        return torch.stack([torch.randn(77, self.width, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def tiny_card(**changes: Any) -> ModelCard:
    values: dict[str, Any] = {
        "unet": Part("VideoUNet", dict(UNET)),
        "autoencoder": Part("Autoencoder", {"source": "package:shapes_autoencoder"}, TinyAutoencoder().sha256()),
        "text_encoder": Part("TextEncoder.random", {"seed": 0, "width": 32}, TinyTextEncoder().sha256()),
        "schedule": {"num_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "prediction": "noise"},
        "sampler": {"scheduler": "ddim", "num_steps": 3, "guidance": {"scale": 2.0}, "spacing": "leading"},
        "sample": {"frames": 4, "height": 32, "width": 48, "fps": 3},
        "step": 7,
    }
    return ModelCard(**{**values, **changes})


def tiny_frozen() -> Frozen:
    return Frozen(TinyAutoencoder(), TinyTextEncoder())  # type: ignore[arg-type]


def read_tiny_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let checkpoints name the tiny parts as they name the real ones."""
    monkeypatch.setitem(card.AUTOENCODERS, "Autoencoder", lambda: TinyAutoencoder.from_pretrained)
    monkeypatch.setitem(card.TEXT_ENCODERS, "TextEncoder.random", lambda: TinyTextEncoder.random)

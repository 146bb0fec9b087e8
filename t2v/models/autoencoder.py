"""The frozen autoencoder, Eqs. 1-2: frames <-> latents, 8 times smaller (Stable Diffusion's, which the paper calls VQGAN).

It works in two stages, frames -> moments (slow, may be done offline) and moments -> latents (sample, scale).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v.models import autoencoder_layers
from t2v.models.names import autoencoder_state
from t2v.models.text_encoder import state_sha256

SD_CONFIG: dict[str, Any] = {  # 83,653,863 parameters: Stable Diffusion's, for files that come without a configuration
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


class Autoencoder:
    """Wraps diffusers' AutoencoderKL. `factor` is pixels per latent pixel, `channels` those of the latents, `config` rebuilds it.

    max_frames_per_pass  frames that go through the network at once; more need more memory. None: 64, on GPUs 64 of 256 x 256 or as many
                         smaller or larger ones as have those pixels
    channels_last        the forward pass of autoencoder_layers instead of diffusers'; None: on GPUs, where the network is of that kind; on
                         CPUs diffusers' own with the weights laid out so, which their convolutions and GroupNorm are faster with
    compile              the forward pass of autoencoder_layers, on CPUs, too, through torch.compile: faster after a minute of compiling for
                         each shape

    Raises ValueError for options that the network does not allow.
    """

    def __init__(
        self,
        model: Any,
        source: str | None = None,
        max_frames_per_pass: int | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
    ):
        if max_frames_per_pass is not None and max_frames_per_pass < 1:
            raise ValueError(f"max_frames_per_pass={max_frames_per_pass} must be at least 1")
        for option, asked in (("channels_last", channels_last), ("compile", compile)):
            if asked and not autoencoder_layers.is_supported(model):
                raise ValueError(f"{option}=true is for Stable Diffusion's kinds of blocks, and this autoencoder has others: leave it out")
        if compile and channels_last is False:
            raise ValueError("compile=true compiles the forward pass that channels_last=false leaves out: set one of them only")
        self.model: Any = model.eval().requires_grad_(False)
        self.max_frames_per_pass = max_frames_per_pass
        self._wants_channels_last = True if compile else channels_last
        passes = autoencoder_layers.encode, autoencoder_layers.decode
        self._encoder_pass, self._decoder_pass = (torch.compile(f, dynamic=False) if compile else f for f in passes)
        config: dict[str, Any] = dict(model.config)
        self.factor: int = 2 ** (len(config["block_out_channels"]) - 1)
        self.channels: int = config["latent_channels"]
        self.scaling_factor: float = config["scaling_factor"]
        self.config = {"source": source}
        self._sha256: str | None = None
        self._lay_out()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        max_frames_per_pass: int | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
        download: bool = False,
    ) -> Autoencoder:
        """From a diffusers folder (or one that has it in `vae/`), ModelScope's VQGAN_autoencoder.pth, or `package:NAME`."""
        from t2v.weights import find, read

        file = find("autoencoder", source, download=download)
        config = file.with_name("config.json")
        model = empty_autoencoder(json.loads(config.read_text()) if config.exists() else SD_CONFIG)
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        try:
            state = autoencoder_state(read(file), wanted)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        model.load_state_dict(state, assign=True)
        return cls(model.float(), str(source) if source is not None else None, max_frames_per_pass, channels_last, compile)

    def moments(self, frames: Tensor) -> Tensor:
        """Stage 1. uint8 frames (b f h w c) -> mean and log variance (b f h/s w/s 2c), float."""
        b, f, h, w, c = frames.shape
        if c != 3 or frames.dtype != torch.uint8:
            raise ValueError(f"frames must be uint8 (b f h w 3), not {frames.dtype} {tuple(frames.shape)}")
        if h % self.factor or w % self.factor or 0 in (h, w):
            nearest = [max(1, round(size / self.factor)) * self.factor for size in (h, w)]
            raise ValueError(
                f"{h} x {w} pixels cannot be encoded: the autoencoder's factor {self.factor} must divide both; "
                f"use {nearest[0]} x {nearest[1]}"
            )
        shape = (b, f, h // self.factor, w // self.factor, 2 * self.channels)
        parts = [self._encode(part) for part in frames.flatten(0, 1).split(self.frames_per_pass(h * w))] if b * f else []
        return torch.cat(parts).view(shape) if parts else torch.zeros(shape, device=self.device)

    def sample(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Stage 2. Moments (b f h w 2c), standard normal noise (b c f h w) -> scaled latents (b c f h w); the mean where noise is None."""
        mean, log_variance = moments.float().permute(0, 4, 1, 2, 3).chunk(2, dim=1)  # (b c f h w)
        if noise is not None:
            mean = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise.to(mean)
        return mean * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (b c f h w) -> uint8 frames (b f h*s w*s 3)."""
        b, c, f, h, w = latents.shape
        if c != self.channels:
            raise ValueError(f"latents must be (b {self.channels} f h w) for this autoencoder, not {tuple(latents.shape)}")
        z = (latents / self.scaling_factor).transpose(1, 2).flatten(0, 1)  # ((b f) c h w)
        shape = (b, f, h * self.factor, w * self.factor, 3)
        parts = [self._decode(part) for part in z.split(self.frames_per_pass(h * w * self.factor**2))] if b * f else []
        return torch.cat(parts).view(shape) if parts else torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def frames_per_pass(self, pixels: int) -> int:
        """For frames of so many pixels."""
        if self.max_frames_per_pass is not None:
            return self.max_frames_per_pass
        return max(1, 64 * 256 * 256 // pixels) if self.device.type == "cuda" else 64

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        """uint8 (n h w 3) -> float32 (n h/s w/s 2c)."""
        x = frames.to(self.device).to(self.dtype).permute(0, 3, 1, 2) / 127.5 - 1  # ((b f) c h w), channels last in memory
        h = self._encoder_pass(self.model.encoder, x) if self.channels_last else self.model.encoder(x)
        h = h if self.model.quant_conv is None else self.model.quant_conv(h)
        return h.permute(0, 2, 3, 1).float()

    @torch.no_grad()
    def _decode(self, z: Tensor) -> Tensor:
        """(n c h w) -> uint8 (n h*s w*s 3)."""
        z = z.to(self.device, self.dtype)
        z = z if self.model.post_quant_conv is None else self.model.post_quant_conv(z)
        x = (self._decoder_pass(self.model.decoder, z) if self.channels_last else self.model.decoder(z)).float()
        return (x / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Autoencoder:
        self.sha256()  # of the weights as loaded, whatever type they are cast to
        # diffusers' own `to` warns about parts to keep in float32, of which there are none
        torch.nn.Module.to(self.model, device=device, dtype=dtype)
        self._lay_out()
        return self

    @property
    def channels_last(self) -> bool:
        """Whether the forward pass is that of autoencoder_layers, now."""
        if self._wants_channels_last is None:
            return self.device.type == "cuda" and autoencoder_layers.is_supported(self.model)
        return self._wants_channels_last

    def _lay_out(self) -> None:
        last = self.channels_last or (self._wants_channels_last is None and self.device.type == "cpu")
        torch.nn.Module.to(self.model, memory_format=torch.channels_last if last else torch.contiguous_format)  # type: ignore[call-overload]

    def sha256(self) -> str:
        """Hash of the weights, hexadecimal."""
        if self._sha256 is None:
            self._sha256 = state_sha256(self.model.state_dict())
        return self._sha256


def empty_autoencoder(config: dict[str, Any]) -> Any:
    """diffusers' AutoencoderKL on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    known = {key: value for key, value in config.items() if not key.startswith("_")}
    with torch.device("meta"):
        return AutoencoderKL.from_config(known)

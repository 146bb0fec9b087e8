"""what=encode: frames to moments and latents to frames by Autoencoder itself, Stable Diffusion's shape, against diffusers' AutoencoderKL.

Both take uint8 frames on the device and give float32 moments, or take latents and give uint8 frames. Beside the peer the channels-last
forward pass is also checked: its bfloat16 error against float32 is at most 1.1 times that of diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v.benchmarks.measuring import Row, attempt, ceilings, check_peer, default_device, peak_memory, speed, timed, write_profile
from t2v.benchmarks.parity import relative, row, tf32_off
from t2v.benchmarks.random_parts import kl_config, random_autoencoder, random_kl
from t2v.models import autoencoder_layers
from t2v.models.autoencoder import Autoencoder
from t2v.pipeline import default_dtype
from t2v.training.operations import autoencoder_tflop

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def encode(
    config: Mapping[str, Any] | None = None,
    batches: Sequence[int] = (4,),
    frames: int = 16,
    size: int = 32,
    directions: Sequence[str] = ("encode", "decode"),
    options: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    versus: str | None = None,
    compile_peer: bool = False,
    rounds: int = 20,
    seconds: float = 10,
    profile: str | None = None,
    device: str | None = None,
) -> Iterator[Row]:
    """A row for each direction, number of clips and network. `size` of the latents; `options` are Autoencoder's own.

    `profile`: a file for the kernels of our last call.
    """
    check_peer(versus, compile_peer)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is unknown; there are {', '.join(DTYPES)}")
    place = torch.device(device) if device else default_device()
    torch.backends.cudnn.benchmark = True
    kind = default_dtype(place) if dtype is None else DTYPES[dtype]
    best = ceilings(place)
    if best:
        yield {"what": "ceiling", **best}
    if versus:
        yield from errors(random_kl(config, place, torch.float32), place, size)
    tflop = autoencoder_tflop(kl_config(config, place), (4, frames, size, size))
    work = dict(zip(("encode", "decode"), tflop, strict=True))
    networks: dict[str, Callable[[], Any]] = {"t2v": partial(our_coder, config, place, kind, options or {})}
    if versus:
        networks["diffusers"] = partial(peers_coder, config, place, kind, compile_peer)
    for direction in directions:
        for batch in batches:
            for name, make in networks.items():
                last = name == "t2v" and direction == directions[-1] and batch == batches[-1]
                file = Path(profile) if profile and last else None

                def measure(
                    make: Callable[[], Any] = make, batch: int = batch, direction: str = direction, file: Path | None = file
                ) -> Row:
                    coder = make()
                    pixels, latents = inputs(coder.factor, place, batch, frames, size)
                    call = partial(coder.moments, pixels) if direction == "encode" else partial(coder.decode, latents)
                    timing = timed(call, place, rounds=rounds, seconds=seconds)
                    if file is not None:
                        write_profile(call, place, file)
                    return {**speed(timing, batch, work[direction], best), **peak_memory(place)}

                known = {"network": name, "compiled": name != "t2v" and compile_peer, "direction": direction, "clips": batch}
                yield attempt(known, measure, may_fail=name != "t2v")


def inputs(factor: int, device: torch.device, batch: int, frames: int, size: int) -> tuple[Tensor, Tensor]:
    """uint8 frames (b f h w c) and latents (b c f h w)."""
    side = factor * size
    pixels = torch.randint(0, 256, (batch, frames, side, side, 3), dtype=torch.uint8, device=device)
    return pixels, torch.randn(batch, 4, frames, size, size, device=device)


def our_coder(config: Mapping[str, Any] | None, device: torch.device, dtype: torch.dtype, options: Mapping[str, Any]) -> Autoencoder:
    return random_autoencoder(config, device, dtype, **options)


class Peer:
    """AutoencoderKL as its users call it, 64 frames at a time."""

    def __init__(self, kl: Any, frames_per_pass: int = 64) -> None:
        self.kl, self.frames_per_pass = kl, frames_per_pass
        self.factor = 2 ** (len(kl.config.block_out_channels) - 1)

    @torch.no_grad()
    def moments(self, frames: Tensor) -> Tensor:
        parts = []
        for part in frames.flatten(0, 1).split(self.frames_per_pass):
            x = (part.to(self.kl.dtype) / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
            parts.append(self.kl.encode(x).latent_dist.parameters.float())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        parts = []
        for part in latents.transpose(1, 2).flatten(0, 1).split(self.frames_per_pass):
            x = self.kl.decode(part.to(self.kl.dtype) / self.kl.config.scaling_factor).sample
            parts.append((x.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8))
        return torch.cat(parts)


def peers_coder(config: Mapping[str, Any] | None, device: torch.device, dtype: torch.dtype, compiled: bool) -> Peer:
    kl = random_kl(config, device, dtype).requires_grad_(False)
    if compiled:
        kl.encoder.compile(dynamic=False)
        kl.decoder.compile(dynamic=False)
    return Peer(kl)


@torch.no_grad()
def errors(kl: Any, device: torch.device, size: int, frames: int = 4) -> list[Row]:
    """Of encoder and decoder in bfloat16, relative, channels last and as diffusers runs them."""
    side = size * 2 ** (len(kl.config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(frames, 3, side, side, generator=generator).to(device) * 2 - 1
    latents = torch.randn(frames, kl.config.latent_channels, size, size, generator=generator).to(device)
    rows = []
    with tf32_off():
        exact = kl.encoder(pixels).double(), kl.decoder(latents).double()
    half = torch.nn.Module.to(kl, torch.bfloat16)
    inputs = pixels.bfloat16(), latents.bfloat16()
    plain = half.encoder(inputs[0]), half.decoder(inputs[1])
    torch.nn.Module.to(half, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, z = (t.contiguous(memory_format=torch.channels_last) for t in inputs)
    ours = autoencoder_layers.encode(half.encoder, x), autoencoder_layers.decode(half.decoder, z)
    for what, a, b, truth in zip(("encoder", "decoder"), ours, plain, exact, strict=True):
        theirs = relative(b, truth)
        rows.append(row(f"{what}, bfloat16 against float32", relative(a, truth), 1.1 * theirs, diffusers=theirs))
    return rows

"""what=train, what=image: an optimizer step of the text-to-video module, without a Trainer, against diffusers' class.

Ours is the module's own step: encode (or precomputed latents and text), noise, Eq. 5 under bf16 autocast (float32 on a CPU), backward, the
watch over the gradients, AdamW, EMA. The peer's has the same objective, precision and optimizer, but no average and no watch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401 (an import inside of a function would keep its locals: the networks)
import torch
from torch import Tensor

from t2v.batch import ClipBatch
from t2v.benchmarks.measuring import (
    Row,
    attempt,
    ceilings,
    check_peer,
    default_device,
    peak_memory,
    speed,
    synchronize,
    timed,
    write_profile,
)
from t2v.benchmarks.random_parts import (
    backend_for,
    config_for,
    kl_config,
    random_autoencoder,
    random_peer,
    random_text_encoder,
    random_unet,
)
from t2v.diffusion.objective import DenoisingLoss
from t2v.diffusion.sampling import Sampler
from t2v.models.autoencoder import SD_CONFIG, Autoencoder, empty_autoencoder
from t2v.models.convolution import channels_last as lay_out
from t2v.models.text_encoder import TOKENS, TextEncoder, empty_tower
from t2v.training.compiling import compile_blocks
from t2v.training.ema import EMA
from t2v.training.module import TextToVideoModule
from t2v.training.operations import autoencoder_tflop, unet_tflop

OPTIMIZER: dict[str, Any] = {"lr": 5.0e-5, "betas": (0.9, 0.999), "eps": 1.0e-8, "weight_decay": 0.0, "fused": True}  # optimizer/adamw.yaml


def train(
    config: Mapping[str, Any] | None = None,
    batches: Sequence[int] = (8,),
    frames: int = 16,
    size: int = 32,
    fed: str = "latents",
    gradient_checkpointing: str = "none",
    attention_backend: str | None = None,
    channels_last: bool = True,
    compile: bool = False,
    cuda_graphs: bool = False,
    versus: str | None = None,
    compile_peer: bool = False,
    rounds: int = 20,
    seconds: float = 30,
    profile: str | None = None,
    device: str | None = None,
) -> Iterator[Row]:
    """A row for each batch size and network, the ceilings first. `size` of the latents; `fed` with latents or pixels (and captions).

    `seconds` end the rounds of a row. `profile`: a file for the kernels of one step of ours at the last batch size.
    """
    if fed not in ("latents", "pixels"):
        raise ValueError(f"fed={fed} is unknown; a step is fed with latents or pixels")
    check_peer(versus, compile_peer)
    torch.set_float32_matmul_precision("high")  # as t2v.train
    torch.backends.cudnn.benchmark = True  # as conf/trainer/default.yaml
    place = torch.device(device) if device else default_device()
    if cuda_graphs and place.type != "cuda":
        raise ValueError(f"cuda_graphs=true needs an NVIDIA GPU, and this would run on {place.type}: leave it out")
    config = config_for(place, config)
    best = ceilings(place)
    if best:
        yield {"what": "ceiling", **best}
    latents = (4, frames, size, size)
    work = 3 * unet_tflop(config, latents, (TOKENS, config.get("cross_attention_dim", 1024)))
    work += autoencoder_tflop(kl_config(None, place), latents)[0] if fed == "pixels" else 0
    step_of = {"t2v": partial(our_step, fed, gradient_checkpointing, attention_backend, channels_last, compile, cuda_graphs)}
    if versus:
        step_of["diffusers"] = partial(peers_step, compile_peer)
    for batch in batches:
        for name, make in step_of.items():
            known = {"network": name, "compiled": compile if name == "t2v" else compile_peer, "batch": batch, "frames": frames}
            file = Path(profile) if profile and name == "t2v" and batch == batches[-1] else None

            def measure(make: Callable[..., Any] = make, batch: int = batch, file: Path | None = file) -> Row:
                began = time.perf_counter()
                step = make(config, place, batch, frames, size)
                synchronize(place)
                built = time.perf_counter() - began
                timing = timed(step, place, rounds=rounds, seconds=seconds)
                loss = float(step())
                if file is not None:
                    write_profile(step, place, file)
                unit = "images" if frames == 1 else "clips"
                return {**speed(timing, batch, work, best, unit), **peak_memory(place), "build_s": built, "loss": loss}

            yield attempt(known, measure, may_fail=name != "t2v")


image = partial(train, frames=1, batches=(175,))


# Ours ---------------------------------------------------------------------------------------------------------------------------------


def our_step(
    fed: str,
    gradient_checkpointing: str,
    attention_backend: str | None,
    channels_last: bool,
    compile: bool,
    cuda_graphs: bool,
    config: Mapping[str, Any],
    device: torch.device,
    batch: int,
    frames: int,
    size: int,
) -> Callable[[], Tensor]:
    """An optimizer step on one fixed micro-batch: () -> its loss."""
    backend = backend_for(device, config, attention_backend or ("sdpa" if compile else None))
    config = {**config, "fused_kernels": config.get("fused_kernels", True) and not compile}
    unet = random_unet(config, device, attention_backend=backend, gradient_checkpointing=gradient_checkpointing)
    if channels_last:
        lay_out(unet)
    width = unet.config["cross_attention_dim"]
    autoencoder, text_encoder = encoders(fed, width, device)
    module = TextToVideoModule(
        unet,
        autoencoder,
        text_encoder,
        DenoisingLoss(),
        Sampler(),
        partial(torch.optim.AdamW, **OPTIMIZER),
        lambda step: 1.0,
        EMA(),
        {"frames": frames, "height": 8 * size, "width": 8 * size, "fps": 3},
        compile="inductor" if compile else None,
    )
    module.to(device)  # where it puts noise and timesteps
    module.unet.train()
    if cuda_graphs:
        module.record_network()
    if module.compiler is not None:
        compile_blocks(module.unet, module.compiler)
    optimizer = module.configure_optimizers()["optimizer"]
    clips = clips_for(fed, width, device, batch, frames, size)
    stream = "image" if frames == 1 else "video"

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = module.predict(stream, clips).losses.mean()
        loss.backward()
        module.on_before_optimizer_step(optimizer)  # the watch
        optimizer.step()
        optimizer.zero_grad()
        module.update_average(step=1)
        return loss.detach()

    return step


def encoders(fed: str, width: int, device: torch.device) -> tuple[Autoencoder, TextEncoder]:
    """float32, as the trainer holds them. Latents need of the autoencoder its scale only, and of the text encoder nothing."""
    if fed == "latents":
        return Autoencoder(empty_autoencoder(SD_CONFIG)), TextEncoder(empty_tower(width=16, layers=2, heads=1))
    return random_autoencoder(None, device, torch.float32), random_text_encoder(width, device, torch.float32)


def clips_for(fed: str, width: int, device: torch.device, batch: int, frames: int, size: int) -> ClipBatch:
    """Pixels and captions, or the moments and embeddings that t2v.encode would have stored."""
    names = [str(index) for index in range(batch)]
    rest: dict[str, Any] = {"keys": names, "sources": names, "indices": list(range(batch))}
    if fed == "pixels":
        pixels = torch.randint(0, 256, (batch, frames, 8 * size, 8 * size, 3), dtype=torch.uint8, device=device)
        return ClipBatch(pixels, ["a red circle moving left slowly on a black background"] * batch, **rest)
    moments = torch.randn(batch, frames, size, size, 8, device=device)
    text = torch.randn(batch, TOKENS, width, device=device)
    return ClipBatch(moments, names, **rest, text=text, empty_text=torch.randn(TOKENS, width, device=device))


# The peer -----------------------------------------------------------------------------------------------------------------------------


def peers_step(compiled: bool, config: Mapping[str, Any], device: torch.device, batch: int, frames: int, size: int) -> Callable[[], Tensor]:
    """diffusers' class on latents, under the same objective, precision and optimizer; no average."""
    peer = random_peer(config, device).train()
    optimizer = torch.optim.AdamW(peer.parameters(), **OPTIMIZER)
    network = torch.compile(peer, dynamic=False) if compiled else peer
    objective = DenoisingLoss()
    shape = (batch, peer.config.in_channels, frames, size, size)
    latents, noise = (torch.randn(shape, device=device) for _ in range(2))
    text = torch.randn(batch, TOKENS, peer.config.cross_attention_dim, device=device)
    timestep = torch.randint(0, objective.schedule.num_timesteps, (batch,), device=device)

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = objective(lambda z, t, text: network(z, t, text).sample, latents, text, timestep, noise).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step

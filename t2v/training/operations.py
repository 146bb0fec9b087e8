"""How much a training computes, and how much its GPU could: floating point operations counted from the model, and a measured ceiling."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from t2v.models.autoencoder import Autoencoder, empty_autoencoder
from t2v.models.unet import VideoUNet


def tflop(call: Callable[[], Any]) -> float:
    """Of matrix products, convolutions and attention, in units of 10^12; on tensors without data (meta), too."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e12


def unet_tflop(config: Mapping[str, Any], latents: Sequence[int], text: Sequence[int], texts: int = 1) -> float:
    """Of the network's forward pass on one clip of latents (c f h w) and so many texts (n d), two in guidance. Its backward pass is twice
    that."""
    with torch.device("meta"):
        unet = VideoUNet(**{**config, "attention_backend": "sdpa"}).eval()
        sample, words = torch.empty(1, *latents), torch.empty(texts, *text)
        return tflop(lambda: unet(sample, torch.zeros(1, dtype=torch.long), words))


def autoencoder_tflop(config: Mapping[str, Any], latents: Sequence[int]) -> tuple[float, float]:
    """Of encoding and of decoding one clip whose latents are (c f h w)."""
    on_meta = Autoencoder(empty_autoencoder(dict(config)))
    c, f, h, w = latents
    pixels = torch.empty(1, f, h * on_meta.factor, w * on_meta.factor, 3, dtype=torch.uint8, device="meta")
    return tflop(lambda: on_meta.moments(pixels)), tflop(lambda: on_meta.decode(torch.empty(1, c, f, h, w, device="meta")))


def ceiling_tflop_per_s(device: torch.device, size: int = 8192, rounds: int = 20) -> float | None:
    """What a GPU reaches at best: a bf16 product of two random matrices (their numbers matter: zeros are faster). None for a CPU."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(rounds):
        torch.mm(a, b)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        torch.mm(a, b)
        event.record()
    torch.cuda.synchronize(device)
    milliseconds = statistics.median(before.elapsed_time(after) for before, after in itertools.pairwise(events))
    return 2 * size**3 / milliseconds / 1e9

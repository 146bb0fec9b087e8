"""The model's parts with random weights, made where they are measured: full size on a GPU, small on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from t2v.models.attention import check_backend
from t2v.models.autoencoder import SD_CONFIG, Autoencoder
from t2v.models.text_encoder import VIT_H, TextEncoder, empty_tower
from t2v.models.unet import EXTRAS, VideoUNet

SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
}
SMALL_AUTOENCODER: dict[str, Any] = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "layers_per_block": 1}


def config_for(device: torch.device, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of the UNet; where none is given, the paper's on a GPU and a small one on a CPU."""
    return dict(config) if config is not None else {} if device.type == "cuda" else SMALL


def backend_for(device: torch.device, config: Mapping[str, Any], wanted: str | None) -> str:
    """The fused kernel where it can run, unless `wanted` says otherwise."""
    if wanted is not None:
        return wanted
    if device.type != "cuda":
        return "sdpa"
    try:
        check_backend("triton", config.get("attention_head_dim", 64))
    except ValueError:
        return "sdpa"
    return "triton"


def randomised(network: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Where a fresh network has zeros, random numbers stand, so that every layer counts."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    return nn.Module.to(network, device, dtype)  # diffusers' own warns of parts to keep in float32, of which there are none


def random_unet(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.float32, **more: Any) -> VideoUNet:
    with device:
        return randomised(VideoUNet(**{**config, **more}), device, dtype)


def random_peer(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' class of the same network."""
    import diffusers

    peer_class: Any = diffusers.UNet3DConditionModel
    with device:
        return randomised(peer_class(**peer_config(config)), device, dtype)


def peer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what diffusers' class does not know. Raises ValueError where that would make another network of it."""
    for name in ("num_temporal_convs", "num_temporal_attentions", "temporal_positions"):
        if config.get(name, EXTRAS[name]) != EXTRAS[name]:
            raise ValueError(
                f"{name}={config[name]} is a network that diffusers does not have (there it is {EXTRAS[name]}): leave versus out"
            )
    return {name: value for name, value in config.items() if name not in EXTRAS}


def kl_config(config: Mapping[str, Any] | None, device: torch.device) -> dict[str, Any]:
    """Of the autoencoder; where none is given, Stable Diffusion's on a GPU and a small one of its kind on a CPU."""
    return SD_CONFIG | dict(config if config is not None else {} if device.type == "cuda" else SMALL_AUTOENCODER)


def random_kl(config: Mapping[str, Any] | None, device: torch.device, dtype: torch.dtype) -> Any:
    """diffusers' AutoencoderKL."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with device:
        return randomised(AutoencoderKL.from_config(kl_config(config, device)).eval(), device, dtype)


def random_autoencoder(config: Mapping[str, Any] | None, device: torch.device, dtype: torch.dtype, **options: Any) -> Autoencoder:
    return Autoencoder(random_kl(config, device, dtype), **options)


def random_text_encoder(width: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """ViT-H/14's shape for its width, else two layers."""
    layers, heads = (VIT_H["layers"], VIT_H["heads"]) if width == VIT_H["width"] else (2, max(1, width // 32))
    tower = empty_tower(width, layers, heads).to(device, dtype)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(float("ln_" in name and name.endswith("weight")))
    return TextEncoder(tower)

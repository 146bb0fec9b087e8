"""Small configurations of VideoUNet and diffusers' own class with the same random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2v.models.unet import VideoUNet

TWO_LEVELS: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
}
FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 64),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
}


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter random, also those that start at zero, of a scale that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                value *= (parameter[0].numel()) ** -0.5
            else:
                value = 0.1 * value + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            parameter.copy_(value)


def pair(config: dict[str, Any], dtype: torch.dtype = torch.float64, **extras: Any) -> tuple[VideoUNet, Any]:
    """(ours, diffusers'), in train mode without dropout on our side, eval on theirs."""
    from diffusers import UNet3DConditionModel

    ours = VideoUNet(**config, temporal_dropout=0.0, **extras)
    randomize(ours)
    theirs = UNet3DConditionModel(**config)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype).eval()


def inputs(b: int, f: int, h: int, w: int, dtype: torch.dtype = torch.float64, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b * 1000 + f)
    sample = torch.randn(b, 4, f, h, w, generator=generator, dtype=torch.float64).to(dtype)
    timestep = torch.randint(0, 1000, (b,), generator=generator)
    return sample, timestep, torch.randn(b, 7, width, generator=generator, dtype=torch.float64).to(dtype)

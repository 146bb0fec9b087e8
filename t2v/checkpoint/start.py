"""Start a network from the spatial weights of one that was trained here: our own step from section 4.1.2, where no Stable Diffusion is."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from t2v.checkpoint.folder import EMA, UNET, CheckpointError, find
from t2v.models.attention import ZeroLinear
from t2v.models.convolution import TemporalConv
from t2v.models.names import is_temporal


class SpatialWeights:
    """init=spatial: all spatial weights of a checkpoint; temporal layers stay as built, their outputs zero.

    `zero_temporal_outputs=False` draws those outputs at random instead, as any other layer's, to see what the zeros are for.
    Raises CheckpointError where the checkpoint's spatial layers are not this network's.
    """

    def __init__(self, path: str | Path, zero_temporal_outputs: bool = True) -> None:
        self.path, self.zero_temporal_outputs = Path(path), zero_temporal_outputs

    @torch.no_grad()
    def __call__(self, unet: nn.Module) -> None:
        folder = find(self.path)
        file = folder / (EMA if (folder / EMA).exists() else UNET)
        own = {name: value for name, value in unet.state_dict().items() if not is_temporal(name)}
        with safe_open(file, "pt") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 (not a mapping)
            wrong = [name for name, value in own.items() if shapes.get(name) != tuple(value.shape)]
            if wrong:
                raise CheckpointError(
                    f"{file} has other spatial layers: {len(wrong)} of {len(own)} differ (such as {wrong[0]}: {shapes.get(wrong[0])} "
                    f"there, {tuple(own[wrong[0]].shape)} here). Take the widths that it was trained with"
                )
            for name, value in own.items():
                value.copy_(stored.get_tensor(name))
        if not self.zero_temporal_outputs:
            randomise_temporal_outputs(unet)


def randomise_temporal_outputs(unet: nn.Module) -> None:
    """Give the zero-initialised outputs (section 4.1.2) the initial values of their class."""
    for module in unet.modules():
        if isinstance(module, ZeroLinear):
            nn.Linear.reset_parameters(module)
        elif isinstance(module, TemporalConv) and module.zero:
            nn.Conv3d.reset_parameters(module)

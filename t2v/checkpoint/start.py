"""Start a network from one that was trained here: from all of its weights, or from the spatial ones, our own step from section 4.1.2."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from t2v.checkpoint.folder import EMA, UNET, CheckpointError, find
from t2v.models.attention import ZeroLinear
from t2v.models.convolution import TemporalConv
from t2v.models.names import is_temporal


class AllWeights:
    """init=checkpoint: the weights of a checkpoint, averaged ones where it has them; optimizer and schedule start anew.

    Raises CheckpointError where they are not this network's.
    """

    kind = ""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def wanted(self, name: str) -> bool:
        return True

    @torch.no_grad()
    def __call__(self, unet: nn.Module) -> None:
        file, own = self.check(unet), unet.state_dict()
        with safe_open(file, "pt") as stored:
            for name in filter(self.wanted, own):
                own[name].copy_(stored.get_tensor(name))

    def check(self, unet: nn.Module) -> Path:
        """The file with the weights; names and shapes alone are read. Raises CheckpointError as the start would."""
        folder = find(self.path)
        file = folder / (EMA if (folder / EMA).exists() else UNET)
        with safe_open(file, "pt") as stored:
            there = {name: tuple(stored.get_slice(name).get_shape()) for name in filter(self.wanted, stored.keys())}
        here = {name: tuple(value.shape) for name, value in unet.state_dict().items() if self.wanted(name)}
        wrong = [name for name in {**here, **there} if there.get(name) != here.get(name)]
        if wrong:
            raise CheckpointError(
                f"{file} has other {self.kind}layers: {len(wrong)} of {len(here)} differ (such as {wrong[0]}: {there.get(wrong[0])} "
                f"there, {here.get(wrong[0])} here). Take the network that it was trained with"
            )
        return file


class SpatialWeights(AllWeights):
    """init=spatial: all spatial weights of a checkpoint; temporal layers stay as built, their outputs zero.

    `zero_temporal_outputs=False` draws those outputs at random instead, as any other layer's, to see what the zeros are for.
    Raises CheckpointError where the checkpoint's spatial layers are not this network's.
    """

    kind = "spatial "

    def __init__(self, path: str | Path, zero_temporal_outputs: bool = True) -> None:
        super().__init__(path)
        self.zero_temporal_outputs = zero_temporal_outputs

    def wanted(self, name: str) -> bool:
        return not is_temporal(name)

    def __call__(self, unet: nn.Module) -> None:
        super().__call__(unet)
        if not self.zero_temporal_outputs:
            randomise_temporal_outputs(unet)


@torch.no_grad()
def randomise_temporal_outputs(unet: nn.Module) -> None:
    """Give the zero-initialised outputs (section 4.1.2) the initial values of their class."""
    for module in unet.modules():
        if isinstance(module, ZeroLinear):
            nn.Linear.reset_parameters(module)
        elif isinstance(module, TemporalConv) and module.zero:
            nn.Conv3d.reset_parameters(module)

"""Where training starts from: Stable Diffusion 2.1 inflated to video (section 4.1.2), or the weights of a released video model.

Stable Diffusion's 686 tensors fill the spatial layers; the 39 temporal outputs stay zero as built, so that the model first gives
Stable Diffusion's frames one by one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from t2v import weights
from t2v.models.names import is_temporal, unet_state


class FromStableDiffusion:
    """init=sd21: a diffusers folder of SD 2.1-base, or its original single file. Raises ValueError for 2.1-768 and SD 1.x."""

    def __init__(self, path: str | Path | None = None, download: bool = False, repositories: Sequence[str] | None = None):
        self.path, self.download, self.repositories = path, download, repositories

    def __call__(self, unet: nn.Module) -> None:
        file = weights.find("sd21", self.path, download=self.download, repositories=self.repositories)
        config: dict = unet.config  # type: ignore[assignment]
        refuse_other_versions(file, config["attention_head_dim"])
        state = weights.read(file)
        width = next((value.shape[1] for name, value in state.items() if name.endswith("attn2.to_k.weight")), None)
        wanted = config["cross_attention_dim"]
        if width is not None and width != wanted:
            version = "Stable Diffusion 1.x, which has another text encoder" if width == 768 else "another model"
            raise ValueError(f"{file} reads text of width {width}, the network {wanted}: it is {version}; use SD 2.1-base")
        fill(unet, state, file, spatial_only=True)
        for name, parameter in unet.named_parameters():
            ends = name.endswith(("proj_out.weight", "proj_out.bias"))
            zero = parameter.is_meta or not (is_temporal(name) and ends and parameter.any())
            assert zero, f"{name} is not zero: frames would be mixed from the start"


class FromRelease:
    """init=diffusers or init=modelscope: all weights of a video model of the same structure. `path`: its folder or file."""

    def __init__(self, path: str | Path | None = None, download: bool = False, repositories: Sequence[str] | None = None):
        self.path, self.download, self.repositories = path, download, repositories

    def __call__(self, unet: nn.Module) -> None:
        file = weights.find("unet", self.path, download=self.download, repositories=self.repositories)
        fill(unet, weights.read(file), file)


def fill(unet: nn.Module, state: dict[str, Tensor], file: Path, spatial_only: bool = False) -> None:
    """Copy a file's weights into the network, whatever their names. Raises ValueError that lists what does not fit."""
    own = unet.state_dict()
    try:
        renamed = unet_state(state, {name: tuple(value.shape) for name, value in own.items()}, spatial_only)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    with torch.no_grad():
        for name, value in renamed.items():
            own[name].copy_(value)


def refuse_other_versions(file: Path, head_dim: int) -> None:
    """Raise ValueError for what has SD 2.1-base's shapes but not its meaning: velocity prediction (2.1-768), heads of another width."""
    folder = file.parent.parent if file.parent.name == "unet" else file.parent
    scheduler = folder / "scheduler" / "scheduler_config.json"
    kind = json.loads(scheduler.read_text()).get("prediction_type", "epsilon") if scheduler.is_file() else "epsilon"
    if kind != "epsilon" or "768" in file.name:
        what = f"prediction_type {kind!r}" if kind != "epsilon" else "the name of the 768-pixel version, which predicts velocity"
        raise ValueError(f"{file} has {what}, but this model predicts noise ('epsilon'): use SD 2.1-base (512 pixels), not 2.1 (768)")
    description = file.with_name("config.json")
    if not description.is_file():
        return
    values = json.loads(description.read_text())
    if values.get("_class_name") not in (None, "UNet2DConditionModel"):
        raise ValueError(
            f"{description} describes a {values['_class_name']}, not Stable Diffusion's UNet2DConditionModel: use init=diffusers"
        )
    widths, heads = values.get("block_out_channels"), values.get("attention_head_dim")  # the latter are numbers of heads in 2D models
    if widths and heads:
        heads = [heads] * len(widths) if isinstance(heads, int) else heads
        found = [width // number for width, number in zip(widths, heads, strict=True)]
        if set(found) != {head_dim}:
            raise ValueError(f"{description}: its heads are {found} wide, the network's attention_head_dim is {head_dim}: use SD 2.1-base")

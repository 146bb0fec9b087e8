"""The spatio-temporal block (section 3.2, Figure 3) and the stages of the UNet that are made of it (Figure 2).

Parameters sit in lists by kind (`resnets`, `temp_convs`, `attentions`, `temp_attentions`), as diffusers names them;
`spatio_temporal_block` runs the j-th of each in the order of the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from t2v.models.attention import SpatialTransformer, TemporalTransformer
from t2v.models.convolution import Downsample, SpatialConvBlock, TemporalConvBlock, Upsample, once_per_text

CHECKPOINTING = ("none", "elementwise", "attention", "all")


@dataclass(frozen=True)
class BlockSettings:
    """What all spatio-temporal blocks of one UNet share."""

    time_width: int
    text_width: int
    head_dim: int
    norm_groups: int
    norm_eps: float
    num_temporal_convs: int  # N_2; 0 leaves temporal convolutions out
    num_temporal_attentions: int  # N_4; 0 leaves temporal attention out
    spatial_dropout: float
    temporal_dropout: float
    temporal_positions: str | None
    attention_backend: str


class SpatioTemporalStage(nn.Module):
    """A row of spatio-temporal blocks at one resolution. `attentions[j]` tells whether the j-th has spatial and temporal attention."""

    def __init__(self, channels: Sequence[tuple[int, int]], attentions: Sequence[bool], settings: BlockSettings, scale: float = 1.0):
        super().__init__()
        s = settings
        self.gradient_checkpointing = "none"
        self.has_attention = tuple(attentions)
        self.has_temporal_convs, self.has_temporal_attentions = s.num_temporal_convs > 0, s.num_temporal_attentions > 0
        self.resnets = nn.ModuleList(
            [SpatialConvBlock(i, o, s.time_width, s.norm_groups, s.norm_eps, s.spatial_dropout, scale) for i, o in channels]
        )
        if self.has_temporal_convs:
            self.temp_convs = nn.ModuleList(
                [TemporalConvBlock(o, s.num_temporal_convs, s.norm_groups, s.temporal_dropout) for _, o in channels]
            )
        widths = [o for (_, o), attention in zip(channels, attentions, strict=True) if attention]
        if widths:
            self.attentions = nn.ModuleList(
                [SpatialTransformer(o, o // s.head_dim, s.head_dim, s.text_width, s.norm_groups, s.attention_backend) for o in widths]
            )
        if widths and self.has_temporal_attentions:
            self.temp_attentions = nn.ModuleList([temporal_transformer(o, o // s.head_dim, s) for o in widths])

    def spatio_temporal_block(self, j: int, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Figure 3: x (b f h w c), time (b d), text (b n d) -> (b f h w o)."""
        x = run(self.resnets[j], self.gradient_checkpointing, x, time)  # N_1 = 2 spatial convolutions
        if self.has_temporal_convs:
            x = run(self.temp_convs[j], self.gradient_checkpointing, x)  # N_2 = 4 temporal convolutions
        if self.has_attention[j]:
            x = run(self.attentions[j], self.gradient_checkpointing, x, text)  # N_3 = 2 spatial attentions
            if self.has_temporal_attentions:
                x = run(self.temp_attentions[j], self.gradient_checkpointing, x)  # N_4 = 2 temporal attentions
        return x


def run(module: nn.Module, recompute: str, *inputs: Tensor) -> Tensor:
    """The module's output. Its inner activations are kept, or computed again in the backward pass where `recompute` covers its kind."""
    is_attention = isinstance(module, SpatialTransformer | TemporalTransformer)
    if torch.is_grad_enabled() and (recompute == "all" or (recompute == "attention" and is_attention)):
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


class DownStage(SpatioTemporalStage):
    """Blocks, then the downsampling block of Figure 2, if any. Every output is kept as a skip."""

    def __init__(
        self, channels: int, out_channels: int, num_blocks: int, attention: bool, downsample: bool, padding: int, settings: BlockSettings
    ):
        pairs = [(channels if j == 0 else out_channels, out_channels) for j in range(num_blocks)]
        super().__init__(pairs, [attention] * num_blocks, settings)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding)]) if downsample else None

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for j in range(len(self.resnets)):
            x = self.spatio_temporal_block(j, x, time, text)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidStage(SpatioTemporalStage):
    """One full block and one of convolutions only, at the lowest resolution."""

    def __init__(self, channels: int, scale: float, settings: BlockSettings):
        super().__init__([(channels, channels)] * 2, [True, False], settings, scale)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.spatio_temporal_block(0, x, time, text)
        return self.spatio_temporal_block(1, x, time, text)


class UpStage(SpatioTemporalStage):
    """Blocks, each of which first takes in a skip, then the upsampling block of Figure 2, if any."""

    def __init__(
        self, channels: int, skip_channels: Sequence[int], out_channels: int, attention: bool, upsample: bool, settings: BlockSettings
    ):
        pairs = [((channels if j == 0 else out_channels) + skip, out_channels) for j, skip in enumerate(skip_channels)]
        super().__init__(pairs, [attention] * len(pairs), settings)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if upsample else None

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, text: Tensor) -> Tensor:
        """`skips` is used up from its end; the one that then is last gives the size to upsample to."""
        for j in range(len(self.resnets)):
            x = beside(x, once_per_text(skips.pop(), len(x)))  # (b f h w c+skip)
            x = self.spatio_temporal_block(j, x, time, text)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x, (skips[-1].shape[2], skips[-1].shape[3]))
        return x


def beside(x: Tensor, skip: Tensor) -> Tensor:
    """(b f h w c), (b f h w k) -> (b f h w c+k), as matrices: torch joins up to four axes by a fast kernel of a GPU, more by slow ones."""
    return torch.cat([x.flatten(0, 3), skip.flatten(0, 3)], 1).unflatten(0, x.shape[:4])


def temporal_transformer(channels: int, heads: int, settings: BlockSettings) -> TemporalTransformer:
    s = settings
    return TemporalTransformer(
        channels, heads, s.head_dim, s.norm_groups, s.num_temporal_attentions, s.attention_backend, s.temporal_positions
    )


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of all stages in the order in which they run: spatial and temporal convolutions, spatial and temporal attentions."""
    kinds = ("resnets", "temp_convs", "attentions", "temp_attentions")
    rows = [zip_longest(*(getattr(stage, kind, ()) for kind in kinds)) for stage in stages_of(module)]
    return [block for row in rows for blocks in row for block in blocks if block is not None]


def stages_of(module: nn.Module) -> list[Any]:
    """Every stage inside a network, to switch gradient checkpointing."""
    return [child for child in module.modules() if isinstance(child, SpatioTemporalStage)]

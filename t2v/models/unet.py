"""VideoUNet: the denoising network of ModelScopeT2V (section 3.1, Figure 2), 1,411,233,860 parameters by default.

Constructor arguments, parameter names and shapes are those of diffusers' UNet3DConditionModel, so that weights move without a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.models.attention import check_backend
from t2v.models.convolution import GroupNorm, SpatialConv, once_per_text
from t2v.models.kernels import Fusable, recomputed
from t2v.models.spatio_temporal import CHECKPOINTING, BlockSettings, DownStage, MidStage, UpStage, run, stages_of, temporal_transformer
from t2v.models.timestep import TimestepEmbedding

INPUT_HEADS = 8  # of the input transformer, whatever its width; fixed in the released model
EXTRAS = {  # keyword-only arguments that diffusers does not have, and its behaviour; they never enter its config.json
    "num_temporal_convs": 4,
    "num_temporal_attentions": 2,
    "temporal_positions": None,
    "spatial_dropout": 0.0,
    "temporal_dropout": 0.1,
    "attention_backend": "sdpa",
    "gradient_checkpointing": "none",
    "fused_kernels": True,
}


class VideoUNet(nn.Module):
    """Predicts the noise in a latent video, Eq. 4. Arguments before `*` as in diffusers' UNet3DConditionModel; after it:

    num_temporal_convs       N_2 of section 3.2; 0 leaves temporal convolutions out
    num_temporal_attentions  N_4 of section 3.2; 0 leaves temporal attention out, the input transformer included
    temporal_positions       None (as released) or "sinusoidal": frame indices are added to the input of temporal attention
    spatial_dropout          in the spatial convolution blocks; the released model was trained with 0.1, diffusers has none
    temporal_dropout         in the temporal convolution blocks
    attention_backend        "sdpa", "xformers", or "triton" (a fused kernel for temporal attention)
    fused_kernels            on a GPU, norms with their neighbours and GEGLU as one kernel each (t2v/models/kernels)
    gradient_checkpointing   what the backward pass computes again instead of keeping it: "none"; "elementwise", what the fused kernels
                             write (no matrix product); "attention", transformers; "all", every block. May be changed later

    Raises ValueError where widths do not fit together.
    """

    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types: Sequence[str] = ("UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"),
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1024,
        attention_head_dim: int = 64,
        num_attention_heads: None = None,
        time_cond_proj_dim: None = None,
        *,
        num_temporal_convs: int = 4,
        num_temporal_attentions: int = 2,
        temporal_positions: str | None = None,
        spatial_dropout: float = 0.0,
        temporal_dropout: float = 0.1,
        attention_backend: str = "sdpa",
        gradient_checkpointing: str = "none",
        fused_kernels: bool = True,
    ):
        arguments = {name: plain(value) for name, value in locals().items() if name not in ("self", "__class__")}
        check_arguments(**arguments)
        super().__init__()
        self.config: dict[str, Any] = arguments
        widths = tuple(block_out_channels)
        settings = BlockSettings(
            time_width=4 * widths[0],
            text_width=cross_attention_dim,
            head_dim=attention_head_dim,
            norm_groups=norm_num_groups,
            norm_eps=norm_eps,
            num_temporal_convs=num_temporal_convs,
            num_temporal_attentions=num_temporal_attentions,
            spatial_dropout=spatial_dropout,
            temporal_dropout=temporal_dropout,
            temporal_positions=temporal_positions,
            attention_backend=attention_backend,
        )
        # Initial block
        self.conv_in = SpatialConv(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], settings.time_width)
        self.transformer_in = temporal_transformer(widths[0], INPUT_HEADS, settings) if num_temporal_attentions else None
        # Downwards; every output is kept as a skip
        self.down_blocks, skips, channels = nn.ModuleList(), [widths[0]], widths[0]
        for i, (kind, width) in enumerate(zip(down_block_types, widths, strict=True)):
            last = i == len(widths) - 1
            self.down_blocks.append(
                DownStage(channels, width, layers_per_block, kind == "CrossAttnDownBlock3D", not last, downsample_padding, settings)
            )
            skips += [width] * (layers_per_block + (not last))
            channels = width
        self.mid_block = MidStage(channels, mid_block_scale_factor, settings)
        # Upwards; one block more than downwards, each takes one skip
        self.up_blocks = nn.ModuleList()
        for i, (kind, width) in enumerate(zip(up_block_types, reversed(widths), strict=True)):
            taken = [skips.pop() for _ in range(layers_per_block + 1)]
            self.up_blocks.append(UpStage(channels, taken, width, kind == "CrossAttnUpBlock3D", i < len(widths) - 1, settings))
            channels = width
        self.conv_norm_out = GroupNorm(norm_num_groups, channels, norm_eps, silu=True)
        self.conv_out = SpatialConv(channels, out_channels, 3, padding=1)
        self.gradient_checkpointing = gradient_checkpointing
        for module in self.modules():
            if isinstance(module, Fusable):
                module.fused_kernels = fused_kernels

    def forward(self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor) -> Tensor:
        """sample (b c f h w), timestep (b,) or one for all, encoder_hidden_states (b n d) -> predicted noise (b c f h w).

        With k texts for each clip (k b n d), clip i's in the rows i, b + i, ..., the result is (k b c f h w); what comes before the
        first text attention, much of the dearest resolution, is then computed once (for the halves of guidance).
        """
        self.check_inputs(sample, encoder_hidden_states)
        with recomputed(self.gradient_checkpointing == "elementwise" and torch.is_grad_enabled()):
            return self.predict(sample, timestep, encoder_hidden_states)

    def predict(self, sample: Tensor, timestep: Tensor | float, text: Tensor) -> Tensor:
        timestep = torch.as_tensor(timestep, device=sample.device).expand(sample.shape[0])
        time = F.silu(self.time_embedding(timestep))  # (b d); every block starts by this SiLU, so it is done once
        time = once_per_text(time, len(text))
        x = self.conv_in(sample.permute(0, 2, 3, 4, 1))  # (b f h w c)
        if self.transformer_in is not None:
            x = run(self.transformer_in, self.gradient_checkpointing, x)
        skips = [x]
        for stage in self.down_blocks:
            x, outputs = stage(x, time, text)
            skips += outputs
        x = self.mid_block(x, time, text)
        for stage in self.up_blocks:
            x = stage(x, skips, time, text)
        x = self.conv_out(self.conv_norm_out(x))
        return once_per_text(x.permute(0, 4, 1, 2, 3), len(text))  # (k b c f h w)

    @property
    def gradient_checkpointing(self) -> str:
        return self.config["gradient_checkpointing"]

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, which: str) -> None:
        if which not in CHECKPOINTING:
            raise ValueError(f"gradient_checkpointing={which!r} is not one of {', '.join(CHECKPOINTING)}")
        self.config["gradient_checkpointing"] = which
        for stage in stages_of(self):
            stage.gradient_checkpointing = which

    def check_inputs(self, sample: Tensor, text: Tensor) -> None:
        channels, width = self.config["in_channels"], self.config["cross_attention_dim"]
        if sample.ndim != 5 or sample.shape[1] != channels:
            raise ValueError(f"sample must be (b {channels} f h w), but its shape is {tuple(sample.shape)}; add or reorder its axes")
        if 0 in sample.shape[1:]:
            raise ValueError(
                f"sample has shape {tuple(sample.shape)}: a video needs at least 1 frame of 1 x 1, this has none; check num_frames"
            )
        if text.ndim != 3 or text.shape[-1] != width:
            raise ValueError(
                f"encoder_hidden_states must be (b n {width}), cross_attention_dim={width}, but its shape is {tuple(text.shape)}; "
                f"use a text encoder of width {width} or build VideoUNet(cross_attention_dim={text.shape[-1]})"
            )
        videos, texts = sample.shape[0], text.shape[0]
        if texts != videos and (min(videos, texts) == 0 or texts % videos):
            raise ValueError(f"{texts} texts for {videos} videos: give one text per video, or equally many for each")


def plain(value: Any) -> Any:
    """Sequences as lists, so that `config` survives JSON unchanged."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def check_arguments(
    *,
    down_block_types: Sequence[str],
    up_block_types: Sequence[str],
    block_out_channels: Sequence[int],
    norm_num_groups: int,
    attention_head_dim: int,
    act_fn: str,
    attention_backend: str,
    temporal_positions: str | None,
    num_attention_heads: int | None,
    time_cond_proj_dim: int | None,
    **others: Any,
) -> None:
    """Raise ValueError for a structure that cannot be built, before any memory is spent."""
    counts = len(block_out_channels), len(down_block_types), len(up_block_types)
    if len(set(counts)) > 1 or counts[0] == 0:
        raise ValueError("block_out_channels, down_block_types and up_block_types must be equally long, not {}, {} and {}".format(*counts))
    for kinds, known in (
        (down_block_types, ("CrossAttnDownBlock3D", "DownBlock3D")),
        (up_block_types, ("CrossAttnUpBlock3D", "UpBlock3D")),
    ):
        for kind in kinds:
            if kind not in known:
                raise ValueError(f"unknown block type {kind!r}; known: {', '.join(known)}")
    if not isinstance(attention_head_dim, int) or attention_head_dim < 1:
        raise ValueError(f"attention_head_dim={attention_head_dim!r}: give one positive integer, the width of a head (64 in SD 2.1)")
    if not isinstance(norm_num_groups, int) or norm_num_groups < 1:
        raise ValueError(f"norm_num_groups={norm_num_groups!r}: give a positive integer; a network without norms is not supported")
    for i, width in enumerate(block_out_channels):
        for name, divisor in (("attention_head_dim", attention_head_dim), ("norm_num_groups", norm_num_groups)):
            if width < 1 or width % divisor:
                nearest = max(divisor, round(width / divisor) * divisor)
                raise ValueError(
                    f"block_out_channels[{i}]={width} is not a multiple of {name}={divisor}: "
                    f"use {nearest}, or a {name} that divides {width}"
                )
    if block_out_channels[0] % 2:
        raise ValueError(f"block_out_channels[0]={block_out_channels[0]} is odd: the timestep's embedding needs an even width")
    for name in ("layers_per_block", "in_channels", "out_channels", "cross_attention_dim"):
        if others[name] < 1:
            raise ValueError(f"{name}={others[name]} must be at least 1")
    for name in ("num_temporal_convs", "num_temporal_attentions"):
        if others[name] < 0:
            raise ValueError(f"{name}={others[name]} must be at least 0 (0 leaves the module out)")
    for name in ("spatial_dropout", "temporal_dropout"):
        if not 0 <= others[name] < 1:
            raise ValueError(f"{name}={others[name]} must lie in [0, 1)")
    if act_fn not in ("silu", "swish"):
        raise ValueError(f"act_fn={act_fn!r} is not supported: the released model and SD 2.1 use 'silu'")
    if temporal_positions not in (None, "sinusoidal"):
        raise ValueError(f"temporal_positions={temporal_positions!r} is neither None nor 'sinusoidal'")
    if num_attention_heads is not None or time_cond_proj_dim is not None:
        raise ValueError("num_attention_heads and time_cond_proj_dim must be None, as in diffusers; use attention_head_dim for the heads")
    check_backend(attention_backend, attention_head_dim)

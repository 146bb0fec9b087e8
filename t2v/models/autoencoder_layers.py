"""The forward pass of diffusers' AutoencoderKL with the channels last in memory, for GPUs: its own modules' weights, other steps between.

diffusers' GroupNorm, whose kernel knows only one layout, makes every convolution on a GPU transpose its input and output. Here all
activations stay (n c h w) with the channels last, GroupNorm and SiLU are one step, and nothing divides by a scale of 1.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def is_supported(model: Any) -> bool:
    """Whether these are Stable Diffusion's kinds of blocks, the only ones that the functions below know."""
    blocks = model.config["down_block_types"], model.config["up_block_types"]
    return [set(kinds) for kinds in blocks] == [{"DownEncoderBlock2D"}, {"UpDecoderBlock2D"}] and model.config["act_fn"] == "silu"


def encode(encoder: Any, x: Tensor) -> Tensor:
    """`encoder(x)`: (n 3 h w) -> (n 2c h/s w/s)."""
    x = encoder.conv_in(x)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = residual_block(resnet, x)
        for downsampler in block.downsamplers or ():
            x = downsampler.conv(F.pad(x, (0, 1, 0, 1)))
    x = middle(encoder.mid_block, x)
    return encoder.conv_out(norm_silu(encoder.conv_norm_out, x))


def decode(decoder: Any, z: Tensor) -> Tensor:
    """`decoder(z)`: (n c h w) -> (n 3 h*s w*s)."""
    x = middle(decoder.mid_block, decoder.conv_in(z))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = residual_block(resnet, x)
        for upsampler in block.upsamplers or ():
            x = upsampler.conv(doubled(x))
    return decoder.conv_out(norm_silu(decoder.conv_norm_out, x))


def middle(block: Any, x: Tensor) -> Tensor:
    """Residual blocks with attention between them, where the model has it."""
    x = residual_block(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = x if attention is None else self_attention(attention, x)
        x = residual_block(resnet, x)
    return x


def residual_block(block: Any, x: Tensor) -> Tensor:
    h = block.conv1(norm_silu(block.norm1, x))
    h = block.conv2(norm_silu(block.norm2, h))
    return h + (x if block.conv_shortcut is None else block.conv_shortcut(x))


def self_attention(block: Any, x: Tensor) -> Tensor:
    """Among the pixels of a frame, by one head."""
    n, c, h, w = x.shape
    tokens = F.group_norm(x, block.group_norm.num_groups, block.group_norm.weight, block.group_norm.bias, block.group_norm.eps)
    tokens = tokens.permute(0, 2, 3, 1).reshape(n, 1, h * w, c)
    y = F.scaled_dot_product_attention(block.to_q(tokens), block.to_k(tokens), block.to_v(tokens))  # (n 1 hw c)
    return x + block.to_out[0](y).view(n, h, w, c).permute(0, 3, 1, 2)


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps))


def doubled(x: Tensor) -> Tensor:
    """Every pixel four times: (n c h w) -> (n c 2h 2w). F.interpolate's kernel for this layout fails beyond 2^31 numbers."""
    n, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None]  # (n h 1 w 1 c)
    return rows.expand(n, h, 2, w, 2, c).reshape(n, 2 * h, 2 * w, c).permute(0, 3, 1, 2)

"""The forward pass of diffusers' AutoencoderKL with the channels last in memory, for GPUs: its own modules' weights, fewer passes.

diffusers' GroupNorm, whose kernel knows only one layout, makes every convolution on a GPU transpose its input and output. Here all
activations stay (n c h w) with the channels last, and GroupNorm and SiLU are one kernel. The bias of a convolution is not added by a
pass of its own: it travels beside the tensor as a shift (c), which the next layer that reads the tensor anyway adds. No gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.models.kernels import DTYPES, INSTALLED
from t2v.models.kernels.group_norm import fused_group_norm, plain_group_norm

Shifted = tuple[Tensor, Tensor]
"""x (n c h w) and s (c): the activations x + s."""


def is_supported(model: Any) -> bool:
    """Whether these are Stable Diffusion's kinds of blocks, the only ones that the functions below know."""
    blocks = model.config["down_block_types"], model.config["up_block_types"]
    return [set(kinds) for kinds in blocks] == [{"DownEncoderBlock2D"}, {"UpDecoderBlock2D"}] and model.config["act_fn"] == "silu"


def encode(encoder: Any, x: Tensor) -> Tensor:
    """`encoder(x)`: (n 3 h w) -> (n 2c h/s w/s)."""
    h = convolution(encoder.conv_in, x)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            h = residual_block(resnet, h)
        for downsampler in block.downsamplers or ():
            h = convolution(downsampler.conv, padded(h))
    h = middle(encoder.mid_block, h)
    return encoder.conv_out(norm(encoder.conv_norm_out, h, silu=True))


def decode(decoder: Any, z: Tensor) -> Tensor:
    """`decoder(z)`: (n c h w) -> (n 3 h*s w*s)."""
    h = middle(decoder.mid_block, convolution(decoder.conv_in, z))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            h = residual_block(resnet, h)
        for upsampler in block.upsamplers or ():
            h = convolution(upsampler.conv, doubled(h))
    return decoder.conv_out(norm(decoder.conv_norm_out, h, silu=True))


def middle(block: Any, h: Shifted) -> Shifted:
    """Residual blocks with attention between them, where the model has it."""
    h = residual_block(block.resnets[0], h)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        h = h if attention is None else self_attention(attention, h)
        h = residual_block(resnet, h)
    return h


def residual_block(block: Any, h: Shifted) -> Shifted:
    between = convolution(block.conv1, norm(block.norm1, h, silu=True))
    y, s = convolution(block.conv2, norm(block.norm2, between, silu=True))
    if block.conv_shortcut is None:
        return y.add_(h[0]), s + h[1]
    return plus_linear(y, h[0], block.conv_shortcut.weight.flatten(1)), s + through(block.conv_shortcut, h[1])


def self_attention(block: Any, h: Shifted) -> Shifted:
    """Among the pixels of a frame, by one head."""
    x, s = h
    n, c, height, width = x.shape
    tokens = norm(block.group_norm, h).permute(0, 2, 3, 1).reshape(n, 1, height * width, c)
    y = F.scaled_dot_product_attention(block.to_q(tokens), block.to_k(tokens), block.to_v(tokens))  # (n 1 hw c)
    y = y.view(n, height, width, c).permute(0, 3, 1, 2)
    return plus_linear(x, y, block.to_out[0].weight), s + block.to_out[0].bias


def convolution(layer: nn.Conv2d, x: Tensor) -> Shifted:
    assert layer.bias is not None
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding), wide(layer.bias)


def plus_linear(y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """y + W x for every pixel, in one matrix product: y (n o h w), x (n c h w), W (o c) -> (n o h w)."""
    n, o, h, w = y.shape
    rows = y.permute(0, 2, 3, 1).reshape(-1, o), x.permute(0, 2, 3, 1).reshape(n * h * w, -1)
    return torch.addmm(*rows, weight.t()).view(n, h, w, o).permute(0, 3, 1, 2)


def through(layer: nn.Conv2d, s: Tensor) -> Tensor:
    """What a 1 x 1 convolution makes of a shift (c), its own bias included."""
    assert layer.bias is not None
    with torch.autocast(s.device.type, enabled=False):
        return wide(layer.weight).flatten(1) @ s + layer.bias


def wide(x: Tensor) -> Tensor:
    """At least float32, so that sums of shifts are not rounded again and again."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(layer: nn.GroupNorm, h: Shifted, silu: bool = False) -> Tensor:
    """GroupNorm of x + s, then SiLU where asked for: (n c h w)."""
    x, s = h
    n, c, height, width = x.shape
    tokens, shift = x.permute(0, 2, 3, 1).reshape(n, height * width, c), s[None]
    if has_kernel(x):
        y, _ = fused_group_norm(tokens, layer.weight, layer.bias, layer.num_groups, layer.eps, silu=silu, shift=shift)
    else:  # a compiler makes one kernel of this, too
        wider = wide(tokens), wide(layer.weight), wide(layer.bias)
        y = plain_group_norm(*wider, layer.num_groups, layer.eps, silu=silu, shift=shift).to(x.dtype).contiguous()
    return y.view(n, height, width, c).permute(0, 3, 1, 2)


def has_kernel(x: Tensor) -> bool:
    return x.is_cuda and INSTALLED and x.dtype in DTYPES and not torch.compiler.is_compiling()


def padded(h: Shifted) -> Tensor:
    """x + s with a row and a column of zeros at the end, in one pass: (n c h w) -> (n c h+1 w+1)."""
    x, s = h
    n, c, height, width = x.shape
    result = x.new_empty(n, height + 1, width + 1, c).permute(0, 3, 1, 2)
    result[:, :, height], result[..., width] = 0, 0
    torch.add(x, s.to(x.dtype)[:, None, None], out=result[:, :, :height, :width])
    return result


def doubled(h: Shifted) -> Tensor:
    """x + s with every pixel four times, in one pass: (n c h w) -> (n c 2h 2w). F.interpolate fails beyond 2^31 numbers in this layout."""
    x, s = h
    n, c, height, width = x.shape
    rows = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(n, height, 2, width, 2, c)
    result = torch.add(rows, s.to(x.dtype), out=x.new_empty(rows.shape))
    return result.view(n, 2 * height, 2 * width, c).permute(0, 3, 1, 2)

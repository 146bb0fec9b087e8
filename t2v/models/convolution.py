"""Spatial and temporal convolutions of the spatio-temporal block (section 3.2, Figure 4a), on channels-last tokens (b f h w c).

Stored weights keep the shapes of diffusers' modules. Only the layout of the activations differs: with the channels last, a spatial
convolution, a temporal convolution and a matrix product all read the same memory, and nothing is transposed between them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.models.kernels import Fusable
from t2v.models.kernels.group_norm import fused_group_norm, fused_group_norm_taps
from t2v.models.kernels.residual import fused_residual_sum
from t2v.models.pointwise import linear


class GroupNorm(nn.GroupNorm, Fusable):
    """Group normalisation of tokens (b f h w c), with SiLU where `silu`. Statistics are taken per frame, or over all frames of a clip where
    `over_frames`."""

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, over_frames: bool = False, silu: bool = False):
        super().__init__(num_groups, num_channels, eps=eps)
        self.over_frames = over_frames
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return self.beside(x)[0]

    def beside(self, x: Tensor, shift: Tensor | None = None, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
        """dropout(norm(x + shift)), and x for what runs beside it (a residual). shift (b c) or (1 c), where the kernel runs only."""
        b, f, h, w, c = x.shape
        if self.fused(x):
            seed = torch.randint(-(2**31), 2**31 - 1, (2,), dtype=torch.int32, device=x.device) if dropout > 0 else None
            shape = (b, f * h * w, c) if self.over_frames else (b * f, h * w, c)
            y, same = fused_group_norm(
                x.reshape(shape), self.weight, self.bias, self.num_groups, self.eps, silu=self.silu, shift=shift, dropout=dropout, seed=seed
            )
            return y.view(x.shape), same.view(x.shape)
        assert shift is None
        # A 4-d view whose strides torch recognises as channels-last; with any other, its CPU kernel copies and is several times slower.
        y = x.reshape(b, f, h * w, c) if self.over_frames else x.reshape(b * f, h, w, c)
        y = y.permute(0, 3, 1, 2)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            y = y.float() if torch.is_autocast_enabled("cpu") else y
            norm = GroupNormOnCPU.apply if torch.is_grad_enabled() else F.group_norm
            y = norm(y, self.num_groups, self.weight, self.bias, self.eps)
        else:
            y = F.group_norm(y, self.num_groups, self.weight, self.bias, self.eps)
        y = y.permute(0, 2, 3, 1).reshape(b, f, h, w, c)
        y = F.silu(y, inplace=not torch.is_grad_enabled()) if self.silu else y
        return (drop(y, dropout) if dropout > 0 else y), x

    def taps(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """norm(x + shift) of every frame between those of its neighbours, 0 outside, without gradients: (b f h w c) -> (b f h w (3 c))."""
        assert self.over_frames
        b, f, h, w, c = x.shape
        y = fused_group_norm_taps(
            x.reshape(b, f * h * w, c), self.weight, self.bias, self.num_groups, self.eps, f, silu=self.silu, shift=shift
        )
        return y.view(b, f, h, w, 3 * c)


class GroupNormOnCPU(torch.autograd.Function):
    """F.group_norm on (n c h w), channels last, but its backward pass always computes the gradient of the input.

    torch's channels-last CPU kernel (2.13) crashes the process where that one is not asked for, as below a frozen convolution.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.sizes = *x.shape[:2], x.shape[2] * x.shape[3], groups
        y, mean, inverse = torch.ops.aten.native_group_norm(x, weight, bias, *ctx.sizes, eps)
        ctx.save_for_backward(x, mean, inverse, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx, dw, db = torch.ops.aten.native_group_norm_backward(grad, *ctx.saved_tensors, *ctx.sizes, [True, True, True])
        return dx, None, dw, db, None


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout whose random numbers on a CPU are 16 bits each: torch's own draws them one by one and would be the slowest layer of all.

    There the rate is rounded to a multiple of 1/65536, and the survivors are scaled by that rate, so that the mean is exact.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = round(p * 65_536)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= dropped - 32_768
    return x * kept.to(x.dtype).mul_(65_536 / (65_536 - dropped))


class SpatialConv(nn.Conv2d):
    """A 2-d convolution of every frame: (b f h w c) -> (b f h' w' o)."""

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        b, f, h, w, c = x.shape
        y = self._conv_forward(x.reshape(b * f, h, w, c).permute(0, 3, 1, 2), self.weight, self.bias if with_bias else None)
        return y.permute(0, 2, 3, 1).unflatten(0, (b, f))


class PointwiseConv(nn.Conv2d):
    """A 1 x 1 convolution, (b f h w c) -> (b f h w o): its (o c 1 1) weight is used as a matrix."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.flatten(1), self.bias)


class TemporalConv(nn.Conv3d):
    """A convolution of three taps along the frames, zero beyond the clip's ends: (b f h w c) -> (b f h w c).

    The (o c 3 1 1) weight of a Conv3d is viewed as a (3, 1) kernel over the image (frames, pixels).
    For one frame it is its centre tap, a matrix; the outer taps then get the zero gradients that the zero padding would give them.
    `zero`: weight and bias start at zero (section 4.1.2).
    """

    def __init__(self, channels: int, zero: bool = False):
        self.zero = zero
        super().__init__(channels, channels, kernel_size=(3, 1, 1), padding=(1, 0, 0))

    def reset_parameters(self) -> None:
        if self.zero:
            nn.init.zeros_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)
        else:
            super().reset_parameters()

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        b, f, h, w, c = x.shape
        bias = self.bias if with_bias else None
        if f == 1:
            return linear(x, self.weight[:, :, 1, 0, 0], bias)
        y = F.conv2d(x.reshape(b, f, h * w, c).permute(0, 3, 1, 2), self.weight.squeeze(-1), bias, padding=(1, 0))
        return y.permute(0, 2, 3, 1).reshape(b, f, h, w, c)

    def of_taps(self, x: Tensor) -> Tensor:
        """The same without its bias as one matrix product, of `GroupNorm.taps`: (b f h w (3 c)) -> (b f h w c)."""
        return F.linear(x, self.weight[..., 0, 0].transpose(1, 2).flatten(1))  # a view of what `channels_last` laid out


def once_per_text(x: Tensor, rows: int) -> Tensor:
    """(b ...) -> (rows ...): all clips again for each of their texts, where they are not so already."""
    return x if len(x) == rows else x.expand(rows // len(x), *x.shape).flatten(0, 1)


def channels_last(network: nn.Module) -> None:
    """Lay the weights of convolutions out as the tokens lie, in place: else they, and their gradients, are converted in every step."""
    for module in network.modules():
        if isinstance(module, SpatialConv):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(module, TemporalConv):
            module.weight.data = module.weight.data.squeeze(-1).contiguous(memory_format=torch.channels_last).unsqueeze(-1)


class SpatialConvBlock(Fusable):
    """The N_1 = 2 spatial convolutions of Figure 3: the residual block of Stable Diffusion. (b f h w c) -> (b f h w o)."""

    def __init__(self, channels: int, out_channels: int, time_width: int, groups: int, eps: float, dropout: float, scale: float = 1.0):
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps, silu=True)
        self.conv1 = SpatialConv(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=True)
        self.conv2 = SpatialConv(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = PointwiseConv(channels, out_channels) if channels != out_channels else None
        self.dropout = dropout
        self.scale = scale

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """`time` (b d): the timestep's embedding after its SiLU, one per clip; or (k b d) where the clips still stand for k texts each."""
        dropout = self.dropout if self.training else 0.0
        shift = self.time_emb_proj(time[: len(x)])  # (b o)
        h, x = self.norm1.beside(x)
        if self.fused(x):  # the second norm adds embedding and bias where it reads
            h, shift = self.conv1(h, with_bias=False), shift + self.conv1.bias
            h, _ = self.norm2.beside(h, shift, dropout)
        else:
            h, _ = self.norm2.beside(self.conv1(h) + shift[:, None, None, None], dropout=dropout)
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        bias: Any = self.conv2.bias
        if self.fused(x):
            y = fused_residual_sum(x, self.conv2(h, with_bias=False), bias)
        else:
            y = x + self.conv2(h)
        return y if self.scale == 1 else y / self.scale


class TemporalConvBlock(Fusable):
    """The N_2 = 4 temporal convolutions of Figure 3 on a residual branch that starts at zero: (b f h w c) -> (b f h w c)."""

    def __init__(self, channels: int, num_convs: int, groups: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        for i in range(1, num_convs + 1):  # conv1, conv2, ...: diffusers' names and positions; its first has no dropout
            layers: list[nn.Module] = [GroupNorm(groups, channels, over_frames=True, silu=True), nn.Identity()]  # SiLU is in the norm
            layers += [nn.Identity()] if i > 1 else []  # so is dropout
            self.add_module(f"conv{i}", nn.Sequential(*layers, TemporalConv(channels, zero=i == num_convs)))

    def forward(self, x: Tensor) -> Tensor:
        fused = self.fused(x)
        if fused and x.shape[1] > 1 and not torch.is_grad_enabled() and not self.training:
            return self.by_products(x)
        h, bias = x, None
        for i, layers in enumerate(self.children()):
            norm, conv = layers[0], layers[-1]  # type: ignore[index]
            h, beside = norm.beside(h, bias, self.dropout if self.training and i else 0.0)
            if i == 0:
                x = beside
            h = conv(h, with_bias=not fused)
            bias = conv.bias[None] if fused else None  # which the next norm, or the sum, adds where it reads
        return x + h if bias is None else fused_residual_sum(x, h, bias[0])

    def by_products(self, x: Tensor) -> Tensor:
        """For sampling, without dropout and gradients: each norm writes all that a position's taps read side by side, three times as much,
        so that a convolution is one matrix product; faster than cuDNN's at every size of ours."""
        h, bias = x, None
        for layers in self.children():
            norm, conv = layers[0], layers[-1]  # type: ignore[index]
            h = conv.of_taps(norm.taps(h, bias))
            bias = conv.bias[None]
        assert bias is not None
        return fused_residual_sum(x, h, bias[0])


class Downsample(nn.Module):
    """Halves height and width (rounding up) by a strided convolution: (b f h w c) -> (b f h/2 w/2 c)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = SpatialConv(channels, channels, 3, stride=2, padding=padding)
        self.pad_after = padding == 0  # diffusers then pads one row and one column at the end

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 0, 0, 1, 0, 1)) if self.pad_after else x)


class Upsample(nn.Module):
    """Doubles height and width by repetition, cut to the size of the skip that follows, then convolves: (b f h w c) -> (b f h' w' c)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = SpatialConv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        b, f, h, w, c = x.shape
        x = torch.stack([x, x], 4).view(b, f, h, 2 * w, c)  # stacks, because their backward pass is faster than a sum over two axes
        x = torch.stack([x, x], 3).view(b, f, 2 * h, 2 * w, c)
        if size != (2 * h, 2 * w):
            x = x[:, :, : size[0], : size[1]]
        return self.conv(x)

"""Spatial and temporal attention of the spatio-temporal block (section 3.2, Figure 4b), on channels-last tokens (b f n d), n = h * w.

Which tokens see each other is only a matter of views:
spatial self-attention (b f) batches of n tokens; text cross-attention b batches of (f n) queries on one set of text keys per clip;
temporal attention (n heads) heads of f tokens. Pixels go to the axis of the heads because that is a view of the same memory and
because CUDA's attention kernels take at most 65,535 batches, which b * n would pass at 64 images of 256 x 256.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2v.models.convolution import GroupNorm, once_per_text
from t2v.models.kernels import Fusable
from t2v.models.kernels.geglu import fused_geglu
from t2v.models.kernels.layer_norm import fused_add_layer_norm
from t2v.models.kernels.residual import fused_residual_sum
from t2v.models.kernels.temporal_attention import temporal_attention
from t2v.models.pointwise import Linear, joinable, linear, linear_gelu, linear_plus, linear_times
from t2v.models.timestep import sinusoid

VECTOR = 16  # float32 numbers that a CPU with AVX-512 computes at once
MAX_GRID = 65_535  # CUDA's limit for the second and third grid dimension, where attention kernels put batches and heads

BACKENDS = ("sdpa", "xformers", "triton")


def check_backend(backend: str, head_dim: int) -> None:
    """Raise ValueError for a backend that does not exist or cannot run here. On the meta device only its name is checked."""
    if backend not in BACKENDS:
        raise ValueError(f"attention_backend={backend!r} is not one of {', '.join(BACKENDS)}")
    if backend == "triton" and (head_dim < 16 or head_dim & (head_dim - 1)):
        raise ValueError(f"attention_backend='triton' needs heads of 16, 32, 64 or 128, not attention_head_dim={head_dim}: use 'sdpa'")
    if backend == "sdpa" or torch.empty(0).device.type == "meta":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"attention_backend={backend!r} needs an NVIDIA GPU, and torch sees none here: use 'sdpa'")
    if find_spec(backend) is None:
        raise ValueError(f"attention_backend={backend!r} needs the {backend} package, which is not installed: use 'sdpa'")


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa", mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v for q (b m h d), k and v (b n h d), any strides -> (b m h d). The mask (m n) is sdpa's alone."""
    if backend == "xformers":
        return attend_by_xformers(q, k, v)
    ragged = k.shape[1] > VECTOR and k.shape[1] % VECTOR != 0
    if mask is None and ragged and on_a_plain_cpu(q):  # its kernel takes half the time for 80 words as for 77
        beyond = -k.shape[1] % VECTOR
        mask = F.pad(q.new_zeros(1, k.shape[1]), (0, beyond), value=-torch.inf)
        k, v = (F.pad(x, (0, 0, 0, 0, 0, beyond)) for x in (k, v))
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask).transpose(1, 2)


def on_a_plain_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def attend_by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type != "cuda":
        raise ValueError(f"attention_backend='xformers' runs on CUDA, but the tensors are on {q.device}: move the network, or use 'sdpa'")
    from xformers.ops import memory_efficient_attention

    try:
        return memory_efficient_attention(q, k, v)
    except NotImplementedError as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"xformers has no kernel for {tuple(q.shape)} {q.dtype} on this machine: use attention_backend='sdpa' ({why})"
        ) from error


class Attention(Fusable):
    """Projections shared by the three kinds of attention; `to_out` is a list because the stored name is `to_out.0`."""

    def __init__(self, width: int, heads: int, head_dim: int, context_width: int | None = None, backend: str = "sdpa"):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim, self.backend = heads, head_dim, backend
        self.to_q = Linear(width, inner, bias=False)
        self.to_k = Linear(context_width or width, inner, bias=False)
        self.to_v = Linear(context_width or width, inner, bias=False)
        self.to_out = nn.ModuleList([Linear(inner, width)])

    def project(self, x: Tensor, names: str) -> tuple[Tensor, ...]:
        """`names` of "q", "k", "v": (... d) -> as many (... h d)."""
        if len(names) > 1 and self.fused(x):
            return self.project_at_once(x, names).unbind(-3)
        layers = (getattr(self, f"to_{name}") for name in names)
        return tuple(layer(x).unflatten(-1, (self.heads, self.head_dim)) for layer in layers)

    def project_at_once(self, x: Tensor, names: str) -> Tensor:
        """By one matrix product, though the weights are stored apart: (... d) -> (... k h d), k = len(names)."""
        weight = torch.cat([getattr(self, f"to_{name}").weight for name in names])
        return F.linear(x, weight).unflatten(-1, (len(names), self.heads, self.head_dim))

    def out(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(... (h d)) -> (... d), and the bias that the sum after it is to add; None where it is in already."""
        layer: Any = self.to_out[0]
        return (F.linear(x, layer.weight), layer.bias) if self.fused(x) else (layer(x), None)


class SpatialAttention(Attention):
    """Every pixel attends to the pixels of its own frame."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        b, f, n, _ = x.shape
        q, k, v = self.project(x.flatten(0, 1), "qkv")
        return self.out(attend(q, k, v, self.backend).reshape(b, f, n, -1))


class TextAttention(Attention):
    """Every pixel of every frame attends to the words of its clip; their keys and values are projected once per clip."""

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        b, f, n, _ = x.shape
        (q,) = self.project(x.flatten(1, 2), "q")
        k, v = self.project(text, "kv")
        return self.out(attend(q, k, v, self.backend).reshape(b, f, n, -1))


class TemporalAttention(Attention):
    """Every pixel attends to the same pixel of all frames.

    `positions` "sinusoidal" adds a sinusoid of the frame's index to the input; None (as released) leaves the frames without order.
    """

    def __init__(self, width: int, heads: int, head_dim: int, backend: str = "sdpa", positions: str | None = None):
        super().__init__(width, heads, head_dim, backend=backend)
        self.positions = positions

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        b, f, n, d = x.shape
        if self.positions is not None:
            x = x + sinusoid(torch.arange(f, device=x.device), d).to(x.dtype)[:, None]
        if f == 1:  # the softmax over one key is 1
            y, bias = self.out(self.to_v(x))
            zero = self.untouched(x)
            return (y + zero, None) if bias is None else (y, bias + zero)
        if f <= VECTOR // 2 and self.backend == "sdpa" and on_a_plain_cpu(x):
            return self.attend_over_few_frames(x)
        return self.out(self.attend_over_frames(x).reshape(b, f, n, -1))

    def attend_over_frames(self, x: Tensor) -> Tensor:
        """(b f n d) -> (b f n h d)."""
        if self.backend == "triton":
            return temporal_attention(self.project_at_once(x, "qkv"))
        q, k, v = self.project(x, "qkv")
        return over_frames(q, k, v, self.backend)

    def attend_over_few_frames(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """All of it, (b f n d) -> (b f n d), with the frames of several pixels as one sequence, in which each sees its own pixel only:
        a CPU's kernel takes its time for each sequence, and for eight keys as long as for 16."""
        b, f, n, d = x.shape
        pixels = max(m for m in range(1, VECTOR // f + 1) if n % m == 0)
        pixel = torch.arange(pixels, device=x.device).repeat_interleave(f)
        q, k, v = self.project(x.transpose(1, 2).reshape(-1, pixels * f, d), "qkv")  # (b*n/pixels pixels*f h d)
        others = q.new_zeros(pixels * f, pixels * f).masked_fill(pixel[:, None] != pixel, -torch.inf)
        y, bias = self.out(attend(q, k, v, mask=others).flatten(2))
        return y.view(b, n, f, d).transpose(1, 2), bias

    def untouched(self, x: Tensor) -> Tensor:
        """An exact zero through the projections of queries and keys, which one frame does not need: their gradients are 0, not None."""
        if not torch.is_grad_enabled():
            return x.new_zeros(())
        token = x[:1, :, :1]
        return 0.0 * (self.to_q(token).sum() + self.to_k(token).sum())


def over_frames(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Attention of every pixel over the frames: (b f n h d) each -> (b f n h d)."""
    b, f, _, h, d = q.shape
    step = max(1, MAX_GRID // h)
    if backend == "xformers":  # its flash attention's backward pass has 128 rows a sequence at least, and counts their numbers in 32 bits
        step = max(1, min(step, (2**31 - 1) // (b * h * d * 128 * -(-f // 128))))
    parts = zip(q.split(step, 2), k.split(step, 2), v.split(step, 2), strict=True)
    found = [attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), backend).view(q.shape) for q, k, v in parts]
    return found[0] if len(found) == 1 else torch.cat(found, 2)


class FeedForward(nn.Module):
    """GEGLU, four times as wide inside, and the residual sum: (... d), (... d) -> (... d)."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), OutLinear(4 * width, width)])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x + feed_forward(y)."""
        last: Any = self.net[2]
        return last.add(x, self.net[0](y))


class GEGLU(Fusable):
    """value * gelu(gate), both linear in the input. For the kernel they are projected at once; elsewhere halves of rows are slow to use."""

    def __init__(self, width: int, width_out: int):
        super().__init__()
        self.proj = Linear(width, 2 * width_out)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused(x):
            return fused_geglu(F.linear(x, self.proj.weight), self.proj.bias)
        weight, bias = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        if joinable(x):
            return linear_times(x, weight[0], bias[0], linear_gelu(x, weight[1], bias[1]))
        return linear(x, weight[0], bias[0]) * F.gelu(linear(x, weight[1], bias[1]))


class LayerNorm(nn.LayerNorm, Fusable):
    """Layer normalisation of tokens, with the residual sum before it."""

    def add(self, x: Tensor, branch: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x + branch + bias, and its layer norm. All (... d), bias (d)."""
        if self.fused(x):
            return fused_add_layer_norm(x, branch, bias, self.weight, self.bias, self.eps)
        assert bias is None
        x = x if branch is None else x + branch
        return x, self(x)


class OutLinear(Linear, Fusable):
    """The last layer of a residual branch."""

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + linear(y), where y may have other axes before its last."""
        if joinable(x):
            return linear_plus(y.view(*x.shape[:-1], -1), self.weight, self.bias, x)
        return fused_residual_sum(x, F.linear(y, self.weight).view(x.shape), self.bias) if self.fused(x) else x + self(y).view(x.shape)


class ZeroLinear(OutLinear):
    """Starts at zero: the output of a temporal attention (section 4.1.2)."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SpatialTransformerLayer(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, text_width: int, backend: str):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = SpatialAttention(width, heads, head_dim, backend=backend)
        self.norm2 = LayerNorm(width)
        self.attn2 = TextAttention(width, heads, head_dim, context_width=text_width, backend=backend)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x, y = self.norm1.add(x)
        x, y = self.norm2.add(x, *self.attn1(y))
        x, y = once_per_text(x, len(text)), once_per_text(y, len(text))
        x, y = self.norm3.add(x, *self.attn2(y, text))
        return self.ff(x, y)


class TemporalTransformerLayer(nn.Module):
    def __init__(self, width: int, heads: int, head_dim: int, num_attentions: int, backend: str, positions: str | None):
        super().__init__()
        self.num_attentions = num_attentions
        for i in range(1, num_attentions + 1):  # norm3 is the feed-forward's in the released model, so a third attention's is norm4
            self.add_module(f"norm{i if i < 3 else i + 1}", LayerNorm(width))
            self.add_module(f"attn{i}", TemporalAttention(width, heads, head_dim, backend=backend, positions=positions))
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        branch: tuple[Tensor, Tensor | None] | tuple[()] = ()
        for i in range(1, self.num_attentions + 1):
            norm, attention = getattr(self, f"norm{i if i < 3 else i + 1}"), getattr(self, f"attn{i}")
            x, y = norm.add(x, *branch)
            branch = attention(y)
        x, y = self.norm3.add(x, *branch)
        return self.ff(x, y)


class SpatialTransformer(nn.Module):
    """The N_3 = 2 spatial attentions of Figure 3, one to the frame and one to the text: (b f h w c), (k b n d) -> (k b f h w c)."""

    def __init__(self, channels: int, heads: int, head_dim: int, text_width: int, groups: int, backend: str):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = Linear(channels, heads * head_dim)
        self.transformer_blocks = nn.ModuleList([SpatialTransformerLayer(heads * head_dim, heads, head_dim, text_width, backend)])
        self.proj_out = OutLinear(heads * head_dim, channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y, x = self.norm.beside(x)
        tokens = self.proj_in(y).flatten(2, 3)  # (b f (h w) d)
        for layer in self.transformer_blocks:
            tokens = layer(tokens, text)
        return self.proj_out.add(once_per_text(x, len(text)), tokens)


class TemporalTransformer(nn.Module):
    """The N_4 = 2 temporal attentions of Figure 3, on a residual branch that starts at zero: (b f h w c) -> (b f h w c)."""

    def __init__(self, channels: int, heads: int, head_dim: int, groups: int, num_attentions: int, backend: str, positions: str | None):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6, over_frames=True)
        self.proj_in = Linear(channels, heads * head_dim)
        self.transformer_blocks = nn.ModuleList(
            [TemporalTransformerLayer(heads * head_dim, heads, head_dim, num_attentions, backend, positions)]
        )
        self.proj_out = ZeroLinear(heads * head_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.norm.beside(x)
        tokens = self.proj_in(y).flatten(2, 3)  # (b f (h w) d)
        for layer in self.transformer_blocks:
            tokens = layer(tokens)
        return self.proj_out.add(x, tokens)

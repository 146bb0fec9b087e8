"""Temporal attention as one kernel over packed tokens (b f n 3 h d), forward and backward: attention_backend="triton".

Frames are few, so a program holds all of one pixel's queries, keys and values of one head, and the softmax needs no second pass.
Nothing is transposed or copied, the number of sequences has no limit, and queries, keys and values lie side by side as one matrix
product wrote them, gradients too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2v.models.kernels import launch, planned_gpu, power_of_two

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None
    _attention_forward = _attention_backward = None

MAX_FRAMES = 64  # of which one program's scores, gradients and operands still fit its registers


def temporal_attention(qkv: Tensor) -> Tensor:
    """softmax over frames: (b f n 3 h d) on a CUDA device -> (b f n h d). Raises ValueError where the kernel cannot run."""
    if qkv.device.type != "cuda" and planned_gpu.get() is None:
        raise ValueError(f"attention_backend='triton' runs on CUDA, but the tensors are on {qkv.device}: move the network, or use 'sdpa'")
    if qkv.shape[1] > MAX_FRAMES:
        raise ValueError(f"attention_backend='triton' takes at most {MAX_FRAMES} frames, not {qkv.shape[1]}: use 'sdpa'")
    if triton is None and planned_gpu.get() is None:
        raise ValueError("attention_backend='triton' needs the triton package, which comes with CUDA builds of torch: use 'sdpa'")
    return FusedTemporalAttention.apply(qkv)


class PlainTemporalAttention(torch.autograd.Function):
    """The kernel's arithmetic, forward and backward, in plain torch: (b f n 3 h d) -> (b f n h d)."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        ctx.save_for_backward(qkv)
        q, k, v = qkv.unbind(3)
        return torch.einsum("bnhfg,bgnhd->bfnhd", _probabilities(q, k).to(v.dtype), v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        q, k, v = qkv.unbind(3)
        p = _probabilities(q, k)  # (b n h f g), g the frames of the keys
        dv = torch.einsum("bnhfg,bfnhd->bgnhd", p.to(grad.dtype), grad)
        dp = torch.einsum("bfnhd,bgnhd->bnhfg", grad, v).to(p.dtype)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        dq = torch.einsum("bnhfg,bgnhd->bfnhd", ds.to(k.dtype), k)
        dk = torch.einsum("bnhfg,bfnhd->bgnhd", ds.to(q.dtype), q)
        return torch.stack([dq, dk, dv], dim=3)


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bfnhd,bgnhd->bnhfg", q, k).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    return p / p.sum(-1, keepdim=True)


class FusedTemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        qkv = qkv.contiguous()
        b, f, n, _, h, d = qkv.shape
        o = qkv.new_empty((b, f, n, h, d))
        launch(_attention_forward, b * n * h, qkv, qkv, o, **_sizes(qkv))
        ctx.save_for_backward(qkv)
        return o

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (qkv,) = ctx.saved_tensors
        result = torch.empty_like(qkv)
        b, _, n, _, h, _ = qkv.shape
        launch(_attention_backward, b * n * h, qkv, qkv, grad.contiguous(), result, **_sizes(qkv))
        return result


def _sizes(qkv: Tensor) -> dict[str, Any]:
    _, f, n, _, h, d = qkv.shape
    block = max(16, power_of_two(f))
    sizes = {"n_pixels": n, "n_heads": h, "n_frames": f, "scale": d**-0.5, "BLOCK": block, "D": d}
    return {**sizes, "num_warps": 1 if block <= 16 else 4}


if triton is not None:

    @triton.jit
    def _offsets(n_pixels, n_heads, n_frames, BLOCK: tl.constexpr, D: tl.constexpr):
        """Where a program, for a pixel and head of a clip, finds its frames: in (b f n h d), in (b f n 3 h d), and there the width."""
        i = tl.program_id(0).to(tl.int64)
        head, pixel, clip = i % n_heads, (i // n_heads) % n_pixels, i // (n_heads * n_pixels)
        frame, channel = tl.arange(0, BLOCK), tl.arange(0, D)
        width = n_heads * D
        token = (clip * n_frames + frame) * n_pixels + pixel
        inside = (head * D + channel)[None, :]
        exists = frame < n_frames
        return token[:, None] * width + inside, token[:, None] * (3 * width) + inside, width, exists[:, None], exists[None, :]

    @triton.jit
    def _softmax(Q, K, key_exists, scale):
        S = tl.dot(Q, tl.trans(K), input_precision="ieee") * scale
        S = tl.where(key_exists, S, -1e30)
        P = tl.exp(S - tl.max(S, 1)[:, None])
        return P / tl.sum(P, 1)[:, None]

    @triton.jit
    def _attention_forward(qkv, o, n_pixels, n_heads, n_frames, scale, BLOCK: tl.constexpr, D: tl.constexpr):
        out, at, width, exists, key_exists = _offsets(n_pixels, n_heads, n_frames, BLOCK, D)
        Q, K, V = tl.load(qkv + at, exists, 0.0), tl.load(qkv + at + width, exists, 0.0), tl.load(qkv + at + 2 * width, exists, 0.0)
        P = _softmax(Q, K, key_exists, scale)
        O = tl.dot(P.to(V.dtype), V, input_precision="ieee")
        tl.store(o + out, O.to(o.dtype.element_ty), exists)

    @triton.jit
    def _attention_backward(qkv, g, result, n_pixels, n_heads, n_frames, scale, BLOCK: tl.constexpr, D: tl.constexpr):
        out, at, width, exists, key_exists = _offsets(n_pixels, n_heads, n_frames, BLOCK, D)
        Q, K, V = tl.load(qkv + at, exists, 0.0), tl.load(qkv + at + width, exists, 0.0), tl.load(qkv + at + 2 * width, exists, 0.0)
        G = tl.load(g + out, exists, 0.0)
        P = tl.where(exists, _softmax(Q, K, key_exists, scale), 0.0)
        dV = tl.dot(tl.trans(P.to(G.dtype)), G, input_precision="ieee")
        dP = tl.dot(G, tl.trans(V), input_precision="ieee")
        dS = P * (dP - tl.sum(P * dP, 1)[:, None]) * scale
        dQ = tl.dot(dS.to(K.dtype), K, input_precision="ieee")
        dK = tl.dot(tl.trans(dS.to(Q.dtype)), Q, input_precision="ieee")
        tl.store(result + at, dQ.to(result.dtype.element_ty), exists)
        tl.store(result + at + width, dK.to(result.dtype.element_ty), exists)
        tl.store(result + at + 2 * width, dV.to(result.dtype.element_ty), exists)

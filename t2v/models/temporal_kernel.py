"""attention_backend="triton": temporal attention as one kernel over strided tokens (b f n h d), forward and backward.

Frames are few, so a program holds all of one pixel's queries, keys and values of one head, and the softmax needs no second pass.
Nothing is transposed or copied, and the number of sequences has no limit. `PlainTemporalAttention` is the same arithmetic in torch,
which the tests hold to the bounds on any machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_FRAMES = 64  # of which one program's scores, gradients and operands still fit its registers


def temporal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax over frames: (b f n h d) each, on a CUDA device -> (b f n h d). Raises ValueError where the kernel cannot run."""
    if q.device.type != "cuda":
        raise ValueError(f"attention_backend='triton' runs on CUDA, but the tensors are on {q.device}: move the network, or use 'sdpa'")
    if q.shape[1] > MAX_FRAMES:
        raise ValueError(f"attention_backend='triton' takes at most {MAX_FRAMES} frames, not {q.shape[1]}: use 'sdpa'")
    return _operator()(q.contiguous(), k.contiguous(), v.contiguous())


class PlainTemporalAttention(torch.autograd.Function):
    """The kernel's arithmetic, forward and backward, in plain torch: (b f n h d) each -> (b f n h d)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.einsum("bnhfg,bgnhd->bfnhd", _probabilities(q, k).to(v.dtype), v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        p = _probabilities(q, k)  # (b n h f g), g the frames of the keys
        dv = torch.einsum("bnhfg,bfnhd->bgnhd", p.to(grad.dtype), grad)
        dp = torch.einsum("bfnhd,bgnhd->bnhfg", grad, v).to(p.dtype)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        dq = torch.einsum("bnhfg,bgnhd->bfnhd", ds.to(k.dtype), k)
        dk = torch.einsum("bnhfg,bfnhd->bgnhd", ds.to(q.dtype), q)
        return dq, dk, dv


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.einsum("bfnhd,bgnhd->bnhfg", q, k).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    return p / p.sum(-1, keepdim=True)


try:
    import triton
    import triton.language as tl
    from torch.library import triton_op, wrap_triton
except ImportError:  # CPU builds of torch come without it
    triton = None
else:

    @triton.jit
    def _offsets(n_pixels, n_heads, n_frames, BLOCK: tl.constexpr, D: tl.constexpr):
        i = tl.program_id(0).to(tl.int64)  # one program per (clip, pixel, head)
        head, pixel, clip = i % n_heads, (i // n_heads) % n_pixels, i // (n_heads * n_pixels)
        frame, channel = tl.arange(0, BLOCK), tl.arange(0, D)
        stride = n_pixels * n_heads * D  # from one frame to the next
        start = (clip * n_frames * n_pixels + pixel) * n_heads * D + head * D
        return start + frame[:, None] * stride + channel[None, :], (frame < n_frames)[:, None], (frame < n_frames)[None, :]

    @triton.jit
    def _softmax(Q, K, key_exists, scale, PRECISION: tl.constexpr):
        S = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * scale
        S = tl.where(key_exists, S, -1e30)
        P = tl.exp(S - tl.max(S, 1)[:, None])
        return P / tl.sum(P, 1)[:, None]

    @triton.jit
    def _forward_kernel(q, k, v, o, n_pixels, n_heads, n_frames, scale, BLOCK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr):
        at, exists, key_exists = _offsets(n_pixels, n_heads, n_frames, BLOCK, D)
        Q, K, V = tl.load(q + at, exists, 0.0), tl.load(k + at, exists, 0.0), tl.load(v + at, exists, 0.0)
        P = _softmax(Q, K, key_exists, scale, PRECISION)
        O = tl.dot(P.to(V.dtype), V, input_precision=PRECISION)
        tl.store(o + at, O.to(o.dtype.element_ty), exists)

    @triton.jit
    def _backward_kernel(
        q, k, v, g, dq, dk, dv, n_pixels, n_heads, n_frames, scale, BLOCK: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr
    ):
        at, exists, key_exists = _offsets(n_pixels, n_heads, n_frames, BLOCK, D)
        Q, K, V, G = tl.load(q + at, exists, 0.0), tl.load(k + at, exists, 0.0), tl.load(v + at, exists, 0.0), tl.load(g + at, exists, 0.0)
        P = tl.where(exists, _softmax(Q, K, key_exists, scale, PRECISION), 0.0)
        dV = tl.dot(tl.trans(P.to(G.dtype)), G, input_precision=PRECISION)
        dP = tl.dot(G, tl.trans(V), input_precision=PRECISION)
        dS = P * (dP - tl.sum(P * dP, 1)[:, None]) * scale
        dQ = tl.dot(dS.to(K.dtype), K, input_precision=PRECISION)
        dK = tl.dot(tl.trans(dS.to(Q.dtype)), Q, input_precision=PRECISION)
        tl.store(dq + at, dQ.to(dq.dtype.element_ty), exists)
        tl.store(dk + at, dK.to(dk.dtype.element_ty), exists)
        tl.store(dv + at, dV.to(dv.dtype.element_ty), exists)

    def _launch(q: Tensor) -> tuple[tuple[int], dict[str, Any]]:
        b, f, n, h, d = q.shape
        block = max(16, triton.next_power_of_2(f))
        sizes = {"n_pixels": n, "n_heads": h, "n_frames": f, "scale": d**-0.5, "BLOCK": block, "D": d}
        return (b * n * h,), {**sizes, "PRECISION": "ieee", "num_warps": 1 if block <= 16 else 4}

    @triton_op("t2v::temporal_attention", mutates_args={})
    def _forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = torch.empty_like(q)
        grid, sizes = _launch(q)
        wrap_triton(_forward_kernel)[grid](q, k, v, o, **sizes)
        return o

    @triton_op("t2v::temporal_attention_backward", mutates_args={})
    def _backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        grid, sizes = _launch(q)
        wrap_triton(_backward_kernel)[grid](q, k, v, g, dq, dk, dv, **sizes)
        return dq, dk, dv

    def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _backward(*ctx.saved_tensors, grad.contiguous())

    _forward.register_autograd(_gradients, setup_context=_remember)


def _operator() -> Any:
    if triton is None:
        raise ValueError("attention_backend='triton' needs the triton package, which comes with CUDA builds of torch: use 'sdpa'")
    return _forward

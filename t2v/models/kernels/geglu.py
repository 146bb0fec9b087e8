"""GEGLU, value * gelu(gate), with the bias of the projection before it: the gradients of both halves and of the bias in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.models.kernels import launch, remember, width_of_tile

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None
    _geglu_forward = _geglu_backward = None

WARPS = 4
FORWARD = 4, 256, 32  # rows and columns of a tile, rows of a program
BACKWARD = 8, 128, 128  # longer programs, whose partial gradients of the bias are added later


def plain_geglu(x: Tensor, bias: Tensor) -> Tensor:
    """x (... 2 d) = (value, gate) before its bias (2 d) -> (... d)."""
    value, gate = (x + bias.to(x.dtype)).chunk(2, dim=-1)
    return value * F.gelu(gate)


def fused_geglu(x: Tensor, bias: Tensor) -> Tensor:
    """`plain_geglu` as kernels, the sum with the bias in float32. Keeps x only."""
    return FusedGEGLU.apply(x, bias)


class FusedGEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
        rows, sizes, programs = _sizes(x, *FORWARD)

        def write(y: Tensor) -> None:
            launch(_geglu_forward, programs, x, x, bias, y, rows, **sizes)

        write(y)
        remember(y, write)
        ctx.save_for_backward(x, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        rows, sizes, programs = _sizes(x, *BACKWARD)
        dx = torch.empty_like(x)
        sums = x.new_empty((-(-rows // sizes["CHUNK"]), x.shape[-1]), dtype=torch.float32)
        launch(_geglu_backward, programs, x, x, bias, grad.contiguous(), dx, sums, rows, **sizes)
        return dx, sums.sum(0).to(bias.dtype)


def _sizes(x: Tensor, rows: int, columns: int, chunk: int) -> tuple[int, dict[str, int], int]:
    d = x.shape[-1] // 2
    total = x.numel() // (2 * d)
    block = width_of_tile(d, columns, 128, 64, 32)
    blocks = -(-d // block)
    sizes = {"D": d, "blocks": blocks, "ROWS": rows, "CHUNK": chunk, "BLOCK": block, "num_warps": WARPS}
    return total, sizes, -(-total // chunk) * blocks


if triton is not None:

    @triton.jit
    def _place(blocks, D, BLOCK: tl.constexpr):
        i = tl.program_id(0)
        c = (i % blocks) * BLOCK + tl.arange(0, BLOCK)
        return i // blocks, c, c < D

    @triton.jit
    def _half(x, bias, r, c, exists, D, side: tl.constexpr):
        X = tl.load(x + r.to(tl.int64)[:, None] * (2 * D) + (side * D + c)[None, :], exists, 0.0).to(tl.float32)
        return X + tl.load(bias + side * D + c, c < D, 0.0).to(tl.float32)[None, :]

    @triton.jit(do_not_specialize=["rows", "blocks"])
    def _geglu_forward(x, bias, y, rows, D, blocks, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
        k, c, in_c = _place(blocks, D, BLOCK)
        for first in range(0, CHUNK, ROWS):
            r = k * CHUNK + first + tl.arange(0, ROWS)
            exists = (r < rows)[:, None] & in_c[None, :]
            value, gate = _half(x, bias, r, c, exists, D, 0), _half(x, bias, r, c, exists, D, 1)
            Y = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
            tl.store(y + r.to(tl.int64)[:, None] * D + c[None, :], Y.to(y.dtype.element_ty), exists)

    @triton.jit(do_not_specialize=["rows", "blocks"])
    def _geglu_backward(x, bias, grad, dx, sums, rows, D, blocks, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
        k, c, in_c = _place(blocks, D, BLOCK)
        sum_value = tl.zeros((ROWS, BLOCK), tl.float32)
        sum_gate = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, CHUNK, ROWS):
            r = k * CHUNK + first + tl.arange(0, ROWS)
            exists = (r < rows)[:, None] & in_c[None, :]
            value, gate = _half(x, bias, r, c, exists, D, 0), _half(x, bias, r, c, exists, D, 1)
            G = tl.load(grad + r.to(tl.int64)[:, None] * D + c[None, :], exists, 0.0).to(tl.float32)
            below = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))  # the normal distribution's share below the gate
            of_value = G * gate * below
            of_gate = G * value * (below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate))
            at = r.to(tl.int64)[:, None] * (2 * D) + c[None, :]
            tl.store(dx + at, of_value.to(dx.dtype.element_ty), exists)
            tl.store(dx + at + D, of_gate.to(dx.dtype.element_ty), exists)
            sum_value += of_value
            sum_gate += of_gate
        tl.store(sums + k * (2 * D) + c, tl.sum(sum_value, 0), in_c)
        tl.store(sums + k * (2 * D) + D + c, tl.sum(sum_gate, 0), in_c)

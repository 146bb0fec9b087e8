"""The sum of a residual and a branch with the bias of the branch's last layer: one pass, and none for the bias's own sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from t2v.models.kernels import launch, width_of_tile

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None
    _sum_forward = _column_sums = None

ROWS, BLOCK, WARPS = 32, 64, 4
CHUNK, CHUNK_OF_SUMS = 64, 256  # rows of a program: of the sum itself; of the bias's gradient, whose partial results are added later


def plain_residual_sum(x: Tensor, branch: Tensor, offset: Tensor) -> Tensor:
    """x + branch + offset: (... d), (... d), (d)."""
    return x + branch + offset.to(branch.dtype)


def fused_residual_sum(x: Tensor, branch: Tensor, offset: Tensor) -> Tensor:
    """`plain_residual_sum` as a kernel. Backward, x and the branch receive the same tensor, and the offset its sum over the rows."""
    assert x.shape == branch.shape, (x.shape, branch.shape)
    return FusedResidualSum.apply(x, branch, offset)


class FusedResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, offset: Tensor) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, programs, sizes = _sizes(x, CHUNK)
        launch(_sum_forward, programs, x, x.contiguous(), branch.contiguous(), offset, y, rows, **sizes)
        ctx.of_offset = offset.dtype
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad.contiguous()
        rows, programs, sizes = _sizes(grad, CHUNK_OF_SUMS)
        sums = grad.new_empty((-(-rows // CHUNK_OF_SUMS), grad.shape[-1]), dtype=torch.float32)
        launch(_column_sums, programs, grad, grad, sums, rows, **sizes)
        return grad, grad, sums.sum(0).to(ctx.of_offset)


def _sizes(x: Tensor, chunk: int) -> tuple[int, int, dict[str, int]]:
    d = x.shape[-1]
    rows = x.numel() // d
    block = width_of_tile(d, BLOCK, 32, 16)
    blocks = -(-d // block)
    return rows, -(-rows // chunk) * blocks, {"D": d, "blocks": blocks, "CHUNK": chunk, "ROWS": ROWS, "BLOCK": block, "num_warps": WARPS}


if triton is not None:

    @triton.jit
    def _tile(k, first, c, rows, D, CHUNK: tl.constexpr, ROWS: tl.constexpr):
        r = k * CHUNK + first + tl.arange(0, ROWS)
        return (r < rows)[:, None] & (c < D)[None, :], r.to(tl.int64)[:, None] * D + c[None, :]

    @triton.jit(do_not_specialize=["rows", "blocks"])
    def _sum_forward(x, branch, offset, y, rows, D, blocks, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0)
        c = (i % blocks) * BLOCK + tl.arange(0, BLOCK)
        add = tl.load(offset + c, c < D, 0.0).to(tl.float32)
        for first in range(0, CHUNK, ROWS):
            exists, at = _tile(i // blocks, first, c, rows, D, CHUNK, ROWS)
            Y = tl.load(x + at, exists, 0.0).to(tl.float32) + tl.load(branch + at, exists, 0.0).to(tl.float32) + add[None, :]
            tl.store(y + at, Y.to(y.dtype.element_ty), exists)

    @triton.jit(do_not_specialize=["rows", "blocks"])
    def _column_sums(grad, sums, rows, D, blocks, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0)
        c = (i % blocks) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, CHUNK, ROWS):
            exists, at = _tile(i // blocks, first, c, rows, D, CHUNK, ROWS)
            total += tl.load(grad + at, exists, 0.0).to(tl.float32)
        tl.store(sums + (i // blocks) * D + c, tl.sum(total, 0), c < D)

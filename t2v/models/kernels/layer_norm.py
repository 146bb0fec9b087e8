"""Layer normalisation of tokens together with the residual sum before it: one pass forward, one backward, and only the sum is kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.models.kernels import compute_dtype, launch, power_of_two, remember

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None
    _norm_forward = _norm_backward = None


TILE, WARPS = 2048, 2  # numbers of a tile of whole rows, and who works on them
PROGRAMS = 16  # of each multiprocessor, that sum the weights' gradients


def plain_add_layer_norm(
    x: Tensor, branch: Tensor | None, offset: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + branch + offset, and its layer norm: (... d) each, offset (d,), the bias of the layer that made the branch."""
    if branch is not None:
        x = x + (branch if offset is None else branch + offset.to(branch.dtype))
    return x, F.layer_norm(x, weight.shape, weight, bias, eps)


def fused_add_layer_norm(
    x: Tensor, branch: Tensor | None, offset: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`plain_add_layer_norm` as kernels. The gradients of sum and norm are added where they are written."""
    return FusedAddLayerNorm.apply(x, branch, offset, weight, bias, eps, compute_dtype(x))


class FusedAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, offset: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        total = x if branch is None else torch.empty_like(x)
        y = torch.empty_like(x, dtype=dtype)
        rows, sizes = _sizes(x)
        programs = -(-rows // sizes["ROWS"])
        branch, offset = (None, None) if branch is None else (branch.contiguous(), offset)  # no branch: the offset is not used
        adds = {"BRANCH": branch is not None, "OFFSET": offset is not None}
        launch(_norm_forward, programs, x, x, branch, offset, weight, bias, total, y, rows, eps, **sizes, **adds)

        def write(y: Tensor) -> None:
            launch(
                _norm_forward, programs, total, total, None, None, weight, bias, total, y, rows, eps, **sizes, BRANCH=False, OFFSET=False
            )

        remember(y, write)
        ctx.save_for_backward(total, weight, bias, offset)
        ctx.eps, ctx.of_branch = eps, branch is not None
        return total, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, offset = ctx.saved_tensors
        rows, sizes = _sizes(total)
        assert grad is not None, "a normalised value that nothing uses"
        steps = power_of_two(-(-rows // (sizes["ROWS"] * _programs(total))))
        programs = -(-rows // (sizes["ROWS"] * steps))
        sums = total.new_empty((2 + (offset is not None), programs, total.shape[-1]), dtype=torch.float32)
        dx = torch.empty_like(total)
        of_total = None if of_total is None else of_total.contiguous()
        launch(
            _norm_backward, programs, total, total, weight, grad.contiguous(), of_total, dx, *sums, *[None] * (offset is None),
            rows, ctx.eps, **sizes, STEPS=steps, RESIDUAL=of_total is not None, OFFSET=offset is not None,
        )  # fmt: skip
        of_weight, of_bias, *of_offset = sums.sum(1)
        return (
            dx,
            dx if ctx.of_branch else None,
            of_offset[0].to(offset.dtype) if of_offset else None,
            of_weight.to(weight.dtype),
            of_bias.to(bias.dtype),
            None,
            None,
        )


def _sizes(x: Tensor) -> tuple[int, dict[str, int]]:
    """Rows, and how many of them a program takes at a time: some 2,048 numbers."""
    d = x.shape[-1]
    block = power_of_two(d)
    return x.numel() // d, {"D": d, "ROWS": max(1, TILE // block), "BLOCK": block, "num_warps": WARPS}


def _programs(x: Tensor) -> int:
    """How many sum the weights' gradients at once, at most."""
    return PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2


if triton is not None:

    @triton.jit
    def _normalised(X, exists, D, eps):
        mean = tl.sum(X, 1) / D
        away = tl.where(exists, X - mean[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(away * away, 1) / D + eps)
        return away * inverse[:, None], inverse

    @triton.jit
    def _norm_forward(
        x, branch, offset, weight, bias, total, y, rows, eps,
        D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, OFFSET: tl.constexpr,
    ):  # fmt: skip
        r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        c = tl.arange(0, BLOCK)
        exists = (r < rows)[:, None] & (c < D)[None, :]
        at = r.to(tl.int64)[:, None] * D + c[None, :]
        X = tl.load(x + at, exists, 0.0).to(tl.float32)
        if BRANCH:
            X += tl.load(branch + at, exists, 0.0).to(tl.float32)
            if OFFSET:
                X += tl.load(offset + c, c < D, 0.0).to(tl.float32)[None, :]
            rounded = X.to(total.dtype.element_ty)
            tl.store(total + at, rounded, exists)
            X = rounded.to(tl.float32)  # what the backward pass will read
        hat, inverse = _normalised(X, exists, D, eps)
        w, b = tl.load(weight + c, c < D, 0.0).to(tl.float32), tl.load(bias + c, c < D, 0.0).to(tl.float32)
        tl.store(y + at, (hat * w[None, :] + b[None, :]).to(y.dtype.element_ty), exists)

    @triton.jit
    def _norm_backward(
        total, weight, grad, residual, dx, of_weight, of_bias, of_offset, rows, eps,
        D: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, OFFSET: tl.constexpr,
    ):  # fmt: skip
        i = tl.program_id(0)
        c = tl.arange(0, BLOCK)
        w = tl.load(weight + c, c < D, 0.0).to(tl.float32)
        # by row of a tile, joined at the end: joining them step by step would make threads wait
        sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
        sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
        sum_offset = tl.zeros((ROWS, BLOCK), tl.float32)
        for step in range(0, STEPS):
            r = (i * STEPS + step) * ROWS + tl.arange(0, ROWS)
            exists = (r < rows)[:, None] & (c < D)[None, :]
            at = r.to(tl.int64)[:, None] * D + c[None, :]
            X = tl.load(total + at, exists, 0.0).to(tl.float32)
            G = tl.load(grad + at, exists, 0.0).to(tl.float32)
            hat, inverse = _normalised(X, exists, D, eps)
            sum_weight += G * hat
            sum_bias += G
            G = G * w[None, :]
            DX = inverse[:, None] * (G - (tl.sum(G, 1) / D)[:, None] - hat * (tl.sum(G * hat, 1) / D)[:, None])
            if RESIDUAL:
                DX += tl.load(residual + at, exists, 0.0).to(tl.float32)
            if OFFSET:
                sum_offset += tl.where(exists, DX, 0.0)
            tl.store(dx + at, DX.to(dx.dtype.element_ty), exists)
        tl.store(of_weight + i * D + c, tl.sum(sum_weight, 0), c < D)
        tl.store(of_bias + i * D + c, tl.sum(sum_bias, 0), c < D)
        if OFFSET:
            tl.store(of_offset + i * D + c, tl.sum(sum_offset, 0), c < D)

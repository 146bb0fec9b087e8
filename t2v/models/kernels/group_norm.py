"""Group normalisation of channels-last tokens with what stands around it: a shift before it, SiLU and dropout after it.

Two passes over the input forward (statistics, result), two backward (sums, result), and nothing but the input is kept. torch's own kernel
reads channels-last memory slowly, and every neighbour would be one more pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.models.kernels import compute_dtype, launch, power_of_two, remember, width_of_tile

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None
    _moments = _statistics = _result = _sums = _along = _gradient = None


ROWS, BLOCK, WARPS = 16, 64, 4  # a tile: positions, channels; and who works on it
CHUNKS, MAX_CHUNKS, PROGRAMS = (256, 64), 256, 1024  # positions of a program; chunks of a sample; programs that keep a GPU busy
TALL, OF_A_WARP = 256, 4096  # positions of a tile whose statistics are taken; numbers of it that a warp takes


def plain_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """dropout(silu(group_norm(x + shift))) of (n s c): statistics over s and the channels of a group; shift (m c), each for n / m samples.

    The mask of the dropout is a function of `seed` (2,) and the place alone, so that the backward pass makes it again.
    """
    if shift is not None:
        x = (x.unflatten(0, (len(shift), -1)) + shift[:, None, None]).flatten(0, 1)
    y = F.group_norm(x.transpose(1, 2), groups, weight, bias, eps).transpose(1, 2)
    y = F.silu(y) if silu else y
    if dropout > 0:
        assert seed is not None
        y = y * keep_mask(y.numel(), dropout, seed).view(y.shape) / (1 - dropout)
    return y


def keep_mask(size: int, dropout: float, seed: Tensor) -> Tensor:
    """(size,) bool: which places survive. A counter-based hash of (place, seed), as in the kernel; 32-bit arithmetic in int64."""
    place = torch.arange(size, dtype=torch.int64, device=seed.device)
    first, second = (int(number) & 0xFFFFFFFF for number in seed.tolist())
    return ((_mixed(place ^ first) + second) & 0xFFFFFFFF) >= threshold(dropout)


def _mixed(x: Tensor) -> Tensor:
    """An invertible mixing of 32 bits: two rounds of xor-shift and multiplication."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def threshold(dropout: float) -> int:
    return min(2**32 - 1, round(dropout * 2**32))


def fused_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    silu: bool = False,
    shift: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`plain_group_norm` as kernels: (y, x). Whoever needs the input again (a residual) takes the returned x: then its gradient is added
    where this layer's own is written, instead of in a pass of its own."""
    return FusedGroupNorm.apply(x, weight, bias, shift, seed, groups, eps, silu, dropout, compute_dtype(x))


def plain_group_norm_taps(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, frames: int, *, silu: bool = False, shift: Tensor | None = None
) -> Tensor:
    """`plain_group_norm` of clips (n (frames p) c), each position beside its own in the frames before and after: (n s 3 c), 0 outside."""
    y = plain_group_norm(x, weight, bias, groups, eps, silu=silu, shift=shift)
    pixels = y.shape[1] // frames
    before, after = F.pad(y, (0, 0, pixels, 0))[:, :-pixels], F.pad(y, (0, 0, 0, pixels))[:, pixels:]
    return torch.stack([before, y, after], 2)


def fused_group_norm_taps(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, frames: int, *, silu: bool = False, shift: Tensor | None = None
) -> Tensor:
    """`plain_group_norm_taps` as kernels, without gradients: a convolution along the frames is then one matrix product."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:2], 3, x.shape[2]), dtype=compute_dtype(x))
    normalisation = _Normalisation(x, shift, weight, bias, None, groups, eps, silu, 0.0, pixels=x.shape[1] // frames)
    normalisation.write(y)
    return y


class _Normalisation:
    """The forward pass over x (n s c): statistics, and `write`, which can be called again. With `pixels` of a frame it writes taps."""

    def __init__(
        self,
        x: Tensor,
        shift: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        seed: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        dropout: float,
        pixels: int = 0,
    ) -> None:
        n, _, c = x.shape
        self.sizes = sizes = _Sizes(x, groups)
        self.shift = None if shift is None else shift.contiguous()
        self.mean, self.inverse = (x.new_empty((n, groups), dtype=torch.float32) for _ in range(2))
        self.tensors = x, self.shift, weight, bias, self.mean, self.inverse, seed
        self.shifted = sizes.shifted(self.shift)
        self.options = {**self.shifted, **_after(silu, dropout), "pixels": pixels, "TAPS": pixels > 0}
        means, squares = (x.new_empty((n * sizes.chunks, c), dtype=torch.float32) for _ in range(2))
        launch(_moments, sizes.programs, x, x, self.shift, means, squares, **sizes.tall, **self.shifted)
        launch(_statistics, n * groups, x, means, squares, self.mean, self.inverse, eps, **sizes.grouped)

    def write(self, y: Tensor) -> None:
        launch(_result, self.sizes.programs, y, *self.tensors, y, **self.sizes.common, **self.options)


class FusedGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        seed: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
        dropout: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        x = x.contiguous()
        y = torch.empty_like(x, dtype=dtype)
        normalisation = _Normalisation(x, shift, weight, bias, seed, groups, eps, silu, dropout)
        normalisation.write(y)
        remember(y, normalisation.write)
        ctx.save_for_backward(*normalisation.tensors)
        ctx.settings = normalisation.sizes, silu, dropout
        return y, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        x, shift, weight, bias, mean, inverse, seed = ctx.saved_tensors
        sizes, silu, dropout = ctx.settings
        if grad is None:
            return residual, *[None] * 9
        grad = grad.contiguous()
        residual = None if residual is None else residual.contiguous()
        n, _, c = x.shape
        sums = x.new_empty((2, n * sizes.chunks, c), dtype=torch.float32)  # of the gradient before scale and offset, and that times x^
        along = x.new_empty((2, n, sizes.groups), dtype=torch.float32)
        of_shift = x.new_empty((n * sizes.chunks, c), dtype=torch.float32) if shift is not None else None
        dx = torch.empty_like(x)
        options = {**sizes.common, **sizes.shifted(shift), **_after(silu, dropout)}
        launch(_sums, sizes.programs, x, x, shift, weight, bias, mean, inverse, seed, grad, sums[0], sums[1], **options)
        launch(_along, n * sizes.groups, x, sums[0], sums[1], weight, along[0], along[1], **sizes.grouped)
        launch(
            _gradient, sizes.programs, x, x, shift, weight, bias, mean, inverse, seed, grad, along[0], along[1], residual, dx, of_shift,
            **options, RESIDUAL=residual is not None,
        )  # fmt: skip
        of_bias, of_weight = sums.sum(1)
        if of_shift is not None:
            of_shift = of_shift.view(len(shift), -1, c).sum(1).to(shift.dtype)
        return dx, of_weight.to(weight.dtype), of_bias.to(bias.dtype), of_shift, *[None] * 6


class _Sizes:
    """How (n s c) is divided between programs: each takes BLOCK channels of `chunk` positions of a sample, ROWS positions at a time."""

    def __init__(self, x: Tensor, groups: int):
        n, s, c = x.shape
        block = width_of_tile(c, BLOCK, 32, 16)
        blocks = -(-c // block)
        chunk = next((k for k in CHUNKS if n * blocks * -(-s // k) >= PROGRAMS), CHUNKS[-1])  # shorter programs rather than few
        while -(-s // chunk) > MAX_CHUNKS:
            chunk *= 2
        self.groups = groups
        self.chunks = -(-s // chunk)
        self.programs = n * self.chunks * blocks
        self.samples = n
        sizes = {"S": s, "C": c, "GROUPS": groups, "CHUNK": chunk, "chunks": self.chunks}
        whole = s % chunk == 0 and c % block == 0
        self.common = {**sizes, "blocks": blocks, "ROWS": ROWS, "BLOCK": block, "WHOLE": whole, "num_warps": WARPS}
        tall = min(chunk, TALL)
        self.tall = {**self.common, "ROWS": tall, "num_warps": max(1, tall * block // OF_A_WARP)}
        self.grouped = {**sizes, "CHUNKS": power_of_two(self.chunks), "WIDTH": power_of_two(c // groups)}

    def shifted(self, shift: Tensor | None) -> dict[str, Any]:
        return {"SHIFT": shift is not None, "per_shift": 1 if shift is None else self.samples // len(shift)}


def _after(silu: bool, dropout: float) -> dict[str, Any]:
    return {"SILU": silu, "DROPOUT": dropout > 0, "limit": threshold(dropout) - 2**31, "survivors": 1 / (1 - dropout)}


if triton is not None:
    # Sums over positions are kept for every row of a tile and joined once, at the end: joining them tile by tile would make threads wait.

    @triton.jit
    def _place(C, chunks, blocks, BLOCK: tl.constexpr):
        i = tl.program_id(0)  # neighbours take neighbouring channels of the same rows
        c = (i % blocks) * BLOCK + tl.arange(0, BLOCK)
        return i // (blocks * chunks), (i // blocks) % chunks, c, c < C

    @triton.jit
    def _rows(n, k, r, c, S, C, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
        """A tile's positions, whether its numbers exist (all of them where WHOLE: nothing is asked then), and where they lie."""
        s = k * CHUNK + r + tl.arange(0, ROWS)
        exists = tl.full((ROWS, BLOCK), True, tl.int1) if WHOLE else (s < S)[:, None] & (c < C)[None, :]
        return s, exists, (n.to(tl.int64) * S + s[:, None]) * C + c[None, :]

    @triton.jit
    def _shift(shift, n, c, in_c, C, per_shift, SHIFT: tl.constexpr):
        return tl.load(shift + (n // per_shift) * C + c, in_c, 0.0).to(tl.float32) if SHIFT else 0.0 * c

    @triton.jit(do_not_specialize=["chunks", "blocks", "per_shift"])
    def _moments(
        x, shift, means, squares, S, C, GROUPS, chunks, blocks, per_shift,
        CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, SHIFT: tl.constexpr,
    ):  # fmt: skip
        """Of each channel of a chunk: its mean, and the sum of squared distances from it. Both sums are of distances from the chunk's first
        position, so that they are taken at once; what cancels in the second is at most as many bits as the chunk's length has."""
        n, k, c, in_c = _place(C, chunks, blocks, BLOCK)
        first = tl.load(x + (n.to(tl.int64) * S + k * CHUNK) * C + c, in_c, 0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        squared = tl.zeros((BLOCK,), tl.float32)
        for r in range(0, CHUNK, ROWS):
            _, exists, at = _rows(n, k, r, c, S, C, CHUNK, ROWS, BLOCK, WHOLE)
            away = tl.where(exists, tl.load(x + at, exists, 0.0).to(tl.float32) - first[None, :], 0.0)
            total += tl.sum(away, 0)
            squared += tl.sum(away * away, 0)
        count = tl.minimum(S - k * CHUNK, CHUNK)
        mean = total / count
        at = (n * chunks + k) * C + c
        tl.store(means + at, mean + first + _shift(shift, n, c, in_c, C, per_shift, SHIFT), in_c)
        tl.store(squares + at, tl.maximum(squared - total * mean, 0.0), in_c)

    @triton.jit
    def _group(C, GROUPS, chunks, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
        i = tl.program_id(0)
        n, g = i // GROUPS, i % GROUPS
        width = C // GROUPS
        k, c = tl.arange(0, CHUNKS), tl.arange(0, WIDTH)
        exists = (k < chunks)[:, None] & (c < width)[None, :]
        return i, (n * chunks + k)[:, None] * C + (g * width + c)[None, :], exists, g * width + c, c < width, k, width

    @triton.jit(do_not_specialize=["chunks"])
    def _statistics(
        means, squares, mean, inverse, eps, S, C, GROUPS, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr
    ):  # fmt: skip
        i, at, exists, c, in_c, k, width = _group(C, GROUPS, chunks, CHUNKS, WIDTH)
        M, Q = tl.load(means + at, exists, 0.0), tl.load(squares + at, exists, 0.0)
        count = tl.where(exists, tl.minimum(tl.maximum(S - k * CHUNK, 0), CHUNK)[:, None].to(tl.float32), 0.0)
        total = S * 1.0 * width
        m = tl.sum(tl.sum(M * count, 1), 0) / total
        variance = tl.sum(tl.sum(Q + count * (M - m) * (M - m), 1), 0) / total
        tl.store(mean + i, m)
        tl.store(inverse + i, 1.0 / tl.sqrt(variance + eps))

    @triton.jit
    def _mix(h):
        h = (h ^ (h >> 16)) * 0x7FEB352D
        h = (h ^ (h >> 15)) * 0x846CA68B
        return h ^ (h >> 16)

    @triton.jit
    def _survive(Y, seed, at, limit, survivors):
        """Dropout: the value where the hash of (place, seed) is high enough."""
        first, second = tl.load(seed).to(tl.uint32, bitcast=True), tl.load(seed + 1).to(tl.uint32, bitcast=True)
        hashed = _mix(at.to(tl.uint32) ^ first) + second
        return tl.where((hashed ^ 0x80000000).to(tl.int32, bitcast=True) >= limit, Y * survivors, 0.0)

    @triton.jit
    def _channels(weight, bias, mean, inverse, n, c, in_c, C, GROUPS):
        """Of each channel: mean and inverse deviation of its group, scale and offset."""
        g = n * GROUPS + c // (C // GROUPS)
        m, i = tl.load(mean + g, in_c, 0.0), tl.load(inverse + g, in_c, 0.0)
        return m, i, tl.load(weight + c, in_c, 0.0).to(tl.float32), tl.load(bias + c, in_c, 0.0).to(tl.float32)

    @triton.jit(do_not_specialize=["chunks", "blocks", "per_shift", "limit"])
    def _result(
        x, shift, weight, bias, mean, inverse, seed, y, S, C, GROUPS, chunks, blocks, per_shift, pixels, limit, survivors,
        CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
        SHIFT: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr, TAPS: tl.constexpr,
    ):  # fmt: skip
        n, k, c, in_c = _place(C, chunks, blocks, BLOCK)
        m, i, w, b = _channels(weight, bias, mean, inverse, n, c, in_c, C, GROUPS)
        scale = i * w
        b -= (m - _shift(shift, n, c, in_c, C, per_shift, SHIFT)) * scale
        for r in range(0, CHUNK, ROWS):
            s, exists, at = _rows(n, k, r, c, S, C, CHUNK, ROWS, BLOCK, WHOLE)
            Y = tl.load(x + at, exists, 0.0).to(tl.float32) * scale[None, :] + b[None, :]
            if SILU:
                Y = Y / (1.0 + tl.exp(-Y))
            if DROPOUT:
                Y = _survive(Y, seed, at, limit, survivors)
            Y = Y.to(y.dtype.element_ty)
            if TAPS:  # (n s 3 c): also beside the frames before and after
                row, frame = (n.to(tl.int64) * S + s[:, None]) * (3 * C), pixels * (3 * C)
                before, same, after = c[None, :], (C + c)[None, :], (2 * C + c)[None, :]
                starts, ends = s < pixels, s >= S - pixels
                tl.store(y + row + same, Y, exists)
                tl.store(y + (row + frame) + before, Y, exists & ~ends[:, None])
                tl.store(y + (row - frame) + after, Y, exists & ~starts[:, None])
                tl.store(y + row + before, tl.zeros_like(Y), exists & starts[:, None])
                tl.store(y + row + after, tl.zeros_like(Y), exists & ends[:, None])
            else:
                tl.store(y + at, Y, exists)

    @triton.jit
    def _before(
        x, seed, grad, at, exists, m, i, w, b, limit, survivors, SILU: tl.constexpr, DROPOUT: tl.constexpr
    ):  # fmt: skip
        """x^ and the gradient of the normalised, scaled values, with dropout and SiLU undone."""
        hat = tl.where(exists, (tl.load(x + at, exists, 0.0).to(tl.float32) - m[None, :]) * i[None, :], 0.0)
        G = tl.load(grad + at, exists, 0.0).to(tl.float32)
        if DROPOUT:
            G = _survive(G, seed, at, limit, survivors)
        if SILU:
            z = hat * w[None, :] + b[None, :]
            sigmoid = tl.sigmoid(z)
            G = G * sigmoid * (1.0 + z * (1.0 - sigmoid))
        return hat, G

    @triton.jit(do_not_specialize=["chunks", "blocks", "per_shift", "limit"])
    def _sums(
        x, shift, weight, bias, mean, inverse, seed, grad, sums, sums_hat, S, C, GROUPS, chunks, blocks, per_shift, limit, survivors,
        CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
        SHIFT: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        n, k, c, in_c = _place(C, chunks, blocks, BLOCK)
        m, i, w, b = _channels(weight, bias, mean, inverse, n, c, in_c, C, GROUPS)
        m -= _shift(shift, n, c, in_c, C, per_shift, SHIFT)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        total_hat = tl.zeros((ROWS, BLOCK), tl.float32)
        for r in range(0, CHUNK, ROWS):
            s, exists, at = _rows(n, k, r, c, S, C, CHUNK, ROWS, BLOCK, WHOLE)
            hat, G = _before(x, seed, grad, at, exists, m, i, w, b, limit, survivors, SILU, DROPOUT)
            total += G
            total_hat += G * hat
        at = (n * chunks + k) * C + c
        tl.store(sums + at, tl.sum(total, 0), in_c)
        tl.store(sums_hat + at, tl.sum(total_hat, 0), in_c)

    @triton.jit(do_not_specialize=["chunks"])
    def _along(sums, sums_hat, weight, ones, hats, S, C, GROUPS, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
        """The gradient's part along the constant and along x^, which normalisation removes."""
        i, at, exists, c, in_c, k, width = _group(C, GROUPS, chunks, CHUNKS, WIDTH)
        w = tl.load(weight + c, in_c, 0.0).to(tl.float32)
        total = S * 1.0 * width
        tl.store(ones + i, tl.sum(tl.sum(tl.load(sums + at, exists, 0.0), 0) * w, 0) / total)
        tl.store(hats + i, tl.sum(tl.sum(tl.load(sums_hat + at, exists, 0.0), 0) * w, 0) / total)

    @triton.jit(do_not_specialize=["chunks", "blocks", "per_shift", "limit"])
    def _gradient(
        x, shift, weight, bias, mean, inverse, seed, grad, ones, hats, residual, dx, of_shift,
        S, C, GROUPS, chunks, blocks, per_shift, limit, survivors,
        CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
        SHIFT: tl.constexpr, SILU: tl.constexpr, DROPOUT: tl.constexpr,
        RESIDUAL: tl.constexpr,
    ):  # fmt: skip
        n, k, c, in_c = _place(C, chunks, blocks, BLOCK)
        m, i, w, b = _channels(weight, bias, mean, inverse, n, c, in_c, C, GROUPS)
        m -= _shift(shift, n, c, in_c, C, per_shift, SHIFT)
        g = n * GROUPS + c // (C // GROUPS)
        one, along_hat = tl.load(ones + g, in_c, 0.0), tl.load(hats + g, in_c, 0.0)
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for r in range(0, CHUNK, ROWS):
            s, exists, at = _rows(n, k, r, c, S, C, CHUNK, ROWS, BLOCK, WHOLE)
            hat, G = _before(x, seed, grad, at, exists, m, i, w, b, limit, survivors, SILU, DROPOUT)
            D = i[None, :] * (G * w[None, :] - one[None, :] - hat * along_hat[None, :])
            if SHIFT:
                total += tl.where(exists, D, 0.0)
            if RESIDUAL:
                D += tl.load(residual + at, exists, 0.0).to(tl.float32)
            tl.store(dx + at, D.to(dx.dtype.element_ty), exists)
        if SHIFT:
            tl.store(of_shift + (n * chunks + k) * C + c, tl.sum(total, 0), in_c)

"""The Triton kernels beside their plain twins in float64, by Triton's interpreter: the very code that a GPU compiles."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_unets import TWO_LEVELS, inputs, randomize
from torch import Tensor

from t2v.models.convolution import TemporalConv, TemporalConvBlock, channels_last
from t2v.models.kernels import Fusable, PlannedGPU, planned_gpu, recomputed
from t2v.models.kernels.geglu import fused_geglu, plain_geglu
from t2v.models.kernels.group_norm import fused_group_norm, fused_group_norm_taps, keep_mask, plain_group_norm, plain_group_norm_taps
from t2v.models.kernels.layer_norm import fused_add_layer_norm, plain_add_layer_norm
from t2v.models.kernels.residual import fused_residual_sum, plain_residual_sum
from t2v.models.kernels.temporal_attention import FusedTemporalAttention, PlainTemporalAttention
from t2v.models.unet import VideoUNet

pytest.importorskip("triton")
BOUND = 1e-5  # float32 against float64
BOUNDS = {torch.float32: BOUND, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # against float64


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def compare(fused: Callable[..., Any], plain: Callable[..., Any], *arguments: Tensor | None, dtype: torch.dtype = torch.float32) -> None:
    """Outputs, and the gradients of a random functional of all of them. Activations are of `dtype`, weights (1-d) of 32 bits."""
    torch.manual_seed(1)
    arguments = tuple(a if a is None or a.ndim < 3 else a.detach().to(dtype).requires_grad_() for a in arguments)
    found, expected = fused(*arguments), plain(*(None if a is None else a.double() for a in arguments))
    assert len(found) == len(expected)
    weights = [torch.randn(y.shape) for y in found]
    leaves = [a for a in arguments if a is not None]
    gradients = [
        torch.autograd.grad(sum((w * y).sum() for w, y in zip(weights, ys, strict=True)), leaves)  # type: ignore[arg-type]
        for ys in (found, expected)
    ]
    for a, b in (*zip(found, expected, strict=True), *zip(*gradients, strict=True)):
        assert (a - b).abs().max() <= BOUNDS[dtype] * max(1.0, b.abs().max())


@pytest.mark.parametrize(
    ("n", "s", "c", "groups", "silu", "shifts", "dropout"),
    [
        (2, 5, 32, 4, True, 0, 0.0),
        (4, 300, 48, 8, True, 2, 0.1),
        (3, 520, 20, 4, False, 0, 0.0),
        (2, 70, 40, 4, True, 1, 0.3),
        (2, 128, 64, 4, True, 2, 0.1),
        (2, 64, 200, 2, True, 1, 0.0),
    ],
)
def test_group_norm(n: int, s: int, c: int, groups: int, silu: bool, shifts: int, dropout: float) -> None:
    torch.manual_seed(0)
    seed = torch.tensor([123_456_789, -987_654_321], dtype=torch.int32)
    options: dict[str, Any] = {"silu": silu, "dropout": dropout, "seed": seed}

    def fused(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        return fused_group_norm(x, weight, bias, groups, 1e-5, shift=shift, **options)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
        return plain_group_norm(x, weight, bias, groups, 1e-5, shift=shift, **options), x

    x = (torch.randn(n, s, c) * 2 + 30).requires_grad_()  # a mean far from zero: squares of the values would lose it
    compare(fused, plain, x, randn(c), randn(c), randn(shifts, c) if shifts else None)


@pytest.mark.parametrize(("frames", "pixels", "c", "shifts"), [(5, 30, 48, 2), (2, 64, 64, 0), (16, 20, 20, 1)])
def test_group_norm_taps(frames: int, pixels: int, c: int, shifts: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, frames * pixels, c), torch.randn(c), torch.randn(c)
    shift = torch.randn(shifts, c) if shifts else None
    y = fused_group_norm_taps(x, weight, bias, 4, 1e-5, frames, silu=True, shift=shift)
    double = (a if a is None else a.double() for a in (x, weight, bias))
    expected = plain_group_norm_taps(*double, 4, 1e-5, frames, silu=True, shift=None if shift is None else shift.double())  # type: ignore[arg-type]
    assert y.shape == expected.shape == (2, frames * pixels, 3, c)
    assert (y - expected).abs().max() <= BOUND * expected.abs().max()


def test_the_masks_of_dropout_are_random() -> None:
    size, seed = 200_000, torch.tensor([1_234_567_890, -1_098_765_432], dtype=torch.int32)
    masks = [keep_mask(size, 0.1, s).double() for s in (seed, seed.flip(0), seed // 3)]
    for mask in masks:
        assert abs(mask.mean() - 0.9) < 4 * (0.09 / size) ** 0.5
        for lag in (1, 2, 3, 32, 320):
            assert abs(torch.corrcoef(torch.stack([mask[:-lag], mask[lag:]]))[0, 1]) < 5 / size**0.5
    assert torch.corrcoef(torch.stack(masks)).triu(1).abs().max() < 5 / size**0.5


@pytest.mark.parametrize(("d", "branch", "offset"), [(40, False, False), (40, True, True), (300, True, False)])
def test_layer_norm_of_a_sum(d: int, branch: bool, offset: bool) -> None:
    torch.manual_seed(0)
    arguments = randn(2, 37, d), randn(2, 37, d) if branch else None, randn(d) if offset else None, randn(d), randn(d)
    compare(lambda *a: fused_add_layer_norm(*a, 1e-5), lambda *a: plain_add_layer_norm(*a, 1e-5), *arguments)


def test_an_offset_without_a_branch_is_left_out_of_both_passes() -> None:
    x, offset, weight, bias = randn(2, 5, 40), randn(40), randn(40), randn(40)
    _, y = fused_add_layer_norm(x, None, offset, weight, bias, 1e-5)
    torch.testing.assert_close(y, plain_add_layer_norm(x, None, offset, weight, bias, 1e-5)[1])
    assert torch.autograd.grad(y.sum(), offset, allow_unused=True) == (None,)


def test_a_branch_of_another_shape_is_no_residual() -> None:
    with pytest.raises(AssertionError, match="4, 8"):
        fused_residual_sum(randn(4, 8), randn(1, 8), randn(8))


@pytest.mark.parametrize("d", [32, 50])
def test_geglu(d: int) -> None:
    torch.manual_seed(0)
    compare(lambda *a: (fused_geglu(*a),), lambda *a: (plain_geglu(*a),), randn(3, 50, 2 * d), randn(2 * d))


def test_residual_sum() -> None:
    torch.manual_seed(0)
    compare(lambda *a: (fused_residual_sum(*a),), lambda *a: (plain_residual_sum(*a),), randn(3, 100, 40), randn(3, 100, 40), randn(40))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """As on a GPU. Not temporal attention, whose 16-bit products Triton's interpreter gets wrong: t2v.benchmark what=parity does that."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"silu": True, "dropout": 0.1, "seed": torch.tensor([123, -987], dtype=torch.int32)}
    compare(
        lambda x, w, b, shift: fused_group_norm(x, w, b, 4, 1e-5, shift=shift, **options),
        lambda x, w, b, shift: (plain_group_norm(x, w, b, 4, 1e-5, shift=shift, **options), x),
        randn(2, 70, 40), randn(40), randn(40), randn(1, 40), dtype=dtype,
    )  # fmt: skip
    compare(
        lambda *a: fused_add_layer_norm(*a, 1e-5), lambda *a: plain_add_layer_norm(*a, 1e-5),
        randn(2, 37, 40), randn(2, 37, 40), randn(40), randn(40), randn(40), dtype=dtype,
    )  # fmt: skip
    compare(lambda *a: (fused_geglu(*a),), lambda *a: (plain_geglu(*a),), randn(3, 50, 64), randn(64), dtype=dtype)
    compare(
        lambda *a: (fused_residual_sum(*a),),
        lambda *a: (plain_residual_sum(*a),),
        randn(3, 99, 40),
        randn(3, 99, 40),
        randn(40),
        dtype=dtype,
    )


@pytest.mark.parametrize("f", [2, 16, 20])
def test_temporal_attention(f: int) -> None:
    torch.manual_seed(0)
    compare(lambda qkv: (FusedTemporalAttention.apply(qkv),), lambda qkv: (PlainTemporalAttention.apply(qkv),), randn(2, f, 3, 3, 2, 16))


def test_what_kernels_wrote_is_made_again_and_not_kept() -> None:
    torch.manual_seed(0)
    x, weight, bias, matrix = randn(2, 40, 32), randn(32), randn(32), randn(16, 16)
    seed = torch.tensor([5, 6], dtype=torch.int32)

    def gradients(again: bool) -> tuple[list[Tensor], bool]:
        with recomputed(again):
            y, _ = fused_group_norm(x, weight, bias, 4, 1e-5, silu=True, dropout=0.2, seed=seed)
            total, y = fused_add_layer_norm(y, None, None, weight, bias, 1e-5)
            y = fused_geglu(y, bias)
            z = y @ matrix
        storage = weakref.ref(y.untyped_storage())
        del y, total
        gc.collect()  # Triton's interpreter leaves cycles
        lives = storage() is not None
        return list(torch.autograd.grad(z.square().sum(), (x, weight, bias, matrix))), lives

    kept, lived = gradients(False)
    made_again, still_lived = gradients(True)
    assert lived
    assert not still_lived
    for a, b in zip(made_again, kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("laid_out", [True, False])
def test_temporal_convolutions_as_products(monkeypatch: pytest.MonkeyPatch, laid_out: bool) -> None:
    torch.manual_seed(0)
    block = TemporalConvBlock(32, num_convs=3, groups=4, dropout=0.0).eval()
    randomize(block)
    block.float()
    if laid_out:
        channels_last(block)
    x = torch.randn(2, 5, 3, 4, 32)
    expected = block.double()(x.double())
    block.float()
    monkeypatch.setattr(Fusable, "fused", lambda self, x: True)
    monkeypatch.setattr(TemporalConv, "forward", lambda self, x, with_bias: pytest.fail("a convolution"))
    with torch.no_grad():
        assert (block(x) - expected).abs().max() <= BOUND * expected.abs().max()
    # Gradients need the convolutions, and so do the hooks that find the first layer with a NaN, which a network in training has.
    for needs_convolutions in (lambda: block(x), lambda: torch.no_grad()(block.train())(x)):
        with pytest.raises(pytest.fail.Exception, match="a convolution"):
            needs_convolutions()


@pytest.mark.slow
@pytest.mark.parametrize("f", [1, 3])
def test_a_network_of_kernels_is_the_network(monkeypatch: pytest.MonkeyPatch, f: int) -> None:
    """Outputs and gradients of the way that a GPU takes, biases added by the next layer and all."""
    network = VideoUNet(**TWO_LEVELS, temporal_dropout=0.0)
    randomize(network)
    arguments = tuple(a.float() for a in inputs(2, f, 4, 4))
    y = network(*arguments)
    expected = torch.autograd.grad(y.square().sum(), list(network.parameters()))
    monkeypatch.setattr(Fusable, "fused", lambda self, x: self.fused_kernels)
    found = network(*arguments)
    assert (found - y).abs().max() <= BOUND * y.abs().max()
    with torch.no_grad():
        assert (network.eval()(*arguments) - y).abs().max() <= BOUND * y.abs().max()
    gradients = torch.autograd.grad(found.square().sum(), list(network.train().parameters()))
    for (name, _), a, b in zip(network.named_parameters(), gradients, expected, strict=True):
        assert (a - b).abs().max() <= 3e-4 * max(1e-2, b.abs().max()), name
    network.gradient_checkpointing = "elementwise"
    again = torch.autograd.grad(network(*arguments).square().sum(), list(network.parameters()))
    for a, b in zip(again, gradients, strict=True):
        assert torch.equal(a, b)


def test_a_network_without_kernels_has_none_anywhere() -> None:
    for allowed in (True, False):
        layers = [module for module in VideoUNet(**TWO_LEVELS, fused_kernels=allowed).modules() if isinstance(module, Fusable)]
        assert layers
        assert all(layer.fused_kernels is allowed for layer in layers)


def test_on_meta_the_planned_gpu_decides() -> None:
    with torch.device("meta"):
        network = VideoUNet(**TWO_LEVELS)
        arguments = tuple(a.float().to("meta") for a in inputs(2, 3, 4, 4))

    def kept() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.untyped_storage().nbytes()) or x, lambda x: x):
            network(*arguments).sum().backward()
        return sum(sizes)

    plain = kept()
    token = planned_gpu.set(PlannedGPU(autocast=None))
    try:
        assert kept() < 0.85 * plain  # parameters among them
        for module in network.modules():
            if isinstance(module, Fusable):
                module.fused_kernels = False
        assert kept() == plain
    finally:
        planned_gpu.reset(token)

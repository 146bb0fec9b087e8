from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F

from t2v.models.attention import GEGLU
from t2v.models.convolution import Downsample, GroupNorm, TemporalConv, TemporalConvBlock, Upsample, drop


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_rate_mean_and_independence(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(199, 1001, requires_grad=True)  # not a multiple of four
    y = drop(x, p)
    kept = (y != 0).double()
    assert abs(kept.mean() - (1 - p)) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    assert y.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-4)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    for shift in (1, 2, 3, 4):  # four numbers share a draw: neighbours must not be alike
        flat = kept.flatten()
        correlation = torch.corrcoef(torch.stack([flat[:-shift], flat[shift:]]))[0, 1]
        assert abs(correlation) < 5 / x.numel() ** 0.5
    torch.manual_seed(0)
    assert torch.equal(drop(x, p), y)


def test_geglu_by_halves_is_geglu() -> None:
    torch.manual_seed(0)
    layer = GEGLU(6, 10).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    value, gate = layer.proj(x).chunk(2, -1)
    torch.testing.assert_close(layer(x), value * F.gelu(gate), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("over_frames", [False, True])
def test_group_norm_counts_the_right_axes(over_frames: bool) -> None:
    x = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64) * 3 + 1
    y = GroupNorm(2, 8, over_frames=over_frames).double()(x).unflatten(-1, (2, 4))
    axes = (1, 2, 3, 5) if over_frames else (2, 3, 5)
    assert y.mean(axes).abs().max() < 1e-6
    assert (y.var(axes, correction=0) - 1).abs().max() < 1e-4


def test_temporal_convolution_is_conv3d_for_one_frame_and_many() -> None:
    layer = TemporalConv(6).double()
    for f in (1, 2, 5):
        x = torch.randn(2, f, 3, 4, 6, dtype=torch.float64)
        expected = F.conv3d(x.permute(0, 4, 1, 2, 3), layer.weight, layer.bias, padding=(1, 0, 0)).permute(0, 2, 3, 4, 1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_only_later_temporal_convolutions_drop() -> None:
    x = torch.randn(1, 3, 2, 2, 4)
    for num_convs, dropped in ((1, False), (2, True)):
        block = TemporalConvBlock(4, num_convs, groups=2, dropout=0.5)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
        assert torch.equal(block(x), block(x)) != dropped


@pytest.mark.parametrize("padding", [0, 1])
def test_downsampling_is_diffusers(padding: int) -> None:
    from diffusers.models.downsampling import Downsample2D

    ours, theirs = Downsample(4, padding), Downsample2D(4, use_conv=True, padding=padding, name="op")
    theirs.conv.load_state_dict(ours.conv.state_dict())
    x = torch.randn(2, 3, 8, 6, 4)
    expected = theirs(x.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(0, (2, 3))
    assert torch.allclose(ours(x), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (8, 9)])
def test_upsampling_repeats_and_is_cut_to_the_skip(size: tuple[int, int]) -> None:
    layer = Upsample(4).double()
    layer.conv.weight.data.zero_()
    layer.conv.weight.data[range(4), range(4), 1, 1] = 1.0
    layer.conv.bias.data.zero_()
    x = torch.randn(2, 3, 4, 5, 4, dtype=torch.float64)
    expected = F.interpolate(x.flatten(0, 1).permute(0, 3, 1, 2), size=size, mode="nearest").permute(0, 2, 3, 1).unflatten(0, (2, 3))
    torch.testing.assert_close(layer(x, size), expected, rtol=1e-12, atol=1e-12)


def test_the_network_compiles_without_a_graph_break() -> None:
    import torch._dynamo as dynamo
    from small_unets import TWO_LEVELS, inputs

    from t2v.models.unet import VideoUNet

    for f in (1, 3):
        dynamo.reset()
        unet = VideoUNet(**TWO_LEVELS)
        found = dynamo.explain(unet)(*inputs(1, f, 8, 8, dtype=torch.float32))
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_a_compiled_stage_is_the_same() -> None:
    """One stage with all kinds of layers; the whole network takes a CPU compiler minutes."""
    from small_unets import TWO_LEVELS, inputs, randomize

    from t2v.models.unet import VideoUNet

    stage = VideoUNet(**TWO_LEVELS, temporal_dropout=0.0).down_blocks[0]
    randomize(stage)
    _, _, text = inputs(1, 3, 8, 8, dtype=torch.float32)
    x, time = torch.randn(1, 3, 8, 8, 32), torch.randn(1, 128)
    expected, found = stage(x, time, text)[0], torch.compile(stage)(x, time, text)[0]
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    parameters = list(stage.parameters())
    ours = torch.autograd.grad(found.square().sum(), parameters)
    for a, b in zip(ours, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        assert (a - b).norm() <= 1e-4 * (1 + b.norm())


def test_parts_may_be_frozen() -> None:
    """Gradients of the norms alone: torch's own kernel crashes where the input needs none."""
    from small_unets import TWO_LEVELS, inputs

    from t2v.models.unet import VideoUNet

    unet = VideoUNet(**TWO_LEVELS)
    unet.conv_in.requires_grad_(False)
    unet(*inputs(1, 3, 8, 8, dtype=torch.float32)).square().sum().backward()
    assert unet.transformer_in.norm.weight.grad is not None
    y = unet(*inputs(2, 3, 8, 8, dtype=torch.float32))
    (gradient,) = torch.autograd.grad(y.square().sum(), [unet.conv_norm_out.weight])
    assert gradient.abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        unet(*inputs(1, 2, 8, 8, dtype=torch.float32)).float().square().sum().backward()

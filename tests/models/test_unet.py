from __future__ import annotations

import re

import pytest
import torch
from small_unets import FOUR_LEVELS, TWO_LEVELS, inputs, pair, randomize

from t2v.models.attention import TemporalTransformer
from t2v.models.convolution import TemporalConv
from t2v.models.names import is_temporal
from t2v.models.unet import VideoUNet

SHAPES = [(2, 1, 8, 8), (1, 5, 9, 7), (3, 5, 8, 12), (1, 16, 10, 14), (2, 16, 4, 4)]


def test_full_size_has_the_papers_parameters() -> None:
    with torch.device("meta"):
        unet = VideoUNet()
    state = unet.state_dict()
    count = lambda kind: sum(p.numel() for name, p in state.items() if kind in name)  # noqa: E731
    assert sum(p.numel() for p in unet.parameters()) == 1_411_233_860
    assert sum(p.numel() for name, p in state.items() if not is_temporal(name)) == 865_910_724
    assert (count("temp_convs"), count("temp_attentions"), count("transformer_in")) == (266_891_520, 272_850_880, 5_580_736)
    assert len(state) == 1480
    assert sum(is_temporal(name) for name in state) == 794


@pytest.mark.parametrize("config", [{}, TWO_LEVELS, FOUR_LEVELS, {**TWO_LEVELS, "layers_per_block": 3, "downsample_padding": 0}])
def test_names_and_shapes_are_diffusers(config: dict) -> None:
    from diffusers import UNet3DConditionModel

    with torch.device("meta"):
        ours, theirs = VideoUNet(**config), UNet3DConditionModel(**config)
    assert {n: v.shape for n, v in ours.state_dict().items()} == {n: v.shape for n, v in theirs.state_dict().items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("config", [TWO_LEVELS | {"mid_block_scale_factor": 2}, FOUR_LEVELS], ids=["two", "four"])
def test_equals_diffusers_in_double_precision_with_gradients(config: dict, shape: tuple[int, ...]) -> None:
    ours, theirs = pair(config)
    sample, timestep, text = inputs(*shape)
    sample.requires_grad_()
    text.requires_grad_()
    a, b = ours(sample, timestep, text), theirs(sample, timestep, text).sample
    assert 0.05 < b.std() < 20
    assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())
    names = [name for name, _ in ours.named_parameters()]
    upstream = torch.randn(b.shape, generator=torch.Generator().manual_seed(1), dtype=b.dtype)
    of_theirs = dict(theirs.named_parameters())
    grads_a = torch.autograd.grad(a, [sample, text, *ours.parameters()], upstream)
    grads_b = torch.autograd.grad(b, [sample, text, *(of_theirs[n] for n in names)], upstream)
    scale = max(g.abs().max() for g in grads_b)
    for name, x, y in zip(["sample", "text", *names], grads_a, grads_b, strict=True):
        assert (x - y).abs().max() <= 1e-11 * scale, name


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 1, 8, 8), (2, 3, 9, 7)])
@pytest.mark.parametrize("first", ["CrossAttnDownBlock3D", "DownBlock3D"])
def test_two_texts_for_each_clip_are_two_passes_with_gradients(first: str, shape: tuple[int, ...]) -> None:
    unet, _ = pair({**TWO_LEVELS, "down_block_types": [first, "DownBlock3D"]})
    sample, timestep, text = inputs(*shape)
    both = torch.cat([text, text.flip(1)])
    upstream = torch.randn(len(both), *sample.shape[1:], generator=torch.Generator().manual_seed(1), dtype=sample.dtype)
    apart = unet(torch.cat([sample, sample]), torch.cat([timestep, timestep]), both)
    rows: list[int] = []
    unet.conv_in.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    together = unet(sample, timestep, both)
    assert rows == [len(sample)]  # the clips alone
    assert (together - apart).abs().max() <= 1e-12 * apart.abs().max()
    parameters = list(unet.parameters())
    grads = [torch.autograd.grad(x, parameters, upstream) for x in (apart, together)]
    scale = max(g.abs().max() for g in grads[0])
    assert all((x - y).abs().max() <= 1e-11 * scale for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_diffusers_in_single_precision(shape: tuple[int, ...]) -> None:
    ours, theirs = pair(TWO_LEVELS, torch.float32)
    args = inputs(*shape, dtype=torch.float32)
    with torch.no_grad():
        a, b = ours(*args), theirs(*args).sample
    assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


@pytest.mark.parametrize("which", ["attention", "all"])
def test_checkpointing_changes_neither_output_nor_gradients_and_keeps_dropout(which: str) -> None:
    torch.manual_seed(0)
    unet = VideoUNet(**TWO_LEVELS, temporal_dropout=0.3, spatial_dropout=0.2).double()
    randomize(unet)
    results = []
    for mode in ("none", which):
        unet.gradient_checkpointing = mode
        torch.manual_seed(5)
        y = unet(*inputs(2, 3, 8, 8))
        results.append((y, *torch.autograd.grad(y.square().sum(), list(unet.parameters()))))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_checkpointing_keeps_fewer_tensors() -> None:
    kept = {}
    for mode in ("none", "attention", "all"):
        unet = VideoUNet(**TWO_LEVELS, gradient_checkpointing=mode)
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.__setitem__(x.data_ptr(), x.numel()) or x, lambda x: x):
            unet(*inputs(1, 4, 8, 8, dtype=torch.float32))
        kept[mode] = sum(sizes.values())
    assert kept["all"] < kept["attention"] < kept["none"]


def test_one_frame_leaves_no_gradient_none_and_outer_taps_zero() -> None:
    unet, _ = pair(TWO_LEVELS)
    unet(*inputs(2, 1, 8, 8)).square().sum().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None] == []
    for module in unet.modules():
        if isinstance(module, TemporalConv):
            assert module.weight.grad[:, :, 0].abs().max() == module.weight.grad[:, :, 2].abs().max() == 0
            assert module.weight.grad[:, :, 1].abs().max() > 0


def test_zero_outputs_survive_materialisation_in_any_order() -> None:
    """Building on meta, then to_empty, then reset_parameters module by module, parents first or last."""
    for order in (1, -1):
        with torch.device("meta"):
            unet = VideoUNet(**FOUR_LEVELS)
        unet.to_empty(device="cpu")
        for parameter in unet.parameters():
            torch.nn.init.constant_(parameter, 7.0)
        for module in list(unet.modules())[::order]:
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()
        zero = {name.rsplit(".", 1)[0] for name, p in unet.named_parameters() if name.endswith("weight") and not p.any()}
        biases = {name.rsplit(".", 1)[0] for name, p in unet.named_parameters() if name.endswith("proj_out.bias") and not p.any()}
        assert len(zero) == 39
        assert biases == {name for name in zero if "proj_out" in name}
        assert not any((p == 7).all() for p in unet.parameters())


def test_images_and_videos_of_any_length_share_the_weights() -> None:
    unet, _ = pair(TWO_LEVELS)
    assert [tuple(unet(*inputs(1, f, 8, 8)).shape) for f in (1, 2, 7)] == [(1, 4, f, 8, 8) for f in (1, 2, 7)]


def test_extras_leave_modules_out_and_keep_the_rest_named() -> None:
    full = set(VideoUNet(**TWO_LEVELS).state_dict())
    without = set(VideoUNet(**TWO_LEVELS, num_temporal_convs=0, num_temporal_attentions=0).state_dict())
    assert without == {name for name in full if not is_temporal(name)}
    fewer = set(VideoUNet(**TWO_LEVELS, num_temporal_convs=2, num_temporal_attentions=1).state_dict())
    assert fewer < full
    assert not any("conv3" in n and "temp_convs" in n for n in fewer)
    assert any("temp_attentions.0.transformer_blocks.0.norm3" in n for n in fewer)
    more = VideoUNet(**TWO_LEVELS, num_temporal_convs=5, num_temporal_attentions=3)
    assert full < set(more.state_dict())
    assert more(*inputs(1, 3, 8, 8, dtype=torch.float32)).shape == (1, 4, 3, 8, 8)


def test_order_of_frames_matters_only_through_temporal_convolutions_and_positions() -> None:
    sample, timestep, text = inputs(1, 4, 8, 8)
    for extras, ordered in (
        ({"num_temporal_convs": 0}, False),
        ({"num_temporal_convs": 0, "temporal_positions": "sinusoidal"}, True),
        ({}, True),
    ):
        unet = VideoUNet(**TWO_LEVELS, temporal_dropout=0.0, **extras).double()
        randomize(unet)
        for order in ([3, 2, 1, 0], [1, 0, 2, 3], [0, 2, 1, 3]):
            difference = (unet(sample[:, :, order], timestep, text) - unet(sample, timestep, text)[:, :, order]).abs().max()
            assert (difference > 1e-3) == ordered, (extras, order, difference)


def test_dropout_is_where_it_is_asked_for() -> None:
    args = inputs(1, 3, 8, 8)
    for extras, varies in (
        ({"temporal_dropout": 0.0}, False),
        ({"temporal_dropout": 0.1}, True),
        ({"temporal_dropout": 0, "spatial_dropout": 0.1}, True),
    ):
        unet = VideoUNet(**TWO_LEVELS, **extras).double()
        randomize(unet)
        assert (not torch.equal(unet(*args), unet(*args))) == varies
        unet.eval()
        assert torch.equal(unet(*args), unet(*args))


def test_scalar_timesteps_count_for_all() -> None:
    unet, _ = pair(TWO_LEVELS)
    sample, _, text = inputs(2, 2, 8, 8)
    expected = unet(sample, torch.tensor([17, 17]), text)
    for timestep in (17, torch.tensor(17), torch.tensor([17])):
        assert torch.equal(unet(sample, timestep, text), expected)


def test_more_sequences_than_a_cuda_grid_are_cut_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import t2v.models.attention as attention

    unet, _ = pair(TWO_LEVELS)
    args = inputs(2, 3, 8, 8)
    whole = unet(*args)
    monkeypatch.setattr(attention, "MAX_GRID", 100)  # 64 pixels x 8 heads: several parts
    torch.testing.assert_close(unet(*args), whole, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_batch_of_256_images_runs() -> None:
    unet = VideoUNet(**TWO_LEVELS)
    sample, timestep, text = inputs(256, 1, 32, 32, dtype=torch.float32)  # 262,144 temporal sequences
    with torch.no_grad():
        assert unet(sample, timestep, text).shape == (256, 4, 1, 32, 32)


def test_config_is_plain_and_rebuilds_the_network() -> None:
    import json

    unet = VideoUNet(**TWO_LEVELS, num_temporal_convs=1)
    again = VideoUNet(**json.loads(json.dumps(unet.config)))
    assert again.config == unet.config
    assert set(again.state_dict()) == set(unet.state_dict())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_head_dim": 24}, "block_out_channels[0]=32 is not a multiple of attention_head_dim=24"),
        ({"norm_num_groups": 12}, "block_out_channels[0]=32 is not a multiple of norm_num_groups=12"),
        ({"block_out_channels": (32, 64, 64)}, "equally long, not 3, 2 and 2"),
        ({"down_block_types": ("DownBlock3D", "Foo")}, "unknown block type 'Foo'"),
        ({"act_fn": "gelu"}, "act_fn='gelu' is not supported: the released model and SD 2.1 use 'silu'"),
        ({"attention_backend": "flash9"}, "attention_backend='flash9' is not one of sdpa"),
        ({"temporal_positions": "rotary"}, "temporal_positions='rotary' is neither None nor 'sinusoidal'"),
        ({"num_temporal_convs": -1}, "num_temporal_convs=-1 must be at least 0"),
        ({"temporal_dropout": 1.5}, "temporal_dropout=1.5 must lie in [0, 1)"),
        ({"gradient_checkpointing": "some"}, "gradient_checkpointing='some' is not one of none, elementwise, attention, all"),
        ({"num_attention_heads": 8}, "use attention_head_dim for the heads"),
        ({"cross_attention_dim": 0}, "cross_attention_dim=0 must be at least 1"),
    ],
)
def test_bad_structures_are_refused_with_both_numbers(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)), torch.device("meta"):
        VideoUNet(**{**TWO_LEVELS, **changes})


def test_bad_inputs_are_refused_with_both_numbers() -> None:
    unet = VideoUNet(**TWO_LEVELS)
    sample, timestep, text = inputs(2, 2, 8, 8, dtype=torch.float32)
    for args, words in (
        ((sample[:, :3], timestep, text), "sample must be (b 4 f h w), but its shape is (2, 3, 2, 8, 8)"),
        ((sample[:, :, :0], timestep, text), "sample has shape (2, 4, 0, 8, 8): a video needs at least 1 frame"),
        ((sample, timestep, text[..., :10]), "must be (b n 24), cross_attention_dim=24, but its shape is (2, 7, 10)"),
        ((sample, timestep, text[:1]), "1 texts for 2 videos"),
        ((sample, timestep, torch.cat([text, text[:1]])), "3 texts for 2 videos"),
        ((sample, timestep, text[:0]), "0 texts for 2 videos"),
        ((sample[0], timestep, text), "sample must be (b 4 f h w), but its shape is (4, 2, 8, 8)"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            unet(*args)


def test_temporal_projections_are_the_only_zero_linears() -> None:
    unet = VideoUNet(**TWO_LEVELS)
    zero = [name for name, p in unet.named_parameters() if p.ndim > 1 and not p.any()]
    owners = sum(isinstance(m, TemporalTransformer) for m in unet.modules()) + sum(getattr(m, "zero", False) for m in unet.modules())
    assert all(is_temporal(name) for name in zero)
    assert len(zero) == owners

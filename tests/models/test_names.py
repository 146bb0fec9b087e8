from __future__ import annotations

from typing import Any

import pytest
import torch
from small_unets import FOUR_LEVELS, TWO_LEVELS, randomize
from torch import Tensor, nn

from t2v.models.autoencoder import SD_CONFIG, empty_autoencoder
from t2v.models.names import (
    autoencoder_state,
    hugging_face_text_state,
    is_temporal,
    ldm_autoencoder_state,
    modelscope_unet_state,
    text_tower_state,
    unet_names,
    unet_state,
)
from t2v.models.text_encoder import TextEncoder
from t2v.models.unet import VideoUNet


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].shape == b[name].shape for name in a)


def test_full_size_names_are_modelscopes() -> None:
    """Spot checks against the released file's names (`text2video_pytorch_model.pth`), and that they are 1480 different ones."""
    with torch.device("meta"):
        names = unet_names(VideoUNet().state_dict(), modelscope=True)
    assert len(set(names.values())) == 1480
    for ours, theirs in {
        "conv_in.weight": "input_blocks.0.0.weight",
        "transformer_in.proj_in.weight": "input_blocks.0.1.proj_in.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.1.time_emb_proj.weight": "input_blocks.2.0.emb_layers.1.weight",
        "down_blocks.0.temp_convs.0.conv4.3.bias": "input_blocks.1.0.temopral_conv.conv4.3.bias",
        "down_blocks.1.downsamplers.0.conv.weight": "input_blocks.6.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.2.attentions.0.proj_in.weight": "input_blocks.7.1.proj_in.weight",
        "down_blocks.2.temp_attentions.1.norm.bias": "input_blocks.8.2.norm.bias",
        "down_blocks.3.resnets.1.norm1.weight": "input_blocks.11.0.in_layers.0.weight",
        "mid_block.temp_attentions.0.proj_out.weight": "middle_block.2.proj_out.weight",
        "mid_block.resnets.1.conv2.bias": "middle_block.3.out_layers.3.bias",
        "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
        "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.3.conv.weight",
        "up_blocks.3.resnets.2.norm2.bias": "output_blocks.11.0.out_layers.0.bias",
        "conv_norm_out.weight": "out.0.weight",
        "conv_out.bias": "out.2.bias",
    }.items():
        assert names[ours] == theirs


def test_single_file_names_of_stable_diffusion_are_shifted_in_two_places() -> None:
    with torch.device("meta"):
        names = unet_names(VideoUNet().state_dict(), modelscope=False)
    assert len(set(names.values())) == 686
    assert names["mid_block.resnets.1.norm1.weight"] == "middle_block.2.in_layers.0.weight"
    assert names["down_blocks.0.downsamplers.0.conv.bias"] == "input_blocks.3.0.op.bias"
    assert names["up_blocks.0.upsamplers.0.conv.bias"] == "output_blocks.2.1.conv.bias"
    assert names["up_blocks.2.upsamplers.0.conv.bias"] == "output_blocks.8.2.conv.bias"


@pytest.mark.parametrize("config", [TWO_LEVELS, FOUR_LEVELS], ids=["two", "four"])
def test_modelscope_and_diffusers_round_trips_are_bit_for_bit(config: dict[str, Any]) -> None:
    unet = VideoUNet(**config)
    randomize(unet)
    ours, shapes = dict(unet.state_dict()), shapes_of(unet)
    theirs = modelscope_unet_state(ours)
    assert theirs["input_blocks.0.1.proj_in.weight"].ndim == 3  # Conv1d
    assert same(unet_state(theirs, shapes), ours)
    assert same(modelscope_unet_state(unet_state(theirs, shapes)), theirs)
    assert same(unet_state(ours, shapes), ours)


def test_missing_unknown_and_misshapen_weights_are_listed() -> None:
    unet = VideoUNet(**TWO_LEVELS)
    ours, shapes = dict(unet.state_dict()), shapes_of(unet)
    with pytest.raises(ValueError, match=r"1 of \d+ are missing \(conv_out\.bias\)"):
        unet_state({n: v for n, v in ours.items() if n != "conv_out.bias"}, shapes)
    with pytest.raises(ValueError, match=r"1 are unknown \(lora.weight\)"):
        unet_state({**ours, "lora.weight": torch.zeros(1)}, shapes)
    with pytest.raises(ValueError, match=r"conv_out.bias has shape \(3,\), the network needs \(4,\)"):
        unet_state({**ours, "conv_out.bias": torch.zeros(3)}, shapes)
    spatial = {n: v for n, v in ours.items() if not is_temporal(n)}
    unet_state(spatial, shapes, spatial_only=True)
    with pytest.raises(ValueError, match="unknown"):
        unet_state(ours, shapes, spatial_only=True)  # temporal weights do not belong in Stable Diffusion's file
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        unet_state({n: v for n, v in spatial.items() if n != "conv_in.weight"}, shapes, spatial_only=True)


def test_autoencoder_names_go_both_ways_and_all_former_ones_are_read() -> None:
    model = empty_autoencoder({**SD_CONFIG, "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4}).to_empty(device="cpu")
    randomize(model)
    ours, shapes = dict(model.state_dict()), shapes_of(model)
    theirs = ldm_autoencoder_state(ours)
    assert "decoder.up.3.block.0.conv1.weight" in theirs
    assert "encoder.down.1.block.0.nin_shortcut.weight" in theirs
    assert "encoder.down.2.downsample.conv.bias" in theirs
    assert theirs["decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert torch.equal(theirs["decoder.up.3.upsample.conv.weight"], ours["decoder.up_blocks.0.upsamplers.0.conv.weight"])
    assert same(autoencoder_state(theirs, shapes), ours)
    assert same(autoencoder_state({f"first_stage_model.{n}": v for n, v in theirs.items()} | {"model.x": torch.ones(1)}, shapes), ours)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in ours.items():
        for new, before in former.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = value
    assert old.keys() != ours.keys()
    assert same(autoencoder_state(old, shapes), ours)


def test_autoencoder_full_size_names_match_a_released_file() -> None:
    names = ldm_autoencoder_state({n: torch.empty(v.shape, device="meta") for n, v in empty_autoencoder(SD_CONFIG).state_dict().items()})
    assert len(names) == 248
    for name in (
        "encoder.down.0.block.1.norm2.weight",
        "encoder.norm_out.bias",
        "decoder.mid.block_2.conv1.weight",
        "decoder.up.0.block.2.conv2.bias",
    ):
        assert name in names


def test_text_tower_equals_transformers_with_one_layer_less_and_whole_clips_are_read() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = TextEncoder.random(width=64, layers=3, heads=1)
    state = dict(encoder.tower.state_dict())
    theirs = hugging_face_text_state(state)
    sizes = {"vocab_size": 49408, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1}
    model = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act="gelu", eos_token_id=49407))
    plain = theirs if set(theirs) & set(model.state_dict()) else {n.removeprefix("text_model."): v for n, v in theirs.items()}
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert not unexpected
    assert not [name for name in missing if "position_ids" not in name]
    prompts = ["a red circle", "two cats on a roof, in the rain"]
    with torch.no_grad():
        expected = model.eval()(encoder.tokenize(prompts)).last_hidden_state
    torch.testing.assert_close(encoder.encode(prompts), expected, rtol=1e-5, atol=2e-5)
    assert same(text_tower_state(theirs), state)
    last = {n.replace("resblocks.0.", "resblocks.2."): v for n, v in state.items() if "resblocks.0." in n}
    whole = {**state, **last, "visual.proj": torch.ones(1), "text_projection": torch.ones(64, 8), "logit_scale": torch.ones(())}
    assert same(text_tower_state(whole), state)
    assert same(text_tower_state({f"cond_stage_model.model.{n}": v for n, v in whole.items()}), state)
    with pytest.raises(ValueError, match="no CLIP text encoder"):
        text_tower_state({"a": torch.ones(1)})

"""init=spatial: spatial weights from a checkpoint, temporal outputs zero or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import tiny_card, tiny_unet

from t2v import checkpoint
from t2v.checkpoint import CheckpointError
from t2v.checkpoint.start import AllWeights, SpatialWeights
from t2v.models.names import is_temporal
from t2v.models.unet import VideoUNet


def fresh(**changes: object) -> VideoUNet:
    return VideoUNet(**{**tiny_unet().config, **changes})


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A model without temporal layers, as one trained on images."""
    unet = tiny_unet(seed=3, num_temporal_convs=0, num_temporal_attentions=0)
    checkpoint.write(tmp_path / "start", {"unet.safetensors": lambda path: checkpoint.save_weights(unet, path)}, tiny_card())
    return tmp_path / "start"


def frames_alone(unet: VideoUNet) -> bool:
    """Whether a frame's prediction is the same beside another frame."""
    sample, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 77, 32)
    both = unet.eval()(sample, torch.tensor([500]), text)
    return torch.allclose(both[:, :, :1], unet(sample[:, :, :1], torch.tensor([500]), text), atol=1e-5)


@torch.no_grad()
def test_a_model_of_images_starts_a_model_of_videos(start: Path) -> None:
    unet, images = fresh(), tiny_unet(seed=3, num_temporal_convs=0, num_temporal_attentions=0)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    SpatialWeights(start)(unet)
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name] if is_temporal(name) else images.state_dict()[name]), name
    sample, text = torch.randn(1, 4, 3, 8, 8), torch.randn(1, 77, 32)
    assert torch.allclose(unet.eval()(sample, 500, text), images(sample, 500, text), atol=1e-5)
    assert frames_alone(unet)


@torch.no_grad()
def test_without_the_zeros_frames_are_mixed_from_the_start(start: Path) -> None:
    unet = fresh()
    SpatialWeights(start, zero_temporal_outputs=False)(unet)
    assert all(value.any() for name, value in unet.state_dict().items() if name.endswith("proj_out.weight"))
    assert not frames_alone(unet)


def test_other_widths_are_refused(start: Path) -> None:
    with pytest.raises(CheckpointError, match="has other spatial layers"):
        SpatialWeights(start)(fresh(block_out_channels=[16, 32]))


def test_all_weights_of_the_same_network_or_none(start: Path) -> None:
    images = {"num_temporal_convs": 0, "num_temporal_attentions": 0}
    unet, trained = fresh(**images), tiny_unet(seed=3, **images)
    AllWeights(start)(unet)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in unet.state_dict().items())
    with pytest.raises(CheckpointError, match="has other layers"):
        AllWeights(start)(fresh())

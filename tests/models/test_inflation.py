"""Section 4.1.2: inflated from Stable Diffusion, the model gives its frames one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_unets import inputs, randomize

from t2v.models.inflation import FromRelease, FromStableDiffusion
from t2v.models.names import is_temporal, modelscope_unet_state, unet_names
from t2v.models.unet import VideoUNet

CONFIG: dict[str, Any] = {"block_out_channels": (16, 32, 32, 32), "attention_head_dim": 8, "norm_num_groups": 8, "cross_attention_dim": 24}


@pytest.fixture
def image_model() -> Any:
    """A random 2D UNet of Stable Diffusion 2.1's structure."""
    from diffusers import UNet2DConditionModel

    heads = [width // 8 for width in CONFIG["block_out_channels"]]
    model = UNet2DConditionModel(**{**CONFIG, "attention_head_dim": heads}, use_linear_projection=True, sample_size=8)
    randomize(model)
    return model.eval()


def inflated(place: Path) -> VideoUNet:
    unet = VideoUNet(**CONFIG)
    FromStableDiffusion(place)(unet)
    return unet.double().eval()


def frames_differ(unet: VideoUNet, image_model: Any) -> float:
    sample, timestep, text = inputs(2, 3, 8, 8)
    with torch.no_grad():
        video = unet(sample, timestep, text)
        frames = [image_model.double()(sample[:, :, f], timestep, text).sample for f in range(3)]
    assert frames[0].std() > 0.1
    return (video - torch.stack(frames, 2)).abs().max().item()


def test_frames_are_those_of_the_image_model(image_model: Any, tmp_path: Path) -> None:
    image_model.save_pretrained(tmp_path / "unet")
    unet = inflated(tmp_path)
    assert frames_differ(unet, image_model) <= 1e-12
    # The control: with one projection not zeroed, frames are no longer the image model's.
    torch.nn.init.normal_(unet.down_blocks[0].temp_attentions[0].proj_out.weight, std=0.05)
    assert frames_differ(unet, image_model) > 1e-3


def test_the_original_single_file_and_convolution_projections_load_the_same(image_model: Any, tmp_path: Path) -> None:
    image_model.save_pretrained(tmp_path / "folder" / "unet")
    state = image_model.state_dict()
    names = unet_names([n for n in VideoUNet(**CONFIG).state_dict() if not is_temporal(n)], modelscope=False)
    single = {f"model.diffusion_model.{names[n]}": v for n, v in state.items()}
    torch.save({"state_dict": single | {"first_stage_model.x": torch.ones(1)}, "global_step": 3}, tmp_path / "v2-1_512-ema-pruned.ckpt")
    convolved = {n: v[:, :, None, None] if ".attentions." in n and "proj_" in n and v.ndim == 2 else v for n, v in state.items()}
    save_file(convolved, tmp_path / "convolutions.safetensors")
    expected = inflated(tmp_path / "folder").state_dict()
    for place in (tmp_path / "v2-1_512-ema-pruned.ckpt", tmp_path, tmp_path / "convolutions.safetensors"):
        found = inflated(place).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in state)


def test_other_versions_are_refused_with_the_reason(image_model: Any, tmp_path: Path) -> None:
    image_model.save_pretrained(tmp_path / "unet")
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text(json.dumps({"prediction_type": "v_prediction"}))
    with pytest.raises(ValueError, match=r"v_prediction.*2\.1-base"):
        inflated(tmp_path)
    scheduler.write_text(json.dumps({"prediction_type": "epsilon"}))
    inflated(tmp_path)
    config = tmp_path / "unet" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "attention_head_dim": 8}))  # SD 1.x: 8 heads at every width; the shapes are the same
    with pytest.raises(ValueError, match=r"\[2, 4, 4, 4\] wide.*attention_head_dim is 8"):
        inflated(tmp_path)
    config.unlink()
    unet = VideoUNet(**{**CONFIG, "cross_attention_dim": 32})
    with pytest.raises(ValueError, match="width 24, the network 32"):
        FromStableDiffusion(tmp_path)(unet)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "v2-1_768-ema-pruned.safetensors")
    with pytest.raises(ValueError, match="768"):
        inflated(tmp_path / "v2-1_768-ema-pruned.safetensors")


def test_releases_of_both_formats_fill_the_network(tmp_path: Path) -> None:
    source = VideoUNet(**CONFIG)
    randomize(source)
    save_file(source.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "ms").mkdir()
    torch.save(modelscope_unet_state(source.state_dict()), tmp_path / "ms" / "text2video_pytorch_model.pth")
    for place in (tmp_path, tmp_path / "ms"):
        unet = VideoUNet(**CONFIG)
        FromRelease(place)(unet)
        assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), source.state_dict().values(), strict=True))


@pytest.mark.slow
def test_full_size_takes_all_686_tensors_of_stable_diffusion() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        image = UNet2DConditionModel(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
        video = VideoUNet()
    spatial = {n: v.shape for n, v in video.state_dict().items() if not is_temporal(n)}
    assert spatial == {n: v.shape for n, v in image.state_dict().items()}
    assert len(spatial) == 686

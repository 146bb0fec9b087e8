import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import save_file
from tiny_model import UNET, tiny_unet

from t2v import checkpoint
from t2v.models import names
from t2v.models.autoencoder import Autoencoder
from t2v.models.text_encoder import TextEncoder
from t2v.models.unet import EXTRAS, VideoUNet
from t2v.pipeline import TextToVideoPipeline

SMALL = {**UNET, "cross_attention_dim": 64, "norm_num_groups": 32}


@pytest.fixture(scope="module")
def unet() -> VideoUNet:
    return tiny_unet(3, **{key: value for key, value in SMALL.items() if key not in UNET or value != UNET[key]})


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 8, 8],
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).eval()


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    return TextEncoder.random(width=64, layers=3, heads=1)


def write_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture
def diffusers_folder(tmp_path: Path, unet: VideoUNet, autoencoder: AutoencoderKL, text_encoder: TextEncoder) -> Path:
    folder = tmp_path / "diffusers"
    config = {key: value for key, value in unet.config.items() if key not in EXTRAS}
    write_json(folder / "model_index.json", {"_class_name": "TextToVideoSDPipeline"})
    write_json(
        folder / "unet" / "config.json", {"_class_name": "UNet3DConditionModel", "_diffusers_version": "0.15.0", **config, "sample_size": 4}
    )
    save_file(unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.safetensors")
    write_json(folder / "scheduler" / "scheduler_config.json", {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.01})
    autoencoder.save_pretrained(folder / "vae")
    (folder / "text_encoder").mkdir()
    state = names.hugging_face_text_state(text_encoder.tower.state_dict())
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "text_encoder" / "model.safetensors")
    return folder


@pytest.fixture
def modelscope_folder(tmp_path: Path, unet: VideoUNet, autoencoder: AutoencoderKL, text_encoder: TextEncoder) -> Path:
    folder = tmp_path / "modelscope"
    options = {
        "unet_dim": 32, "unet_dim_mult": [1, 2], "unet_attn_scales": [1], "unet_res_blocks": 1, "unet_context_dim": 64, "unet_head_dim": 8,
        "unet_y_dim": 768, "unet_dropout": 0.1, "num_timesteps": 1000, "mean_type": "eps",
    }  # fmt: skip
    write_json(folder / "configuration.json", {"framework": "pytorch", "model": {"model_cfg": options}})
    torch.save(names.modelscope_unet_state(unet.state_dict()), folder / "text2video_pytorch_model.pth")
    torch.save({"state_dict": names.ldm_autoencoder_state(autoencoder.state_dict())}, folder / "VQGAN_autoencoder.pth")
    write_json(folder / "config.json", dict(autoencoder.config))  # the released one has none: its sizes are known
    tower = text_encoder.tower.state_dict()
    unused = {name.replace("resblocks.1", "resblocks.2"): value for name, value in tower.items() if ".resblocks.1." in name}
    torch.save({**tower, **unused, "logit_scale": torch.zeros(())}, folder / "open_clip_pytorch_model.bin")
    return folder


def test_both_folders_give_the_same_videos(
    diffusers_folder: Path, modelscope_folder: Path, unet: VideoUNet, autoencoder: AutoencoderKL, text_encoder: TextEncoder
) -> None:
    from t2v.models.frozen import Frozen

    frozen = Frozen(Autoencoder(autoencoder), text_encoder)
    first = TextToVideoPipeline.from_pretrained(f"diffusers:{diffusers_folder}", device="cpu")
    second = TextToVideoPipeline.from_pretrained(f"modelscope:{modelscope_folder}", device="cpu")
    for pipeline in (first, second):
        assert isinstance(pipeline.unet, VideoUNet)
        assert not pipeline.unet.training
        assert all(torch.equal(a, b) for a, b in zip(pipeline.unet.state_dict().values(), unet.state_dict().values(), strict=True))
        assert (pipeline.sampler.scheduler, pipeline.sampler.num_steps, pipeline.sampler.guidance.scale) == ("ddim", 50, 9.0)
    assert first.sample == {"frames": 16, "height": 32, "width": 32, "fps": 8}
    assert second.sample == {"frames": 16, "height": 256, "width": 256, "fps": 8}
    assert (first.sampler.schedule.beta_start, first.sampler.schedule.beta_end) == (0.001, 0.01)
    assert (second.sampler.schedule.beta_start, second.sampler.schedule.beta_end) == (0.00085, 0.012)
    sampler = second.sampler.__class__("ddim", 2)
    videos = []
    for pipeline in (first, second, TextToVideoPipeline(copy.deepcopy(unet), frozen).to("cpu")):  # weights laid out alike
        pipeline.sampler = sampler
        videos.append(pipeline("a red circle", num_frames=2, height=16, width=16))
    assert torch.equal(videos[0], videos[2])
    assert torch.equal(videos[1], videos[2])


def test_folders_are_recognised(diffusers_folder: Path, modelscope_folder: Path, tmp_path: Path) -> None:
    assert checkpoint.split_place(diffusers_folder) == ("diffusers", diffusers_folder)
    assert checkpoint.split_place(modelscope_folder) == ("modelscope", modelscope_folder)
    assert checkpoint.split_place(f"modelscope:{tmp_path}") == ("modelscope", tmp_path)
    assert checkpoint.split_place(tmp_path) == (None, tmp_path)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "unet/config.json").unlink(), r"unet/config.json is missing"),
        (lambda f: (f / "unet/config.json").write_text("{"), r"unet/config.json cannot be read"),
        (lambda f: (f / "unet/config.json").write_text("[]"), r"unet/config.json holds no options"),
        (lambda f: change(f / "unet/config.json", _class_name="UNet2DConditionModel"), "describes a UNet2DConditionModel"),
        (lambda f: change(f / "unet/config.json", use_magic=True), "VideoUNet does not know: use_magic"),
        (lambda f: change(f / "unet/config.json", attention_backend="triton"), "VideoUNet does not know: attention_backend"),
        (lambda f: change(f / "unet/config.json", block_out_channels=[32, 96]), "of another model or size"),
        (lambda f: change(f / "unet/config.json", block_out_channels=[33, 64]), "33"),
        (lambda f: change(f / "unet/config.json", block_out_channels=None), "configuration of its network cannot be used"),
        (lambda f: change(f / "unet/config.json", layers_per_block=2), "are missing"),
        (lambda f: change(f / "scheduler/scheduler_config.json", prediction_type="sample"), "prediction_type is 'sample'"),
        (lambda f: change(f / "scheduler/scheduler_config.json", beta_schedule="linear"), "beta_schedule is 'linear'"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), "no unet in it"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"x" * 999), "truncated or not a safetensors file"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "autoencoder"),
        (lambda f: (f / "text_encoder/model.safetensors").unlink(), "text_encoder"),
    ],
)
def test_what_is_wrong_with_a_diffusers_folder(diffusers_folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(diffusers_folder)
    with pytest.raises(ValueError, match=message) as caught:
        TextToVideoPipeline.from_pretrained(f"diffusers:{diffusers_folder}", device="cpu")
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_modelscope_folder(modelscope_folder: Path, tmp_path: Path) -> None:
    configuration = json.loads((modelscope_folder / "configuration.json").read_text())
    for key, value, message in (
        ("mean_type", "v", "mean_type is 'v'"),
        ("num_timesteps", "many", "num_timesteps is 'many'"),
        ("unet_res_blocks", 2, "are missing"),
        ("unet_context_dim", 32, "of another model or size"),
        ("unet_dim_mult", 7, "cannot be used"),
    ):
        options = {**configuration["model"]["model_cfg"], key: value}
        write_json(modelscope_folder / "configuration.json", {"model": {"model_cfg": options}})
        with pytest.raises(ValueError, match=message) as caught:
            TextToVideoPipeline.from_pretrained(modelscope_folder, device="cpu")
        assert "\n" not in str(caught.value)
    write_json(modelscope_folder / "configuration.json", {"model": []})
    with pytest.raises(ValueError, match="model holds no options"):
        TextToVideoPipeline.from_pretrained(modelscope_folder, device="cpu")
    with pytest.raises(ValueError, match="there is no folder"):
        TextToVideoPipeline.from_pretrained(f"modelscope:{tmp_path}/nowhere", device="cpu")

"""A tiny model, written in the formats of others, read back by them and by us."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from t2v import checkpoint, export
from t2v.diffusion.guidance import ClassifierFreeGuidance
from t2v.diffusion.sampling import Sampler
from t2v.models import diffusers_folder, modelscope_folder
from t2v.models.autoencoder import SD_CONFIG, Autoencoder, empty_autoencoder
from t2v.models.frozen import Frozen
from t2v.models.text_encoder import TextEncoder
from t2v.models.unet import VideoUNet
from t2v.pipeline import TextToVideoPipeline

UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 16,
    "sample_size": 4,
}
SCHEDULE = {"num_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "prediction": "noise"}


VAE = {**SD_CONFIG, "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}


@pytest.fixture
def small_autoencoders_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """ModelScope's format has no description of the autoencoder: here the small one stands for Stable Diffusion's."""
    monkeypatch.setattr("t2v.models.autoencoder.SD_CONFIG", VAE)


@pytest.fixture
def model() -> tuple[VideoUNet, Frozen]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = VideoUNet(**UNET).eval()
        for parameter in unet.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        vae = empty_autoencoder(VAE)
        vae.to_empty(device="cpu")
        for parameter in vae.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet, Frozen(Autoencoder(vae), TextEncoder.random(width=64, layers=3, heads=1))


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_diffusers_own_pipeline_loads_the_folder_and_gives_our_frames(model: tuple[VideoUNet, Frozen], tmp_path: Path) -> None:
    from diffusers import TextToVideoSDPipeline

    unet, frozen = model
    diffusers_folder.write(tmp_path / "out", unet, frozen, SCHEDULE)
    theirs = TextToVideoSDPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a red circle moving left", "It's 3 cats, on a roof!"]
    texts, empty = frozen.text_encoder.encode(prompts), frozen.text_encoder.encode([""])
    ids = theirs.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ids, frozen.text_encoder.tokenize(prompts))
    with torch.no_grad():
        torch.testing.assert_close(theirs.text_encoder(ids)[0], texts, rtol=1e-5, atol=2e-5)
    noise = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(num_steps=4, guidance=ClassifierFreeGuidance(5.0))
    with torch.no_grad():
        latents = sampler.sample(unet, noise, texts, empty)
    ours = frozen.autoencoder.decode(latents)
    result = theirs(
        prompt_embeds=texts,
        negative_prompt_embeds=empty.expand_as(texts),
        latents=noise.clone(),
        num_inference_steps=4,
        guidance_scale=5.0,
        num_frames=3,
        height=32,
        width=32,
        output_type="np",
    ).frames
    difference = (ours.float() - torch.from_numpy(result).mul(255).round()).abs()
    assert ours.float().std() > 5
    assert difference.max() <= 1
    assert difference.mean() < 0.01


@pytest.mark.usefixtures("small_autoencoders_pass")
def test_velocity_travels_to_diffusers_and_is_refused_by_modelscope(model: tuple[VideoUNet, Frozen], tmp_path: Path) -> None:
    velocity = SCHEDULE | {"prediction": "velocity"}
    diffusers_folder.write(tmp_path / "diffusers", *model, velocity)
    assert checkpoint.read_foreign("diffusers", tmp_path / "diffusers").schedule == velocity
    with pytest.raises(ValueError, match="predicts velocity"):
        modelscope_folder.write(tmp_path / "modelscope", *model, velocity)
    for folder in (diffusers_folder, modelscope_folder):
        with pytest.raises(ValueError, match=r"shared_noise=0\.5 cannot be exported"):
            folder.write(tmp_path / "modelscope", *model, SCHEDULE | {"shared_noise": 0.5})
    assert not (tmp_path / "modelscope").exists()


@pytest.mark.usefixtures("small_autoencoders_pass")
@pytest.mark.parametrize("kind", ["diffusers", "modelscope"])
def test_what_is_written_is_read_back_bit_for_bit(kind: str, model: tuple[VideoUNet, Frozen], tmp_path: Path) -> None:
    unet, frozen = model
    {"diffusers": diffusers_folder, "modelscope": modelscope_folder}[kind].write(tmp_path, unet, frozen, SCHEDULE)
    again = checkpoint.read_foreign(kind, tmp_path)
    assert equal(again.unet, unet)
    assert equal(again.frozen.autoencoder.model, frozen.autoencoder.model)
    assert equal(again.frozen.text_encoder.tower, frozen.text_encoder.tower)
    assert again.frozen.text_encoder.sha256() == frozen.text_encoder.sha256()
    assert again.schedule == SCHEDULE
    pipeline = TextToVideoPipeline.from_pretrained(f"{kind}:{tmp_path}", sampler=Sampler(num_steps=2), device="cpu")
    ours = TextToVideoPipeline(unet, frozen, Sampler(num_steps=2), sample=pipeline.sample).to("cpu")  # lays weights out, as loading does
    size = {"num_frames": 2, "height": 32, "width": 32}
    assert torch.equal(pipeline("a dog", **size), ours("a dog", **size))


@pytest.mark.usefixtures("small_autoencoders_pass")
def test_the_entry_point_goes_from_one_format_to_the_other(
    model: tuple[VideoUNet, Frozen], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unet, frozen = model
    modelscope_folder.write(tmp_path / "ms", unet, frozen, SCHEDULE)
    arguments = [f"weights=modelscope:{tmp_path / 'ms'}", "format=diffusers", f"output={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    export.main()
    assert "diffusers folder written" in capsys.readouterr().out
    assert equal(checkpoint.read_foreign("diffusers", tmp_path / "out").unet, unet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ms", "out"]
    for wrong, words in (
        (arguments, "not empty"),
        ([*arguments[:1], "format=onnx", "output=x"], "format=onnx"),
        (arguments[1:], "what to export"),
    ):
        monkeypatch.setattr(sys, "argv", ["export", *wrong])
        with pytest.raises(SystemExit):
            export.main()
        assert words in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(folder: Path, *arguments: object) -> None:
        folder.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(diffusers_folder, "write", full)
    monkeypatch.setattr(sys, "argv", ["export", "checkpoint=package:shapes", "format=diffusers", f"output={tmp_path / 'out'}"])
    with pytest.raises(SystemExit):
        export.main()
    assert "No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["export", "checkpoint=package:shapes", "format=diffusers", f"output={tmp_path / 'file' / 'out'}"])
    with pytest.raises(SystemExit):
        export.main()
    assert "a file is where a folder is needed" in capsys.readouterr().err


def test_a_checkpoint_goes_to_our_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["export", "checkpoint=package:shapes", "format=t2v", f"output={tmp_path / 'shipped'}"])
    export.main()
    assert checkpoint.read_card(tmp_path / "shipped") == checkpoint.read_card(checkpoint.find("package:shapes"))


def test_structures_that_diffusers_cannot_hold_are_refused(model: tuple[VideoUNet, Frozen], tmp_path: Path) -> None:
    _, frozen = model
    for extras in ({"num_temporal_convs": 2}, {"num_temporal_attentions": 1}, {"temporal_positions": "sinusoidal"}):
        name, value = next(iter(extras.items()))
        with pytest.raises(ValueError, match=f"{name}={value} cannot be exported"):
            diffusers_folder.write(tmp_path / "out", VideoUNet(**UNET, **extras), frozen, SCHEDULE)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"norm_num_groups=16.*32"):
        modelscope_folder.write(tmp_path / "out", VideoUNet(**UNET, norm_num_groups=16), frozen, SCHEDULE)
    with pytest.raises(ValueError, match=r"block_out_channels.*differ from Stable Diffusion's"):
        modelscope_folder.write(tmp_path / "out", VideoUNet(**UNET), frozen, SCHEDULE)
    config = diffusers_folder.diffusers_config(VideoUNet(**UNET, temporal_dropout=0.0, gradient_checkpointing="all"))
    assert "temporal_dropout" not in config
    assert "gradient_checkpointing" not in config

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2v.models import autoencoder_layers
from t2v.models.autoencoder import SD_CONFIG, Autoencoder, empty_autoencoder
from t2v.models.autoencoder_layers import is_supported
from t2v.models.frozen import Frozen
from t2v.models.text_encoder import TextEncoder

TINY = {**SD_CONFIG, "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}


@pytest.fixture
def model() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(**TINY).eval()


def frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_stable_diffusions_size() -> None:
    assert sum(p.numel() for p in empty_autoencoder(SD_CONFIG).parameters()) == 83_653_863


def test_moments_and_samples_are_diffusers(model: Any) -> None:
    autoencoder = Autoencoder(model, max_frames_per_pass=2)
    video = frames(2, 3, 32, 40)
    moments = autoencoder.moments(video)
    assert moments.shape == (2, 3, 4, 5, 8)
    assert moments.dtype == torch.float32
    pixels = video.permute(0, 1, 4, 2, 3).flatten(0, 1).float() / 127.5 - 1
    posterior = model.encode(pixels).latent_dist
    noise = torch.randn(2, 4, 3, 4, 5)
    expected = (posterior.mean + posterior.std * noise.transpose(1, 2).flatten(0, 1)) * 0.18215
    torch.testing.assert_close(autoencoder.sample(moments, noise).transpose(1, 2).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(autoencoder.sample(moments).transpose(1, 2).flatten(0, 1), posterior.mean * 0.18215, rtol=1e-4, atol=1e-5)


def test_decode_is_diffusers_in_uint8(model: Any) -> None:
    autoencoder = Autoencoder(model, max_frames_per_pass=4)
    latents = torch.randn(2, 4, 3, 4, 5)
    video = autoencoder.decode(latents)
    assert video.shape == (2, 3, 32, 40, 3)
    assert video.dtype == torch.uint8
    expected = model.decode(latents.transpose(1, 2).flatten(0, 1) / 0.18215).sample
    expected = ((expected / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).unflatten(0, (2, 3))
    assert (video.float() - expected).abs().max() <= 1
    assert video.float().std() > 1


def test_nothing_comes_out_of_nothing(model: Any) -> None:
    autoencoder = Autoencoder(model)
    assert autoencoder.moments(frames(0, 3, 32, 32)).shape == (0, 3, 4, 4, 8)
    assert autoencoder.decode(torch.zeros(0, 4, 3, 4, 4)).shape == (0, 3, 32, 32, 3)


def test_bad_sizes_are_refused_with_both_numbers(model: Any) -> None:
    autoencoder = Autoencoder(model)
    with pytest.raises(ValueError, match=r"30 x 32.*factor 8.*32 x 32"):
        autoencoder.moments(frames(1, 1, 30, 32))
    with pytest.raises(ValueError, match="uint8"):
        autoencoder.moments(torch.zeros(1, 1, 32, 32, 3))
    with pytest.raises(ValueError, match="4"):
        autoencoder.decode(torch.zeros(1, 3, 1, 4, 4))


def test_saved_and_loaded_it_has_the_same_hash(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "vae")
    first = Autoencoder(model)
    for place in (tmp_path, tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        again = Autoencoder.from_pretrained(place)
        assert again.sha256() == first.sha256()
        assert again.config == {"source": str(place)}
        assert torch.equal(again.decode(torch.ones(1, 4, 1, 2, 2)), first.decode(torch.ones(1, 4, 1, 2, 2)))
    assert (again.factor, again.channels, again.scaling_factor) == (8, 4, 0.18215)


def test_frozen_parts_are_no_module_and_stay_frozen(model: Any) -> None:
    model.train().requires_grad_(True)
    frozen = Frozen(Autoencoder(model), TextEncoder.random(width=32))
    assert not isinstance(frozen, torch.nn.Module)
    before = frozen.autoencoder.sha256(), frozen.text_encoder.sha256()
    frozen.to("cpu", torch.bfloat16)
    assert frozen.autoencoder.moments(frames(1, 1, 16, 16)).dtype == torch.float32
    assert frozen.autoencoder.dtype == torch.bfloat16
    assert before == (frozen.autoencoder.sha256(), frozen.text_encoder.sha256())
    for part in (frozen.autoencoder.model, frozen.text_encoder.tower):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("attention", [True, False])
def test_channels_last_is_diffusers_forward_pass(attention: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(**TINY, mid_block_add_attention=attention).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1 * (parameter.ndim == 1), std=0.2)  # biases count, too
    names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    video, latents = frames(2, 3, 32, 40), torch.randn(2, 4, 3, 4, 5)
    plain = Autoencoder(model, channels_last=False)
    expected = plain.moments(video), plain.decode(latents)
    fast = Autoencoder(model, channels_last=True, max_frames_per_pass=4)
    layouts: list[bool] = []
    conv2d = torch.nn.functional.conv2d

    def spy(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        layouts.extend(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (x, weight) if tensor.shape[1] > 4)
        return conv2d(x, weight, *rest)

    monkeypatch.setattr(torch.nn.functional, "conv2d", spy)
    torch.testing.assert_close(fast.moments(video), expected[0], rtol=0, atol=1e-6)  # moments are float32
    assert (fast.decode(latents).int() - expected[1].int()).abs().max() <= 1
    assert len(layouts) > 100
    assert all(layouts)
    assert names == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_with_the_kernel_it_is_diffusers_forward_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1 * (parameter.ndim == 1), std=0.2)
    video = frames(1, 1, 16, 16)
    expected = Autoencoder(model, channels_last=False).moments(video)
    used = []
    monkeypatch.setattr(autoencoder_layers, "has_kernel", lambda x: used.append(x.shape) or True)
    found = Autoencoder(model, channels_last=True).moments(video)
    assert len(used) > 10
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_compile_is_of_the_forward_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def compiled(function: Any, dynamic: bool) -> Any:
        return lambda part, x: (called.append(function.__name__), function(part, x))[1]

    monkeypatch.setattr(torch, "compile", compiled)
    autoencoder = Autoencoder(model, channels_last=True, compile=True)
    autoencoder.decode(torch.zeros(1, 4, 1, 2, 2))
    autoencoder.moments(frames(1, 1, 16, 16))
    assert called == ["decode", "encode"]
    Autoencoder(model, compile=True).moments(frames(1, 1, 16, 16))
    assert called == ["decode", "encode", "encode"]
    with pytest.raises(ValueError, match="channels_last=false"):
        Autoencoder(model, channels_last=False, compile=True)


def test_other_kinds_of_blocks_keep_diffusers_forward_pass() -> None:
    from diffusers import AutoencoderKL

    other: Any = AutoencoderKL(**{**TINY, "act_fn": "relu"})
    assert Autoencoder(other).channels_last is False
    assert not is_supported(other)
    for option in ("channels_last", "compile"):
        with pytest.raises(ValueError, match=f"{option}=true.*leave it out"):
            Autoencoder(other, **{option: True})


def test_on_a_gpu_weights_of_other_kinds_of_blocks_are_laid_out_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU they are channels-last, which diffusers' GroupNorm is slow with on a GPU."""
    from diffusers import AutoencoderKL

    model: Any = AutoencoderKL(**{**TINY, "act_fn": "relu"})
    strides = [parameter.stride() for parameter in model.parameters()]
    autoencoder = Autoencoder(model)
    assert [parameter.stride() for parameter in model.parameters()] != strides
    monkeypatch.setattr(Autoencoder, "device", torch.device("cuda"))
    autoencoder.to(dtype=torch.float32)
    assert [parameter.stride() for parameter in model.parameters()] == strides


def test_on_a_gpu_small_frames_go_through_together(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    autoencoder = Autoencoder(model)
    assert autoencoder.frames_per_pass(64 * 64) == 64
    monkeypatch.setattr(type(autoencoder), "device", torch.device("cuda"))
    assert [autoencoder.frames_per_pass(size * size) for size in (64, 256, 512, 4096)] == [1024, 64, 16, 1]
    autoencoder.max_frames_per_pass = 3
    assert autoencoder.frames_per_pass(64 * 64) == 3

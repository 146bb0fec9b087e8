from typing import Any

import pytest
import torch
from diffusers.schedulers import DDPMScheduler

from t2v.diffusion.randomness import normal
from t2v.diffusion.sampling import Sampler
from t2v.diffusion.schedule import NoiseSchedule


def test_values_of_the_released_model() -> None:
    schedule = NoiseSchedule()
    alphas_cumprod = schedule.alphas_cumprod()
    assert alphas_cumprod.dtype == torch.float64
    assert float(alphas_cumprod[0]) == pytest.approx(0.99915, abs=1e-9)
    assert float(alphas_cumprod[999]) == pytest.approx(0.0046601, abs=1e-6)
    assert float(schedule.snr(torch.tensor(999))) == pytest.approx(4.68e-3, abs=1e-5)
    assert schedule.config == {"num_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "prediction": "noise"}
    assert schedule.to("cpu") is schedule


def test_noise_equals_diffusers() -> None:
    peer = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    latents, noise = torch.randn(2, 4, 4, 3, 2, 2).unbind(0)
    timestep = torch.tensor([0, 1, 500, 999])
    expected = peer.add_noise(latents, noise, timestep)
    torch.testing.assert_close(NoiseSchedule().add_noise(latents, noise, timestep), expected, rtol=0, atol=2e-6)


def test_precision_follows_the_wider_type() -> None:
    schedule, timestep = NoiseSchedule(), torch.tensor([10, 900])
    latents, noise = torch.randn(2, 2, 4, 1, 2, 2, dtype=torch.float64).unbind(0)
    exact = schedule.add_noise(latents, noise, timestep)
    assert exact.dtype == torch.float64
    kept = exact.square().mean() / ((schedule.alphas_cumprod()[timestep] ** 0.5).view(-1, 1, 1, 1, 1) * latents).square().mean()
    assert kept > 0
    assert schedule.add_noise(latents.bfloat16(), noise.bfloat16(), timestep).dtype == torch.float32
    variance = schedule.add_noise(torch.ones_like(latents), torch.zeros_like(noise), timestep)[:, 0, 0, 0, 0] ** 2
    torch.testing.assert_close(variance, schedule.alphas_cumprod()[timestep], rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_timesteps": 0},
        {"beta_start": 0.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"beta_end": 1.0},
        {"prediction": "clip"},
        {"shared_noise": 1.0},
    ],
)
def test_refusals(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"num_timesteps|beta_start|noise or velocity|shared_noise is 1.0"):
        NoiseSchedule(**arguments)


def test_frames_share_their_part_of_the_noise() -> None:
    keys, shape = [("noise", 0, index) for index in range(3)], (4, 8, 16, 16)
    assert torch.equal(NoiseSchedule().noise(keys, shape), normal(keys, shape))
    schedule = NoiseSchedule(shared_noise=0.4)
    noise = schedule.noise(keys, shape)  # (b c f h w)
    assert noise.var().item() == pytest.approx(1, abs=0.05)
    first, last = noise[:, :, 0].flatten(), noise[:, :, -1].flatten()
    assert torch.corrcoef(torch.stack([first, last]))[0, 1].item() == pytest.approx(0.4, abs=0.06)
    assert torch.equal(schedule.noise(keys[2:], shape)[0], noise[2])
    assert NoiseSchedule(**schedule.config).shared_noise == 0.4
    with pytest.raises(ValueError, match=r"ddpm.*shared_noise=0.4: use ddim"):
        Sampler("ddpm", schedule=schedule)

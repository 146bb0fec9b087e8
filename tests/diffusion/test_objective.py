import pytest
import torch
from torch import Tensor

from t2v.diffusion.objective import MinSNRNoisePrediction, NoisePrediction
from t2v.diffusion.schedule import NoiseSchedule


def test_perfect_and_empty_predictions() -> None:
    objective = NoisePrediction(NoiseSchedule())
    latents, noise = torch.randn(2, 3, 4, 2, 4, 4).unbind(0)
    timestep, text = torch.tensor([0, 400, 999]), torch.randn(3, 5, 8)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def perfect(z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        seen.append((z, t, c))
        return noise

    assert torch.equal(objective(perfect, latents, text, timestep, noise), torch.zeros(3))
    assert torch.equal(seen[0][0], objective.schedule.add_noise(latents, noise, timestep))
    assert torch.equal(seen[0][1], timestep)
    assert torch.equal(seen[0][2], text)
    lost = objective(lambda z, t, c: torch.zeros_like(z), latents, text, timestep, noise)
    torch.testing.assert_close(lost, noise.square().flatten(1).mean(1))


def test_error_is_taken_in_float32() -> None:
    latents, noise = torch.zeros(2, 2, 4, 1, 8, 8).unbind(0)
    loss = NoisePrediction()(
        lambda z, t, c: torch.full_like(z, 1e-3, dtype=torch.bfloat16), latents, torch.zeros(2, 1, 1), torch.tensor([3, 4]), noise
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), float(torch.tensor(1e-3, dtype=torch.bfloat16)) ** 2))


def test_empty_batch_gives_no_losses() -> None:
    none = torch.zeros(0, 4, 1, 2, 2)
    assert NoisePrediction()(lambda z, t, c: z, none, torch.zeros(0, 1, 1), torch.zeros(0, dtype=torch.int64), none).shape == (0,)


def test_min_snr_weighs_clean_steps_down_and_noisy_ones_not_at_all() -> None:
    latents, noise, text = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2), torch.randn(3, 5, 8)
    timestep = torch.tensor([0, 400, 999])

    def unet(z: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z)

    plain, weighted = NoisePrediction(), MinSNRNoisePrediction(gamma=1.0)
    ratio = weighted(unet, latents, text, timestep, noise) / plain(unet, latents, text, timestep, noise)
    snr = plain.schedule.snr(timestep)
    assert torch.allclose(ratio.double(), snr.clamp(max=1.0) / snr, rtol=1e-5)
    assert ratio[0] < 0.01
    assert ratio[2] == 1
    with pytest.raises(ValueError, match="above 0"):
        MinSNRNoisePrediction(gamma=0.0)

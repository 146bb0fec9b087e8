import pytest
import torch
from torch import Tensor

from t2v.diffusion.objective import DenoisingLoss, MinSNRLoss
from t2v.diffusion.schedule import NoiseSchedule


def test_perfect_and_empty_predictions() -> None:
    objective = DenoisingLoss(NoiseSchedule())
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
    loss = DenoisingLoss()(
        lambda z, t, c: torch.full_like(z, 1e-3, dtype=torch.bfloat16), latents, torch.zeros(2, 1, 1), torch.tensor([3, 4]), noise
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((2,), float(torch.tensor(1e-3, dtype=torch.bfloat16)) ** 2))


def test_empty_batch_gives_no_losses() -> None:
    none = torch.zeros(0, 4, 1, 2, 2)
    assert DenoisingLoss()(lambda z, t, c: z, none, torch.zeros(0, 1, 1), torch.zeros(0, dtype=torch.int64), none).shape == (0,)


def test_min_snr_weighs_clean_steps_down_and_noisy_ones_not_at_all() -> None:
    latents, noise, text = torch.randn(3, 4, 2, 2, 2), torch.randn(3, 4, 2, 2, 2), torch.randn(3, 5, 8)
    timestep = torch.tensor([0, 400, 999])

    def unet(z: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(z)

    plain, weighted = DenoisingLoss(), MinSNRLoss(gamma=1.0)
    ratio = weighted(unet, latents, text, timestep, noise) / plain(unet, latents, text, timestep, noise)
    snr = plain.schedule.snr(timestep)
    assert torch.allclose(ratio.double(), snr.clamp(max=1.0) / snr, rtol=1e-5)
    assert ratio[0] < 0.01
    assert ratio[2] == 1
    with pytest.raises(ValueError, match="above 0"):
        MinSNRLoss(gamma=0.0)


def test_velocity_is_the_same_error_seen_from_the_clip() -> None:
    """The same belief as velocity or as noise: losses differ by (SNR + 1) / SNR, and not at all after the weight."""
    latents, noise, wrong = torch.randn(3, 3, 4, 2, 2, 2, dtype=torch.float64).unbind(0)
    text, timestep = torch.randn(3, 5, 8), torch.tensor([0, 400, 999])
    velocity = NoiseSchedule(prediction="velocity")
    snr = velocity.snr(timestep)
    signal, share = (snr / (1 + snr)).sqrt().view(-1, 1, 1, 1, 1), (1 / (1 + snr)).sqrt().view(-1, 1, 1, 1, 1)

    def says_noise(z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return wrong

    def says_velocity(z: Tensor, t: Tensor, c: Tensor) -> Tensor:  # of the same belief: v = (epsilon - sqrt(1 - abar) Z_t) / sqrt(abar)
        return (wrong - share * z) / signal

    as_noise = DenoisingLoss()(says_noise, latents, text, timestep, noise)
    as_velocity = DenoisingLoss(velocity)(says_velocity, latents, text, timestep, noise)
    torch.testing.assert_close(as_velocity / as_noise, (snr + 1) / snr)
    torch.testing.assert_close(
        MinSNRLoss(velocity)(says_velocity, latents, text, timestep, noise), MinSNRLoss()(says_noise, latents, text, timestep, noise)
    )

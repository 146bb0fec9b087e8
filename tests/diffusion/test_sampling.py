from functools import partial

import pytest
import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from t2v.diffusion.guidance import ClassifierFreeGuidance
from t2v.diffusion.randomness import generator_of, normal
from t2v.diffusion.sampling import Sampler
from t2v.diffusion.schedule import NoiseSchedule

RELEASED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading", "steps_offset": 1}


class Network(torch.nn.Module):
    """Something nonlinear in z, t and text, with outputs about as large as noise."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.mix = torch.nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        z, t = (x.repeat(len(text) // len(x), *[1] * (x.ndim - 1)) for x in (z, t))
        shift = text.mean(dim=(1, 2)) + (t / 1000).sin()
        return torch.tanh(self.mix(z) + shift.view(-1, 1, 1, 1, 1)) + 0.5 * z


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return normal([(0, i) for i in range(3)], (4, 5, 6, 4)), normal([(1, i) for i in range(3)], (7, 8)), normal([(2, 0)], (7, 8))


@torch.no_grad()
def plain_loop(scheduler, steps: int, network, noise: Tensor, text: Tensor, empty: Tensor, scale: float, **options) -> Tensor:  # type: ignore[no-untyped-def]
    """As diffusers' pipelines write it, with two separate passes."""
    scheduler.set_timesteps(steps)
    z = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        times = t.expand(len(z))
        unconditional, conditional = network(z, times, empty.expand_as(text)), network(z, times, text)
        z = scheduler.step(unconditional + scale * (conditional - unconditional), t, z, **options).prev_sample
    return z


def test_ddim_equals_a_plain_diffusers_loop(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (noise, text, empty) = Network(), inputs
    sampler = Sampler()
    assert (sampler.scheduler, sampler.num_steps, sampler.guidance.scale) == ("ddim", 50, 9.0)
    assert sampler.timesteps == list(range(981, 0, -20))
    expected = plain_loop(DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **RELEASED), 50, network, noise, text, empty, 9.0)
    result = sampler.sample(network, noise, text, empty)
    assert expected.std() > 0.5
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


def test_dpm_equals_a_plain_diffusers_loop(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (noise, text, empty) = Network(), inputs
    expected = plain_loop(DPMSolverMultistepScheduler(**RELEASED), 20, network, noise, text, empty, 3.0)
    result = Sampler("dpm++", 20, ClassifierFreeGuidance(3.0)).sample(network, noise, text, empty)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["ddim", "dpm++"])
def test_velocity_equals_a_plain_diffusers_loop(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (noise, text, empty) = Network(), inputs
    peer = {"ddim": partial(DDIMScheduler, clip_sample=False, set_alpha_to_one=False), "dpm++": DPMSolverMultistepScheduler}[name]
    expected = plain_loop(peer(prediction_type="v_prediction", **RELEASED), 20, network, noise, text, empty, 3.0)
    schedule = NoiseSchedule(prediction="velocity")
    result = Sampler(name, 20, ClassifierFreeGuidance(3.0), schedule).sample(network, noise, text, empty)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    as_noise = Sampler(name, 20, ClassifierFreeGuidance(3.0)).sample(network, noise, text, empty)
    assert (as_noise - result).abs().max() > 0.1


def test_ddpm_equals_a_plain_diffusers_loop(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (noise, text, empty) = Network(), inputs
    sampler = Sampler("ddpm", 25, ClassifierFreeGuidance(3.0))
    generators = [generator_of("step", i) for i in range(3)]
    expected = plain_loop(DDPMScheduler(clip_sample=False, **RELEASED), 25, network, noise, text, empty, 3.0, generator=generators)
    result = sampler.sample(network, noise, text, empty, generators=[generator_of("step", i) for i in range(3)])
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    alone = sampler.sample(network, noise[1:2], text[1:2], empty, generators=[generator_of("step", 1)])
    torch.testing.assert_close(alone[0], result[1], rtol=0, atol=1e-4)
    other = sampler.sample(network, noise, text, empty, generators=[generator_of("step", 9 + i) for i in range(3)])
    assert (other - result).abs().max() > 0.1


def test_any_schedulers_solve_a_gaussian(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """For data N(2, 0.5^2), the best prediction is known; every scheduler must bring noise to that mean and spread."""
    mean, spread, schedule = 2.0, 0.5, NoiseSchedule()

    def exact(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        signal = schedule.alphas_cumprod()[t].float().view(-1, 1, 1, 1, 1)
        variance = signal * spread**2 + 1 - signal
        return (z - signal.sqrt() * mean) * (1 - signal).sqrt() / variance

    text, empty = inputs[1:]
    noise = normal([(i,) for i in range(3)], (4, 8, 8, 8))
    for scheduler, steps in (("ddim", 50), ("dpm++", 20), ("ddpm", 200)):
        generators = [generator_of("g", i) for i in range(3)]
        result = Sampler(scheduler, steps, ClassifierFreeGuidance(1.0)).sample(exact, noise, text, empty, generators=generators)
        assert float(result.mean()) == pytest.approx(mean, abs=0.12), scheduler  # starting from pure noise at t < 999 costs a little of it
        assert float(result.std()) == pytest.approx(spread, abs=0.08), scheduler


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "ddpm"])
def test_any_number_of_steps(scheduler: str, spacing: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (noise, text, empty) = Network(), inputs
    most = 999 if scheduler == "dpm++" else 1000
    for steps in (1, 2, 3, 7, 30, 300, most):
        sampler = Sampler(scheduler, steps, spacing=spacing)
        timesteps = sampler.timesteps
        assert len(timesteps) == steps
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert 0 <= timesteps[-1] <= timesteps[0] <= 999
        assert (timesteps[0] == 999) or spacing == "leading"
        if steps <= 7:
            assert sampler.sample(network, noise, text, empty, generators=[generator_of(i) for i in range(3)]).isfinite().all()


def test_runs_without_gradients_reports_steps_and_keeps_types(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (noise, text, empty) = Network(), inputs
    steps: list[tuple[int, int]] = []
    sampler = Sampler("ddim", 4)
    result = sampler.sample(network, noise, text, empty, on_step=lambda done, of: steps.append((done, of)))
    assert not result.requires_grad
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(sampler.sample(network, noise, text, empty), result)  # nothing is left over from the first call
    half = network.bfloat16()
    assert sampler.sample(half, noise, text.bfloat16(), empty).dtype == torch.float32
    assert sampler.sample(half.double(), noise.double(), text.double(), empty.double()).dtype == torch.float64


def test_refusals(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    network, (noise, text, empty) = Network(), inputs
    with pytest.raises(ValueError, match="there are ddim, dpm\\+\\+, ddpm"):
        Sampler("euler")
    with pytest.raises(ValueError, match="there are leading, trailing"):
        Sampler(spacing="linspace")
    for steps in (0, -1, 1001, True, 2.5):
        with pytest.raises(ValueError, match="takes 1 to 1000"):
            Sampler("ddim", steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes 1 to 999"):
        Sampler("dpm++", 1000)
    with pytest.raises(ValueError, match="3 clips and text for 2 prompts"):
        Sampler().sample(network, noise, text[:2], empty)
    with pytest.raises(ValueError, match="generator for each of 3 clips, not none"):
        Sampler("ddpm").sample(network, noise, text, empty)

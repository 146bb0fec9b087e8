import subprocess
import sys

import pytest
import torch

from t2v.diffusion.randomness import generator_of, integers, normal, seed_of, uniform


def test_noise_is_the_same_alone_and_in_a_batch() -> None:
    keys = [("sample", 7, index) for index in range(5)]
    together = normal(keys, (4, 3, 8, 8))
    assert together.shape == (5, 4, 3, 8, 8)
    assert together.dtype == torch.float32
    for index, key in enumerate(keys):
        assert torch.equal(normal([key], (4, 3, 8, 8))[0], together[index])
    assert torch.equal(normal(keys[::-1], (4, 3, 8, 8)).flip(0), together)
    assert not torch.equal(together[0], together[1])


def test_global_state_neither_matters_nor_changes() -> None:
    first = normal([(1, 2)], (64,))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(normal([(1, 2)], (64,)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeds_are_stable_across_processes_and_types() -> None:
    code = "from t2v.diffusion.randomness import seed_of; print(seed_of(0, 'noise', 12, 'video', 3))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "3"})
    assert int(other.stdout) == seed_of(0, "noise", 12, "video", 3)
    assert seed_of(torch.tensor(4), "a") == seed_of(4, "a")  # type: ignore[arg-type]
    assert len({seed_of(1, 2), seed_of("1", 2), seed_of(12), seed_of("1,2"), seed_of("1", "2"), seed_of(2, 1)}) == 6
    with pytest.raises(TypeError):
        seed_of(0.5)  # type: ignore[arg-type]


def test_moments_and_ranges() -> None:
    keys = [(0, "t", index) for index in range(20_000)]
    numbers = uniform(keys)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(float(numbers.mean()) - 0.5) < 0.01
    steps = integers(keys, 1000)
    assert steps.dtype == torch.int64
    assert (int(steps.min()), int(steps.max())) == (0, 999)
    assert abs(float(steps.double().mean()) - 499.5) < 10
    assert torch.equal(steps[17:19], integers(keys[17:19], 1000))
    noise = normal(keys[:200], (1000,))
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.var()) - 1) < 0.02
    assert abs(float((noise[0] * noise[1]).mean())) < 0.15
    with pytest.raises(ValueError, match="bound must be 1 or more"):
        integers(keys, 0)


def test_empty_batch() -> None:
    assert normal([], (4, 1, 2, 2)).shape == (0, 4, 1, 2, 2)
    assert integers([], 10).shape == (0,)
    assert uniform([]).shape == (0,)


def test_generator_draws_on() -> None:
    generator = generator_of("steps", 1)
    first, second = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.randn(8, generator=generator_of("steps", 1)))

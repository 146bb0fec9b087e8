"""How often which step is trained on."""

from __future__ import annotations

import pytest
import torch

from t2v.diffusion.randomness import integers
from t2v.diffusion.timesteps import ShiftedTimesteps, UniformTimesteps

KEYS = [(0, "timestep", 5, "video", index) for index in range(4000)]


def test_uniform_is_the_plain_draw() -> None:
    assert torch.equal(UniformTimesteps()(KEYS, 1000), integers(KEYS, 1000))


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_half_of_the_draws_lie_above_the_shifted_middle(shift: float) -> None:
    drawn = ShiftedTimesteps(shift)(KEYS, 1000)
    assert drawn.dtype == torch.int64
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) <= 999
    assert float((drawn >= 1000 * shift / (1 + shift)).double().mean()) == pytest.approx(0.5, abs=0.03)
    assert torch.equal(drawn[7:8], ShiftedTimesteps(shift)(KEYS[7:8], 1000))  # a sample's draw knows no batch


def test_a_shift_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"timesteps\.shift is 0"):
        ShiftedTimesteps(0)

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_unets import TWO_LEVELS, inputs, pair

from t2v.models import attention
from t2v.models.pointwise import VECTORS, joinable, linear_gelu, linear_plus, linear_times

pytestmark = pytest.mark.skipif(not VECTORS, reason="oneDNN joins nothing on this CPU")


@torch.no_grad()
def test_joined_products_are_those_apart() -> None:
    x, weight, bias, other = torch.randn(2, 3, 5, 24), torch.randn(40, 24), torch.randn(40), torch.randn(2, 3, 5, 40)
    y = F.linear(x, weight, bias)
    for found, expected in (
        (linear_gelu(x, weight, bias), F.gelu(y)),
        (linear_times(x, weight, bias, other), y * other),
        (linear_plus(x, weight, bias, other), y + other),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_only_where_no_gradient_is_asked_for() -> None:
    x = torch.zeros(2)
    assert not joinable(x)
    with torch.no_grad():
        assert joinable(x)
        assert not joinable(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            assert not joinable(x)


def test_a_network_that_infers_uses_them_and_equals_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(TWO_LEVELS, torch.float32)
    args = inputs(2, 5, 9, 7, dtype=torch.float32)
    calls = []
    monkeypatch.setattr(attention, "linear_gelu", lambda *of: (calls.append(1), linear_gelu(*of))[1])
    with torch.inference_mode():
        a, b = ours(*args), theirs(*args).sample
    assert len(calls) == sum(isinstance(module, attention.GEGLU) for module in ours.modules())
    assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())

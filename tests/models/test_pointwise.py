from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_unets import TWO_LEVELS, inputs, pair

from t2v.models import attention, pointwise
from t2v.models.convolution import channels_last
from t2v.models.pointwise import VECTORS, Linear, joinable, linear_gelu, linear_plus, linear_times
from t2v.models.unet import VideoUNet

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


@pytest.mark.parametrize("bias", [True, False])
def test_one_dnn_s_product_has_torch_s_gradients(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Linear(24, 40, bias=bias)
    x = torch.randn(3, 5, 2, 24).transpose(1, 2).requires_grad_()  # not contiguous
    leaves, found = [x, *layer.parameters()], {}
    grad = torch.randn(3, 1, 5, 40).expand(3, 2, 5, 40)
    for half_speed in (False, True):
        monkeypatch.setattr(pointwise, "HALF_SPEED", half_speed)
        y = layer(x)
        assert ("OneDNN" in type(y.grad_fn).__name__) == half_speed
        found[half_speed] = [y, *torch.autograd.grad(y, leaves, grad)]
        with torch.no_grad():
            assert torch.equal(layer(x), y)
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert "OneDNN" not in type(layer.double()(x.double()).grad_fn).__name__  # still at half speed


def test_only_the_gradients_that_are_asked_for_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "HALF_SPEED", True)
    frozen = Linear(8, 4).requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(frozen(x).sum(), x)[0], frozen.weight.sum(0).expand(2, 8))
    trained = Linear(8, 4)
    trained(x.detach()).sum().backward()
    torch.testing.assert_close(trained.weight.grad, x.detach().sum(0).expand(4, 8))
    torch.testing.assert_close(trained.bias.grad, torch.full((4,), 2.0))


def test_a_network_trained_by_it_equals_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "HALF_SPEED", True)
    ours, theirs = pair(TWO_LEVELS, torch.float32)
    args = inputs(2, 5, 9, 7, dtype=torch.float32)
    calls = []
    monkeypatch.setattr(pointwise, "one_dnn", lambda *of, product=pointwise.one_dnn: (calls.append(1), product(*of))[1])
    a, b = ours(*args), theirs(*args).sample
    assert len(calls) > sum(isinstance(module, Linear) for module in ours.modules())  # gates and values are two products
    a.square().mean().backward()
    b.square().mean().backward()
    assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert (p.grad - wanted[name]).abs().max() <= 1e-4 * max(1e-3, wanted[name].abs().max()), name


@pytest.mark.parametrize("frames", [1, 3])
def test_no_weight_with_gaps_is_multiplied_by_one_dnn(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be right, and 300 times as slow."""
    monkeypatch.setattr(pointwise, "HALF_SPEED", True)
    dense = []

    def spy(x: torch.Tensor, weight: torch.Tensor, *rest: Any, product: Any = pointwise.one_dnn) -> torch.Tensor:
        dense.append(weight.is_contiguous() or weight.t().is_contiguous())
        return product(x, weight, *rest)  # type: ignore[no-any-return]

    monkeypatch.setattr(pointwise, "one_dnn", spy)
    network = VideoUNet(**TWO_LEVELS).float()
    channels_last(network)
    args = inputs(2, frames, 8, 8, dtype=torch.float32)
    network(*args).square().mean().backward()
    with torch.no_grad():
        network.eval()(*args)
    assert dense
    assert all(dense)


def test_what_does_not_fit_is_said_in_torch_s_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "HALF_SPEED", True)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        pointwise.linear(torch.randn(3, 8), torch.randn(4, 9))
    with pytest.raises(RuntimeError, match="dtype"):
        pointwise.linear(torch.randn(3, 8), torch.randn(4, 8, dtype=torch.float64))

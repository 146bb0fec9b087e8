"""EMA, learning-rate factors, the NaN watch and the update-to-weight ratio."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from t2v.training.callbacks.training_log import update_to_weight
from t2v.training.ema import EMA
from t2v.training.learning_rate import constant, cosine
from t2v.training.nan_watch import first_bad_gradient, first_bad_layer, gradient_norm


def test_ema_is_the_weighted_mean_of_the_weights() -> None:
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    average.load_state_dict(model.state_dict())
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    EMA(decay=0.9).update(average, model, step=1)
    assert torch.allclose(average.weight, 0.9 * start + 0.1 * model.weight)


def test_ema_warmup_forgets_the_start() -> None:
    ema = EMA(decay=0.9999, warmup=True)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(10**6) == 0.9999
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        EMA(decay=1.0)


def test_learning_rate_factors() -> None:
    assert [constant(3)(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    factor = cosine(100, warmup_steps=10, final=0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(55) == pytest.approx(0.55)
    assert factor(100) == factor(10**6) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"trainer\.max_steps"):
        cosine(10, warmup_steps=10)


def test_nan_watch_names_layer_parameter_and_gradient() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.ones(1, 4)
    assert first_bad_layer(model, lambda: model(x)).startswith("the loss itself")
    assert first_bad_layer(model, lambda: model(x * float("inf"))) == "layer 0"
    model(x).sum().backward()
    assert torch.isfinite(gradient_norm(model))
    model[2].weight.grad[0, 0] = float("nan")  # type: ignore[index,union-attr]
    assert not torch.isfinite(gradient_norm(model))
    assert first_bad_gradient(model) == "2.weight"
    with torch.no_grad():
        model[2].bias.fill_(float("inf"))  # type: ignore[union-attr]
    assert first_bad_layer(model, lambda: model(x)) == "parameter 2.bias"


def test_update_to_weight_is_what_adam_did() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(50))
    optimizer = torch.optim.AdamW([{"params": [weight], "name": "all"}], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        (weight**3).sum().backward()
        before = weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    measured = float((weight.detach() - before).norm() / weight.detach().norm())
    assert update_to_weight(optimizer, optimizer.param_groups[0]) == pytest.approx(measured, rel=0.02)

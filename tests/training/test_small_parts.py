"""EMA, learning-rate factors, the NaN watch, clipping and the update-to-weight ratio."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from small_training import MadeUpData, fit, small_module, small_unet
from torch import nn

from t2v.diffusion.objective import DenoisingLoss
from t2v.diffusion.schedule import NoiseSchedule
from t2v.training.callbacks import training_log
from t2v.training.datamodules import FirstStep
from t2v.training.ema import EMA
from t2v.training.learning_rate import constant, cosine
from t2v.training.mixture import JointMixture
from t2v.training.module import TextToVideoModule
from t2v.training.nan_watch import Model, first_bad_gradient, first_bad_layer, gradient_norms, norm_of
from t2v.training.run import show


def test_ema_is_the_weighted_mean_of_the_weights() -> None:
    model, average = nn.Linear(3, 2), nn.Linear(3, 2)
    average.load_state_dict(model.state_dict())
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    EMA(decay=0.9).update(list(average.parameters()), list(model.parameters()), step=1)
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
    assert [factor(0), factor(9)] == pytest.approx([1 / 11, 10 / 11])
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
    watched = Model(model, list(model.parameters()), lambda: x)
    norms = gradient_norms(watched.parameters)
    whole = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    assert torch.allclose(norm_of(norms, sharded=False), whole)
    assert first_bad_gradient(watched, norms) is None
    model[2].weight.grad[0, 0] = float("nan")  # type: ignore[index,union-attr]
    model[0].bias.grad = None
    norms = gradient_norms(watched.parameters)
    assert not torch.isfinite(norm_of(norms, sharded=False))
    assert first_bad_gradient(watched, norms) == "2.weight"
    with torch.no_grad():
        model[2].bias.fill_(float("inf"))  # type: ignore[union-attr]
    assert first_bad_layer(model, lambda: model(x)) == "parameter 2.bias"


@pytest.mark.parametrize("at_once", [1, 60, 1 << 24])
def test_update_to_weight_is_what_adam_did(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """However many parameters are looked at together."""
    monkeypatch.setattr(training_log, "AT_ONCE", at_once)
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(size)) for size in (50, 9, 21)]
    optimizer = torch.optim.AdamW([{"params": weights, "name": "all"}], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        torch.stack([(weight**3).sum() for weight in weights]).sum().backward()
        before = torch.cat(weights).detach()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.cat(weights).detach()
    measured = float((after - before).norm() / after.norm())
    assert training_log.update_to_weight(optimizer, optimizer.param_groups[0]) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(("elements", "parts"), [(1, [[5], [3], [4], [1]]), (8, [[5, 3], [4, 1]]), (99, [[5, 3, 4, 1]])])
def test_tensors_are_taken_together_within_a_size(elements: int, parts: list[list[int]]) -> None:
    tensors = [torch.zeros(size) for size in (5, 3, 4, 1)]
    assert [[len(tensor) for tensor in part] for part in training_log.within(elements, tensors)] == parts


def test_temporal_layers_may_learn_at_another_rate() -> None:
    equal = small_module().configure_optimizers()["optimizer"]
    assert {group["name"]: group["lr"] for group in equal.param_groups} == {"spatial": 1e-3, "temporal": 1e-3}
    module = small_module(temporal_lr_factor=3.0)
    optimizer = module.configure_optimizers()["optimizer"]
    assert {group["name"]: pytest.approx(group["lr"]) for group in optimizer.param_groups} == {"spatial": 1e-3, "temporal": 3e-3}
    of_group = {group["name"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    for name, parameter in module.unet.named_parameters():
        temporal = any(part in name for part in ("temp_convs", "temp_attentions", "transformer_in"))
        assert id(parameter) in of_group["temporal" if temporal else "spatial"], name


def test_caption_dropout_replaces_that_share_by_the_empty_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    data = MadeUpData({"image": 400, "video": 4}, {"image": 400, "video": 4}, JointMixture())
    for share in (0.0, 0.25, 0.9):
        module = small_module(caption_dropout=share)
        monkeypatch.setattr(type(module), "global_step", 0)
        prompts: list[str] = []
        monkeypatch.setattr(module.frozen.text_encoder, "encode", lambda captions: prompts.extend(captions) or torch.zeros(1))  # noqa: B023
        module.encode("image", data.clips("image", list(range(400))))
        assert len(prompts) == 400
        assert prompts.count("") == pytest.approx(400 * share, abs=400 * 0.05 if share else 0)
    with pytest.raises(ValueError, match="share of the captions"):
        small_module(caption_dropout=1.0)


def test_the_first_step_again_and_again() -> None:
    steps = FirstStep(iter(range(100)), accumulate=3)  # type: ignore[arg-type]
    taken = iter(steps)
    assert [next(taken) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_gradients_are_clipped_also_for_a_fused_optimizer_in_mixed_precision(tmp_path: Path) -> None:
    def change(module: TextToVideoModule, **options: Any) -> float:
        before = [p.detach().clone() for p in module.unet.parameters()]
        fit(module, MadeUpData({"image": 2, "video": 2}, {"image": 2, "video": 2}, JointMixture()), tmp_path, steps=1, **options)
        return sum(float((p.detach() - q).square().sum()) for p, q in zip(module.unet.parameters(), before, strict=True)) ** 0.5

    descent = partial(torch.optim.SGD, lr=1.0)
    free = change(small_module(optimizer=descent))
    assert change(small_module(optimizer=descent), gradient_clip_val=free / 8) == pytest.approx(free / 8)
    assert change(small_module(optimizer=descent), gradient_clip_val=free * 8) == pytest.approx(free)
    mixed = small_module(unet=small_unet().float(), optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True))
    assert change(mixed, gradient_clip_val=0.1, precision=MixedPrecision("bf16-mixed", "cpu")) > 0
    with pytest.raises(ValueError, match="gradient_clip_algorithm=value"):
        change(small_module(), gradient_clip_val=0.1, gradient_clip_algorithm="value")


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_frozen_parts_in_bfloat16_run_without_autocast(monkeypatch: pytest.MonkeyPatch, in_bfloat16: bool) -> None:
    module = small_module(unet=small_unet().float())
    module.frozen_in_bfloat16 = in_bfloat16
    found: list[bool] = []
    encode = module.encode
    monkeypatch.setattr(module, "encode", lambda *a: found.append(torch.is_autocast_enabled("cpu")) or encode(*a))
    monkeypatch.setattr(type(module), "global_step", 0)
    clips = MadeUpData({"video": 1}, {"video": 1}, JointMixture()).clips("video", [0])
    with torch.autocast("cpu", torch.bfloat16):
        losses = module.predict("video", clips).losses
    assert found == [not in_bfloat16]
    assert torch.isfinite(losses).all()


def test_training_noise_is_that_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule(shared_noise=0.5)
    module = small_module(unet=small_unet().float(), objective=DenoisingLoss(schedule))
    monkeypatch.setattr(type(module), "global_step", 0)
    clips = MadeUpData({"video": 1}, {"video": 1}, JointMixture()).clips("video", [0])
    noise = module.predict("video", clips).noise
    assert torch.equal(noise, schedule.noise([(module.seed, "noise", 0, "video", 0)], noise.shape[1:]))


@pytest.mark.parametrize(("step", "out_of_time", "words"), [
    (5, True, "trained  5 of 10 steps; trainer.max_time is over, the same command goes on; results"),
    (5, False, "trained  5 of 10 steps; results"),
    (10, True, "trained  10 steps; results"),
])  # fmt: skip
def test_what_ended_a_training_is_said(
    step: int, out_of_time: bool, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show({"step": step, "max_steps": 10, "out_of_time": out_of_time, "report": []}, tmp_path, samples=False)
    assert words in capsys.readouterr().out

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2v.diffusion import recording
from t2v.diffusion.recording import Recordings, recordable
from t2v.diffusion.sampling import Sampler


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls = 0

    def forward(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        z, t = (x.repeat(len(text) // len(x), *[1] * (x.ndim - 1)) for x in (z, t))
        return self.scale * z + t.view(-1, 1, 1, 1, 1) / 1000 + text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)


class Recorder:
    """As a graph does: runs once without a result, then again and again on the same inputs into the same output."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        output = torch.full_like(call(), float("nan"))
        return lambda: output.copy_(call())


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "recordable", lambda network: not network.training and not torch.is_grad_enabled())


def inputs(b: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, 4, 2, 3, 3, dtype=dtype), torch.arange(b), torch.randn(b, 7, 8, dtype=dtype)


@pytest.mark.usefixtures("on_cpu")
@torch.no_grad()
def test_the_third_call_of_a_kind_is_recorded_and_all_give_what_the_network_gives() -> None:
    network, recorder = Network().eval(), Recorder()
    recordings = Recordings(record=recorder)
    call = recordings.of(network)
    results = []
    for number in range(6):
        x = inputs()
        results.append((call(*x), network(*x)))
        assert recorder.recorded == (number >= 2)
    for replayed, expected in results:  # also the earlier ones, which later replays must not overwrite
        torch.testing.assert_close(replayed, expected)
    with torch.inference_mode():  # the same recording in another mode
        x = inputs()
        torch.testing.assert_close(recordings.of(network)(*x), network(*x))
    assert recorder.recorded == 1


@pytest.mark.usefixtures("on_cpu")
@torch.no_grad()
def test_weights_may_change_in_place_and_moved_ones_are_recorded_anew() -> None:
    network, recorder = Network().eval(), Recorder()
    recordings = Recordings(plain_calls=0, record=recorder)
    x = inputs()
    recordings.of(network)(*x)
    network.scale.mul_(3)
    torch.testing.assert_close(recordings.of(network)(*x), network(*x))
    assert recorder.recorded == 1
    network.scale.data = network.scale.data.clone()
    recordings.of(network)(*x)
    assert recorder.recorded == 2


@pytest.mark.usefixtures("on_cpu")
@torch.no_grad()
def test_every_kind_of_call_has_its_own_recording_and_the_oldest_go() -> None:
    network, recorder = Network().eval(), Recorder()
    recordings = Recordings(capacity=2, plain_calls=0, record=recorder)
    call = recordings.of(network)
    call(*inputs(2))
    call(*inputs(3))
    call(*inputs(2))
    assert recorder.recorded == 2
    call(*inputs(2, torch.float64))  # the batch of 3 goes
    call(*inputs(2))
    assert recorder.recorded == 3
    with torch.autocast("cpu", torch.bfloat16):
        call(*inputs(2))
    assert recorder.recorded == 4
    recordings.clear()
    call(*inputs(2))
    assert recorder.recorded == 5


@pytest.mark.usefixtures("on_cpu")
def test_a_sampling_is_the_same() -> None:
    network = Network().eval()
    noise, text, empty = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 7, 8), torch.randn(7, 8)
    for sampler in (Sampler("ddim", 8), Sampler("dpm++", 8)):
        recorder = Recorder()
        with torch.inference_mode():
            replayed = sampler.sample(Recordings(record=recorder).of(network), noise, text, empty)
        assert recorder.recorded == 1
        torch.testing.assert_close(replayed, sampler.sample(network, noise, text, empty), rtol=0, atol=0)


@pytest.mark.usefixtures("on_cpu")
@torch.no_grad()
def test_what_cannot_be_recorded_says_how_to_go_on() -> None:
    def fail(error: Exception) -> Any:
        raise error

    call = Recordings(plain_calls=0, record=lambda call: fail(RuntimeError("operation not permitted"))).of(Network().eval())
    with pytest.raises(RuntimeError, match="cuda_graph=false") as caught:
        call(*inputs())
    assert "not permitted" in str(caught.value.__cause__)
    call = Recordings(plain_calls=0, record=lambda call: fail(torch.OutOfMemoryError("x"))).of(Network().eval())
    with pytest.raises(torch.OutOfMemoryError):
        call(*inputs())


def test_networks_on_a_cpu_are_called_as_they_are() -> None:
    network = Network().eval()
    with torch.no_grad():
        assert not recordable(network)
        assert Recordings().of(network) is network


def test_recorded_are_networks_whole_on_one_gpu_in_evaluation_without_gradients() -> None:
    class Parameter:
        device = torch.device("cuda", 0)

    class Sharded(Parameter):
        placements = ()

    class Other(Parameter):
        device = torch.device("cuda", 1)

    class Stub:
        training = False

        def __init__(self, *parameters: Any) -> None:
            self.parameters = lambda: iter(parameters)

    whole: Any = Stub(Parameter(), Parameter())
    assert not recordable(whole)  # gradients are on
    with torch.no_grad():
        assert recordable(whole)
        assert not recordable(Stub(Parameter(), Sharded()))  # type: ignore[arg-type]
        assert not recordable(Stub(Parameter(), Other()))  # type: ignore[arg-type]
        whole.training = True
        assert not recordable(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_replays_equal_calls() -> None:
    network = Network().eval().cuda().requires_grad_(False)
    noise, text, empty = torch.randn(2, 4, 2, 3, 3).cuda(), torch.randn(2, 7, 8).cuda(), torch.randn(7, 8).cuda()
    recordings = Recordings()
    for mixed in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=mixed), torch.inference_mode():
            network.scale.mul_(0.5)
            expected = Sampler("dpm++", 8).sample(network, noise, text, empty)
            torch.testing.assert_close(Sampler("dpm++", 8).sample(recordings.of(network), noise, text, empty), expected, rtol=0, atol=0)
    assert network.calls == 2 * (8 + 2 + 1)

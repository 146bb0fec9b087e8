"""CUDA graphs of the training step: what is recorded when, anywhere; that a replay is the network itself, on a GPU."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small_training import MadeUpData, fit, small_module, small_unet
from tiny_model import UNET
from torch import Tensor

from t2v.training import graphs
from t2v.training.graphs import MOST, RecordedNetwork, own_gradients
from t2v.training.mixture import JointMixture
from t2v.training.strategies import FullyShardedStrategy

BATCH = {"image": 2, "video": 2}


def inputs(b: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b)
    sample, text = torch.randn(b, 4, 2, 4, 4, generator=generator), torch.randn(b, 5, UNET["cross_attention_dim"], generator=generator)
    return sample.to(device, dtype), torch.arange(b, device=device), text.to(device, dtype)


def test_each_shape_is_recorded_once_and_the_fifth_runs_unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_unet()
    recorded: list[tuple[int, ...]] = []

    def record(network: Any, inputs: tuple[Tensor, ...]) -> Any:
        recorded.append(tuple(inputs[0].shape))
        return lambda *arguments: 1.01 * network(*arguments)

    monkeypatch.setattr(graphs, "record", record)
    called = RecordedNetwork(network)
    for b in (1, 2, 1, 3, 4, 2, 5, 1):
        sample, time, text = inputs(b)
        factor = 1 if b > MOST else 1.01
        torch.testing.assert_close(called(sample, time, text), factor * network(sample, time, text))
    assert [shape[0] for shape in recorded] == [1, 2, 3, 4]
    assert called.recordings == MOST
    network.eval()
    assert len(called.recorded) == MOST  # evaluation is another kind of call, and there is no room


@pytest.mark.parametrize("wrong", [1.5, float("nan")])
def test_what_was_recorded_wrongly_runs_unrecorded(
    wrong: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = small_unet(temporal_dropout=0.5)
    monkeypatch.setattr(graphs, "record", lambda network, inputs: lambda *arguments: wrong * network(*arguments))
    torch.manual_seed(3)
    expected = network(*inputs(2)), torch.rand(1)
    torch.manual_seed(3)
    found = RecordedNetwork(network)(*inputs(2)), torch.rand(1)
    torch.testing.assert_close(found, expected)  # the same dropout, too: comparing uses up no random number
    assert "graphs   none for 2 x 4 x 2 x 4 x 4: recorded, its gradient is off by" in capsys.readouterr().out


def test_a_step_in_which_something_was_recorded_runs_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no recording lies between a replay and its backward pass; losses, data and updates are those of the other trainings."""
    events: list[str] = []

    def record(network: Any, inputs: tuple[Tensor, ...]) -> Any:
        events.append("record")

        def replay(*arguments: Tensor) -> Tensor:
            events.append("replay")
            return network(*arguments)

        return replay

    monkeypatch.setattr(graphs, "record", record)
    updates = []
    for recorded in (True, False):
        module, data = small_module(), MadeUpData(BATCH, BATCH, JointMixture())
        if recorded:
            monkeypatch.setattr(module, "on_train_start", module.record_network)
        fit(module, data, tmp_path, steps=2)
        updates.append(module.state_dict())
        assert [m.stream for m in module.micro_batches] == ["video", "image"]
    assert events == ["record", "replay"] + ["replay"] + ["record", "replay"] + ["replay"] + 2 * ["replay", "replay"]
    torch.testing.assert_close(*updates, rtol=0, atol=1e-12)


def test_gradients_of_their_own_are_zero_and_stay_where_they_are() -> None:
    network = small_unet()
    own_gradients(network.parameters())
    first = next(network.parameters())
    assert first.grad is not None
    place = first.grad.data_ptr()
    first.grad += 1
    own_gradients(network.parameters())
    assert first.grad.data_ptr() == place
    assert not first.grad.any()


@pytest.mark.parametrize("which", ["attention", "all"])
def test_what_cannot_be_recorded_is_refused(which: str, tmp_path: Path) -> None:
    """Before the networks have memory, and wherever they are recorded after all."""
    module = small_module(unet=small_unet(gradient_checkpointing=which), cuda_graphs=True)
    module.configure_model = lambda: pytest.fail("networks with memory")
    with pytest.raises(ValueError, match=f"cuda_graphs=true.*gradient_checkpointing={which}.*elementwise"):
        fit(module, MadeUpData(BATCH, BATCH, JointMixture()), tmp_path)
    with pytest.raises(ValueError, match="cannot record"):
        small_module(unet=small_unet(gradient_checkpointing=which)).record_network()


def test_compiled_blocks_are_not_recorded(tmp_path: Path) -> None:
    module = small_module(unet=small_unet(fused_kernels=False), compile="eager", cuda_graphs=True)
    module.configure_model = lambda: pytest.fail("networks with memory")
    with pytest.raises(ValueError, match=r"compile=eager and module\.cuda_graphs=true do not go together: set module\.cuda_graphs=false"):
        fit(module, MadeUpData(BATCH, BATCH, JointMixture()), tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_replay_is_the_network_on_a_gpu() -> None:
    network = small_unet(temporal_dropout=0.1).float().cuda()
    called = RecordedNetwork(network)
    for b in (1, 2, 1, 2):
        sample, time, text = inputs(b, "cuda", torch.float32)
        found = []
        for function in (network, called):
            torch.manual_seed(7)
            with torch.autocast("cuda", torch.bfloat16):
                loss = function(sample, time, text).float().square().mean()
            found.append((loss, *torch.autograd.grad(loss, list(network.parameters()))))
        for x, y in zip(*found, strict=True):
            assert (x - y).norm() <= 0.1 * x.norm()  # each by its own size, which bfloat16 rounds by up to 0.08 of it


def said_under_fsdp(folder: Path) -> str:
    """With recomputation, and compiled blocks, that could not be recorded."""
    unet = small_unet(gradient_checkpointing="all", fused_kernels=False)
    module, said = small_module(unet=unet, cuda_graphs=True, compile="eager"), io.StringIO()
    with contextlib.redirect_stdout(said):
        fit(module, MadeUpData(BATCH, BATCH, JointMixture()), folder, strategy=FullyShardedStrategy(gather="block"))
    assert module.recorded is None
    return said.getvalue()


def test_sharded_networks_are_not_recorded_and_it_is_said(tmp_path: Path) -> None:
    (said,) = on_ranks(said_under_fsdp, 1, tmp_path, tmp_path)
    assert "graphs   none: strategy.gather=block" in said


def test_without_a_gpu_nothing_is_recorded_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = small_module(cuda_graphs=True)
    fit(module, MadeUpData(BATCH, BATCH, JointMixture()), tmp_path)
    assert module.recorded is None
    assert "graphs   none: there is no NVIDIA GPU" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["DDPStrategy", "SingleDeviceStrategy"])
def test_every_other_strategy_records(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pytorch_lightning.strategies as strategies

    module, recorded = small_module(cuda_graphs=True), []
    trainer = SimpleNamespace(strategy=object.__new__(getattr(strategies, strategy)), world_size=2, optimizers=[None])
    monkeypatch.setattr(type(module), "trainer", trainer)
    monkeypatch.setattr(type(module), "device", torch.device("cuda"))
    monkeypatch.setattr(module, "record_network", lambda: recorded.append(True))
    monkeypatch.setattr(module, "forget_gradients", lambda: None)
    monkeypatch.setattr("t2v.training.module.lay_out_like_parameters", lambda optimizer: None)
    module.on_train_start()
    assert recorded == [True]

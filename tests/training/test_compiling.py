"""module.compile: blocks compiled one by one make the update of plain ones, under every strategy; what cannot go together is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small_training import MadeUpData, fit, small_module, small_unet

from t2v.models.spatio_temporal import blocks_of
from t2v.training.compiling import compile_blocks, require_compiler
from t2v.training.mixture import JointMixture
from t2v.training.nan_watch import first_bad_layer
from t2v.training.strategies import FullyShardedStrategy

STRATEGIES: dict[str, Any] = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": FullyShardedStrategy,
    "fsdp_block": lambda: FullyShardedStrategy(gather="block"),
}
PLAIN = {"fused_kernels": False}
FEW = {**PLAIN, "num_temporal_attentions": 0}


def trained(folder: Path, strategy: str, world: int, unet: dict[str, Any], compile: str | None, resumed: bool = False) -> dict[str, Any]:
    """Two steps, float64: weights of the network and of its average. `resumed`: the second step in another life."""
    options: dict[str, Any] = {}
    if resumed:
        module = small_module(unet=small_unet(**unet), compile=compile)
        trainer = fit(module, data(), folder, strategy=STRATEGIES[strategy](), world=world, steps=1)
        trainer.save_checkpoint(folder / "step-00000001")
        options = {"resume": folder / "step-00000001"}
    module = small_module(unet=small_unet(**unet), compile=compile)
    fit(module, data(), folder, strategy=STRATEGIES[strategy](), world=world, **options)
    networks = [module.unet] if module.gathered is None else module.gathered.streams.values()
    assert all(("forward" in vars(block)) == (compile is not None) for network in networks for block in blocks_of(network))
    assert not any("forward" in vars(block) for block in blocks_of(module.ema_unet))
    state = module.state_dict()
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}


def data() -> MadeUpData:
    return MadeUpData({"image": 2, "video": 2}, {"image": 2, "video": 2}, JointMixture())


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    worst = max(float((one[name] - other[name]).abs().max()) for name in one)
    assert worst < 1e-9, worst


def test_compiled_blocks_make_the_update_of_plain_ones(tmp_path: Path) -> None:
    """What torch traces, run as it is: no compiler is needed, and no half minute."""
    expected = trained(tmp_path, "single", 1, FEW, None)
    assert_same(expected, trained(tmp_path, "single", 1, FEW, "eager"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world", "recompute"),
    [("single", 1, "none"), ("ddp", 2, "none"), ("fsdp", 2, "none"), ("fsdp", 2, "all"), ("fsdp_block", 2, "all")],
)
def test_compiled_blocks_go_with_every_strategy(strategy: str, world: int, recompute: str, tmp_path: Path) -> None:
    """All kinds of blocks, images and videos, forward and backward graphs as inductor gets them; one process goes on from a checkpoint."""
    unet = {**PLAIN, "gradient_checkpointing": recompute}
    expected = trained(tmp_path, "single", 1, unet, None)
    if world == 1:
        assert_same(expected, trained(tmp_path, strategy, 1, unet, "aot_eager", True))
        return
    for rank in on_ranks(trained, world, tmp_path, tmp_path, strategy, world, unet, "aot_eager", timeout=300):
        assert_same(expected, rank)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductor_s_code_is_the_network() -> None:
    """The least network that there is, float32."""
    kinds = {"down_block_types": ["DownBlock3D"], "up_block_types": ["UpBlock3D"], "num_temporal_convs": 0, "num_temporal_attentions": 0}
    plain, compiled = (small_unet(**PLAIN, **kinds).float() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compile_blocks(compiled, "inductor")
    sample, text = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 5, plain.config["cross_attention_dim"])
    found = []
    for network in (plain, compiled):
        y = network(sample, torch.tensor([3, 500]), text)
        found.append((y, *torch.autograd.grad(y.square().mean(), list(network.parameters()))))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_the_first_bad_layer_inside_a_compiled_block_is_found() -> None:
    network = small_unet(**FEW)
    network.mid_block.resnets[0].conv1.weight.data.fill_(1e308)
    compile_blocks(network, "eager")
    text = torch.zeros(1, 5, network.config["cross_attention_dim"], dtype=torch.float64)

    def forward() -> Any:
        return network(torch.ones(1, 4, 1, 4, 4, dtype=torch.float64), torch.zeros(1, dtype=torch.long), text)

    forward()  # compiled before the search
    assert first_bad_layer(network, forward) == "layer mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("unet", "options", "words"),
    [
        ({}, {"compile": "inductor"}, "unet.fused_kernels=true is not: set unet.fused_kernels=false"),
        (PLAIN | {"gradient_checkpointing": "elementwise"}, {"compile": "inductor"}, "use none, attention or all"),
        (PLAIN, {"compile": "other"}, "module.compile=other is unknown; torch.compile has .*inductor"),
    ],
)
def test_what_cannot_be_compiled_is_refused(unet: dict[str, Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_module(unet=small_unet(**unet), **options)


def test_a_missing_compiler_is_named_before_the_first_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    require_compiler("eager", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no g\+\+: install one, say where it is with CXX=PROGRAM"):
        fit(small_module(unet=small_unet(**FEW), compile="inductor"), data(), tmp_path)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    (tmp_path / "c++").touch(mode=0o755)
    require_compiler("inductor", torch.device("cpu"))

"""A checkpoint of any number of ranks in any strategy is the same folder; a disk that refuses stops nobody."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from ranks import on_ranks
from safetensors.torch import load_file
from small_training import MadeUpData, fit, small_module, small_unet
from tiny_model import read_tiny_parts
from torch import Tensor

from t2v import checkpoint
from t2v.checkpoint import CheckpointError, Piece, reserve, write_pieces
from t2v.models.spatio_temporal import stages_of
from t2v.models.unet import VideoUNet
from t2v.pipeline import TextToVideoPipeline
from t2v.training import checkpoints
from t2v.training.callbacks.samples import SampleVideos
from t2v.training.checkpoints import Checkpoints, FolderCheckpointIO, one_of_all
from t2v.training.learning_rate import cosine
from t2v.training.mixture import JointMixture
from t2v.training.run import farewell
from t2v.training.sharding import gathered_together, is_sharded, local, materialise, size_of
from t2v.training.strategies import FullyShardedStrategy

BATCH = {"image": 3, "video": 3}
KINDS = ("resnets", "temp_convs", "attentions", "temp_attentions")
STRATEGIES: dict[str, Any] = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": FullyShardedStrategy,
    "fsdp_block": partial(FullyShardedStrategy, gather="block"),
}


def train(folder: Path, strategy: str, world: int, steps: int, resume: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train and save every step in `folder`."""
    saving = Checkpoints(every_n_steps=1, keep=9)
    data = MadeUpData(BATCH, {"image": 2, "video": 2}, JointMixture())
    callbacks = [*options.pop("callbacks", []), saving]
    module = options.pop("module", None) or small_module()
    fit(module, data, folder, strategy=STRATEGIES[strategy](), world=world, steps=steps, resume=resume, callbacks=callbacks, **options)
    return {"saved": saving.saved_step, "tried": saving.tried_step, "farewell": farewell(saving, steps) if saving.received else ""}


def tensors(folder: Path) -> dict[str, Tensor]:
    files = ("unet.safetensors", "ema.safetensors", "train/optimizer.safetensors")
    return {f"{file}:{name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps in one process."""
    folder = tmp_path_factory.mktemp("straight")
    train(folder, "single", 1, 3)
    return folder


def test_a_damaged_file_of_the_optimizer_is_named(straight: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint.step_folder(straight, 3), tmp_path / "step-00000003"))
    moments = folder / "train" / "optimizer.safetensors"
    with moments.open("r+b") as file:
        file.seek(20)
        file.write(b"\0" * 8)
    with pytest.raises(checkpoint.CheckpointError, match=r"optimizer.safetensors is damaged.*continues from the one before"):
        train(tmp_path, "single", 1, 4, resume=folder)


def test_a_disk_that_holds_no_checkpoint_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000))
    with pytest.raises(checkpoint.CheckpointWriteError, match=r"has 0.00 GiB free, .* needed"):
        train(tmp_path, "single", 1, 1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("fsdp", 2), ("single", 1)),
        pytest.param(("single", 1), ("fsdp", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp", 2), ("fsdp", 3), marks=pytest.mark.slow),
        pytest.param(("ddp", 2), ("fsdp", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp_block", 2), ("fsdp", 3), marks=pytest.mark.slow),
    ],
)
def test_another_strategy_continues(straight: Path, first: tuple[str, int], second: tuple[str, int], tmp_path: Path) -> None:
    """float64: what two strategies made, one after the other, is what one process makes alone."""
    for (strategy, world), steps, resume in ((first, 2, None), (second, 3, checkpoint.step_folder(tmp_path, 2))):
        if strategy == "single":
            train(tmp_path, strategy, world, steps, resume)
        else:
            on_ranks(train, world, tmp_path, tmp_path, strategy, world, steps, resume)
        step = checkpoint.step_folder(tmp_path, steps)
        checkpoint.check(step)
        expected, found = tensors(checkpoint.step_folder(straight, steps)), tensors(step)
        assert expected.keys() == found.keys()
        worst = max(float((expected[name] - found[name]).abs().max()) for name in expected)
        assert worst < 1e-10, worst
    sizes = [{path.name: path.stat().st_size for path in folder.glob("*.safetensors")} for folder in (step, checkpoint.latest(straight))]
    assert sizes[0] == sizes[1]


def recomputing(folder: Path, which: str) -> list[int]:
    module = small_module(unet=small_unet(gradient_checkpointing=which))
    train(folder, "fsdp", 2, 3, module=module)
    return [len(blocks) for blocks in gathered_together(module.unet)]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["attention", "all"])
def test_blocks_that_are_gathered_together_recompute_one_by_one(straight: Path, which: str, tmp_path: Path) -> None:
    sizes, _ = on_ranks(recomputing, 2, tmp_path, tmp_path, which)
    assert max(sizes) > 1
    expected, found = (tensors(checkpoint.step_folder(folder, 3)) for folder in (straight, tmp_path))
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) < 1e-10


def test_what_is_gathered_together_is_hardly_larger_than_the_largest_block() -> None:
    unet = small_unet(block_out_channels=[16, 64], down_block_types=["CrossAttnDownBlock3D"] * 2, up_block_types=["CrossAttnUpBlock3D"] * 2)
    pieces = gathered_together(unet)
    blocks = [block for piece in pieces for block in piece]
    assert len(pieces) < len(blocks) == len(set(blocks))
    assert sum(map(size_of, blocks)) == sum(size_of(block) for stage in stages_of(unet) for kind in KINDS for block in getattr(stage, kind))
    assert max(sum(map(size_of, piece)) for piece in pieces) <= 1.5 * max(map(size_of, blocks))
    first = unet.down_blocks[0]
    assert blocks[:4] == [first.resnets[0], first.temp_convs[0], first.attentions[0], first.temp_attentions[0]]


@pytest.mark.slow
def test_a_sharded_checkpoint_is_a_model_for_everyone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_ranks(train, 2, tmp_path, tmp_path, "fsdp", 2, 1)
    read_tiny_parts(monkeypatch)
    assert json.loads((checkpoint.step_folder(tmp_path, 1) / "model.json").read_text())["unet"]["class"] == "VideoUNet"
    video = TextToVideoPipeline.from_pretrained(tmp_path, device="cpu")("a red circle", num_frames=1)
    assert video.shape == (1, 32, 32, 3)


class Obstacle(Callback):
    """From its step on, the folder of checkpoints is where a file stands: no rank can write there. Sends a signal, if asked to."""

    def __init__(self, step: int, send: signal.Signals | None = None) -> None:
        self.step, self.send = step, send

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == self.step:
            place = Path(trainer.default_root_dir) / "checkpoints"
            if trainer.is_global_zero:
                trainer.strategy.checkpoint_io.wait()  # the one before is whole
                place.rename(place.with_name("moved"))
                place.write_text("")
            if self.send is not None and trainer.is_global_zero:
                os.kill(os.getpid(), self.send)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_refused_save_stops_no_rank(strategy: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = on_ranks(refused, 2, tmp_path, tmp_path, strategy)
    assert results == [{"saved": 1, "tried": 3, "farewell": ""}] * 2
    checkpoint.check(tmp_path / "moved" / "step-00000001")
    warnings = [line for line in capfd.readouterr().err.splitlines() if "could not write" in line]
    assert len(warnings) == 2  # steps 2 and 3, one rank each


def refused(folder: Path, strategy: str) -> dict[str, Any]:
    return train(folder, strategy, 2, 3, callbacks=[Obstacle(2)])


def test_a_refused_save_at_a_signal_promises_nothing(tmp_path: Path) -> None:
    result = train(tmp_path, "single", 1, 9, callbacks=[Obstacle(2, signal.SIGTERM)])
    assert "continues from step 1" in result["farewell"]
    assert "no checkpoint could be written" in result["farewell"]
    assert "from there" not in result["farewell"]


def test_a_network_without_memory_gets_the_weights_of_its_seed() -> None:
    torch.manual_seed(5)
    expected = paper_structure()
    with torch.device("meta"):
        network = paper_structure()
    state = torch.get_rng_state()
    materialise(network, torch.device("cpu"), seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), expected.parameters(), strict=True))
    assert sum(1 for name, weight in network.named_parameters() if name.endswith("weight") and not weight.any()) == 39


def paper_structure() -> VideoUNet:
    """The paper's structure and little width."""
    return VideoUNet(block_out_channels=[32, 32, 32, 32], norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32)


def one_level() -> VideoUNet:
    kinds = {"down_block_types": ["CrossAttnDownBlock3D"], "up_block_types": ["CrossAttnUpBlock3D"]}
    return VideoUNet(block_out_channels=[16], norm_num_groups=8, attention_head_dim=8, cross_attention_dim=32, **kinds)


@pytest.mark.parametrize(
    ("strategy", "world", "network", "zeros"),
    [
        ("single", 1, one_level, 14),
        ("ddp", 2, one_level, 14),
        pytest.param("fsdp", 2, paper_structure, 39, marks=pytest.mark.slow),
        pytest.param("fsdp", 3, one_level, 14, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_starts_from_the_weights_of_the_seed(
    strategy: str, world: int, network: Any, zeros: int, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    expected = network().double().state_dict()
    arguments = tmp_path, strategy, world, network
    ranks = on_ranks(built_on_meta, world, tmp_path, *arguments) if world > 1 else [built_on_meta(*arguments)]
    for weights, averages_equal, sharded in ranks:
        assert sum(1 for name, weight in weights.items() if name.endswith("weight") and not weight.any()) == zeros
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
        assert (averages_equal, sharded) == (True, strategy == "fsdp")


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), pytest.param("fsdp", 2, marks=pytest.mark.slow)])
def test_a_file_fills_a_network_without_memory(strategy: str, world: int, tmp_path: Path) -> None:
    arguments = tmp_path, strategy, world, one_level, sevens
    ranks = on_ranks(built_on_meta, world, tmp_path, *arguments) if world > 1 else [built_on_meta(*arguments)]
    for weights, averages_equal, sharded in ranks:
        assert (weights["conv_in.weight"] == 7).all()
        assert weights["conv_out.weight"].std() > 0  # of the seed
        assert (averages_equal, sharded) == (True, strategy == "fsdp")


def sevens(network: Any) -> None:
    """As t2v.models.inflation fills a network."""
    with torch.no_grad():
        network.state_dict()["conv_in.weight"].copy_(torch.full_like(network.conv_in.weight, 7.0, device="cpu"))


def built_on_meta(folder: Path, strategy: str, world: int, network: Any, init: Any = None) -> tuple[dict[str, Tensor], bool, bool]:
    with torch.device("meta"):
        unet = network().double()
    look = Look()
    data = MadeUpData(BATCH, {"image": 2, "video": 2}, JointMixture())
    fit(small_module(unet=unet, seed=5, init=init), data, folder, strategy=STRATEGIES[strategy](), world=world, steps=1, callbacks=[look])
    return look.weights, look.averages_equal, look.sharded


class Look(Callback):
    def on_train_start(self, trainer: Any, module: Any) -> None:
        parameters, averages = (dict(network.named_parameters()) for network in (module.unet, module.ema_unet))
        self.sharded = all(local([p])[0].numel() < p.numel() for p in parameters.values() if p.shape[0] > 1)
        self.weights = {name: whole(p) for name, p in parameters.items()}
        self.averages_equal = all(torch.equal(whole(p), self.weights[name]) for name, p in averages.items())


def whole(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if is_sharded(parameter) else parameter).detach().clone()


@pytest.mark.slow
def test_every_rank_samples_where_the_average_is_sharded(tmp_path: Path) -> None:
    on_ranks(sampled, 2, tmp_path, tmp_path)
    assert (tmp_path / "samples" / "step-00000001" / "00.mp4").stat().st_size > 0


def sampled(folder: Path) -> dict[str, Any]:
    return train(folder, "fsdp", 2, 1, callbacks=[SampleVideos(["a red circle"], every_n_steps=1, num_frames=3)])


def test_pieces_of_many_make_the_file_of_one(tmp_path: Path) -> None:
    whole = {"a": torch.randn(7, 3), "b": torch.arange(5), "half": torch.randn(4, 2).bfloat16(), "scalar": torch.tensor(2.0)}
    reserve(tmp_path / "one", {name: Piece.whole(tensor) for name, tensor in whole.items()})
    write_pieces(tmp_path / "one", {name: Piece.whole(tensor) for name, tensor in whole.items()})
    cuts = [0, 3, 3, 7]  # the second of three has no rows
    for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
        pieces = {
            name: Piece(tensor[begin:end], tuple(tensor.shape), min(begin, len(tensor))) if tensor.ndim else Piece.whole(tensor)
            for name, tensor in whole.items()
        }
        if number == 0:
            reserve(tmp_path / "three", pieces)
        write_pieces(tmp_path / "three", pieces)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "three").read_bytes()
    found = load_file(tmp_path / "three")
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in whole.items())


def test_an_autoencoders_checkpoint_is_no_model_to_generate_with(tmp_path: Path) -> None:
    card = checkpoint.AutoencoderCard(checkpoint.Part("AutoencoderKL", {"latent_channels": 4}), 3)
    weights = {"autoencoder.safetensors": lambda path: checkpoint.save_weights({"a": torch.zeros(1)}, path)}
    folder = checkpoint.write(tmp_path / "step-00000003", weights, card)
    assert checkpoint.read_card(folder, checkpoint.AutoencoderCard) == card
    with pytest.raises(CheckpointError, match="not a text-to-video model"):
        checkpoint.read_card(folder)


def test_removing_a_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    from t2v.training.checkpoints import FolderCheckpointIO

    folder = tmp_path / "step-00000001"
    folder.mkdir()
    (folder / "unet.safetensors").write_text("x")
    FolderCheckpointIO(lambda: None).remove_checkpoint(folder)  # type: ignore[arg-type, return-value]
    assert not list(tmp_path.iterdir())


def test_a_signal_at_one_rank_is_every_rank_s() -> None:
    ranks = [None, signal.SIGUSR1, None, signal.SIGTERM]
    highest = torch.tensor(max(number or 0 for number in ranks))

    def reduce(mine: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        return torch.maximum(mine, highest)

    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    several: Any = SimpleNamespace(world_size=4, strategy=strategy)
    assert [one_of_all(several, number) for number in ranks] == [signal.SIGTERM] * 4
    highest.zero_()
    assert one_of_all(several, None) is None
    alone: Any = SimpleNamespace(world_size=1)
    assert (one_of_all(alone, None), one_of_all(alone, signal.SIGINT)) == (None, signal.SIGINT)


def test_a_signal_that_comes_while_ranks_ask_each_other_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    callback = Checkpoints()
    monkeypatch.setattr(Checkpoints, "_settle", lambda self, trainer: None)
    trainer: Any = SimpleNamespace(global_step=1, max_steps=9, accumulate_grad_batches=1, should_stop=False)
    trainer.strategy = SimpleNamespace(checkpoint_io=object.__new__(FolderCheckpointIO))
    monkeypatch.setattr(FolderCheckpointIO, "is_writing", False)
    monkeypatch.setattr(checkpoints, "one_of_all", lambda trainer, number: callback._receive(signal.SIGUSR1, None) or number)
    callback.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    assert (callback.received, trainer.should_stop) == (signal.SIGUSR1, False)


def resumed_with(folder: Path, first: Path, strategy: str, world: int) -> dict[str, Any]:
    """The third step, with a rate and a decay that the first two did not have."""
    optimizer = partial(torch.optim.AdamW, lr=5e-4, weight_decay=0.5)
    module = small_module(optimizer=optimizer, lr_schedule=cosine(4), temporal_lr_factor=3)
    data = MadeUpData(BATCH, {"image": 2, "video": 2}, JointMixture())
    trainer = fit(module, data, folder, strategy=STRATEGIES[strategy](), world=world, steps=3, resume=first)
    (used,) = trainer.optimizers
    steps = {int(state["step"]) for state in used.state.values()}
    return {"steps": sorted(steps), "groups": [(g["initial_lr"], g["lr"], g["weight_decay"]) for g in used.param_groups]}


@pytest.mark.parametrize(("strategy", "world"), [("single", 1), ("fsdp", 2)])
def test_a_resumed_training_has_the_settings_of_its_own_command(
    straight: Path, tmp_path: Path, strategy: str, world: int, capfd: pytest.CaptureFixture[str]
) -> None:
    (first, *_) = on_ranks(resumed_with, world, tmp_path, tmp_path, checkpoint.step_folder(straight, 2), strategy, world)
    assert first["steps"] == [3]
    assert first["groups"] == [(base, base * cosine(4)(3), 0.5) for base in (5e-4, 1.5e-3)]
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("resume")]
    assert said == [
        "resume   spatial lr is 0.0005 from here on, 0.001 before",
        "resume   spatial weight_decay is 0.5 from here on, 0.01 before",
        "resume   temporal lr is 0.0015 from here on, 0.001 before",
        "resume   temporal weight_decay is 0.5 from here on, 0.01 before",
    ]

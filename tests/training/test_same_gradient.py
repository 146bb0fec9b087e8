"""One process, DDP and FSDP on gloo, accumulation and the two mixtures make the same update: float64, sizes that ranks do not divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small_training import MadeUpData, fit, small_module, small_unet
from torch import Tensor

from t2v.models.unet import VideoUNet
from t2v.training.mixture import JointMixture, RankMixture
from t2v.training.strategies import FullyShardedStrategy

BATCH = {"image": 5, "video": 7}
STRATEGIES: dict[str, Any] = {
    "single": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": FullyShardedStrategy,
    "fsdp_pass": lambda: FullyShardedStrategy(gather="pass"),
    "fsdp_block": lambda: FullyShardedStrategy(gather="block"),
}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def update(
    strategy: str, world: int, micro: int, folder: Path, batch: dict[str, int] = BATCH, mixture: Any = JointMixture, **options: Any
) -> dict[str, Any]:
    """Two steps; what they left in the network and its average, and what each rank read."""
    module = small_module(**options.pop("module", {}))
    data = MadeUpData(batch, {"image": micro, "video": micro}, mixture())
    fit(module, data, folder, strategy=STRATEGIES[strategy](), world=world, **options)
    weights = {name: whole(value.detach()) for name, value in module.state_dict().items()}
    return {"weights": weights, "norm": module.watch.norm, "used": data.used}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return update("single", 1, 16, tmp_path_factory.mktemp("alone"))


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["weights"].keys() == other["weights"].keys()
    worst = max(float((one["weights"][name] - other["weights"][name]).abs().max()) for name in one["weights"])
    assert worst < 1e-10, worst
    assert abs(float(one["norm"]) - float(other["norm"])) < 1e-10 * float(one["norm"])


def assert_every_sample_once(ranks: list[dict[str, Any]], batch: dict[str, int], steps: int = 2) -> None:
    used = sorted(sample for rank in ranks for sample in rank["used"])
    assert used == sorted((stream, index) for stream, size in batch.items() for index in range(steps * size))


def test_accumulation_is_exact(alone: dict[str, Any], tmp_path: Path) -> None:
    start = small_module().state_dict()
    assert max(float((alone["weights"][name] - start[name]).abs().max()) for name in start) > 1e-4  # it did move
    assert_same(alone, update("single", 1, 2, tmp_path))


@pytest.mark.parametrize(
    ("strategy", "world", "micro"), [("ddp", 2, 2), ("ddp", 4, 4), ("fsdp", 2, 2), ("fsdp_pass", 2, 2), ("fsdp_block", 2, 2)]
)
def test_ranks_make_the_update_of_one_process(alone: dict[str, Any], strategy: str, world: int, micro: int, tmp_path: Path) -> None:
    ranks = on_ranks(update, world, tmp_path, strategy, world, micro, tmp_path)
    assert_every_sample_once(ranks, BATCH)
    for rank in ranks:
        assert_same(alone, rank)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("fsdp_block", marks=pytest.mark.slow)])
def test_a_rank_without_samples_takes_part(strategy: str, tmp_path: Path) -> None:
    """3 and 3 samples in micro-batches of one: rank 1 has nothing in the second."""
    batch = {"image": 3, "video": 3}
    expected = update("single", 1, 8, tmp_path, batch)
    ranks = on_ranks(update, 2, tmp_path, strategy, 2, 1, tmp_path, batch)
    assert_every_sample_once(ranks, batch)
    assert_same(expected, ranks[0])


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 4), ("fsdp", 2), pytest.param("fsdp_block", 2, marks=pytest.mark.slow)])
def test_divided_ranks_make_the_update_of_joint_ones(alone: dict[str, Any], strategy: str, world: int, tmp_path: Path) -> None:
    ranks = on_ranks(update, world, tmp_path, strategy, world, 2, tmp_path, BATCH, RankMixture)
    assert {stream for stream, _ in ranks[0]["used"]} == {"image"}
    assert all({stream for stream, _ in rank["used"]} == {"video"} for rank in ranks[1:])
    assert_every_sample_once(ranks, BATCH)
    assert_same(alone, ranks[0])


def update_on_meta(strategy: str, world: int, folder: Path) -> dict[str, Any]:
    """As `update`, of a network that gets its memory from configure_model."""
    config = small_unet().config
    with torch.device("meta"):
        unet = VideoUNet(**config).double()
    return update(strategy, world, 4, folder, module={"unet": unet})


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_block"])
def test_rows_that_ranks_do_not_divide_are_trained_too(strategy: str, tmp_path: Path) -> None:
    """Three ranks: FSDP pads rows and may move them when it first runs, after the optimizer was made."""
    expected = update_on_meta("single", 1, tmp_path)
    for rank in on_ranks(update_on_meta, 3, tmp_path, strategy, 3, tmp_path):
        assert_same(expected, rank)

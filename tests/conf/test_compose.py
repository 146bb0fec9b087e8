"""Every shipped configuration composes, and every `_target_` exists and takes the arguments that it is given."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from t2v.configuration import config_dir

CONF = config_dir()


def composed(entry: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(entry, overrides=list(overrides), return_hydra_config=False)
    return cfg


def targets(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node with a `_target_`; interpolated copies included."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for key in node:
            if not OmegaConf.is_missing(node, key):
                yield from targets(node.get(key), f"{path}.{key}")
    elif isinstance(node, ListConfig):
        for number, item in enumerate(node):
            yield from targets(item, f"{path}.{number}")


def check_targets(cfg: DictConfig) -> None:
    for path, node in targets(cfg):
        target = get_object(node["_target_"])
        signature = inspect.signature(target)
        given = {key for key in node if not str(key).startswith("_")}
        if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            continue
        unknown = given - set(signature.parameters)
        assert not unknown, f"{path}: {node['_target_']} takes no {', '.join(sorted(unknown))}"


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def train_config(*overrides: str) -> DictConfig:
    cfg = composed("train", *overrides, "name=test", "run=test")
    for key in ("trainer.profiler.dirpath",):
        if OmegaConf.select(cfg, key, throw_on_missing=False, throw_on_resolution_failure=False) is not None or "profiler" in str(
            overrides
        ):
            OmegaConf.update(cfg, key, "profile")
    return cfg


@pytest.mark.parametrize("experiment", names("experiment"))
def test_experiment_matches_the_signatures_it_feeds(experiment: str) -> None:
    check_targets(train_config(f"experiment={experiment}"))


GROUPS = [
    (group, option)
    for group in ("data", "mixture", "unet", "autoencoder", "text_encoder", "init", "schedule", "objective", "sampler", "optimizer")
    for option in names(group)
] + [
    (group, option)
    for group in ("timesteps", "lr_schedule", "trainer", "strategy", "callbacks", "logger", "debug", "sweep", "training_path", "paths")
    for option in names(group)
]


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_every_option_matches_the_signatures_it_feeds(group: str, option: str) -> None:
    check_targets(train_config("experiment=shapes", f"{group}={option}"))


@pytest.mark.parametrize("experiment", [name for name in names("experiment") if name != "shapes_autoencoder"])
def test_experiments_leave_no_settings_of_callbacks_that_were_replaced(experiment: str) -> None:
    for option in names("callbacks") if experiment.startswith("shapes") else ("default", "msrvtt"):  # the others are for shapes
        chosen = train_config(f"experiment={experiment}", f"callbacks={option}").callbacks
        assert all(node is None or "_target_" in node for node in chosen.values()), option


def test_base_256_states_the_paper() -> None:
    """Section 4.1.3 and 4.1.2, value by value."""
    cfg = train_config("experiment=base_256")
    assert cfg.optimizer["_target_"] == "torch.optim.AdamW"
    assert cfg.optimizer.lr == 5e-5
    assert (cfg.batch.image, cfg.batch.video, cfg.trainer.max_steps) == (1400, 3200, 267_000)
    assert (cfg.data.video.num_frames, cfg.data.video.fps, cfg.data.video.size, cfg.data.image.size) == (16, 3, 256, 256)
    assert cfg.mixture.image_weight == 1 / 8
    assert cfg.schedule.num_timesteps == 1000
    assert (cfg.sampler.scheduler, cfg.sampler.num_steps) == ("ddim", 50)
    assert (cfg.unet.num_temporal_convs, cfg.unet.num_temporal_attentions) == (4, 2)  # N_2, N_4
    assert cfg.unet.cross_attention_dim == 1024


def test_base_256_builds_the_paper_s_network() -> None:
    """On meta: no memory is spent."""
    with torch.device("meta"):
        unet = instantiate(train_config("experiment=base_256").unet)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 1_411_233_860


def test_heavy_nodes_are_interpolated_once() -> None:
    """Hydra would build a network for every `${unet}`."""
    text = "\n".join(path.read_text() for path in Path(CONF).rglob("*.yaml"))
    for heavy in ("unet", "autoencoder", "text_encoder"):
        assert text.count("${" + heavy + "}") == 1, heavy

"""Every shipped sweep: each of its jobs composes, and what is compared is comparable."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from t2v.configuration import config_dir

EXPERIMENT = {"guidance": "shapes", "seeds": "shapes", "claim1": "shapes_gpu", "images": "shapes_gpu", "paths": "shapes_gpu"}
"""The others: shapes_motion."""
SWEEPS = sorted(path.stem for path in (config_dir() / "sweep").glob("*.yaml"))
OF_COMPUTE = ("motion", "motion_convolution", "motion_attention", "motion_positions", "motion_frames")


def composed(*overrides: str, hydra: bool = False) -> Any:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", overrides=[*overrides, "name=test", "run=test"], return_hydra_config=hydra)


def jobs(sweep: str) -> Iterator[list[str]]:
    """The overrides of each job, as Hydra's sweeper makes them."""
    base = [f"experiment={EXPERIMENT.get(sweep, 'shapes_motion')}", f"sweep={sweep}"]
    base += ["init.path=start"] if sweep in ("claim1", "claim3") else []
    params = composed(*base, hydra=True).hydra.sweeper.params
    for values in itertools.product(*(str(value).split(",") for value in params.values())):
        yield [*base, *(f"{name}={value.strip()}" for name, value in zip(params, values))]


@pytest.mark.parametrize("sweep", SWEEPS)
def test_jobs_differ_in_what_is_compared(sweep: str) -> None:
    resolved = []
    for overrides in itertools.islice(jobs(sweep), 6):
        cfg = composed(*overrides)
        columns = composed(*overrides, hydra=True).hydra.callbacks.sweep_table.columns
        measured = {*(name for name, node in cfg.callbacks.items() if node is not None), "val", "loss"}
        assert all(name.split("/")[0] in measured for name in (cfg.metric, *columns))
        resolved.append(OmegaConf.to_yaml(cfg))
    assert len(set(resolved)) == len(resolved) > 1


def test_a_sweep_s_settings_win_over_its_experiment_s() -> None:
    cfg = composed(*next(jobs("claim3")))
    assert (cfg.trainer.max_steps, cfg.callbacks.score.every_n_steps) == (400, 50)
    assert composed(*next(jobs("claim1"))).callbacks.samples is None


def test_a_loss_is_the_mean_of_the_last_fifty_steps_and_the_paths_are_what_they_say() -> None:
    of_path = {}
    for overrides in jobs("paths"):
        cfg = composed(*overrides)
        assert cfg.trainer.max_steps % cfg.callbacks.training_log.every_n_steps == 0
        assert cfg.callbacks.training_log.every_n_steps == 50
        of_path[overrides[2]] = cfg
    computed = {
        path.removeprefix("training_path="): (
            cfg.unet.attention_backend,
            cfg.unet.fused_kernels,
            cfg.unet.gradient_checkpointing,
            cfg.module.cuda_graphs,
            cfg.module.compile,
        )
        for path, cfg in of_path.items()
    }
    assert sorted(computed) == sorted(path.stem for path in (config_dir() / "training_path").glob("*.yaml"))
    plain = computed["plain"]
    assert plain == ("sdpa", False, "none", False, None)
    differences = {path: sum(a != b for a, b in zip(values, plain)) for path, values in computed.items()}
    assert differences == dict.fromkeys(computed, 1) | {"plain": 0, "elementwise": 2, "together": 3}
    fastest = composed("experiment=shapes_gpu", "trainer=gpu")
    assert computed["together"][:2] == (fastest.unet.attention_backend, fastest.unet.fused_kernels)


def test_claim_2_compares_equal_compute() -> None:
    """Float operations of one training clip; the backward pass takes twice the forward's in all of them."""
    counted = {}
    for name in OF_COMPUTE:
        with torch.device("meta"):
            unet = instantiate(composed("experiment=shapes_motion", f"unet={name}").unet)
            with FlopCounterMode(display=False) as counter:
                unet(torch.empty(1, 4, 16, 8, 8), torch.zeros(1, dtype=torch.long), torch.empty(1, 77, 64))
        counted[name] = counter.get_total_flops()
        kinds = {part for parameter, _ in unet.named_parameters() for part in parameter.split(".")}
        assert ("temp_convs" in kinds) == (name in ("motion", "motion_convolution")), name
        assert ("temp_attentions" in kinds) == (name in ("motion", "motion_attention", "motion_positions")), name
    assert max(counted.values()) < 1.05 * min(counted.values()), counted


@pytest.mark.parametrize("chosen", [None, "3"])
def test_jobs_side_by_side_run_on_the_gpu_that_was_chosen(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    launcher = composed("experiment=shapes", "hydra/launcher=side_by_side", hydra=True).hydra.launcher
    assert f"export CUDA_VISIBLE_DEVICES={chosen or 0}" in OmegaConf.to_container(launcher, resolve=True)["setup"]

"""Run names, help, and errors that fit on one line; each command in its own process, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import ANY

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig

from t2v.configuration import FRACTIONS, config_dir, groups_of, run_name, values_of_other_kinds


def train(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return subprocess.run([sys.executable, "-m", "t2v.train", *arguments], capture_output=True, text=True, cwd=cwd, env=environment)


def test_run_names_ignore_order_devices_and_paths() -> None:
    name = run_name(["experiment=shapes", "seed=1"])
    assert name == run_name(["seed=1", "experiment=shapes", "trainer.devices=4", "paths.data=/x", "resume=none", "hydra/launcher=slurm"])
    assert name != run_name(["experiment=shapes", "seed=2"])


def test_help_and_configuration_need_no_heavy_import(tmp_path: Path) -> None:
    for arguments in (("--help",), ("--cfg", "job", "experiment=base_256")):
        before = time.process_time(), os.times().children_user
        result = train(*arguments, cwd=tmp_path)
        assert result.returncode == 0
        assert os.times().children_user - before[1] < 3  # seconds of processor time
    assert "267000" in result.stdout
    assert not list(tmp_path.iterdir())


def test_help_offers_what_can_be_chosen() -> None:
    assert groups_of("generate") == {"sampler"}
    assert groups_of("plan") - groups_of("train") == {"hardware"}
    assert {"experiment", "sweep", "unet"} < groups_of("train")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.lr=fast", "a word where conf/ has a number, 0.002"),
        ("optimizer.lr=1", None),
        ("optimizer.lr='1e-3'", "a word where conf/ has a number"),
        ("optimizer.betas=0.9", "a number where conf/ has a list, [0.9, 0.99]"),
        ("batch.video=2.5", "a number where conf/ has a whole number, 14"),
        ("batch.video=${batch.image}", None),
        ("data.video.fps=2.5", None),
        ("metric=null", None),
        ("ema.warmup=maybe", "a word where conf/ has true or false, True"),
        ("ema.warmup={a: 1}", "a group of keys where conf/ has true or false"),
        ("+ema.new=maybe", None),
        ("~callbacks.samples", None),
        ("++unet.num_temporal_convs=[1]", "a list where conf/ has a whole number, 4"),
        ("trainer.devices=auto", None),
        ("seed=null", "nothing where conf/ has a whole number, 0"),
        ("run=12", None),
        ("strategy.timeout_minutes=0.5", None),
        ("data=webvid", None),
    ],
)
def test_values_of_other_kinds_than_conf_has(override: str, words: str | None) -> None:
    wrong = values_of_other_kinds("train", ["experiment=shapes", "strategy=fsdp", override])
    assert wrong == ([] if words is None else [ANY])
    assert all(f"{override} is {words}" in one for one in wrong)


@pytest.mark.parametrize("name", ["''", "a/../../b"])
def test_a_run_without_a_folder_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    result = train("experiment=shapes", f"run={name}", f"paths.experiments={tmp_path}/made", cwd=tmp_path)
    assert result.returncode == 1
    assert "names no folder of its own" in result.stderr


def test_groups_from_elsewhere_are_not_judged() -> None:
    assert values_of_other_kinds("train", ["experiment=mine", "seed=one"]) == []


def test_what_is_a_fraction_anywhere_is_one_everywhere() -> None:
    """Else a fraction would be refused where conf/ happens to have a whole one."""
    kinds: dict[str, set[type]] = {}
    for experiment in sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml")):
        for hardware in sorted(path.stem for path in (config_dir() / "hardware").glob("*.yaml")):
            with initialize_config_dir(str(config_dir()), version_base="1.3"):
                cfg = compose("plan", overrides=[f"experiment={experiment}", f"hardware={hardware}", "strategy=fsdp"])
            for key, value in leaves(cfg):
                kinds.setdefault(key, set()).add(type(value))
    assert len(kinds) > 100
    mixed = {key for key, found in kinds.items() if {int, float} <= found}
    assert {key.split(".")[-1] for key in mixed} <= FRACTIONS


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key in map(str, node):
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing() or child._is_interpolation()):
            yield from leaves(child, f"{prefix}{key}.")
        elif child is not None and not isinstance(child, (DictConfig, ListConfig)):
            yield f"{prefix}{key}", child._value()


def test_values_of_other_kinds_are_refused_before_anything_starts(tmp_path: Path) -> None:
    result = train("experiment=shapes", "optimizer.lr=fast", "seed=one", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        "error: optimizer.lr=fast is a word where conf/ has a number, 0.002; seed=one is a word where conf/ has a whole number, 0"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "Available options: "),
        (("experiment=shpes",), "Did you mean shapes"),
        (("experiment=shapes", "optimzer.lr=1"), "Did you mean optimizer.lr"),
        (("experiment=shapes", "trainer.max_step=1"), "trainer.max_steps"),
        (("experiment=shapes", "mixture=jont"), "Did you mean joint"),
    ],
)
def test_misspelt_options_name_near_matches_in_one_line(tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    result = train(*arguments, cwd=tmp_path)
    assert result.returncode == 1
    assert expected in result.stderr
    assert "run's folder" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_key_without_a_value_is_named_as_it_is_typed(tmp_path: Path) -> None:
    result = train("experiment=shapes", "init=checkpoint", cwd=tmp_path)  # which the module's settings take over
    assert (result.returncode, result.stderr) == (1, "error: init.path not given: write init.path=VALUE\n")


def test_conf_is_found() -> None:
    assert (config_dir() / "experiment" / "base_256.yaml").is_file()

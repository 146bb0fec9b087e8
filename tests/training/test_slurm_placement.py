"""What SLURM says of itself against what the trainer is told; devices that are not there."""

from __future__ import annotations

import signal
import subprocess
from typing import Any

import pytest

from t2v.training import slurm
from t2v.training.slurm import Allocation

STEP = {"SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


def environment(tasks: int, nodes: int, **more: str) -> dict[str, str]:
    return {"SLURM_NTASKS": str(tasks), "SLURM_NNODES": str(nodes), **STEP, **more}


def test_allocation() -> None:
    assert Allocation.of({}) is None
    assert Allocation.of(environment(1, 1, SLURM_JOB_NAME="bash")) is None
    assert Allocation.of(environment(80, 10)) == Allocation(10, 8, True)
    with pytest.raises(ValueError, match=r"#SBATCH --nodes=3 --ntasks-per-node=3"):
        Allocation.of(environment(8, 3))


def test_disagreements_print_the_corrected_line() -> None:
    allocation = Allocation(10, 8, True)
    allocation.check("auto", 10)
    allocation.check(8, 10)
    with pytest.raises(ValueError, match=r"#SBATCH --nodes=1 --ntasks-per-node=8 --gpus-per-node=8"):
        allocation.check(8, 1)
    with pytest.raises(ValueError, match=r"#SBATCH --nodes=10 --ntasks-per-node=4 --gpus-per-node=4"):
        allocation.check(4, 10)
    with pytest.raises(ValueError, match="srun python -m"):
        Allocation(1, 2, False).check(2, 1)


def test_configuration_follows_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra import compose, initialize_config_dir

    from t2v.configuration import config_dir

    def trainer(*overrides: str) -> tuple[Any, Any]:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", overrides=["experiment=shapes", *overrides])
        return cfg.trainer.devices, cfg.trainer.num_nodes

    for name in ("SLURM_NTASKS", "SLURM_NNODES", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    assert trainer() == ("auto", 1)
    assert trainer("trainer=a100_10x8") == (8, 10)
    for name, value in environment(20, 5).items():
        monkeypatch.setenv(name, value)
    assert trainer() == (4, 5)
    assert trainer("trainer=a100_1x8") == (8, 1)


def test_launcher_takes_its_shape_from_the_trainer() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir

    from t2v.configuration import config_dir

    def launcher(*overrides: str) -> Any:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            cfg = compose("train", overrides=["experiment=shapes", "hydra/launcher=slurm", *overrides], return_hydra_config=True)
        return cfg.hydra.launcher

    shape = launcher("trainer=a100_10x8")
    assert (shape.nodes, shape.tasks_per_node, shape.gpus_per_node) == (10, 8, 8)
    with pytest.raises(Exception, match=r"trainer\.devices is auto: give a number"):
        _ = launcher().tasks_per_node


def test_a_missing_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    slurm.require_devices("cpu", 8)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"sees no GPU.*trainer\.accelerator=cpu"):
        slurm.require_devices("gpu", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    slurm.require_devices("gpu", 2)
    with pytest.raises(ValueError, match=r"trainer\.devices=2"):
        slurm.require_devices("gpu", 8)


def test_requeue(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []

    def scontrol(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, len(asked) - 1, "", "not allowed")

    monkeypatch.setattr(slurm.subprocess, "run", scontrol)
    for name in ("SLURM_NTASKS", "SUBMITIT_EXECUTOR", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    slurm.requeue(signal.SIGUSR1)  # no SLURM here
    for name, value in environment(2, 1).items():
        monkeypatch.setenv(name, value)
    slurm.requeue(signal.SIGTERM)  # scancel
    assert asked == []
    with pytest.raises(SystemExit) as done:
        slurm.requeue(signal.SIGUSR1)
    assert done.value.code == 0
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.requeue(signal.SIGUSR1)
    assert "Submit the same script again" in capsys.readouterr().err
    assert asked == [["scontrol", "requeue", "1234"], ["scontrol", "requeue", "7_3"]]
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(SystemExit):
        slurm.requeue(signal.SIGUSR1)
    assert len(asked) == 2

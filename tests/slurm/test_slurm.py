"""The same training through a real SLURM: a multirun of two jobs, and a job that is stopped, queued again and continued."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(REPOSITORY / "tests" / "end_to_end")]

import slurm_cluster  # noqa: E402
from trainings import Trainings  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(slurm_cluster.missing() is not None, reason=str(slurm_cluster.missing())),
]
QUICK = ("trainer.max_steps=3", "loader.num_workers=0", "~callbacks.samples")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        environment.pop("HYDRA_FULL_ERROR", None)
        yield environment


@pytest.fixture
def trainings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path, tmp_path_factory.getbasetemp() / "shapes")


def run(environment: dict[str, str], *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def wait_for(condition: Callable[[], bool], seconds: float, explain: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, explain()
        time.sleep(0.2)


def weights(trainings: Trainings, name: str, step: int) -> dict[str, torch.Tensor]:
    return load_file(trainings.checkpoint(name, step) / "unet.safetensors")


def test_multirun_of_two_jobs_one_of_which_is_preempted(slurm: dict[str, str], trainings: Trainings) -> None:
    """The command waits for both; the preempted job is queued again by submitit, continues in its folder, and has its row in the table."""
    launcher = ["/launcher=slurm"] + [f".launcher.{part}" for part in ("gpus_per_node=null", "cpus_per_task=1", "timeout_min=20")]
    same = ("trainer.max_steps=16", "loader.num_workers=0", "callbacks.samples=null", "callbacks.checkpoints.every_n_steps=2")
    command = trainings.command("-m", "seed=0,1", *same, "trainer.devices=1", *(f"hydra{part}" for part in launcher))
    process = subprocess.Popen(command, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def said() -> str:
        return "\n".join(path.read_text() for path in sorted(trainings.folder.glob("slurm/*/*.[oe][ur][tr]")))

    try:
        wait_for(lambda: any(trainings.folder.glob("shapes/runs/*/checkpoints/step-00000002")), 200, said)
        jobs = run(slurm, "squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").stdout.split()
        assert jobs
        assert run(slurm, "scancel", "--signal=USR1", jobs[0]).returncode == 0
        printed, _ = process.communicate(timeout=500)
    finally:
        process.kill()
    assert process.returncode == 0, printed + said()
    assert "stopped by SIGUSR1" in said()
    assert "Requeued job" in said()
    assert re.search(r"resume   step \d+ from", said()), said()
    table = printed[printed.index("| job |") :]
    rows = re.findall(r"^\| (\d) \| seed=(\d) \| ([\d.e-]+) \| (\S+) \|$", table, re.MULTILINE)
    assert [row[:2] for row in rows] == [("0", "0"), ("1", "1")], table
    assert "score/all" in table.splitlines()[0]
    assert all((Path(row[3]) / "results.json").is_file() for row in rows)


def submit(environment: dict[str, str], trainings: Trainings, output: Path, *overrides: str) -> str:
    """The shipped batch script with two tasks instead of eight GPUs; devices and nodes are not typed again."""
    python, _, _, *arguments = trainings.command(*overrides)
    shape = ["--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", "--time=30", f"--output={output}"]
    command = ["sbatch", *shape, str(REPOSITORY / "slurm" / "train.sbatch"), *arguments]
    result = subprocess.run(command, env=environment | {"PYTHON": python}, capture_output=True, text=True, cwd=trainings.folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-1]


def ended(environment: dict[str, str], job: str) -> bool:
    return not run(environment, "squeue", "--noheader", "--job", job).stdout.strip()


def test_a_stopped_job_is_queued_again_and_ends_with_the_same_weights(slurm: dict[str, str], trainings: Trainings, tmp_path: Path) -> None:
    same = ("strategy=ddp", "trainer.max_steps=20", "lr_schedule.total_steps=20", "loader.num_workers=0", "metric=null")
    same += ("~callbacks.samples", "~callbacks.score", "callbacks.checkpoints.every_n_steps=4", "callbacks.checkpoints.keep=20")
    output = tmp_path / "stopped.out"
    job = submit(slurm, trainings, output, "run=stopped", *same)

    def said() -> str:
        return output.read_text() if output.exists() else ""

    wait_for(trainings.checkpoint("stopped", 4).exists, 180, said)
    began = time.monotonic()
    assert run(slurm, "scancel", "--signal=USR1", job).returncode == 0
    wait_for(lambda: "queued again" in said(), 60, said)
    assert time.monotonic() - began < 30, "saved within 30 s"
    wait_for(lambda: ended(slurm, job), 300, said)
    assert re.search(r"stopped by SIGUSR1 after step \d+", said()), said()
    assert re.search(r"resume   step \d+ from", said()), said()
    assert "on 2 ranks" in said()
    code, straight = trainings.run("run=straight", *same, "trainer.devices=2")
    assert code == 0, straight
    stopped = weights(trainings, "stopped", 20)
    assert all(torch.equal(stopped[name], value) for name, value in weights(trainings, "straight", 20).items())


def test_devices_that_disagree_end_in_one_line(slurm: dict[str, str], trainings: Trainings, tmp_path: Path) -> None:
    output = tmp_path / "wrong.out"
    job = submit(slurm, trainings, output, "run=wrong", *QUICK, "trainer.devices=8")
    wait_for(lambda: ended(slurm, job), 120, output.read_text)
    errors = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output.read_text()
    assert "#SBATCH --nodes=1 --ntasks-per-node=8" in errors[0]
    assert "Traceback" not in output.read_text()

"""Where SLURM has placed this process, what does not fit to it, and how a job is queued again.

One task per GPU, started by srun. Signals: SIGUSR1 (the end of the time limit is near: `--signal=USR1@120`) saves and queues the job again;
SIGTERM (scancel, or a preemption, after which SLURM itself queues the job again) saves and ends.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

FIRST_OF_NO_SRUN = 0xFFFFFFF0  # slurm.h: the last step ids are those of batch scripts, shells of salloc and the like


def first_process() -> bool:
    """Of all ranks, before they are connected: SLURM numbers its tasks; Lightning and torchrun number the processes they start."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "SLURM_PROCID", "NODE_RANK", "LOCAL_RANK"))


def in_step(name: str, otherwise: int, environment: Mapping[str, str] = os.environ) -> int:
    """A number of SLURM's for a task that srun started. Batch scripts and shells of salloc run once, but have those of all tasks."""
    step = int(environment.get("SLURM_STEP_ID", FIRST_OF_NO_SRUN))
    return int(environment.get(name, otherwise)) if step < FIRST_OF_NO_SRUN else otherwise


@dataclass(frozen=True)
class Allocation:
    """What SLURM gave to the job: as many tasks on each of its nodes."""

    nodes: int
    tasks_per_node: int
    started_by_srun: bool

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> Allocation | None:
        """None outside SLURM, and in a shell of salloc or srun, where jobs are called bash or interactive."""
        if "SLURM_NTASKS" not in environment or environment.get("SLURM_JOB_NAME") in ("bash", "interactive"):
            return None
        tasks, nodes = int(environment["SLURM_NTASKS"]), int(environment.get("SLURM_NNODES", 1))
        if tasks % nodes:
            raise ValueError(
                f"SLURM started {tasks} tasks on {nodes} nodes; every node needs as many: #SBATCH --nodes={nodes} "
                f"--ntasks-per-node={-(-tasks // nodes)}, and no --ntasks"
            )
        return Allocation(nodes, tasks // nodes, "SLURM_STEP_ID" in environment)

    def check(self, devices: int | str, num_nodes: int) -> None:
        """Raise ValueError with the corrected line where trainer.devices and trainer.num_nodes are not what SLURM started."""
        if self.nodes * self.tasks_per_node > 1 and not self.started_by_srun:
            raise ValueError(
                f"SLURM gave {self.nodes * self.tasks_per_node} tasks, but only one process runs: "
                "write `srun python -m t2v.train ...` in the batch script"
            )
        wanted = self.tasks_per_node if devices in ("auto", -1) else devices
        if (wanted, num_nodes) != (self.tasks_per_node, self.nodes):
            raise ValueError(
                f"trainer.devices={devices} trainer.num_nodes={num_nodes}, but SLURM started {self.tasks_per_node} tasks on each of "
                f"{self.nodes} nodes, one task per GPU: #SBATCH --nodes={num_nodes} --ntasks-per-node={wanted} --gpus-per-node={wanted}; "
                "or leave trainer.devices and trainer.num_nodes out, they follow SLURM"
            )


def plugins(environment: Mapping[str, str] = os.environ) -> list[Any]:
    """Lightning's view of SLURM, without its own way of queueing again, which saves another kind of checkpoint in another place."""
    allocation = Allocation.of(environment)
    if allocation is None:
        return []
    from lightning_fabric.plugins.environments import SLURMEnvironment

    os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(allocation.tasks_per_node))  # Lightning refuses --ntasks without it
    return [SLURMEnvironment(auto_requeue=False)]


def require_devices(accelerator: str, devices: int | str) -> None:
    """Raise ValueError for a GPU that is not there."""
    if accelerator not in ("gpu", "cuda"):
        return
    import torch

    seen = torch.cuda.device_count()
    if seen == 0:
        raise ValueError(
            f"trainer.accelerator={accelerator}, but torch {torch.__version__} sees no GPU on {socket.gethostname()}: check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, ask SLURM for --gpus-per-node, or use trainer.accelerator=cpu"
        )
    if isinstance(devices, int) and devices > seen:
        raise ValueError(
            f"trainer.devices={devices}, but this process sees {seen} of them on {socket.gethostname()}: trainer.devices={seen}, "
            f"or in SLURM --gpus-per-node={devices} instead of --gpus-per-task, so that every task sees all of its node"
        )


def requeue_when_signalled() -> None:
    """For the time before training has its own handlers: nothing is lost yet, so the job is queued again at once."""
    if Allocation.of() is not None and "SUBMITIT_EXECUTOR" not in os.environ:

        def again(number: int, frame: FrameType | None) -> None:
            requeue(number)
            sys.exit(128 + number)

        signal.signal(signal.SIGUSR1, again)


def requeue(number: int) -> None:
    """Called by every rank once the checkpoint is on the disk. Queues the job again after SIGUSR1 under SLURM, and ends the process.

    submitit's handler does it for jobs of a multirun, because their arguments lie in its folder. Returns where nothing is to be done.
    """
    if Allocation.of() is None or number != signal.SIGUSR1:
        return
    first = int(os.environ.get("SLURM_PROCID", 0)) == 0
    if not first:
        sys.exit(0)  # an error code would end the first rank too
    handler = signal.getsignal(number)
    if "SUBMITIT_EXECUTOR" in os.environ and callable(handler):
        handler(number, None)
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if result.returncode:
        print(f"SLURM does not queue job {job} again: {result.stderr.strip()}. Submit the same script again", file=sys.stderr, flush=True)
        return
    print(f"job {job} is queued again and will continue", file=sys.stderr, flush=True)
    sys.exit(0)

"""A real SLURM on this machine, for tests: munged, slurmctld and slurmd from Debian's packages, in a folder and on ports of their own.

    python tests/slurm/slurm_cluster.py          starts one, prints the variable that makes sbatch find it, ends it with Ctrl-C

Needs root and `apt-get install slurmctld slurmd slurm-client munge`; no systemd, no accounting, nothing outside the folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CPUS = 4  # that the node claims to have, whatever it has

CONFIGURATION = """\
ClusterName=t2v
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=60
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=100000
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=search_path()) is None]
    if absent:
        return f"no {', '.join(absent)} here: apt-get install slurmctld slurmd slurm-client munge"
    if os.geteuid() != 0:
        return "a SLURM of its own needs root"
    return None


def search_path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yields the environment in which sbatch, srun and scontrol speak to it. All jobs and daemons end with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir(exist_ok=True)
    configuration = CONFIGURATION.format(
        host=socket.gethostname().split(".")[0], folder=folder, controller_port=free_port(), node_port=free_port(), cpus=CPUS
    )
    (folder / "slurm.conf").write_text(configuration)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": search_path()}
    for name in [name for name in environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
        del environment[name]
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munge += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
    daemons: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.out").open("wb") as output:
            daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True))

    try:
        start(*munge)
        _wait(lambda: (folder / "munge.socket").exists(), folder, daemons)
        start("slurmctld", "-D", "-c")
        start("slurmd", "-D")
        _wait(lambda: " idle" in _output(environment, "sinfo", "--noheader", "--format= %t"), folder, daemons)
        yield environment
    finally:
        if len(daemons) > 1:
            _output(environment, "scancel", "--user=root", "--signal=KILL")
            _output(environment, "scancel", "--user=root")
            with contextlib.suppress(TimeoutError):
                _wait(lambda: not _output(environment, "squeue", "--noheader").strip(), folder, daemons, seconds=30)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _output(environment: dict[str, str], *command: str) -> str:
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return result.stdout + result.stderr


def _wait(condition: object, folder: Path, daemons: list[subprocess.Popen[bytes]], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        dead = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if dead or time.monotonic() > end:
            logs = "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in sorted(folder.glob("*.[lo][ou][gt]")))
            raise TimeoutError(f"no SLURM within {seconds:g} s; ended: {dead}\n{logs}")
        time.sleep(0.2)


if __name__ == "__main__":
    if (reason := missing()) is not None:
        sys.exit(reason)
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as place, cluster(Path(place)) as found:
        print(f"export SLURM_CONF={found['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()

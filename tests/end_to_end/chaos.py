"""A training of two ranks (gloo) that is killed again and again, and what it must end with.

    python tests/end_to_end/chaos.py --kills 100 --folder FOLDER        by hand; experiments/chaos/README.md holds the record

The signals come in turns, at one of the ranks: SIGKILL (the other rank is left alone with it), SIGTERM and SIGUSR1 (both save and end). The
moments come in turns too: while a checkpoint is being written, soon after one, and anywhere, also before training has begun.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = map(str, (here.parents[1], here.parent, here))

from trainings import Life, ended

RANKS = 2
STEPS_PER_LIFE = 4  # more than a life lasts on average, so that the run is not done before the last kill
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
MOMENTS = ("while saving", "after a checkpoint", "anywhere", "after a checkpoint")  # 3 and 4: every pair occurs


class Run(Life):
    """Two ranks of it."""

    def __init__(self, folder: Path, data: Path, steps: int) -> None:
        ranks = ("strategy=ddp", f"trainer.devices={RANKS}", f"lr_schedule.total_steps={steps}", "loader.num_workers=0")
        super().__init__(folder, data, steps, *ranks)

    def start(self) -> list[BaseProcess]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        meeting = {"NODE_RANK": 0, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [self.process(LOCAL_RANK=rank, **meeting) for rank in range(RANKS)]

    def finish(self) -> None:
        ranks = self.start()
        with ended(*ranks):
            wait(600, lambda: not any(process.is_alive() for process in ranks))
        assert [process.exitcode for process in ranks] == [0] * RANKS, self.said()

    def live_until(self, number: signal.Signals, moment: str, rng: random.Random) -> None:
        """Start, send the signal to one rank at the moment, and see both ranks end."""
        before, ranks = self.checkpoints(), self.start()
        with ended(*ranks):
            if moment == "anywhere":
                wait(rng.uniform(0, 6), lambda: False)
            else:
                wait(200, lambda: bool(self.checkpoints() - before) or not ranks[0].is_alive())
                if moment == "while saving":
                    wait(60, self.saving)
                wait(rng.uniform(0, 0.05 if moment == "while saving" else 0.6), lambda: False)
            assert all(process.is_alive() for process in ranks), f"ended before {number.name} {moment}: {self.said()}"
            victim = rng.choice(ranks)
            assert victim.pid is not None
            os.kill(victim.pid, number)
            wait(60, lambda: not victim.is_alive())
            assert not victim.is_alive(), f"{number.name} {moment}: rank did not end within 60 s: {self.said()}"
            wait(20, lambda: not any(process.is_alive() for process in ranks))  # or srun ends the other one
            if number != signal.SIGKILL and moment != "anywhere":  # one rank's signal is every rank's
                assert [process.exitcode for process in ranks] == [128 + number] * len(ranks), (number, moment, self.said())


def wait(seconds: float, condition: Callable[[], bool]) -> None:
    """Until the condition holds, at most so long."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and not condition():
        time.sleep(0.002)


def differences(run: Run, straight: Run) -> list[str]:
    """Tensors of the last checkpoint that are not bit for bit the undisturbed run's, and the readers' positions if they differ."""
    import torch
    from safetensors.torch import load_file

    found = []
    last, wanted = (one.folder / "checkpoints" / f"step-{one.steps:08}" for one in (run, straight))
    for path in sorted(wanted.rglob("*.safetensors")):
        ours, theirs = load_file(last / path.relative_to(wanted)), load_file(path)
        found += [f"{path.name} {name}" for name in theirs if name not in ours or not torch.equal(ours[name], theirs[name])]
    if json.loads((last / "data/readers.json").read_text()) != json.loads((wanted / "data/readers.json").read_text()):
        found.append("data/readers.json")
    return found


def torment(folder: Path, data: Path, kills: int, seed: int = 0) -> tuple[list[str], Counter[str], Run]:
    """The undisturbed run, then the same killed `kills` times. What differs at the end, how often each signal came, the killed run."""
    steps, rng, sent = STEPS_PER_LIFE * (kills + 2), random.Random(seed), Counter[str]()
    straight, run = Run(folder / "straight", data, steps), Run(folder / "killed", data, steps)
    straight.finish()
    for kill in range(kills):
        number, moment = SIGNALS[kill % len(SIGNALS)], MOMENTS[kill % len(MOMENTS)]
        run.live_until(number, moment, rng)
        sent[number.name] += 1
        newest = max(run.checkpoints(), default="none")
        print(f"kill {kill + 1} of {kills}: {number.name} {moment}; newest checkpoint {newest}", flush=True)
    assert f"step-{steps:08d}" not in run.checkpoints()
    run.finish()
    return differences(run, straight), sent, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    place = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    place.mkdir(parents=True, exist_ok=True)
    if any(place.iterdir()):  # a finished run of other code would be found finished, and compared with
        parser.error(f"--folder {place} is not empty; name one that is new")
    began = time.monotonic()
    different, signals, _ = torment(place, place / "data", options.kills, options.seed)
    print(f"{options.kills} kills ({dict(signals)}) in {time.monotonic() - began:.0f} s: {len(different)} differences {different[:3]}")
    sys.exit(bool(different))

"""Killed, stopped and continued: the same bits, a checkpoint at every signal, one writer."""

from __future__ import annotations

import json
import re
import signal
import time

import torch
from safetensors.torch import load_file
from trainings import Trainings, losses

from t2v.checkpoint import MARKER


def test_killed_run_continues_bit_for_bit(trainings: Trainings) -> None:
    """Straight to step 8, against SIGKILL after step 4 and again: 2 workers, both streams, dropout on, shuffle buffers part used."""
    same = ("trainer.max_steps=8", "loader.num_workers=2", "callbacks.checkpoints.every_n_steps=4")
    code, output = trainings.run("run=straight", *same)
    assert code == 0, output
    wanted = trainings.checkpoint("killed", 4) / MARKER
    code, _ = trainings.stop_when(wanted.exists, signal.SIGKILL, "run=killed", *same)
    assert code == -signal.SIGKILL
    assert not trainings.checkpoint("killed", 8).exists()
    code, output = trainings.run("run=killed", *same)
    assert code == 0, output
    assert "resume   step 4 " in output
    for name in ("unet.safetensors", "ema.safetensors"):
        straight, killed = (load_file(trainings.checkpoint(run, 8) / name) for run in ("straight", "killed"))
        assert all(torch.equal(straight[key], killed[key]) for key in straight), name
    runs = trainings.folder / "shapes" / "runs"
    straight_losses, killed_losses = losses(runs / "straight"), losses(runs / "killed")
    assert len(straight_losses) == 16
    assert straight_losses == killed_losses
    readers = [json.loads((trainings.checkpoint(run, 8) / "data" / "readers.json").read_text()) for run in ("straight", "killed")]
    assert readers[0] == readers[1]


def test_ctrl_c_saves_and_a_second_writer_is_refused(trainings: Trainings) -> None:
    command = ("run=stopped", "trainer.max_steps=500", "lr_schedule.total_steps=500", "loader.num_workers=0")
    first = trainings.checkpoint("stopped", 2)
    with trainings.start(*command, "callbacks.checkpoints.every_n_steps=2") as process:
        while not first.exists():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        code, output = trainings.run(*command)
        assert code == 1
        assert f"pid {process.pid}" in output.strip().splitlines()[-1]
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopped by SIGINT after step" in output
    step = int(output.split("after step ")[1].split(";")[0])
    assert trainings.checkpoint("stopped", step).exists()


def test_max_time_is_of_each_session(trainings: Trainings) -> None:
    """Lightning's timer keeps what earlier sessions took, and would end the next at its start."""
    same = ("run=in_parts", "trainer.max_steps=100000", "trainer.max_time=00:00:00:02", "callbacks.score=null", "metric=null")
    steps = [0]
    for _ in range(2):
        code, output = trainings.run(*same)
        assert code == 0, output
        said = re.search(r"^trained  (\d+) of 100000 steps; trainer.max_time is over, the same command goes on;", output, re.MULTILINE)
        assert said, output
        steps.append(int(said[1]))
    assert 0 < steps[1] < steps[2]
    assert f"resume   step {steps[1]} " in output


def test_a_resumed_run_keeps_the_scalars_of_the_step_it_resumes_from(trainings: Trainings) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    same = ("run=grows", "loader.num_workers=0", "callbacks.score=null", "metric=null")
    for steps in (2, 4):
        code, output = trainings.run(*same, f"trainer.max_steps={steps}")
        assert code == 0, output
    events = EventAccumulator(str(trainings.folder / "shapes" / "runs" / "grows" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/video")] == [1, 2, 3, 4]


def test_a_run_that_began_from_another_s_checkpoint_continues_from_its_own(trainings: Trainings) -> None:
    fast = (
        "loader.num_workers=0",
        "callbacks.score=null",
        "callbacks.samples=null",
        "metric=null",
        "callbacks.checkpoints.every_n_steps=1",
    )
    code, output = trainings.run("run=first", "trainer.max_steps=2", *fast)
    assert code == 0, output
    branch = ("run=branch", f"resume={trainings.checkpoint('first', 2)}", *fast)
    for steps in (3, 4):
        code, output = trainings.run(*branch, f"trainer.max_steps={steps}")
        assert code == 0, output
        assert f"resume   step {steps - 1} from " in output
    refused = {
        "branch": f"resume={trainings.checkpoint('branch', 3)}",  # an earlier one of its own
        "first": f"resume={trainings.checkpoint('branch', 4)}",  # a later one of another run
    }
    for run, resume in refused.items():
        code, output = trainings.run(f"run={run}", resume, "trainer.max_steps=5", *fast)
        assert code == 1
        assert "but" in output.strip().splitlines()[-1]
        assert "resume=auto" in output.strip().splitlines()[-1]


def test_a_run_whose_last_checkpoint_could_not_be_written_is_not_finished(trainings: Trainings) -> None:
    same = ("run=refused", "trainer.max_steps=2", "loader.num_workers=0", "callbacks.score=null", "metric=null")
    folder = trainings.folder / "shapes" / "runs" / "refused"
    folder.mkdir(parents=True)
    (folder / "checkpoints").write_text("a file where the folder is to be")
    code, output = trainings.run(*same)
    assert code == 1
    assert "there is none yet" in output
    said = output.strip().splitlines()[-1]
    assert said.startswith("error: step 2 was trained, but its checkpoint could not be written: make room in")
    assert said.endswith("the same command continues from the start")
    assert not (folder / "results.json").exists()
    (folder / "checkpoints").unlink()
    code, output = trainings.run(*same)
    assert code == 0, output
    assert trainings.checkpoint("refused", 2).exists()
    (folder / "results.json").write_text("{")
    code, output = trainings.run(*same)
    assert code == 1
    assert f"error: {folder / 'results.json'} is damaged" in output


def test_sigterm_to_the_whole_group_saves_and_continues(trainings: Trainings) -> None:
    """Data workers hear it too, but go on until the trainer has what it needs to save."""
    same = ("run=stopped", "trainer.max_steps=400", "loader.num_workers=2", "callbacks.checkpoints.every_n_steps=2")
    code, output = trainings.stop_when((trainings.checkpoint("stopped", 2) / MARKER).exists, signal.SIGTERM, *same)
    assert code == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output
    assert "Traceback" not in output
    saved = max(path.parent.name for path in trainings.checkpoint("stopped", 0).parent.glob(f"step-*/{MARKER}"))
    assert f"stopped by SIGTERM after step {int(saved.removeprefix('step-'))};" in output

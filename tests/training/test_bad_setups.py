"""What cannot be trained is refused in one line, on one rank, before anything starts."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from pytorch_lightning import Trainer
from ranks import free_port, on_ranks
from small_training import MadeUpData, fit, small_module, small_unet
from tiny_model import TinyTextEncoder

from t2v import checkpoint, configuration
from t2v.configuration import config_dir
from t2v.diffusion.objective import DenoisingLoss
from t2v.diffusion.sampling import Sampler
from t2v.diffusion.schedule import NoiseSchedule
from t2v.planning.step import PRECISIONS as PLANNED
from t2v.training.callbacks.evaluation import Evaluation
from t2v.training.callbacks.samples import SampleVideos
from t2v.training.callbacks.shapes_score import ShapesScore
from t2v.training.checkpoints import Checkpoints
from t2v.training.mixture import JointMixture
from t2v.training.run import PRECISIONS, check_port, make_trainer, same_model
from t2v.training.strategies import FullyShardedStrategy

BATCH = {"image": 2, "video": 2}


@pytest.mark.parametrize("callback", ["training_log", "samples", "score", "evaluation", "checkpoints"])
def test_an_interval_of_no_steps_is_refused(callback: str) -> None:
    experiment = "shapes_motion" if callback == "evaluation" else "shapes"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("train", overrides=[f"experiment={experiment}", f"++callbacks.{callback}.every_n_steps=0", "name=test", "run=test"])
    with pytest.raises(InstantiationException, match=f"callbacks.{callback}.*every_n_steps.* is 0.*at least 1"):
        instantiate(cfg.callbacks[callback])


@pytest.mark.parametrize("kind", [SampleVideos, ShapesScore, Evaluation])
def test_a_sampler_that_does_not_go_with_the_schedule_is_refused_before_anything_is_built(kind: Any, tmp_path: Path) -> None:
    callback = object.__new__(kind)  # an evaluation's constructor reads weights
    callback.sampler = Sampler("ddpm", num_steps=2)
    module = small_module(objective=DenoisingLoss(NoiseSchedule(shared_noise=0.4)))
    module.configure_model = lambda: pytest.fail("networks with memory")  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"ddpm draws noise.*shared_noise=0\.4: use ddim or dpm\+\+"):
        fit(module, MadeUpData(BATCH, BATCH, JointMixture()), tmp_path, callbacks=[callback])


@pytest.mark.parametrize(("accelerator", "devices"), [("gpu", 8), ("auto", 8)])
def test_a_missing_gpu_is_named(accelerator: str, devices: int) -> None:
    asked = functools.partial(Trainer, accelerator=accelerator, devices=devices, logger=False)
    with pytest.raises(ValueError, match=r"trainer\.devices=8.*nvidia-smi") as caught:
        make_trainer(asked)
    assert "\n" not in str(caught.value)
    on_cpus = make_trainer(functools.partial(Trainer, accelerator="cpu", devices=2, logger=False))
    assert on_cpus.world_size == 2


@pytest.mark.parametrize("longest", [12, "soon", "1:30:00"])
def test_a_time_that_is_no_duration_is_refused(longest: Any) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.max_time={longest} is no duration: write DD:HH:MM:SS"):
        make_trainer(functools.partial(Trainer, accelerator="cpu", max_time=longest, logger=False))
    assert make_trainer(functools.partial(Trainer, accelerator="cpu", max_time="00:01:30:00", logger=False)).max_steps == -1


def test_another_precision_is_refused_in_training_and_plan() -> None:
    for precision in ("64-true", "16-mixed", "bf16-true"):
        with pytest.raises(ValueError, match=rf"trainer\.precision={precision} is not supported: use bf16-mixed or 32-true"):
            make_trainer(functools.partial(Trainer, accelerator="cpu", precision=precision, logger=False))
    assert set(PLANNED) == set(PRECISIONS)


def test_a_taken_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer: Any = SimpleNamespace(world_size=2, strategy=SimpleNamespace(cluster_environment=SimpleNamespace(main_port=free_port())))
    check_port(trainer)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        trainer.strategy.cluster_environment.main_port = port
        with pytest.raises(ValueError, match=f"port {port}.*MASTER_PORT"):
            check_port(trainer)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
        check_port(trainer)
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
        monkeypatch.setenv("RANK", "1")
        check_port(trainer)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    card = small_module().describe(3)
    same_model(card, small_module().describe(0), tmp_path)
    other = small_module(sample={"frames": 9, "height": 32, "width": 32, "fps": 3}).describe(0)
    same_model(card, other, tmp_path)  # what it makes by default may change
    with pytest.raises(ValueError, match=r"another unet: layers_per_block is 1 there and 2 here"):
        same_model(card, small_module(unet=small_unet(layers_per_block=2)).describe(0), tmp_path)
    with pytest.raises(ValueError, match="another text_encoder: seed is 0 there and 1 here"):
        same_model(card, small_module(text_encoder=TinyTextEncoder(seed=1)).describe(0), tmp_path)
    velocity = small_module(objective=DenoisingLoss(NoiseSchedule(prediction="velocity")))
    given = Sampler("dpm++", num_steps=3)  # whatever samplers say of the schedule, it samples and is described as it was trained
    assert [velocity.pipeline(sampler).sampler.schedule.prediction for sampler in (None, given)] == ["velocity"] * 2
    assert velocity.describe(0).schedule["prediction"] == "velocity"
    with pytest.raises(ValueError, match="another schedule: prediction is noise there and velocity here"):
        same_model(card, velocity.describe(0), tmp_path)


def resumed(folder: Path, first: Path) -> str:
    """Rank 1 does not see the folder that rank 0 sees."""
    data = MadeUpData(BATCH, BATCH, JointMixture())
    resume = first if os.environ["RANK"] == "0" else None
    with pytest.raises(ValueError, match="every host must see") as caught:
        fit(small_module(), data, folder, strategy="ddp", world=2, steps=3, resume=resume, callbacks=[Checkpoints()])
    return str(caught.value)


def test_ranks_that_see_different_folders_do_not_start(tmp_path: Path) -> None:
    fit(small_module(), MadeUpData(BATCH, BATCH, JointMixture()), tmp_path, steps=1, callbacks=[Checkpoints()])
    messages = on_ranks(resumed, 2, tmp_path, tmp_path, checkpoint.step_folder(tmp_path, 1))
    assert all(message.startswith("rank 0 starts at step 1 and rank 1 at step 0: ") for message in messages)


def whole_weights_wanted(folder: Path) -> str:
    module = small_module(optimizer=torch.optim.Adafactor)
    with pytest.raises(ValueError, match="Adafactor looks at whole weights") as caught:
        fit(module, MadeUpData(BATCH, BATCH, JointMixture()), folder, strategy=FullyShardedStrategy())
    return str(caught.value)


def test_sharded_weights_need_an_optimizer_that_works_element_by_element(tmp_path: Path) -> None:
    (message,) = on_ranks(whole_weights_wanted, 1, tmp_path, tmp_path)
    assert "strategy=ddp" in message


FAILS = """
import functools, os, subprocess, sys, time
import t2v
from t2v import configuration
from t2v.configuration import _exit_with
configuration._first_says_it = functools.partial(configuration._first_says_it, 3)
if len(sys.argv) > 1:
    os.environ["LOCAL_RANK"] = "1"
    print("connected", flush=True)
    time.sleep(float(sys.argv[1]))
    _exit_with(OSError("no such file"))
for after in ("0", "1"):  # one fails while the first is still there, one when it is gone
    subprocess.Popen([sys.executable, __file__, after], stdout=subprocess.PIPE).stdout.readline()
_exit_with(OSError("no such file"))
"""


def test_one_of_several_ranks_speaks(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr == "error: no such file\n"
    alone = subprocess.run([sys.executable, script, "0"], capture_output=True, text=True)
    assert alone.stderr == "error: no such file\n"  # nobody else failed: it is this rank's own


def test_a_forked_rank_knows_what_started_it() -> None:
    known = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=lambda: known.put(configuration.STARTED_BY))
    process.start()
    assert known.get() == os.getpid()
    process.join()

"""One run in one folder: lock, resume, fit, evaluate, report."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from t2v import checkpoint as folder_format
from t2v.checkpoint import AutoencoderCard, CheckpointWriteError, ModelCard
from t2v.training import slurm
from t2v.training.callbacks.samples import SampleVideos
from t2v.training.checkpoints import Checkpoints, FolderCheckpointIO
from t2v.training.orphans import end_with_what_started_this
from t2v.training.slurm import first_process
from t2v.training.tensorboard import add_text

RESULTS = "results.json"
PRECISIONS = ("bf16-mixed", "32-true")  # weights in float32; float16 would need its gradients scaled


def quiet_third_parties() -> None:
    """Their hints at every start are not news to us; their errors still come through."""
    for name in ("pytorch_lightning", "lightning_fabric", "torch.distributed", "xformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric", "torch", "diffusers", "open_clip", "timm", "torchmetrics"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold <folder>/run.lock; ValueError with host and pid if another process does. The kernel frees it when this one ends, however."""
    if not first_process():
        yield
        return
    path = folder / "run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise OSError(
            f"cannot write to the run's folder {folder}: {error.strerror or error}. Choose another place with paths.experiments=FOLDER"
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX locks hold across hosts on shared file systems
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ValueError(f"{holder} is writing to {folder}: wait for it, stop it, or start another run with run=NAME") from None
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, pid {os.getpid()}")
        file.flush()
        yield


def resume_from(resume: str, folder: Path, kind: type[Any]) -> Path | None:
    """auto: the newest whole checkpoint of the run; none: a fresh start; otherwise a checkpoint folder, from which the run begins: once it
    has checkpoints of its own it continues from those, so that the same command goes on after an interruption."""
    newest = folder_format.latest(folder)
    if resume == "auto":
        return newest
    if resume == "none":
        if newest is not None:
            raise ValueError(
                f"resume=none, but {folder} already holds {newest.name}: start another run with run=NAME, or delete that folder"
            )
        return None
    wanted = folder_format.find(resume)
    if newest is None or newest.samefile(wanted):
        return wanted
    steps = {path: folder_format.read_card(path, kind).step for path in (newest, wanted)}
    if wanted.parent.samefile(newest.parent) or steps[newest] <= steps[wanted]:
        raise ValueError(
            f"resume={resume} is step {steps[wanted]}, but {folder} already holds step {steps[newest]}: start another run with "
            "run=NAME, or continue this one with resume=auto"
        )
    return newest


def same_model(stored: ModelCard | AutoencoderCard, wanted: ModelCard | AutoencoderCard, checkpoint: Path) -> None:
    """Raise ValueError where a checkpoint is of another network, noise schedule or prediction, or was trained with other frozen parts."""
    for name in ("unet", "text_encoder", "autoencoder", "schedule"):
        if not hasattr(wanted, name):
            continue
        parts = (getattr(card, name) for card in (stored, wanted))
        old, new = (json.loads(json.dumps(part if isinstance(part, dict) else part.to_dict())) for part in parts)
        if name == "autoencoder" and "sha256" in new:
            old, new = {"sha256": old["sha256"]}, {"sha256": new["sha256"]}  # where it lies may change
        if old == new:
            continue
        old, new = old | old.pop("arguments", {}), new | new.pop("arguments", {})
        differences = [
            f"{key} is {old.get(key)} there and {new.get(key)} here"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        raise ValueError(
            f"{checkpoint} holds another {name}: {'; '.join(differences)}. Continue with its own configuration, or start another "
            "run with run=NAME"
        )


def make_trainer(trainer: Callable[..., Trainer], **arguments: Any) -> Trainer:
    """Raises ValueError for devices that this machine does not have, other precisions, and for what is no duration."""
    asked = getattr(trainer, "keywords", {})
    longest, precision = asked.get("max_time"), asked.get("precision", PRECISIONS[-1])
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision} is not supported: use {' or '.join(PRECISIONS)}")
    try:
        Timer(longest)
    except (MisconfigurationException, AttributeError) as error:  # a number has no seconds
        raise ValueError(
            f"trainer.max_time={longest} is no duration: write DD:HH:MM:SS, such as 00:01:30:00 for an hour and a half"
        ) from error
    advice = (
        "Ask for as many as there are (nvidia-smi lists them), trainer.devices=auto, or trainer.accelerator=cpu for processes on the CPU"
    )
    try:
        made = trainer(**arguments)
    except MisconfigurationException as error:
        raise ValueError(f"trainer.devices={asked.get('devices')} cannot be had: {' '.join(str(error).split())} {advice}") from error
    if asked.get("accelerator") == "auto" and made.world_size > 1 and isinstance(made.accelerator, CPUAccelerator):
        raise ValueError(f"trainer.devices={asked.get('devices')}, but this machine shows no GPU. {advice}")
    return made


def check_port(trainer: Trainer) -> None:
    """Raises ValueError where the port at which the ranks are to meet is taken. torchrun holds it itself."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or trainer.world_size == 1 or not first_process() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = environment.main_port
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            raise ValueError(
                f"port {port}, where the ranks are to meet, cannot be used on this host ({error.strerror}): "
                "another training may hold it; set MASTER_PORT to a free one, or leave it unset"
            ) from error


def train(
    *,
    module: LightningModule,
    data: Callable[[], LightningDataModule],
    trainer: Callable[..., Trainer],
    callbacks: Mapping[str, Callback],
    folder: Path,
    resume: str,
    config: str,
    loggers: Callable[[int | None], list[Any]],
) -> dict[str, float]:
    """Train, or continue, or report a finished run. Returns the final metrics.

    `trainer` and `loggers` are called once the checkpoint is known; `config` is the resolved configuration as text.
    """
    end_with_what_started_this()
    wanted = module.describe(0)  # type: ignore[operator]
    checkpoint = resume_from(resume, folder, type(wanted))
    step = None
    if checkpoint is not None:
        card = folder_format.read_card(checkpoint, type(wanted))
        step = card.step
        same_model(card, wanted, checkpoint)
    lightning_trainer = make_trainer(
        trainer,
        callbacks=list(callbacks.values()),
        logger=loggers(step),
        default_root_dir=str(folder),
        plugins=[FolderCheckpointIO(lambda: module.describe(lightning_trainer.global_step)), *slurm.plugins()],  # type: ignore[operator]
    )
    check_port(lightning_trainer)
    datamodule = data()
    plan = datamodule.plan(lightning_trainer.world_size)  # type: ignore[attr-defined]
    lightning_trainer.accumulate_grad_batches = plan.accumulate
    if first_process():
        print(f"run      {folder}")
        print(f"resume   {'step ' + str(step) + ' from ' + str(checkpoint) if checkpoint else 'nothing: a fresh start'}")
        parts = ", ".join(f"{count} {stream}s (weight {plan.weights[stream]:.3g})" for stream, count in plan.global_batch.items())
        pieces = f"{plan.accumulate} micro-batch{'es' * (plan.accumulate > 1)}"
        print(f"a step   {parts} on {plan.world} rank{'s' * (plan.world > 1)}, in {pieces}", flush=True)
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    if step is None:
        add_text(lightning_trainer, "config", f"```yaml\n{config}\n```")
    started = time.monotonic()
    lightning_trainer.fit(module, datamodule=datamodule, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    seconds = time.monotonic() - started
    saving = next((c for c in callbacks.values() if isinstance(c, Checkpoints)), None)
    if saving is not None and saving.received is not None:
        if lightning_trainer.is_global_zero:
            print(farewell(saving, lightning_trainer.global_step), file=sys.stderr)
        slurm.requeue(saving.received)
        sys.exit(128 + saving.received)
    if saving is not None and saving.saved_step not in (-1, lightning_trainer.global_step):  # -1: there was nothing left to train
        raise CheckpointWriteError(
            f"step {lightning_trainer.global_step} was trained, but its checkpoint could not be written: make room in {folder}; "
            f"the same command continues {onward(saving, lightning_trainer.global_step)}"
        )
    return finish(lightning_trainer, module, callbacks, folder, seconds)


def farewell(stopped: Checkpoints, step: int) -> str:
    """What a signal did, and from where the same command goes on."""
    lost = "" if stopped.saved_step == step else "; no checkpoint could be written then"
    name = signal.Signals(stopped.received).name  # type: ignore[arg-type]
    return f"stopped by {name} after step {step}{lost}; the same command continues {onward(stopped, step)}"


def onward(saving: Checkpoints, step: int) -> str:
    saved = saving.saved_step
    return "from there" if saved == step else f"from step {saved}" if saved > 0 else "from the start"


def finish(trainer: Trainer, module: LightningModule, callbacks: Mapping[str, Callback], folder: Path, seconds: float) -> dict[str, float]:
    """Final scores, results.json and what to type next."""
    module.to(trainer.strategy.root_device)
    report = []
    for callback in callbacks.values():
        if hasattr(callback, "evaluate"):
            report.append(str(callback.evaluate(trainer, module)))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.finalize("success")
        results = {
            "step": trainer.global_step,
            "max_steps": trainer.max_steps,
            "out_of_time": any(isinstance(one, Timer) and (one.time_remaining() or 0) <= 0 for one in trainer.callbacks),  # type: ignore[attr-defined]
            "seconds_of_this_session": seconds,
            "metrics": metrics,
            "report": report,
        }
        temporary = folder / f".{RESULTS}"
        temporary.write_text(json.dumps(results, indent=1))
        temporary.replace(folder / RESULTS)
        show(results, folder, any(isinstance(callback, SampleVideos) for callback in callbacks.values()))
    return metrics


def finished(folder: Path, max_steps: int) -> dict[str, Any] | None:
    """The results of a run that already reached `max_steps`."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text())
        done = results["step"] >= max_steps
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and the same command measures the newest checkpoint again") from error
    return results if done else None


def show(results: dict[str, Any], folder: Path, samples: bool) -> None:
    newest = folder_format.latest(folder)
    print()
    for table in results["report"]:
        print(table, end="\n\n")
    of_all = "" if results["step"] >= results["max_steps"] else f" of {results['max_steps']}"
    why = "; trainer.max_time is over, the same command goes on" if of_all and results.get("out_of_time") else ""
    print(f"trained  {results['step']}{of_all} steps{why}; results in {folder / RESULTS}")
    if samples:
        print(f"samples  {folder / 'samples'}")
    print(f"watch    tensorboard --logdir {folder}")
    if newest is not None and samples:
        print(f'try      python -m t2v.generate checkpoint={newest} prompt="a red circle moving left slowly on a black background"')

"""Train a text-to-video model.

    python -m t2v.train experiment=shapes                       on a laptop, in minutes
    python -m t2v.train experiment=base_256 strategy=ddp        the paper's model
    python -m t2v.train -m experiment=shapes seed=0,1,2         a sweep

The same command continues an interrupted run; see conf/train.yaml for every option.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from t2v.configuration import entry

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule, LightningModule

os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # hydra/launcher=slurm: the signal that callbacks.checkpoints answers


def train(cfg: DictConfig) -> float | None:
    """Returns the metric named by cfg.metric, for sweeps."""
    OmegaConf.resolve(cfg)
    if not str(cfg.run) or ".." in Path(str(cfg.run)).parts:
        raise ValueError(f"run={cfg.run} names no folder of its own below the runs: give a name")
    folder = Path(HydraConfig.get().runtime.output_dir)
    metrics = run(cfg, folder)
    if cfg.metric is None:
        return None
    if cfg.metric not in metrics:
        raise ValueError(f"metric={cfg.metric} was not measured; there are {', '.join(sorted(metrics))}")
    return metrics[cfg.metric]


def run(cfg: DictConfig, folder: Path) -> dict[str, float]:
    from t2v.training import run as running
    from t2v.training import slurm

    slurm.requeue_when_signalled()
    running.quiet_third_parties()
    done = running.finished(folder, cfg.trainer.max_steps)
    if done is not None:
        running.show(done, folder, "samples" in cfg.callbacks)
        print("finished before; run=NAME starts another, a larger trainer.max_steps with run= goes on")
        return dict(done["metrics"])
    if (allocation := slurm.Allocation.of()) is not None:
        allocation.check(cfg.trainer.devices, cfg.trainer.num_nodes)
    slurm.require_devices(cfg.trainer.accelerator, cfg.trainer.devices)
    with running.only_writer(folder):
        import torch
        from pytorch_lightning import seed_everything

        seed_everything(cfg.seed, verbose=False)
        torch.set_float32_matmul_precision("high")
        callbacks = {name: instantiate(node) for name, node in cfg.callbacks.items() if node is not None}
        network = module(cfg)
        check_metric(cfg.metric, (network, *callbacks.values()))
        return running.train(
            module=network,
            data=lambda: datamodule(cfg),
            trainer=instantiate(
                cfg.trainer, strategy=cfg.strategy if isinstance(cfg.strategy, str) else instantiate(cfg.strategy), _partial_=True
            ),
            callbacks=callbacks,
            folder=folder,
            resume=cfg.resume,
            config=OmegaConf.to_yaml(cfg),
            loggers=lambda step: [
                instantiate(node, save_dir=str(folder), purge_step=0 if step is None else step + 1)
                for node in cfg.logger.values()
                if node is not None
            ],
        )


def check_metric(metric: str | None, measuring: Iterable[Any]) -> None:
    """ValueError where nothing writes metrics of this kind, the part before the slash: at the end of the training it would be too late.
    Modules and callbacks say what they write in `measures`."""
    kinds = sorted({kind for one in measuring for kind in getattr(one, "measures", ())})
    if metric is not None and metric.split("/")[0] not in kinds:
        raise ValueError(f"metric={metric}: no callback here measures that; there are {', '.join(kinds)}/..., or metric=null for none")


def module(cfg: DictConfig) -> LightningModule:
    """The network comes without memory: it gets that from the strategy, on its device, this rank's share of it."""
    if cfg.get("unet") is None:
        made: LightningModule = instantiate(cfg.module)
        return made
    import torch

    with torch.device("meta"):
        unet = instantiate(cfg.unet)
    return instantiate(cfg.module, unet=unet)  # type: ignore[no-any-return]


def datamodule(cfg: DictConfig) -> LightningDataModule:
    from t2v.training.datamodules import LAIONDataModule, MixtureDataModule, WebVidDataModule

    mixture = instantiate(cfg.mixture)
    modules: dict[str, Any] = {}
    for name, kind in (("image", LAIONDataModule), ("video", WebVidDataModule)):
        if cfg.data.get(name) is not None and mixture.weights[name] > 0:
            modules[name] = kind(instantiate(cfg.data[name]), batch=cfg.batch[name], micro_batch=cfg.micro_batch[name], **cfg.loader)
    return MixtureDataModule(mixture, **modules)


main = entry("train")(train)

if __name__ == "__main__":
    main()

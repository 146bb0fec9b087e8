"""FID-vid, FVD and CLIPSIM during training: the code of `t2v.evaluate` on a subset, from the EMA weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from t2v.diffusion.sampling import Sampler
from t2v.evaluation import Protocol, QuickEvaluation
from t2v.evaluation.quick import OutOfStep
from t2v.evaluation.scores import extractors_of
from t2v.evaluation.shapes import CheckerFeatures
from t2v.evaluation.videos import generator
from t2v.metrics import weights
from t2v.training.callbacks import SamplingCallback, Stopped, at_least_one, go_on
from t2v.training.sharding import is_sharded


class Evaluation(SamplingCallback):
    """Every `every_n_steps` optimizer steps and at the end: `val/fvd_n256` and the like; the number is that of the videos.

    Every rank generates and measures the same number of videos. The networks' weights and the real clips are found before the first step.
    `paths`: weight files by network, where they do not lie in T2V_WEIGHTS or a cache. `cache`: features of the real clips, on a disk that
    all ranks share.
    """

    measures = ("val",)

    def __init__(
        self,
        protocol: Protocol,
        dataset: Any,
        every_n_steps: int = 5000,
        sampler: Sampler | None = None,
        paths: Mapping[str, str | None] | None = None,
        cache: str | None = None,
    ) -> None:
        self.protocol, self.sampler = protocol, sampler
        self.every_n_steps = at_least_one("evaluation.every_n_steps", every_n_steps)
        names = extractors_of(protocol.metrics)
        extractors, _ = weights.load([name for name in names if name != "checker"], paths)
        if "checker" in names:
            extractors["checker"] = CheckerFeatures(protocol.fps)
        self.measure = QuickEvaluation(protocol, dataset, extractors, Path(cache) if cache else weights.default_cache())

    def evaluate(self, trainer: Trainer, module: Any) -> str:
        """Every rank must call it. Returns a Markdown table."""
        pipeline = module.pipeline(self.sampler)

        def in_training_precision(captions: list[str], **options: Any) -> Tensor:
            try:
                with trainer.precision_plugin.forward_context():
                    return pipeline(captions, on_step=lambda done, of: go_on(trainer), **options)
            except Stopped:
                raise
            except Exception as error:
                if not any(map(is_sharded, pipeline.unet.parameters())):
                    raise
                raise OutOfStep(
                    f"rank {trainer.global_rank} stopped inside a network that is divided between ranks, and the others with it: {error}"
                ) from error

        with torch.random.fork_rng(devices=[]):
            generate = generator(in_training_precision, self.protocol)
            metrics = self.measure(generate, trainer.global_rank, trainer.world_size, module.device)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, trainer.global_step)
        return "\n".join(["| measured on EMA weights | |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in metrics.items())])

    look = evaluate

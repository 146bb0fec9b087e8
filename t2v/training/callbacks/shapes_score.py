"""What a shapes model has learned: prompts it never saw, videos from its EMA weights, attributes recovered from the pixels."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import nn

from t2v.data.checker import Score, Seen, compare, look, truths
from t2v.data.shapes import held_out_specs
from t2v.diffusion.guidance import ClassifierFreeGuidance
from t2v.diffusion.sampling import Sampler
from t2v.pipeline import TextToVideoPipeline
from t2v.ranks import from_all
from t2v.training.callbacks import SamplingCallback, at_least_one, go_on
from t2v.training.sharding import make_room_for_gathering
from t2v.training.tensorboard import add_text

SCORES = "scores.jsonl"


@contextmanager
def at_rest(network: nn.Module) -> Iterator[None]:
    """In eval mode; then as before."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


class ShapesScore(SamplingCallback):
    """At the end, and every `every_n_steps` optimizer steps if given, score `num_prompts` held-out prompts.

    `kind` is the deck of `held_out_specs`: "mixed" holds unseen colour-shape pairs among the seen ones. Ranks generate a part each.
    `name` stands before each metric, as in score/all; several scores beside each other need names of their own. `guidance` is another scale
    than the sampler's, `ema=False` scores the weights that are trained instead of their average; `at_start` also scores before the first
    step. `processes` check videos at the same time.
    """

    def __init__(
        self,
        num_prompts: int = 96,
        every_n_steps: int | None = None,
        sampler: Sampler | None = None,
        num_frames: int | None = None,
        batch_size: int = 16,
        kind: str = "mixed",
        seed: int = 0,
        name: str = "score",
        processes: int = 1,
        guidance: float | None = None,
        ema: bool = True,
        at_start: bool = False,
    ) -> None:
        self.specs = held_out_specs(num_prompts, seed, kind)  # type: ignore[arg-type]
        self.every_n_steps = None if every_n_steps is None else at_least_one(f"{name}.every_n_steps", every_n_steps)
        self.sampler = sampler
        self.guidance = None if guidance is None else ClassifierFreeGuidance(guidance)
        self.ema = ema
        self.at_start = at_start
        self.num_frames = num_frames
        self.batch_size = batch_size
        self.kind = kind
        self.seed = seed
        self.name = name
        self.measures = (name,)
        self.processes = processes
        self.truths: list[Seen] | None = None  # what the checker sees in the real clips; the same at every step

    def is_due(self, trainer: Trainer) -> bool:
        return super().is_due(trainer) or (self.at_start and trainer.global_step == 0)

    def evaluate(self, trainer: Trainer, module: Any) -> Score:
        """Generate and score; every rank must call it. The table is logged, written to scores.jsonl and returned."""
        started = time.perf_counter()
        videos = self.generate(trainer, module)
        fps = module.sample["fps"]
        if self.truths is None:
            self.truths = truths(self.specs, videos[0].shape[0], fps, videos[0].shape[1], self.processes)
        result = compare(look(videos, fps, self.processes), self.specs, self.truths)
        metrics = {f"{self.name}/{name}": row.accuracy for name, row in result.rows.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if trainer.is_global_zero:
            if trainer.logger is not None:
                trainer.logger.log_metrics(metrics, trainer.global_step)
            add_text(trainer, self.name, str(result))
            record: dict[str, Any] = {"name": self.name, "step": trainer.global_step, "seconds": time.perf_counter() - started}
            record |= {"kind": self.kind, "frames": videos[0].shape[0], "ema": self.ema, "score": result.as_dict()}
            with (Path(trainer.default_root_dir) / SCORES).open("a") as file:
                file.write(json.dumps(record) + "\n")
        return Score(result.rows, f"{self.name}: {self.kind} prompts, {videos[0].shape[0]} frames")

    look = evaluate

    def generate(self, trainer: Trainer, module: Any) -> list[torch.Tensor]:
        """A video for each spec, uint8 (f h w c), on every rank."""
        n, world = len(self.specs), trainer.world_size
        share = -(-n // world)  # equal on all ranks, as a sharded network runs on all of them: the last ones repeat
        mine = [min(trainer.global_rank + k * world, n - 1) for k in range(share)]
        pipeline: TextToVideoPipeline = module.pipeline(self.sampler)
        if self.guidance is not None:
            pipeline.sampler = replace(pipeline.sampler, guidance=self.guidance)
        if not self.ema:
            make_room_for_gathering(module.unet)
            pipeline.unet = module.unet
        captions = [self.specs[i].caption for i in mine]
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context(), at_rest(pipeline.unet):
            options: dict[str, Any] = {"batch_size": self.batch_size, "num_frames": self.num_frames}
            videos = pipeline(captions, seed=self.seed, indices=mine, on_step=lambda done, of: go_on(trainer), **options)
        in_order = {i: video for rank, part in enumerate(from_all(videos)) for i, video in zip(range(rank, n, world), part)}
        return [in_order[i] for i in range(n)]

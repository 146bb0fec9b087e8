"""What a shapes model has learned: prompts it never saw, videos from its EMA weights, attributes recovered from the pixels."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

from t2v.data.checker import Score, score
from t2v.data.shapes import held_out_specs
from t2v.diffusion.sampling import Sampler
from t2v.training.tensorboard import add_text


class ShapesScore(Callback):
    """At the end, and every `every_n_steps` optimizer steps if given, score `num_prompts` held-out prompts.

    `kind` is the deck of `held_out_specs`: "mixed" holds unseen colour-shape pairs among the seen ones. Ranks generate a part each.
    """

    metric = "score/all"

    def __init__(
        self,
        num_prompts: int = 96,
        every_n_steps: int | None = None,
        sampler: Sampler | None = None,
        num_frames: int | None = None,
        batch_size: int = 16,
        kind: str = "mixed",
        seed: int = 0,
    ) -> None:
        self.num_prompts = num_prompts
        self.every_n_steps = every_n_steps
        self.sampler = sampler
        self.num_frames = num_frames
        self.batch_size = batch_size
        self.kind = kind
        self.seed = seed
        self.scored_step = -1

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.scored_step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0 and step < trainer.max_steps
        if due and step != self.scored_step:
            self.scored_step = step
            self.evaluate(trainer, module)

    def evaluate(self, trainer: Trainer, module: Any) -> Score:
        """Generate and score; every rank must call it. The table is logged, written to scores.jsonl and returned."""
        started = time.perf_counter()
        specs = held_out_specs(self.num_prompts, self.seed, self.kind)  # type: ignore[arg-type]
        share = -(-len(specs) // trainer.world_size)  # equal on all ranks, as a sharded network runs on all of them: the last ones repeat
        mine = [min(trainer.global_rank + k * trainer.world_size, len(specs) - 1) for k in range(share)]
        frames = {} if self.num_frames is None else {"num_frames": self.num_frames}
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
            videos = module.pipeline(self.sampler)(
                [specs[i].caption for i in mine], seed=self.seed, indices=mine, batch_size=self.batch_size, **frames
            )
        parts: list[Any] = [None] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(parts, videos)
        else:
            parts = [videos]
        in_order = {i: video for rank, part in enumerate(parts) for i, video in zip(range(rank, len(specs), trainer.world_size), part)}
        result = score([in_order[i] for i in range(len(specs))], specs, module.sample["fps"])
        metrics = {f"score/{name}": row.accuracy for name, row in result.rows.items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if trainer.is_global_zero:
            if trainer.logger is not None:
                trainer.logger.log_metrics(metrics, trainer.global_step)
            add_text(trainer, "score", str(result))
            record = {"step": trainer.global_step, "seconds": time.perf_counter() - started, "kind": self.kind, "score": result.as_dict()}
            with (Path(trainer.default_root_dir) / "scores.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        return result

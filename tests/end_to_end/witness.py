"""Callbacks that a training's command names (tests/end_to_end is put on its path): what every rank measured, and one rank that fails."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, Trainer
from torch import Tensor

from t2v.metrics.shapes_features import ShapesFeatures
from t2v.training.callbacks.evaluation import Evaluation


class Witness(Callback):
    """Writes what is measured on its rank to measured-<rank>.json."""

    def evaluate(self, trainer: Trainer, module: Any) -> str:
        measured = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        (Path(trainer.default_root_dir) / f"measured-{trainer.global_rank}.json").write_text(json.dumps(measured))
        return ""


class Breaks(ShapesFeatures):
    """Measures one chunk."""

    calls = 0

    def __call__(self, videos: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise ValueError("no memory for this chunk")
        return super().__call__(videos)


class BreaksOnOneRank(Evaluation):
    """`where`: extractor, or generate, where a network runs that may be divided between the ranks. `deaf`: there the others wait for ever,
    as they do inside an exchange under NCCL, which does not tell them that a rank has gone (gloo does)."""

    def __init__(self, where: str = "extractor", rank: int = 1, deaf: bool = False, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.where, self.rank, self.deaf = where, rank, deaf

    def evaluate(self, trainer: Trainer, module: Any) -> str:
        broken = trainer.global_rank == self.rank
        if self.where == "extractor" and broken:
            whole = self.measure.extractors["shapes"]
            assert isinstance(whole, ShapesFeatures)
            self.measure.extractors["shapes"] = Breaks(whole.network, whole.weights)
        if self.where == "generate":

            def breaks(*arguments: Any) -> None:
                if broken:
                    raise ValueError("no memory in this block")
                if self.deaf:
                    time.sleep(3600)

            module.pipeline(self.sampler).unet.mid_block.register_forward_pre_hook(breaks)
        return super().evaluate(trainer, module)

"""Sample videos for fixed prompts during training: mp4, an animated contact sheet, strips of film, moving pictures in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pytorch_lightning import Trainer
from torch import Tensor

from t2v.diffusion.sampling import Sampler
from t2v.training.callbacks import SamplingCallback, at_least_one, go_on
from t2v.training.sharding import is_sharded
from t2v.training.tensorboard import add_video
from t2v.video import contact_sheet, film_strips, write_animation, write_mp4


class SampleVideos(SamplingCallback):
    """Every `every_n_steps` optimizer steps and at the end, with the EMA weights and always the same noise per prompt.

    Rank 0 samples while the others wait at the next collective; where the network is sharded all ranks do it together. Nothing is swapped,
    so training is not disturbed.
    """

    def __init__(
        self, prompts: list[str], every_n_steps: int = 1000, sampler: Sampler | None = None, num_frames: int | None = None, seed: int = 0
    ) -> None:
        if not prompts:
            raise ValueError(
                "callbacks.samples.prompts is empty: give at least one prompt, or leave the callback out with ~callbacks.samples"
            )
        self.prompts = list(prompts)
        self.every_n_steps = at_least_one("samples.every_n_steps", every_n_steps)
        self.sampler = sampler
        self.num_frames = num_frames
        self.seed = seed

    def is_due(self, trainer: Trainer) -> bool:
        return super().is_due(trainer) or trainer.global_step >= trainer.max_steps

    def look(self, trainer: Trainer, module: Any) -> None:
        together = is_sharded(next(module.ema_unet.parameters())) or trainer.world_size == 1
        if trainer.is_global_zero or together:
            self.sample(trainer, module, on_step=(lambda done, of: go_on(trainer)) if together else None)

    def sample(self, trainer: Trainer, module: Any, on_step: Callable[[int, int], None] | None = None) -> None:
        frames = {} if self.num_frames is None else {"num_frames": self.num_frames}
        with torch.random.fork_rng(devices=[]), trainer.precision_plugin.forward_context():
            videos: Tensor = module.pipeline(self.sampler)(self.prompts, seed=self.seed, on_step=on_step, **frames)  # (b f h w c)
        if not trainer.is_global_zero:
            return
        fps = module.sample["fps"]
        folder = Path(trainer.default_root_dir) / "samples" / f"step-{trainer.global_step:08}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, video in enumerate(videos):
            write_mp4(folder / f"{number:02}.mp4", video, fps)
        sheet = contact_sheet(list(videos), self.prompts)
        write_animation(folder / "contact_sheet.gif", sheet, fps)
        Image.fromarray(film_strips(list(videos), self.prompts).numpy()).save(folder / "film_strips.png")
        (folder / "prompts.txt").write_text("\n".join(self.prompts) + "\n", encoding="utf-8")
        add_video(trainer, "samples", sheet, fps)

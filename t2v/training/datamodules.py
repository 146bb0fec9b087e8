"""Lightning's side of the data: an image and a video data module, merged by CombinedLoader.

The readers themselves (`t2v.data`) know neither Lightning nor distributed training; rank and world of the role are handed to them here.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import CombinedLoader

from t2v.batch import ClipBatch
from t2v.data.latents import LatentStream
from t2v.data.loader import ClipLoader
from t2v.data.progress import Progress
from t2v.data.readers import ClipStream
from t2v.models.frozen import Frozen
from t2v.ranks import from_all
from t2v.training.mixture import JointMixture, Role, StepPlan
from t2v.training.prefetch import Prefetched


class StreamDataModule(LightningDataModule):
    """One stream of clips: what to read, how many per optimizer step, and how far training has come in it."""

    def __init__(
        self,
        stream: ClipStream,
        batch: int,
        micro_batch: int,
        num_workers: int = 2,
        timeout: float = 300,
        start_method: str | None = None,
        repeat_first_step: bool = False,
    ) -> None:
        super().__init__()
        self.stream = stream
        self.batch = batch  # global, per optimizer step
        self.micro_batch = micro_batch  # at most this many at once on one rank
        self.num_workers = num_workers
        self.timeout = timeout
        self.start_method = start_method
        self.repeat_first_step = repeat_first_step  # debug=overfit
        self.progress = Progress(stream.readers, signature=stream.signature)
        self._resume: dict[str, Any] | None = None

    def loader(self, role: Role, accumulate: int) -> Prefetched | FirstStep:
        clips = ClipLoader(
            self.stream,
            global_batch=self.batch,
            accumulate=accumulate,
            rank=role.rank,
            world=role.world,
            num_workers=self.num_workers,
            state=self._resume,
            timeout=self.timeout,
            multiprocessing_context=self.start_method,
        )
        loader = Prefetched(clips, ahead=torch.cuda.is_available())
        return FirstStep(loader, accumulate) if self.repeat_first_step else loader

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict
        self.progress = Progress(self.stream.readers, state_dict, signature=self.stream.signature)


class FirstStep:
    """The micro-batches of the loader's first optimizer step, over and over."""

    def __init__(self, loader: Prefetched, accumulate: int) -> None:
        self.loader, self.accumulate = loader, accumulate

    def __iter__(self) -> Iterator[ClipBatch]:
        return cycle(list(islice(self.loader, self.accumulate)))


class LAIONDataModule(StreamDataModule):
    """Image-text pairs (section 4.1.1), as img2dataset stores them. An image is a clip of one frame."""


class WebVidDataModule(StreamDataModule):
    """Video-text pairs (section 4.1.1), as video2dataset stores them."""


class MixtureDataModule(LightningDataModule):
    """Both streams at once: batches are {"image": ClipBatch, "video": ClipBatch}, or one of them where the mixture divides the ranks."""

    def __init__(self, mixture: JointMixture, image: StreamDataModule | None = None, video: StreamDataModule | None = None) -> None:
        super().__init__()
        self.mixture = mixture
        self.modules: dict[str, StreamDataModule] = {}
        for name, module in (("image", image), ("video", video)):
            weight = mixture.weights[name]
            if weight > 0 and module is None:
                raise ValueError(
                    f"the mixture gives {name}s {weight:.3g} of the loss, but data has no {name} stream: choose a data= with one, "
                    f"or mixture.image_weight={'0' if name == 'image' else '1'}"
                )
            if weight > 0 and module is not None:
                self.modules[name] = module

    def plan(self, world: int) -> StepPlan:
        return StepPlan.of(
            self.mixture,
            {name: module.batch for name, module in self.modules.items()},
            {name: module.micro_batch for name, module in self.modules.items()},
            world,
        )

    def check(self, frozen: Frozen) -> None:
        """Precomputed latents and text embeddings must be of these models. Raises ValueError."""
        for module in self.modules.values():
            if isinstance(module.stream, LatentStream):
                module.stream.check(frozen.autoencoder, frozen.text_encoder)

    def train_dataloader(self) -> CombinedLoader:
        assert self.trainer is not None
        plan = self.plan(self.trainer.world_size)
        roles = self.mixture.roles(self.trainer.global_rank, self.trainer.world_size)
        loaders = {name: self.modules[name].loader(role, plan.accumulate) for name, role in roles.items()}
        return CombinedLoader(loaders, "min_size")  # every stream gives a micro-batch each time; none of them ends

    def transfer_batch_to_device(self, batch: dict[str, ClipBatch], device: torch.device, dataloader_idx: int) -> dict[str, ClipBatch]:
        return {stream: clips.to(device, non_blocking=True) for stream, clips in batch.items()}

    def consumed(self, batch: dict[str, ClipBatch]) -> None:
        """Tell the streams what training has used. Workers are ahead of it; only this is saved."""
        for name, clips in batch.items():
            self.modules[name].progress.update(clips)

    def state_dict(self) -> dict[str, Any]:
        """The position of every virtual reader, gathered from the ranks that host them. All ranks must call it together."""
        mine = {name: module.progress.state_dict() for name, module in self.modules.items()}
        ranks = from_all(mine)
        return {name: Progress.merge([states[name] for states in ranks]) for name in self.modules}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, state in state_dict.items():
            if name in self.modules:
                self.modules[name].load_state_dict(state)

"""Images and videos in one step: section 3.3, "one eighth of GPUs for training are applied to image-text paired datasets".

Data-parallel training averages the ranks' means, so the paper's gradient is 1/8 of the images' mean plus 7/8 of the videos' mean, whatever
the batch sizes. 1:7 is therefore the weight of the losses (and the share of the ranks in `RankMixture`), never of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

STREAMS = ("image", "video")


@dataclass(frozen=True)
class Role:
    """What one rank reads of a stream: share `rank` of `world`."""

    rank: int
    world: int


class JointMixture:
    """Every rank takes images and videos in each step: the paper's gradient on any number of ranks."""

    def __init__(self, image_weight: float = 1 / 8) -> None:
        if not 0 <= image_weight <= 1:
            raise ValueError(
                f"mixture.image_weight is {image_weight}: give a share of the loss between 0 (videos only) and 1 (images only)"
            )
        self.weights = {"image": image_weight, "video": 1 - image_weight}

    def roles(self, rank: int, world: int) -> dict[str, Role]:
        return {stream: Role(rank, world) for stream in STREAMS if self.weights[stream] > 0}

    def world_of(self, stream: str, world: int) -> int:
        return world


class RankMixture(JointMixture):
    """The paper's way: ranks 0, 8, 16, ... read images only, the others videos only."""

    PERIOD = 8

    def __init__(self, image_weight: float = 1 / 8) -> None:
        super().__init__(image_weight)
        if not 0 < image_weight < 1:
            raise ValueError(
                f"mixture=rank divides the ranks between images and videos, but image_weight is {image_weight}: use mixture=joint"
            )

    def roles(self, rank: int, world: int) -> dict[str, Role]:
        images = self.world_of("image", world)
        if rank % self.PERIOD == 0:
            return {"image": Role(rank // self.PERIOD, images)}
        return {"video": Role(rank - rank // self.PERIOD - 1, world - images)}

    def world_of(self, stream: str, world: int) -> int:
        if world < 2:
            raise ValueError(
                f"mixture=rank needs at least 2 ranks, one for images and one for videos, but there is {world}: use mixture=joint"
            )
        images = math.ceil(world / self.PERIOD)
        return images if stream == "image" else world - images


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step, the same on every rank.

    The loss of a rank's micro-batch is W * A * sum over its samples of weight / N: Lightning divides by A, data-parallel training by W, and
    what is left is the weighted mean over the global batch, exact for any division of the samples between ranks and micro-batches.
    """

    global_batch: Mapping[str, int]  # N of each stream
    weights: Mapping[str, float]
    world: int  # W
    accumulate: int  # A

    @staticmethod
    def of(mixture: JointMixture, global_batch: Mapping[str, int], micro_batch: Mapping[str, int], world: int) -> StepPlan:
        accumulate = 1
        for stream, samples in global_batch.items():
            ranks = mixture.world_of(stream, world)
            if samples < ranks:
                raise ValueError(
                    f"a global batch of {samples} {stream} samples cannot be divided between {ranks} ranks: "
                    f"raise batch.{stream} to {ranks} or use fewer ranks"
                )
            if micro_batch[stream] < 1:
                raise ValueError(f"micro_batch.{stream} is {micro_batch[stream]}: it must be at least 1")
            accumulate = max(accumulate, math.ceil(math.ceil(samples / ranks) / micro_batch[stream]))
        return StepPlan(dict(global_batch), {stream: mixture.weights[stream] for stream in global_batch}, world, accumulate)

    def scale(self, stream: str) -> float:
        """What a sample's loss is multiplied by: W * A * weight / N."""
        return self.world * self.accumulate * self.weights[stream] / self.global_batch[stream]

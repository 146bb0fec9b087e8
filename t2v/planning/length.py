"""How long a training takes, from its float operations and what the hardware reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from t2v.training.mixture import JointMixture, StepPlan

SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Length:
    """`operations`: float operations of one sample of each stream, encoding and backward pass included."""

    plan: StepPlan
    steps: int
    operations: Mapping[str, float]
    tflops: float  # reached by one device

    def share(self, mixture: JointMixture, stream: str, rank: int) -> int:
        """Samples of a stream that a rank takes in a step."""
        role = mixture.roles(rank, self.plan.world).get(stream)
        if role is None:
            return 0
        return -(-(self.plan.global_batch[stream] - role.rank) // role.world)

    def seconds_per_step(self, mixture: JointMixture) -> float:
        """Of the rank with most to do: the others wait for it."""
        work = max(
            sum(self.share(mixture, stream, rank) * self.operations[stream] for stream in self.plan.global_batch)
            for rank in range(self.plan.world)
        )
        return work / (self.tflops * 1e12)

    def days(self, mixture: JointMixture) -> float:
        return self.steps * self.seconds_per_step(mixture) / SECONDS_PER_DAY

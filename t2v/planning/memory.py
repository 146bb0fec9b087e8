"""Memory of one GPU, part by part: what stays (weights, optimizer, average, encoders) beside what one step adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2v.models.spatio_temporal import CHECKPOINTING
from t2v.planning.step import ACTIVATIONS, BACKWARD, COPIES, GRADIENTS, Parts, Step, activations_of, step
from t2v.training.graphs import UNRECORDABLE
from t2v.training.sharding import gathered_together, size_of

GIB = 2**30
GRAPHS = "gradients inside CUDA graphs"
GATHERED = "weights gathered by FSDP"


@dataclass(frozen=True)
class Layout:
    """How a training lies on its GPUs. `moments`: tensors that the optimizer keeps per parameter (AdamW: 2)."""

    ranks: int
    gather: str | None  # FullyShardedStrategy's; None: weights are not divided
    moments: int
    accumulate: int
    precision: str
    kernels: bool = False  # those of a GPU
    cuda_graphs: bool = False  # where the network can be recorded

    @property
    def keeps_gradients(self) -> bool:
        """Whole ones, in DDP's buckets, or from micro-batch to micro-batch; gather=step keeps those of its rows."""
        return (self.accumulate > 1 and self.gather != "step") or (self.ranks > 1 and self.gather is None)


def per_gpu(parts: Parts, counted: Step, layout: Layout, recorded: int = 0) -> dict[str, int]:
    """Bytes by part, at the moment of a step when most is alive. `recorded`: how many shapes of input have CUDA graphs of their own."""
    weights = size_of(parts.unet)
    own = weights // layout.ranks if layout.gather is not None else weights
    travelling = weights // 2 if layout.precision == "bf16-mixed" else weights  # FullyShardedStrategy.precision_policy
    in_half = layout.kernels and layout.precision == "bf16-mixed"  # TextToVideoModule.setup
    found = {
        "weights (float32)": own,
        "average of the weights": own,
        "optimizer": layout.moments * own,
        "frozen encoders": (size_of(parts.autoencoder.model) + size_of(parts.text_encoder.tower)) // (2 if in_half else 1),
    }
    if recorded:  # each writes its gradients where it wrote them when it was recorded
        found[GRAPHS] = recorded * (travelling if layout.gather == "step" else own)
    moment = dict(counted.at_peak)
    if layout.gather is not None:
        moment.pop(COPIES, None)
    if layout.gather == "step":  # gradients have the type of the weights, and lie where graphs keep them
        at_work = 0 if recorded else moment.get(GRADIENTS, 0) * travelling // weights
        moment[GRADIENTS] = at_work + (own if layout.accumulate > 1 else 0)
        found[GATHERED] = travelling
    elif layout.gather is not None:  # gradients lie divided; whole are all blocks or those at work and the next, and what belongs to none
        moment[GRADIENTS] = own
        gathered = sorted(sum(map(size_of, blocks)) for blocks in gathered_together(parts.unet))
        outside = weights - sum(gathered)
        whole = sum(gathered[-2:] if layout.gather == "block" else gathered) + outside
        found[GATHERED] = whole * travelling // weights + gathered[-1]  # + the whole gradients of those at work
    return found | moment


def micro_batch_that_fits(parts: Mapping[str, int], stream: str, now: int, limit: int) -> int:
    """The largest micro-batch of `stream` with which the parts stay within `limit` bytes; 0 if not even one sample does.

    Where it is another stream whose activations are alive when most is, a larger one was not counted: `now`, if it fits.
    """
    total, own = sum(parts.values()), parts.get(activations_of(stream), 0)
    if not sets_the_peak(parts, stream):
        return now if total <= limit else 0
    growing = own + parts.get(BACKWARD, 0)
    return max(0, now * (limit - total + growing) // growing)


def sets_the_peak(parts: Mapping[str, int], stream: str) -> bool:
    """Whether it is this stream whose activations are alive when most is: streams take turns within a step."""
    own = parts.get(activations_of(stream), 0)
    return own > 0 and own == max(size for name, size in parts.items() if name.startswith(ACTIVATIONS))


@dataclass(frozen=True)
class Mode:
    """One way of recomputation: bytes by part, and the float operations of a micro-batch by stream."""

    memory: Mapping[str, int]
    operations: Mapping[str, int]


def by_recomputation(parts: Parts, clips: Mapping[str, tuple[int, int, int, int]], layout: Layout) -> dict[str, Mode]:
    """Every value of unet.gradient_checkpointing. `clips`: stream -> (b f h w) of one micro-batch, in pixels."""
    network: Any = parts.unet
    before, found = network.gradient_checkpointing, {}
    for which in CHECKPOINTING:
        network.gradient_checkpointing = which
        counted = step(parts, clips, precision=layout.precision, keeps_gradients=layout.keeps_gradients, kernels=layout.kernels)
        recorded = len(clips) if layout.cuda_graphs and which not in UNRECORDABLE else 0
        found[which] = Mode(per_gpu(parts, counted, layout, recorded), counted.operations)
    network.gradient_checkpointing = before
    return found


def ways_that_fit(modes: Mapping[str, Mode], chosen: str, cuda_graphs: bool, limit: int) -> list[str]:
    """Overrides with which the same micro-batch takes at most `limit` bytes: another way of recomputation; without CUDA graphs, where there
    are some (`cuda_graphs`), only where they cannot be or do not fit."""
    ways = []
    for which, mode in modes.items():
        changes = [] if which == chosen else [f"unet.gradient_checkpointing={which}"]
        total = sum(mode.memory.values())
        if cuda_graphs and (which in UNRECORDABLE or total > limit):
            total -= mode.memory.get(GRAPHS, 0)
            changes.append("module.cuda_graphs=false")
        if changes and total <= limit:
            ways.append(" ".join(changes))
    return ways

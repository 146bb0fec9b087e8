"""A sharded network, whole for the length of a step, in memory that stays (ZeRO's second stage).

FSDP gathers a network block by block, wherever there is room: every gathering costs the CPU milliseconds, and no CUDA graph finds the
weights. Here all ranks' rows come together once a step, and gradients go back to them after the backward pass. Every rank holds all weights
in the type in which they are multiplied, and their gradients; weights in float32, moments and average stay divided.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from t2v.training.compiling import compile_blocks
from t2v.training.graphs import RecordedNetwork
from t2v.training.sharding import within

AT_ONCE = 1 << 26  # elements that travel together: few exchanges, little memory beside the weights


class GatheredNetwork:
    """`network` is one like the sharded one, without memory; `rows` are this rank's of its parameters, in their order (`own_rows`).

    `of` gives the network that a stream passes through. Each stream has parameters of its own in the same memory, so that gradients of two
    streams are added in float32, whatever type they have. Matrices take `dtype`, vectors (norms, biases) keep theirs, as under autocast.
    """

    def __init__(
        self, network: nn.Module, rows: Sequence[nn.Parameter], dtype: torch.dtype | None, group: dist.ProcessGroup, compiler: str | None
    ) -> None:
        self.network, self.compiler = network, compiler
        self.streams: dict[str, nn.Module] = {}
        self.recorded: dict[str, RecordedNetwork] | None = None
        shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        wholes = [Whole(name, shape, mine, dist.get_world_size(group)) for (name, shape), mine in zip(shapes.items(), rows, strict=True)]
        kinds: dict[torch.dtype, list[Whole]] = {}
        for whole in wholes:
            kinds.setdefault(dtype if dtype is not None and len(whole.shape) > 1 else whole.rows.dtype, []).append(whole)
        self.bundles = [Bundle(some, kind, group) for kind, all_of_it in kinds.items() for some in within(AT_ONCE, all_of_it)]

    def record(self) -> None:
        """From now on, passes run as CUDA graphs."""
        self.recorded = {}

    @property
    def recordings(self) -> int:
        return sum(network.recordings for network in (self.recorded or {}).values())

    def of(self, stream: str) -> Callable[..., Tensor]:
        if stream not in self.streams:
            network = self.streams[stream] = copy.deepcopy(self.network)
            for bundle in self.bundles:
                for whole, memory in zip(bundle.wholes, bundle.memory, strict=True):
                    owner, _, name = whole.name.rpartition(".")
                    network.get_submodule(owner).register_parameter(name, nn.Parameter(whole.view(memory)))
            if self.compiler is not None:
                compile_blocks(network, self.compiler)
        if self.recorded is None:
            return self.streams[stream]
        return self.recorded.setdefault(stream, RecordedNetwork(self.streams[stream]))

    @torch.no_grad()
    def gather(self) -> None:
        """Before the first pass of a step. Every rank must call it."""
        for bundle in self.bundles:
            bundle.gather()

    @torch.no_grad()
    def give_gradients(self) -> None:
        """After a backward pass: the mean over the ranks of all streams' gradients is added to that of this rank's rows. Every rank must
        call it."""
        passed = [parameters for network in self.streams.values() if has_gradient(parameters := dict(network.named_parameters()))]
        for bundle in self.bundles:
            bundle.give([[parameters[whole.name].grad for whole in bundle.wholes] for parameters in passed])  # type: ignore[misc]
        for parameters in passed:
            for parameter in parameters.values():
                parameter.grad = None


def has_gradient(parameters: Mapping[str, nn.Parameter]) -> bool:
    return next(iter(parameters.values())).grad is not None


@dataclass(frozen=True)
class Whole:
    """One parameter: its rows lie on the ranks, ceil(n / ranks) on each, the last ones have fewer or none.

    Convolutions' weights lie as the tokens do, input channels last (t2v.models.convolution.channels_last).
    """

    name: str
    shape: torch.Size
    rows: nn.Parameter
    ranks: int

    def numel(self) -> int:
        return self.shape.numel()

    @property
    def share(self) -> int:
        """Elements of one rank, padding included."""
        return -(-self.shape[0] // self.ranks) * math.prod(self.shape[1:])

    def view(self, memory: Tensor, rows: int | None = None) -> Tensor:
        """The parameter, or some rows of it, in memory that may be longer."""
        n, *rest = self.shape
        n = n if rows is None else rows
        flat = memory.flatten()[: n * math.prod(rest)]
        if len(rest) < 2:
            return flat.view(n, *rest)
        i, *kernel = rest
        return flat.view(n, *kernel, i).movedim(-1, 1)

    def along_memory(self, tensor: Tensor) -> Tensor:
        """What `view` gives, or a gradient like it, as it lies in memory."""
        return tensor.movedim(1, -1) if tensor.ndim > 2 else tensor


class Bundle:
    """Parameters that travel together."""

    def __init__(self, wholes: list[Whole], dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        self.wholes, self.dtype, self.group = wholes, dtype, group
        self.ranks, self.shares = dist.get_world_size(group), [whole.share for whole in wholes]
        device = wholes[0].rows.device
        flat = torch.zeros(self.ranks * sum(self.shares), dtype=dtype, device=device)
        self.memory = [part.view(self.ranks, -1) for part in flat.split([self.ranks * share for share in self.shares])]

    def gather(self) -> None:
        mine = self.memory[0].new_empty(sum(self.shares))
        views = [whole.view(part, len(whole.rows)) for whole, part in zip(self.wholes, mine.split(self.shares), strict=True)]
        torch._foreach_copy_(views, [whole.rows for whole in self.wholes])
        everyone = mine.new_empty(self.ranks * len(mine))
        dist.all_gather_into_tensor(everyone, mine, group=self.group)
        torch.split_with_sizes_copy(everyone.view(self.ranks, -1), self.shares, dim=1, out=self.memory)

    def give(self, gradients: list[list[Tensor]]) -> None:
        """`gradients`: those of each stream."""
        total: Tensor | None = None
        for of_stream in gradients:
            laid = [whole.along_memory(gradient).contiguous() for whole, gradient in zip(self.wholes, of_stream, strict=True)]
            kind = self.wholes[0].rows.dtype
            buffer = torch.empty(self.ranks, sum(self.shares), dtype=kind, device=laid[0].device)
            torch._chunk_cat(laid, dim=0, num_chunks=self.ranks, out=buffer)
            total = buffer if total is None else total.add_(buffer)
        assert total is not None, "no stream took part"
        mine = total.new_empty(sum(self.shares))
        dist.reduce_scatter_tensor(mine, total.flatten(), group=self.group)
        mine /= self.ranks
        for whole, part in zip(self.wholes, mine.split(self.shares), strict=True):
            gradient = whole.view(part, len(whole.rows)).contiguous()
            whole.rows.grad = gradient if whole.rows.grad is None else whole.rows.grad.add_(gradient)

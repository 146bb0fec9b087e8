"""Networks whose parameters are divided between ranks (FSDP2): each rank holds some rows of every parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from t2v.checkpoint import Piece
from t2v.models.spatio_temporal import blocks_of


class HasSize(Protocol):
    def numel(self) -> int: ...


T = TypeVar("T", bound=HasSize)


def shard(network: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy, reshard_after_forward: bool = True) -> None:
    """Divide the network's parameters over the mesh, in place.

    The convolution blocks and transformers of the spatio-temporal blocks are gathered just before they run, large ones one by one, small
    ones together with their neighbours; the network gathers the rest (first and last layer, time embedding, resampling). Float parameters
    stay what they are between the steps. Without `reshard_after_forward` a block keeps what it gathered until its first backward pass is
    done: the second stream of a step finds it there.
    """
    for blocks in gathered_together(network):
        fully_shard(blocks, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)  # type: ignore[arg-type]
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def gathered_together(network: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a spatio-temporal network in the order in which they run, cut into pieces of at most 1.5 times the largest block.

    Small blocks one by one would keep a GPU waiting: the CPU takes milliseconds for each gathering, of whatever size.
    """
    blocks = blocks_of(network)
    limit = 1.5 * max(map(size_of, blocks), default=0)
    together: list[list[nn.Module]] = []
    for block in blocks:
        if together and sum(map(size_of, together[-1])) + size_of(block) <= limit:
            together[-1].append(block)
        else:
            together.append([block])
    return together


def make_room_for_gathering(network: nn.Module) -> None:
    """Before a network that is trained is sampled: the tensors into which its weights are gathered are made outside inference mode.

    FSDP makes them at the first gathering and keeps them, with or without memory. From sampling, whose inference mode they would then bear
    for ever, no backward pass could use them. Every rank must call it; a network that is not sharded stays as it is.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()  # one piece at a time


@torch.no_grad()
def materialise(network: nn.Module, device: torch.device, seed: int) -> None:
    """Give memory on `device` and initial weights to a network that was built on the meta device, divided between ranks or not.

    Layer by layer in the order of construction, whole, on the CPU: the weights of a seed are those of a network that was built on the CPU
    after `torch.manual_seed(seed)`, bit for bit, on any device and any number of ranks; of the host's memory they take one layer's.
    """
    network.to_empty(device=device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in network.named_modules():
            own = dict(module.named_parameters(recurse=False))
            assert not list(module.buffers(recurse=False)), f"{name} has buffers, which nothing fills"
            if not own:
                continue
            drawn = copy.copy(module)
            whole = {  # type and device are named, for Lightning sets other defaults around this
                key: nn.Parameter(torch.empty(value.shape, dtype=torch.float32, device="cpu")) for key, value in own.items()
            }
            drawn._parameters = {**module._parameters, **whole}
            drawn.reset_parameters()  # type: ignore[operator]
            for key, value in own.items():
                copy_rows(value, whole[key])


def copy_rows(own: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into this one, which may be this rank's rows of it."""
    if isinstance(own, DTensor):
        own.to_local().copy_(whole[rows_of(own)])
    else:
        own.copy_(whole)


def own_rows(parameter: nn.Parameter) -> nn.Parameter:
    """This rank's rows of a parameter as a parameter of their own, in the same memory; one that is not sharded as it is.

    An optimizer that works element by element does the same on them as on the sharded parameter (`whole`), without the time that every
    operation on a list of those takes.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    with torch.no_grad():
        rows = nn.Parameter(parameter.to_local().detach(), requires_grad=parameter.requires_grad)
    rows.whole = parameter  # type: ignore[attr-defined]
    return rows


@torch.no_grad()
def take_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """What sharded parameters gathered of their gradient becomes that of their `own_rows`."""
    for rows in parameters:
        whole = getattr(rows, "whole", None)
        if whole is not None and whole.grad is not None:
            rows.grad, whole.grad = whole.grad.to_local(), None


def size_of(module: nn.Module) -> int:
    """Bytes of a whole module, wherever it lies."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def within(elements: int, tensors: Iterable[T]) -> Iterator[list[T]]:
    """The tensors in turn, in lists of at most so many elements or of one tensor."""
    part: list[T] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.numel() > elements:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    if part:
        yield part


def is_sharded(tensor: Any) -> bool:
    return isinstance(tensor, DTensor) or hasattr(tensor, "whole")


@torch.no_grad()
def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's rows of each tensor; a tensor that is not sharded as it is."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def rows_of(tensor: DTensor) -> slice:
    """Which rows of the whole lie on this rank: ranks hold ceil(n / ranks) each, the last ones fewer or none."""
    (placement,) = tensor.placements
    assert placement.is_shard(0), placement
    size = -(-tensor.shape[0] // tensor.device_mesh.size())
    first = min(tensor.shape[0], size * tensor.device_mesh.get_local_rank())
    rows = slice(first, min(tensor.shape[0], first + size))
    assert rows.stop - rows.start == tensor.to_local().shape[0]
    return rows


def piece_of(tensor: Tensor) -> Piece:
    """What this rank contributes to a file that holds the whole tensor."""
    if isinstance(tensor, DTensor):
        return Piece(tensor.to_local(), tuple(tensor.shape), rows_of(tensor).start)
    return Piece.whole(tensor)


@torch.no_grad()
def load_rows(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy this rank's rows of whole tensors into a sharded network. Raises RuntimeError where names or shapes differ."""
    own = network.state_dict()
    if own.keys() != state.keys():
        raise RuntimeError(f"the checkpoint's tensors are not the network's: {sorted(own.keys() ^ state.keys())[:3]}")
    for name, value in own.items():
        if value.shape != state[name].shape:
            raise RuntimeError(f"{name} is {tuple(state[name].shape)} in the checkpoint and {tuple(value.shape)} in the network")
        copy_rows(value, state[name])


def divide_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor -> what belongs to the parameter: all of it, or this rank's rows where it is `own_rows` of one."""
    if not is_sharded(parameter):
        return whole
    return whole[rows_of(parameter.whole)].to(parameter.device, copy=True)  # type: ignore[attr-defined]


def as_sharded(value: Tensor, parameter: Tensor) -> Tensor:
    """The reverse: what belongs to `own_rows` of a parameter, as a tensor that is sharded like that one."""
    if not is_sharded(parameter):
        return value
    whole = parameter.whole  # type: ignore[attr-defined]
    return DTensor.from_local(value, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride())

"""Networks whose parameters are divided between ranks (FSDP2): each rank holds some rows of every parameter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from t2v.checkpoint import Piece
from t2v.models.spatio_temporal import stages_of


def shard(network: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Divide the network's parameters over the mesh, in place.

    Every convolution block and every transformer of a spatio-temporal block is gathered for itself, just before it runs; the network
    gathers the rest (first and last layer, time embedding, resampling). Float parameters stay what they are between the steps.
    """
    for stage in stages_of(network):
        for kind in ("resnets", "temp_convs", "attentions", "temp_attentions"):
            for block in getattr(stage, kind, ()):
                fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(network, mesh=mesh, mp_policy=policy)


def materialise(network: nn.Module, device: torch.device) -> None:
    """Give memory and initial weights to a network that was built on the meta device and then sharded."""
    network.to_empty(device=device)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]


def is_sharded(tensor: Any) -> bool:
    return isinstance(tensor, DTensor)


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
        if isinstance(value, DTensor):
            value.to_local().copy_(state[name][rows_of(value)])
        else:
            value.copy_(state[name])


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor sharded like the parameter that it belongs to, if that is sharded."""
    if not isinstance(parameter, DTensor):
        return whole
    rows = whole[rows_of(parameter)].to(parameter.device, copy=True)
    return DTensor.from_local(
        rows, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )

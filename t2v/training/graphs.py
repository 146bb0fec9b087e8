"""The network's forward and backward passes recorded as CUDA graphs: a small network's thousands of launches become two."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from t2v.diffusion.recording import uncached_autocast

RECORDING = threading.Lock()  # held while a graph is recorded, and by other threads while they ask CUDA for memory, which would spoil it
UNRECORDABLE = ("attention", "all")  # recomputation that saves and sets the state of random numbers, as no graph can
MOST = 4  # shapes; each keeps its own activations
TOLERANCE = 0.05  # of the gradient's norm, for sums in another order; what was recorded wrongly is not a number or off by all of it


class RecordedNetwork:
    """The network as a function, recorded anew for each shape of its input; from the fifth shape on it runs unrecorded.

    Losses and gradients are the network's own, dropout included. Recording leaves nothing behind: no gradient, no used random number.
    A parameter's gradient may lie in memory that the next call of the same shape overwrites: before a second one, the caller gives every
    parameter a gradient of its own (`own_gradients`), into which the calls then add.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.recorded: dict[tuple[Any, ...], Any] = {}

    @property
    def recordings(self) -> int:
        return len(self.recorded)

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        inputs = sample, timestep, text
        key = (self.network.training, *((tuple(x.shape), x.dtype) for x in inputs))
        if key not in self.recorded:
            if len(self.recorded) == MOST:
                return self.network(*inputs)
            self.recorded[key] = recorded_or_plain(self.network, inputs)
        return self.recorded[key](*inputs)


class _Call(nn.Module):
    """A module of its own for each shape, because recording replaces a module's `forward`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)


def recorded_or_plain(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What is recorded is compared with the network's own gradient before it is relied upon; where they differ, the network itself."""
    expected = gradient_norms(network, network, inputs)
    recorded = record(network, inputs)
    found = gradient_norms(recorded, network, inputs)
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if difference <= TOLERANCE:
        return recorded
    shape = " x ".join(map(str, inputs[0].shape))
    print(f"graphs   none for {shape}: recorded, its gradient is off by {difference:.2g} of its size; it runs unrecorded", flush=True)
    return network


def gradient_norms(function: Any, network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """(parameters,) of the mean square of what the function gives, with the same dropout each time. Norms, for two sets of gradients would
    not fit beside the activations."""
    with torch.random.fork_rng([x.device for x in inputs[:1] if x.is_cuda], device_type="cuda"), uncached_autocast():
        torch.manual_seed(0)
        loss = function(*inputs).float().square().mean()
        return torch.stack(torch._foreach_norm(torch.autograd.grad(loss, list(network.parameters()))))


def record(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    examples = tuple(x.detach().clone() for x in inputs)
    with RECORDING, uncached_autocast(), torch.random.fork_rng([inputs[0].device], device_type="cuda"):
        return torch.cuda.make_graphed_callables(_Call(network), examples)


def require_recordable(network: Any, compiler: str | None) -> None:
    """ValueError for a network whose recomputation cannot be recorded, or whose blocks go through a compiler."""
    if compiler is not None:
        raise ValueError(f"module.compile={compiler} and module.cuda_graphs=true do not go together: set module.cuda_graphs=false")
    if network.gradient_checkpointing in UNRECORDABLE:
        raise ValueError(
            f"module.cuda_graphs=true cannot record unet.gradient_checkpointing={network.gradient_checkpointing}: "
            "use none or elementwise, or module.cuda_graphs=false"
        )


def own_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Every gradient becomes zero, in memory of its own."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()
        elif parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)

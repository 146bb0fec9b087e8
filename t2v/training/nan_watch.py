"""Stops a training at the first value that is not finite, and says where it arose.

A loss that is not finite makes the gradient of every rank so in the same step. So the norm of the gradient is watched, and all ranks then
search together: a sharded network runs on all of them or not at all.

A fused optimizer can be told on the GPU to leave weights and moments as they are (`found_inf`, as GradScaler tells it). Then the verdict is
read a step later, and this watch never makes the CPU wait for the GPU. (What sums losses over ranks or looks for spikes may.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from t2v.batch import LatentBatch
from t2v.ranks import from_all
from t2v.training.sharding import is_sharded, local


@dataclass(frozen=True)
class MicroBatch:
    """What a micro-batch of one stream was trained on, until the next optimizer step: for the logs, and for the search below."""

    stream: str
    keys: list[str]  # (b)
    encoded: LatentBatch
    timestep: Tensor  # (b,)
    noise: Tensor  # (b c f h w)
    losses: Tensor  # (b,)


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite. The message names step, sample keys and layer."""


class NanWatch:
    """`look` before every optimizer step, `settle` before a step is relied upon. Both raise NonFiniteError, on all ranks alike."""

    def __init__(self) -> None:
        self.norm: Tensor | None = None  # of the last step's gradient, all ranks together, before clipping; 0-d, on its device
        self._pending: Verdict | None = None

    def look(self, model: Model, optimizer: Optimizer, step: int, micro_batches: Sequence[MicroBatch]) -> None:
        """`model` as it is before step `step`. Of the steps seen before, only the last one's micro-batches are kept."""
        self.settle(model)
        norms = gradient_norms(model.parameters)
        self.norm = norm_of(norms, is_sharded(model.parameters[0]))
        verdict = Verdict(step, list(micro_batches), norms, arriving(torch.isfinite(self.norm)))
        skips = all(group.get("fused") for group in optimizer.param_groups)
        if skips:
            optimizer.found_inf = (~torch.isfinite(self.norm)).float()  # type: ignore[attr-defined]
        self._pending = verdict
        if not skips:
            self.settle(model)

    def settle(self, model: Model) -> None:
        """Read the verdict on the last step that was looked at; its weights are those of the model until then."""
        verdict, self._pending = self._pending, None
        if verdict is not None and not verdict.finite():
            raise NonFiniteError(f"step {verdict.step}: {explain(model, verdict)}")


@dataclass(frozen=True)
class Model:
    """What the watch needs of what is trained."""

    network: nn.Module
    parameters: Sequence[nn.Parameter]  # all of the network's, or this rank's rows of each
    objective: Callable[..., Tensor]


@dataclass(frozen=True)
class Verdict:
    step: int
    micro_batches: list[MicroBatch]
    norms: Tensor  # (parameters,) of this rank's rows of each gradient
    finite: Callable[[], bool]


def arriving(flag: Tensor) -> Callable[[], bool]:
    """The flag as a number on the CPU, waited for when it is called for."""
    if not flag.is_cuda:
        return lambda: bool(flag)
    copy = torch.empty_like(flag, device="cpu", pin_memory=True).copy_(flag, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> bool:
        arrived.synchronize()
        return bool(copy)

    return wait


def explain(model: Model, verdict: Verdict) -> str:
    """Whose loss is not finite, and in which layer that arose; or whose gradient. Every rank must call it, and gets the same answer."""
    suspect = next((m for m in verdict.micro_batches if not torch.isfinite(m.losses).all()), None)
    again = suspect or verdict.micro_batches[-1]
    layer = first_bad_layer(
        model.network,
        lambda: model.objective(model.network, again.encoded.latents, again.encoded.text, again.timestep, again.noise),
    )
    finding = None
    if suspect is not None:
        keys = [key for key, loss in zip(suspect.keys, suspect.losses.tolist(), strict=True) if not math.isfinite(loss)]
        finding = f"the loss of {suspect.stream} {', '.join(keys)} is not finite; first in {layer}"
    elif (gradient := first_bad_gradient(model, verdict.norms)) is not None:
        samples = ", ".join(key for m in verdict.micro_batches for key in m.keys)
        finding = f"the loss is finite but the gradient of {gradient} is not; samples {samples}"
    findings = from_all(finding)
    of_losses = [f"{one} (rank {rank})" if len(findings) > 1 else one for rank, one in enumerate(findings) if one]
    return min(of_losses, key=lambda one: "the loss is finite" in one, default="the norm of the gradient is not finite, but no gradient is")


def first_bad_layer(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Run `forward` again and name the first innermost module whose output is not finite; a bad parameter is named before any output."""
    bad_parameter = next((name for name, p in model.named_parameters() if not torch.isfinite(local([p])[0]).all()), None)
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(f"layer {name}")

        return hook

    handles: list[RemovableHandle] = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled blocks do not call the hooks of their layers
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if bad_parameter is not None:
        return f"parameter {bad_parameter}"
    return found[0] if found else "the loss itself (latents, text or target)"


def gradient_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """(parameters,) the norm of each gradient, of this rank's rows where they are sharded; zero where there is none."""
    grads = [parameter.grad for parameter in parameters]
    norms = iter(torch._foreach_norm([grad for grad in grads if grad is not None]))
    zero = torch.zeros((), device=parameters[0].device)
    return torch.stack([zero if grad is None else next(norms) for grad in grads])


def norm_of(norms: Tensor, sharded: bool) -> Tensor:
    """The norm over all gradients, of all ranks where they are sharded; 0-d. Not finite where any of them is not."""
    squares = norms.square().sum()
    if sharded:
        dist.all_reduce(squares)
    return squares.sqrt()


def first_bad_gradient(model: Model, norms: Tensor) -> str | None:
    """The name of the first parameter whose gradient (its part on this rank) is not finite."""
    named = ((name, norm) for (name, _), norm in zip(model.network.named_parameters(), norms.tolist(), strict=True))
    return next((name for name, norm in named if not math.isfinite(norm)), None)

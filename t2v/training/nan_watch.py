"""Stops a training at the first value that is not finite, and says where it arose.

A loss that is not finite makes the gradient of every rank so in the same step. So the norm of the gradient is watched, and all ranks then
search together: a sharded network runs on all of them or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from t2v.batch import LatentBatch
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


def explain(unet: nn.Module, objective: Callable[..., Tensor], micro_batches: Sequence[MicroBatch]) -> str:
    """Whose loss is not finite, and in which layer that arose; or whose gradient. Every rank must call it, and gets the same answer."""
    suspect = next((m for m in micro_batches if not torch.isfinite(m.losses).all()), None)
    again = suspect or micro_batches[-1]
    layer = first_bad_layer(unet, lambda: objective(unet, again.encoded.latents, again.encoded.text, again.timestep, again.noise))
    finding = None
    if suspect is not None:
        keys = [key for key, loss in zip(suspect.keys, suspect.losses.tolist(), strict=True) if not math.isfinite(loss)]
        finding = f"the loss of {suspect.stream} {', '.join(keys)} is not finite; first in {layer}"
    elif (gradient := first_bad_gradient(unet)) is not None:
        samples = ", ".join(key for m in micro_batches for key in m.keys)
        finding = f"the loss is finite but the gradient of {gradient} is not; samples {samples}"
    findings: list[Any] = [finding]
    if dist.is_available() and dist.is_initialized():
        findings *= dist.get_world_size()
        dist.all_gather_object(findings, finding)
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
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    if bad_parameter is not None:
        return f"parameter {bad_parameter}"
    return found[0] if found else "the loss itself (latents, text or target)"


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm over all gradients, of all ranks where they are sharded; 0-d, on their device. Not finite where any of them is not."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    squares = torch.stack(torch._foreach_norm(local(grads))).square().sum()  # type: ignore[arg-type]
    if is_sharded(grads[0]):
        dist.all_reduce(squares)
    return squares.sqrt()


def first_bad_gradient(model: nn.Module) -> str | None:
    """The name of the first parameter whose gradient (its part on this rank) is not finite."""
    with_gradient = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((name for name, gradient in with_gradient if not torch.isfinite(local([gradient])[0]).all()), None)

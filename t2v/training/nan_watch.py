"""Stops a training at the first value that is not finite, and says where it arose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class NonFiniteError(ValueError):
    """A loss or gradient is NaN or infinite. The message names step, sample keys and layer."""


def first_bad_layer(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Run `forward` again and name the first innermost module whose output is not finite; a bad parameter is named before any output."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name}"
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
    return found[0] if found else "the loss itself (latents, text or target)"


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm over all gradients, 0-d, on their device. NaN or infinite where any of them is."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))  # type: ignore[arg-type]


def first_bad_gradient(model: nn.Module) -> str:
    """The name of the first parameter whose gradient is not finite."""
    return next(
        (name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()),
        "the norm itself (overflow)",
    )

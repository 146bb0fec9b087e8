"""Matrix products by oneDNN, for float32 on a CPU: joined with what follows them, in one pass instead of one for each, where there is no
gradient; alone, where torch's own are slow.

No compiler is needed: torch ships them for its own compiler's use. Beside each, in its docstring, what it computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VECTORS = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
INTEL = "GenuineIntel" in (CPUINFO.read_text() if (CPUINFO := Path("/proc/cpuinfo")).exists() else "GenuineIntel")
HALF_SPEED = VECTORS and torch.backends.cpu.get_cpu_capability() == "AVX512" and not INTEL
"""Of torch's own products, which are MKL's: on CPUs of other makers it uses vectors half as long as those can."""


def plain_float32_on_cpu(x: Tensor) -> bool:
    """Whether oneDNN has products for it."""
    plain = not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return VECTORS and x.device.type == "cpu" and x.dtype == torch.float32 and plain


def joinable(x: Tensor) -> bool:
    """Whether the functions of joined products can be used: they have no gradient."""
    return not torch.is_grad_enabled() and plain_float32_on_cpu(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias."""
    fits = weight.dtype == torch.float32 and weight.shape[1] == x.shape[-1]  # else torch says what is wrong in clearer words
    if not (HALF_SPEED and fits and plain_float32_on_cpu(x)):
        return F.linear(x, weight, bias)
    weight = weight.contiguous()  # of one with gaps, as the middle tap of a temporal convolution, oneDNN's product takes 300 times as long
    return LinearByOneDNN.apply(x, weight, bias) if torch.is_grad_enabled() else one_dnn(x, weight, bias)


def one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none")


class LinearByOneDNN(torch.autograd.Function):
    """F.linear with its gradient; that of the weight stays torch's own, which is as fast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return one_dnn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            one_dnn(rows, weight.t()).view(x.shape) if wanted[0] else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            rows.sum(0) if wanted[2] else None,
        )


class Linear(nn.Linear):
    """nn.Linear by the function above."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


def linear_times(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """(x weight^T + bias) * factor."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, factor, weight, bias, "mul")


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor, summand: Tensor) -> Tensor:
    """x weight^T + bias + summand."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, summand, weight, bias, "add")

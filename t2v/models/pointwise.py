"""Matrix products joined with what follows them, for float32 on a CPU that only infers: one pass by oneDNN instead of one for each.

No compiler is needed: torch ships them for its own compiler's use. Beside each, in its docstring, what it computes.
"""

from __future__ import annotations

import torch
from torch import Tensor

VECTORS = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")


def joinable(x: Tensor) -> bool:
    """Whether the functions below can be used: they have no gradient."""
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()
    return VECTORS and x.device.type == "cpu" and x.dtype == torch.float32 and plain


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


def linear_times(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """(x weight^T + bias) * factor."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, factor, weight, bias, "mul")


def linear_plus(x: Tensor, weight: Tensor, bias: Tensor, summand: Tensor) -> Tensor:
    """x weight^T + bias + summand."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, summand, weight, bias, "add")

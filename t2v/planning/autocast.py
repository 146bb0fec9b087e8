"""What torch.autocast("cuda") does to types, for tensors on the meta device, to which autocast itself does not apply."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# The functions of autocast's two lists that networks here call.
LINEAR_ALGEBRA = (
    F.linear,
    F.conv2d,
    F.conv3d,
    torch.conv2d,
    torch.conv3d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    Tensor.matmul,
)
ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
LOW: frozenset[Any] = frozenset((*LINEAR_ALGEBRA, *ATTENTION))
FULL: frozenset[Any] = frozenset((F.group_norm, F.layer_norm, F.softmax, torch.softmax, Tensor.softmax, F.mse_loss, torch.sum, Tensor.sum))


class GPUFunctions(TorchFunctionMode):
    """`low` is autocast's type, None for no autocast. Attention becomes the fused kernel that a GPU would take.

    `on_cast` is told of every copy of a parameter that the cache keeps. As in autocast, that cache holds leaf parameters only, and only
    until `forget`, when the forward pass ends; what is recomputed in the backward pass is cast anew each time.
    """

    def __init__(self, low: torch.dtype | None, on_cast: Callable[[Tensor], None] = lambda copy: None) -> None:
        super().__init__()
        self.low, self.on_cast = low, on_cast
        self._cache: dict[int, Tensor] | None = {}

    def forget(self) -> None:
        self._cache = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = None if self.low is None else self.low if func in LOW else torch.float32 if func in FULL else None
        if dtype is not None:
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None and len(args) == 3:
            kernel = torch.ops.aten._scaled_dot_product_flash_attention
            if args[0].dtype == torch.float32:  # the flash kernel has 16-bit types only
                return torch.ops.aten._scaled_dot_product_efficient_attention(*args, None, torch.is_grad_enabled())[0]
            return kernel(*args)[0]
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if self._cache is None or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._cache:
            self._cache[id(value)] = value.to(dtype)
            self.on_cast(self._cache[id(value)])
        return self._cache[id(value)]

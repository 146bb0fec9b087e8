"""I3D once more, independently: the graph of kinetics-i3d/i3d.py by TensorFlow's layer names, as functions on a dictionary of tensors.

Nothing is shared with t2v.metrics.i3d but the tensors: batch normalisation is folded into the convolution, padding is written out from
TensorFlow's rule, pools pad with minus infinity (TensorFlow's leaves padding out of a maximum).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
BRANCHES = {  # TensorFlow's name inside an inception block: ours
    "Branch_0/Conv3d_0a_1x1": "b0",
    "Branch_1/Conv3d_0a_1x1": "b1a",
    "Branch_1/Conv3d_0b_3x3": "b1b",
    "Branch_2/Conv3d_0a_1x1": "b2a",
    "Branch_2/Conv3d_0b_3x3": "b2b",
    "Branch_3/Conv3d_0b_1x1": "b3b",
}
MIXED_OF_STAGES = (("3b", "3c"), ("4b", "4c", "4d", "4e", "4f"), ("5b", "5c"))
POOLS = {"MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)), "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)), "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2))}


def padded(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int], value: float) -> Tensor:
    """SAME, as TensorFlow documents it: if n % s == 0 the sum is max(k - s, 0), else max(k - n % s, 0); the odd one comes after."""
    for axis, (k, s) in enumerate(zip(kernel, stride), start=2):
        n = x.shape[axis]
        whole = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
        before = whole // 2
        for count, first in ((before, True), (whole - before, False)):
            edge = torch.full((*x.shape[:axis], count, *x.shape[axis + 1 :]), value)
            x = torch.cat([edge, x] if first else [x, edge], axis)
    return x


def unit(state: State, name: str, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor:
    """SAME convolution; y = (conv(x) - mean) / sqrt(variance + 1e-3) + beta, folded; ReLU."""
    weight = state[f"{name}.conv3d.weight"].double()
    shrink = 1 / (state[f"{name}.bn.running_var"].double() + 1e-3).sqrt()
    bias = state[f"{name}.bn.bias"].double() - state[f"{name}.bn.running_mean"].double() * shrink
    kernel = (weight.shape[2], weight.shape[3], weight.shape[4])
    y = F.conv3d(padded(x, kernel, stride, 0.0), (weight * shrink.view(-1, 1, 1, 1, 1)).float(), bias.float(), stride)
    return y.clamp(min=0)


def pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(padded(x, kernel, stride, -math.inf), kernel, stride)


def mixed(state: State, name: str, x: Tensor) -> Tensor:
    def layer(place: str, x: Tensor) -> Tensor:
        return unit(state, f"{name}.{BRANCHES[place]}", x)

    branch_0 = layer("Branch_0/Conv3d_0a_1x1", x)
    branch_1 = layer("Branch_1/Conv3d_0b_3x3", layer("Branch_1/Conv3d_0a_1x1", x))
    branch_2 = layer("Branch_2/Conv3d_0b_3x3", layer("Branch_2/Conv3d_0a_1x1", x))
    branch_3 = layer("Branch_3/Conv3d_0b_1x1", pool(x, (3, 3, 3), (1, 1, 1)))
    return torch.cat([branch_0, branch_1, branch_2, branch_3], 1)


@torch.no_grad()
def logits(state: State, clips: Tensor) -> Tensor:
    """Clips float (b 3 f 224 224) in [-1, 1] -> (b 400)."""
    x = unit(state, "Conv3d_1a_7x7", clips, (2, 2, 2))
    x = pool(x, (1, 3, 3), (1, 2, 2))  # MaxPool3d_2a_3x3
    x = unit(state, "Conv3d_2c_3x3", unit(state, "Conv3d_2b_1x1", x))
    for (kernel, stride), stage in zip(POOLS.values(), MIXED_OF_STAGES):
        x = pool(x, kernel, stride)
        for name in stage:
            x = mixed(state, f"Mixed_{name}", x)
    x = torch.stack([x[:, :, t : t + 2].mean((2, 3, 4)) for t in range(x.shape[2] - 1)], 2)  # average of 2 x 7 x 7, VALID: (b 1024 f')
    weight, bias = state["logits.conv3d.weight"].flatten(1), state["logits.conv3d.bias"]
    return (torch.einsum("kc,bcf->bkf", weight, x) + bias[:, None]).mean(2)

"""Resizing as the published metrics do it, as batched matrix products, on any device.

Every resampling of a picture is one sparse matrix for its columns and one for its rows. Pillow's bicubic on 8-bit pictures works in fixed
point (22 bits) and rounds after each direction; whole numbers below 2^53 are exact in float64, so the products here give Pillow's bytes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

PRECISION = 22  # bits of Pillow's fixed-point coefficients for 8-bit pictures


def pillow_bicubic(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 (n h w c) -> uint8 (n height width c), the bytes of `Image.resize((width, height), Image.Resampling.BICUBIC)`."""
    x = frames.permute(0, 3, 1, 2).to(torch.float64)  # (n c h w)
    x = _rounded(x @ _fixed_point(frames.shape[2], width).to(x.device).T)  # columns first, as Pillow does
    x = _rounded(_fixed_point(frames.shape[1], height).to(x.device) @ x)
    return x.permute(0, 2, 3, 1).to(torch.uint8)


def pillow_bicubic_float(frames: Tensor, height: int, width: int) -> Tensor:
    """uint8 (n h w c) -> float32 (n c height width) in 0..255: Pillow's bicubic on mode F, clipped, unrounded (clean-fid's recipe)."""
    x = frames.permute(0, 3, 1, 2).to(torch.float64)
    x = (x @ bicubic_matrix(frames.shape[2], width).to(x.device).T).float()
    x = (bicubic_matrix(frames.shape[1], height).to(x.device) @ x.double()).float()
    return x.clamp(0, 255)


def tensorflow_bilinear(x: Tensor, height: int, width: int) -> Tensor:
    """float (n c h w) -> (n c height width) on TensorFlow 1's grid: no half-pixel offset, no antialiasing."""
    rows, columns = _legacy_bilinear_matrix(x.shape[2], height), _legacy_bilinear_matrix(x.shape[3], width)
    return rows.to(x) @ (x @ columns.to(x).T)


def short_side(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width once the shorter side is `size` (torchvision's rounding)."""
    if height <= width:
        return size, int(size * width / height)
    return int(size * height / width), size


def centre_crop(frames: Tensor, size: int) -> Tensor:
    """(n h w c) -> (n size size c)."""
    top, left = round((frames.shape[1] - size) / 2), round((frames.shape[2] - size) / 2)
    return frames[:, top : top + size, left : left + size]


@lru_cache(maxsize=32)
def bicubic_matrix(old: int, new: int) -> Tensor:
    """float64 (new old): Keys' cubic with a = -0.5, widened by the scale where the picture shrinks (antialiasing)."""
    scale = old / new
    widening = max(scale, 1.0)
    support = 2.0 * widening
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * scale
        first, last = max(0, int(centre - support + 0.5)), min(old, int(centre + support + 0.5))
        weights = [_keys((column - centre + 0.5) / widening) for column in range(first, last)]
        total = sum(weights)
        matrix[row, first:last] = torch.tensor([weight / total for weight in weights], dtype=torch.float64)
    return matrix


@lru_cache(maxsize=32)
def _fixed_point(old: int, new: int) -> Tensor:
    scaled = bicubic_matrix(old, new) * (1 << PRECISION)
    return torch.trunc(scaled + torch.where(scaled < 0, -0.5, 0.5))


def _rounded(x: Tensor) -> Tensor:
    return ((x + (1 << (PRECISION - 1))) / (1 << PRECISION)).floor().clamp(0, 255)


def _keys(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    if x < 2:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


@lru_cache(maxsize=32)
def _legacy_bilinear_matrix(old: int, new: int) -> Tensor:
    matrix = torch.zeros(new, old, dtype=torch.float64)
    places = torch.arange(new, dtype=torch.float32) * (old / new)  # float32, as TensorFlow computes it
    for row, place in enumerate(places.tolist()):
        low = min(math.floor(place), old - 1)
        high = min(low + 1, old - 1)
        matrix[row, low] += 1 - (place - low)
        matrix[row, high] += place - low
    return matrix

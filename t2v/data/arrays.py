"""What encoders computed, as members of a shard: float16 .npy, read without pickle."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from t2v.data.errors import BadSample


def pack_moments(moments: Tensor) -> bytes:
    """Moments (f h w 2c) -> the bytes of a float16 .npy. Raises ValueError where they do not fit."""
    mean, log_variance = moments.float().cpu().chunk(2, dim=-1)
    return pack(torch.cat([mean, log_variance.clamp(-30, 20)], dim=-1))


def read_moments(data: bytes) -> np.ndarray:
    """The inverse: float16 (f h w 2c). Raises BadSample."""
    moments = unpack(data)
    if moments.ndim != 4:
        raise BadSample("latent_shape", f"{moments.shape}")
    return moments


def pack(values: Tensor) -> bytes:
    """A tensor -> the bytes of a float16 .npy. Raises ValueError where it does not fit."""
    half = values.detach().cpu().half()
    if not torch.isfinite(half).all():
        raise ValueError("an encoder's output is not finite in float16: it is broken, or its precision too low; try dtype=float32")
    buffer = io.BytesIO()
    np.save(buffer, half.numpy(), allow_pickle=False)
    return buffer.getvalue()


def unpack(data: bytes) -> np.ndarray:
    """The inverse. Raises BadSample."""
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise BadSample("latent_open", str(error)) from error
    if values.dtype != np.float16:
        raise BadSample("latent_shape", f"{values.dtype} {values.shape}")
    return values

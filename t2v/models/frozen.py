"""The frozen parts of the model in one plain holder outside the module tree: never trained, wrapped or saved with the network."""

from __future__ import annotations

import torch

from t2v.models.autoencoder import Autoencoder
from t2v.models.text_encoder import TextEncoder


class Frozen:
    """Autoencoder and text encoder. Not an nn.Module, so that FSDP, DDP, optimizers and `.train()` never see them."""

    def __init__(self, autoencoder: Autoencoder, text_encoder: TextEncoder):
        self.autoencoder, self.text_encoder = autoencoder, text_encoder

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Frozen:
        self.autoencoder.to(device, dtype)
        self.text_encoder.to(device, dtype)
        return self

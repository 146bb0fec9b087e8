"""CLIP ViT-B/32 through open_clip: one picture tower for CLIPSIM and the CLIP reading of FID-vid, one text tower for CLIPSIM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2v import weights
from t2v.metrics.resize import centre_crop, pillow_bicubic, short_side

MODELS = {  # our name: open_clip's; OpenAI's models use the quick GELU
    "clip_vit_b32": "ViT-B-32-quickgelu",
    "clip_vit_b16": "ViT-B-16-quickgelu",
    "clip_vit_l14": "ViT-L-14-quickgelu",
}
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class Clip:
    """Pictures and captions -> features of one space, not normalised. `network` is open_clip's CLIP."""

    def __init__(self, network: Any, tokenizer: Any, size: int = 224) -> None:
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size = size

    def to(self, device: torch.device | str) -> Clip:
        self.network.to(device)
        return self

    def pictures(self, frames: Tensor) -> Tensor:
        """uint8 (n h w c) -> features (n d)."""
        return self.network.encode_image(preprocess(frames, self.size))

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Plain captions, no template, cut at 77 tokens with the end token kept -> features (n d)."""
        tokens = self.tokenizer(list(captions))
        return self.network.encode_text(tokens.to(next(self.network.parameters()).device))


def preprocess(frames: Tensor, size: int = 224) -> Tensor:
    """CLIP's own: bicubic to a short side of `size` with Pillow's bytes, centre crop, CLIP's mean and deviation.

    uint8 (n h w c) -> float (n c size size).
    """
    height, width = short_side(frames.shape[1], frames.shape[2], size)
    x = centre_crop(pillow_bicubic(frames, height, width), size).permute(0, 3, 1, 2).float() / 255  # (n c size size)
    return (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]


def load(name: str, path: Path) -> Clip:
    """A model of `MODELS` in float32 from OpenAI's own file (TorchScript: trusted by its hash first), or a safetensors or weights-only
    state dict in open_clip's names."""
    import open_clip

    state = torch.jit.load(path, map_location="cpu").state_dict() if is_torchscript(path) else weights.read(path)
    for extra in ("input_resolution", "context_length", "vocab_size"):
        state.pop(extra, None)
    network = open_clip.create_model(MODELS[name], pretrained=None, precision="fp32", load_weights=False)
    network.load_state_dict({key: tensor.float() for key, tensor in state.items()}, strict=True)
    return Clip(network, open_clip.get_tokenizer(MODELS[name]))


def is_torchscript(path: Path) -> bool:
    """Whether a .pt file is a TorchScript archive (it carries code and constants) rather than a plain state dict."""
    import zipfile

    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())

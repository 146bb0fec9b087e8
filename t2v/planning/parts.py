"""The module's parts without their weights: shapes are enough to count, and files are looked for but not read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2v import weights
from t2v.models.autoencoder import SD_CONFIG, Autoencoder, empty_autoencoder
from t2v.models.text_encoder import VIT_H, TextEncoder, empty_tower
from t2v.planning.findings import Finding


def find(name: str, path: str | None, mend: str, download: bool = False, repositories: Sequence[str] | None = None) -> Path | Finding:
    """The file of a pretrained part; a Finding where it is not there."""
    try:
        return weights.find(name, path, repositories=repositories)
    except weights.WeightsError as error:
        if download:
            return Finding(
                f"{name} is not here yet and will be downloaded when training starts", "nothing to do where nodes reach the Hub", False
            )
        return Finding(str(error), mend)


def autoencoder_without_data(file: Path | None) -> Autoencoder:
    """As `Autoencoder.from_pretrained` would build it from `file`; Stable Diffusion's where there is none."""
    config = file.with_name("config.json") if file is not None else None
    return Autoencoder(empty_autoencoder(json.loads(config.read_text()) if config is not None and config.is_file() else SD_CONFIG))


def text_encoder_without_data(arguments: Mapping[str, Any]) -> TextEncoder:
    """A tower of `width`, `layers` and `heads`; ViT-H/14's where they are not given."""
    width, layers, heads = ({**VIT_H, **arguments}[name] for name in ("width", "layers", "heads"))
    return TextEncoder(empty_tower(width, layers, heads).to("meta"))

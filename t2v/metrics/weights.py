"""Which pretrained networks the metrics use: where they are found, whether they are the right ones, under which licence. Never random ones.

`t2v.weights` looks for files; here stands what a file must be. A published file has a published hash; a file with that name and another
content is corrupted or something else, and is refused. Any other file counts as unverified, which has to be allowed and marks the results.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from t2v.metrics import clip, i3d_weights, inception
from t2v.metrics.features import ClipFeatures, Extractor, I3dFeatures, InceptionFeatures, MotionFeatures
from t2v.weights import Weights, WeightsError, locate, sha256

KNOWN: dict[str, Weights] = {
    "i3d": Weights(
        ("i3d_torchscript.pt", "i3d_pretrained_400.pt", "i3d.safetensors"),
        ("flateon/FVD-I3D-torchscript",),
        "Apache-2.0 (DeepMind)",
        "51,235,320 bytes",
        {"i3d_torchscript.pt": i3d_weights.TORCHSCRIPT_SHA256},
    ),
    "inception_v3": Weights(
        ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
        (),
        "Apache-2.0 (TensorFlow models)",
        "about 95 MB; torch-fidelity's and pytorch-fid's file",
        dict.fromkeys(
            ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"),
            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        ),
    ),
    "clip_vit_b32": Weights(
        ("ViT-B-32.pt", "clip_vit_b32.safetensors"),
        (),
        "MIT (OpenAI)",
        "about 354 MB",
        {"ViT-B-32.pt": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"},
    ),
}
SOURCES = {  # fetched only with download=true; the Hugging Face Hub has no copy that anyone vouches for
    "inception_v3": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "clip_vit_b32": "https://openaipublic.azureedge.net/clip/models/"
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
}
GIT_BLOBS = {"i3d_pretrained_400.pt": i3d_weights.PRETRAINED_400_BLOB}  # no sha256 was published; git's hash was


@dataclass(frozen=True)
class Found:
    """A file and what is known of it."""

    name: str
    path: Path
    sha256: str
    verified: bool
    how: str  # sentence for people
    licence: str


def find(name: str, path: str | Path | None = None, download: bool = False) -> Path:
    """The file of a metric's network; besides `t2v.weights`' places, those where torch.hub and OpenAI's clip leave theirs."""
    spec = KNOWN[name]
    if path is not None:
        return locate(spec, name, path)
    hub, own = Path(torch.hub.get_dir()) / "checkpoints", Path.home() / ".cache" / "clip"
    try:
        return locate(spec, name)
    except WeightsError as error:
        for folder in (hub, own):
            for file in spec.files:
                if (folder / file).is_file():
                    return folder / file
        if name in SOURCES and download:
            return fetch(name, hub)
        if name in SOURCES:
            raise WeightsError(f"{error}. Nor in {hub} or {own}. Published at {SOURCES[name]}") from error
    return locate(spec, name, download=download)


def fetch(name: str, folder: Path) -> Path:
    """Download a published file; a wrong hash leaves nothing behind."""
    target = folder / KNOWN[name].files[0]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(SOURCES[name], str(target), hash_prefix=(KNOWN[name].sha256 or {})[target.name])
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{name} could not be fetched from {SOURCES[name]}: {error}. Fetch it elsewhere and give its path.") from error
    return target


def verify(name: str, path: Path) -> Found:
    """Hash the file. WeightsError if it bears a published name and is not the published file."""
    spec, value = KNOWN[name], sha256(path)
    published = dict(spec.sha256 or {})
    if path.name in published:
        if value != published[path.name]:
            raise WeightsError(
                f"{path} has sha256 {value}, the published {path.name} has {published[path.name]}: "
                "it is damaged or another file; fetch it again, or rename it and allow unverified weights."
            )
        return Found(name, path, value, True, "sha256 as published", spec.licence)
    if value in published.values():
        return Found(name, path, value, True, "sha256 as published", spec.licence)
    if path.name in GIT_BLOBS:
        if git_blob(path) != GIT_BLOBS[path.name]:
            raise WeightsError(f"{path} is not the published {path.name} (git hash {git_blob(path)}, expected {GIT_BLOBS[path.name]}).")
        return Found(name, path, value, True, "git hash as in two public repositories", spec.licence)
    if name == "i3d":
        if clip.is_torchscript(path):
            raise WeightsError(f"{path} is TorchScript, which is code, and not the published one (sha256 {value}): it is not opened.")
        try:
            wrong = i3d_weights.wrong_checksums(i3d_weights.read(path))
        except ValueError as error:
            raise WeightsError(f"{path}: {error}") from error
        if not wrong:
            return Found(name, path, value, True, "CRC-32C of all 230 tensors as in DeepMind's module", spec.licence)
        return Found(name, path, value, False, f"{len(wrong)} of 230 tensors are not DeepMind's", spec.licence)
    if clip.is_torchscript(path):
        raise WeightsError(f"{path} is TorchScript, which is code, and not a published file (sha256 {value}): it is not opened.")
    return Found(name, path, value, False, "no published hash", spec.licence)


def git_blob(path: Path) -> str:
    """git's name for the file's content (`git hash-object FILE`)."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def load(
    names: list[str],
    paths: Mapping[str, str | None] | None = None,
    resize: Mapping[str, str] | None = None,
    allow_unverified: bool = False,
    download: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Extractor], list[Found]]:
    """Extractors by name. All files are found and verified before the first is opened; all that is wrong is said in one WeightsError."""
    paths, resize, found, problems = paths or {}, resize or {}, [], []
    for name in names:
        if name not in KNOWN:
            continue  # motion and shapes bring nothing
        try:
            one = verify(name, find(name, paths.get(name), download))
        except WeightsError as error:
            problems.append(str(error))
            continue
        if not one.verified and not allow_unverified:
            problems.append(f"{one.path} is unverified ({one.how}); allow_unverified=true measures with it and marks the results.")
        found.append(one)
    if problems:
        raise WeightsError(" | ".join(problems))
    files = {one.name: one for one in found}
    builders: dict[str, Callable[[], Extractor]] = {
        "i3d": lambda: I3dFeatures(i3d_weights.build(i3d_weights.read(files["i3d"].path)), files["i3d"].sha256, resize.get("i3d", "torch")),
        "inception_v3": lambda: InceptionFeatures(
            inception.load(files["inception_v3"].path), files["inception_v3"].sha256, resize.get("inception_v3", "clean")
        ),
        "clip_vit_b32": lambda: ClipFeatures(clip.load("clip_vit_b32", files["clip_vit_b32"].path), files["clip_vit_b32"].sha256),
        "motion": MotionFeatures,
        "shapes": _shapes,
    }
    return {name: _built(builders[name], files.get(name)).to(device) for name in names}, found


def _built(build: Callable[[], Extractor], file: Found | None) -> Extractor:
    try:
        return build()
    except (RuntimeError, ValueError) as error:
        if file is None or isinstance(error, WeightsError):
            raise
        first = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")  # PyTorch goes on with every tensor's name
        raise WeightsError(
            f"{file.path} does not hold the weights of {file.name}: {first}. Fetch it again ({SOURCES.get(file.name, 'see check=true')})"
        ) from error


def _shapes() -> Extractor:
    from t2v.metrics.shapes_features import ShapesFeatures

    return ShapesFeatures.shipped()


def default_cache() -> Path:
    """Where reference features live: T2V_CACHE, or ~/.cache/t2v."""
    return Path(os.environ.get("T2V_CACHE") or Path.home() / ".cache" / "t2v") / "reference"

"""I3D's weights as people have them, brought into `InceptionI3d`, and checked tensor by tensor.

| file | what it is | how it is trusted |
|---|---|---|
| `i3d_torchscript.pt` | StyleGAN-V's TorchScript, hassony2's names | TorchScript is code: read only if its sha256 is the published one |
| `i3d_pretrained_400.pt` | VideoGPT's state dict, piergiaj's names | `weights_only`; size and git blob hash |
| `*.safetensors` | ours (`save`) | safetensors |

Whatever the container, the 230 tensors must have the CRC-32C values that DeepMind's own TF-Hub module records: this catches the wrong I3D
(Kinetics-600, ImageNet-only, flow) that looks right otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from t2v import weights
from t2v.metrics.clip import is_torchscript
from t2v.metrics.crc32c import crc32c
from t2v.metrics.i3d import MIXED, InceptionI3d

TORCHSCRIPT_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
PRETRAINED_400_BLOB = "a867b87ac3a9097d200598b1d48a1b890d8ec744"  # git's hash of the file; two independent repositories carry it
CHECKSUMS = Path(__file__).with_name("i3d_checksums.json")

_STEMS = ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3")
_BRANCHES = {  # ours (piergiaj) -> hassony2, TensorFlow
    "b0": ("branch_0", "Branch_0/Conv3d_0a_1x1"),
    "b1a": ("branch_1.0", "Branch_1/Conv3d_0a_1x1"),
    "b1b": ("branch_1.1", "Branch_1/Conv3d_0b_3x3"),
    "b2a": ("branch_2.0", "Branch_2/Conv3d_0a_1x1"),
    "b2b": ("branch_2.1", "Branch_2/Conv3d_0b_3x3"),
    "b3b": ("branch_3.1", "Branch_3/Conv3d_0b_1x1"),
}
_NORM = {"bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def units() -> dict[str, tuple[str, str]]:
    """Every convolution: our name -> (hassony2's name, TensorFlow's name)."""
    table = {stem: (stem[0].lower() + stem[1:], stem) for stem in _STEMS}
    for mixed in MIXED:
        for ours, (hassony2, tensorflow) in _BRANCHES.items():
            if (mixed, ours) == ("Mixed_5b", "b2b"):
                tensorflow = "Branch_2/Conv3d_0a_3x3"  # a slip in the original graph
            table[f"{mixed}.{ours}"] = (f"{mixed.lower()}.{hassony2}", f"{mixed}/{tensorflow}")
    table["logits"] = ("conv3d_0c_1x1", "Logits/Conv3d_0c_1x1")
    return table


def key_maps() -> tuple[dict[str, str], dict[str, str]]:
    """Ours -> hassony2's and ours -> TensorFlow's names, for the tensors that TensorFlow has (no scale, no counters): 230 each."""
    hassony2, tensorflow = {}, {}
    for ours, (theirs, tf) in units().items():
        hassony2[f"{ours}.conv3d.weight"], tensorflow[f"{ours}.conv3d.weight"] = f"{theirs}.conv3d.weight", f"{tf}/conv_3d/w"
        if ours == "logits":
            hassony2[f"{ours}.conv3d.bias"], tensorflow[f"{ours}.conv3d.bias"] = f"{theirs}.conv3d.bias", f"{tf}/conv_3d/b"
            continue
        for name, tf_name in _NORM.items():
            hassony2[f"{ours}.bn.{name}"], tensorflow[f"{ours}.bn.{name}"] = f"{theirs}.batch3d.{name}", f"{tf}/batch_norm/{tf_name}"
    return hassony2, tensorflow


def from_hassony2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """hassony2's names -> ours; scales must all be one, since the original has none."""
    to_ours = {theirs: ours for ours, theirs in key_maps()[0].items()}
    return _renamed(state, to_ours, "batch3d")


def from_piergiaj(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """piergiaj's names are ours; the same checks."""
    return _renamed(state, {name: name for name in key_maps()[0]}, "bn")


def to_hassony2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {theirs: state[ours] for ours, theirs in key_maps()[0].items()}


def _renamed(state: Mapping[str, Tensor], to_ours: Mapping[str, str], norm: str) -> dict[str, Tensor]:
    renamed, foreign = {}, []
    for name, tensor in state.items():
        if name in to_ours:
            renamed[to_ours[name]] = tensor.float()
        elif name.endswith(f".{norm}.weight"):
            if not torch.all(tensor == 1):
                raise ValueError(
                    f"{name}: the original I3D has no batch-norm scale, this file has one that is not 1. It is another network."
                )
        elif not name.endswith(".num_batches_tracked"):
            foreign.append(name)
    missing = sorted(set(to_ours.values()) - set(renamed))
    if foreign or missing:
        raise ValueError(
            f"Not an RGB Kinetics-400 I3D: {len(missing)} tensors missing {missing[:3]}, {len(foreign)} unknown {foreign[:3]}."
        )
    return renamed


def build(state: Mapping[str, Tensor]) -> InceptionI3d:
    """The network with these tensors (our names, 230), frozen and in evaluation mode."""
    with torch.device("meta"):
        network = InceptionI3d()
    full = dict(state)
    for name, parameter in network.state_dict().items():
        if name.endswith(".bn.weight"):
            full[name] = torch.ones(parameter.shape)
        elif name.endswith(".num_batches_tracked"):
            full[name] = torch.zeros((), dtype=torch.long)
        elif full[name].shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(full[name].shape)}, I3D's is {tuple(parameter.shape)}. It is another network.")
    network.load_state_dict(full, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def read(path: Path) -> dict[str, Tensor]:
    """The 230 tensors from a file that was already trusted (see `t2v.metrics.weights`), by its kind."""
    if is_torchscript(path):
        return from_hassony2(torch.jit.load(path, map_location="cpu").state_dict())
    return from_piergiaj(weights.read(path))


def wrong_checksums(state: Mapping[str, Tensor], expected: Mapping[str, str] | None = None) -> list[str]:
    """Names of the tensors that are not DeepMind's, bit by bit. `expected`: TensorFlow's name -> CRC-32C; only these are looked at."""
    if expected is None:
        expected = json.loads(CHECKSUMS.read_text())["tensors"]
    return [ours for ours, theirs in key_maps()[1].items() if theirs in expected and checksum(state[ours]) != expected[theirs]]


def checksum(tensor: Tensor) -> str:
    """CRC-32C over the tensor in TensorFlow's layout (convolutions: depth, height, width, in, out), little-endian float32."""
    layout = tensor.permute(2, 3, 4, 1, 0) if tensor.ndim == 5 else tensor
    return f"{crc32c(layout.contiguous().numpy().astype('<f4').tobytes()):08x}"

"""Lets the registry's torchvision, a CUDA build, import beside a CPU build of torch.

Its compiled operators cannot load there. torchvision copes, except that it then registers fake kernels for two operators that do not
exist, and `import torchvision` raises "operator torchvision::nms does not exist"; with it fall pytorch_lightning, torchmetrics, open_clip,
timm and diffusers. Declaring the two schemas first is enough. Nothing implements them: calling `torchvision.ops.nms` still raises
torchvision's own clear error. The declaration waits for torchvision's import, so that `import t2v` does not import torch.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators(MetaPathFinder):
    """Runs once, before torchvision is found, and then steps aside."""

    library: Any = None  # kept alive: the declarations go when it is collected

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            if needed():
                import torch

                type(self).library = torch.library.Library("torchvision", "FRAGMENT")
                for schema in SCHEMAS:
                    type(self).library.define(schema)
        return None


def needed() -> bool:
    """Only the plain registry wheel (no local version tag) on Linux x86-64, beside a torch without CUDA and HIP."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return False
    import torch

    if torch.version.cuda or torch.version.hip:
        return False
    try:
        return "+" not in metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return False


def install() -> None:
    if "torchvision" not in sys.modules and not any(isinstance(finder, DeclareOperators) for finder in sys.meta_path):
        sys.meta_path.insert(0, DeclareOperators())

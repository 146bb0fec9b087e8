"""Tests run on the CPU, build their own world in tmp_path and fetch nothing."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run without a GPU, slowly; read when they are defined

import t2v  # noqa: F401  (before anything that imports torchvision)

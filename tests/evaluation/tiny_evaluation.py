"""A small MSR-VTT of the right form, extractors that need no weights, and a model that paints."""

from __future__ import annotations

import torch
from torch import Tensor

from t2v.evaluation import Protocol

VIDEOS, CAPTIONS = 13, 3


def annotations(videos: int = VIDEOS, split: str = "test") -> dict[str, object]:
    """MSR-VTT's official JSON, shortened."""
    ids = [f"video{7010 + k}" for k in range(videos)]
    common = {"category": 1, "url": "", "start time": 0.0, "end time": 6.0}
    entries = [{"video_id": video, "split": split, "id": k, **common} for k, video in enumerate(ids)]
    entries.append({"video_id": "video1", "split": "train", "id": 99, **common})
    sentences = [
        {"caption": f"a thing {c} of {video}", "video_id": video, "sen_id": 100 * k + c}
        for k, video in enumerate([*ids, "video1"])
        for c in range(CAPTIONS)
    ]
    return {"info": {"year": "2016"}, "videos": entries, "sentences": sentences}


def moving(seed: int, frames: int, size: int = 48, height: int = 48) -> Tensor:
    """uint8 (f h w c): a bright square on a coloured ground."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 120, (1, 1, 1, 3), generator=generator, dtype=torch.uint8).expand(frames, height, size, 3).clone()
    x, y = torch.randint(0, size // 2, (2,), generator=generator).tolist()
    for k in range(frames):
        left = (x + k) % (size - 12)
        video[k, y % (height - 12) : y % (height - 12) + 12, left : left + 12] = 230
    return video


def protocol(**changes: object) -> Protocol:
    values: dict[str, object] = {"name": "tiny", "metrics": ("fvd", "clipsim", "dynamics"), "num_frames": 16, "size": 32, "chunk": 4}
    return Protocol(**(values | changes))  # type: ignore[arg-type]


class Grid:
    """A video extractor named as asked: mean colours on a 2 x 2 grid and their change."""

    per_frame = False
    recipe = "grid"

    def __init__(self, name: str = "i3d", weights: str = "1" * 64) -> None:
        self.name, self.weights, self.calls = name, weights, 0

    def to(self, device: torch.device | str) -> Grid:
        return self

    def __call__(self, videos: Tensor) -> Tensor:
        self.calls += 1
        x = videos.float().div(255).unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((3, 5))  # (b f 2 2 c)
        return torch.cat([x.mean(1).flatten(1), (x[:, 1:] - x[:, :-1]).abs().mean(1).flatten(1)], 1)


class FrameGrid(Grid):
    """A frame extractor with a text tower, as CLIP is."""

    per_frame = True

    def __init__(self, name: str = "clip_vit_b32") -> None:
        super().__init__(name)

    def __call__(self, videos: Tensor) -> Tensor:
        self.calls += 1
        return videos.float().div(255).unflatten(2, (2, -1)).unflatten(4, (2, -1)).mean((3, 5)).flatten(2) + 0.1  # (b f 12)

    def captions(self, captions: list[str]) -> Tensor:
        return torch.stack([torch.randn(12, generator=torch.Generator().manual_seed(len(text))) for text in captions])


class Painter:
    """A generate function that counts what it was asked for, and may die."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.seeds: list[int] = []
        self.dies_at, self.calls = dies_at, 0

    def __call__(self, captions: list[str], seeds: list[int]) -> Tensor:
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.seeds += seeds
        return torch.stack([moving(seed % 1000, 16, 32, 32) for seed in seeds])

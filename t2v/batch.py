"""What travels from the data to the model, and the alphabet of axes.

b batch, f frames, c channels, h height, w width, n tokens, d width of a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Cursor = tuple[int, int, int]
"""Where a virtual reader stands: (epoch, position in its shard order, samples drawn from that shard)."""


@dataclass
class Clip:
    """One decoded sample. An image is a clip of one frame (section 3.3 of the paper)."""

    frames: Tensor  # uint8 (f h w c)
    caption: str
    key: str  # names the sample within its source, for logs and replays
    source: str
    start: float = 0.0  # seconds into the file where the first frame was taken
    index: int = 0  # global index of the sample within its stream; keys all randomness
    reader: int = 0  # the virtual reader that it came from
    cursor: Cursor = (0, 0, 0)  # that reader's position after this sample


@dataclass
class ClipBatch:
    """b clips of equal shape; 0 where a step's share does not fill every micro-batch. Frames stay uint8 until they reach the GPU."""

    frames: Tensor  # uint8 (b f h w c)
    captions: list[str]
    keys: list[str]
    sources: list[str]
    indices: list[int]
    starts: list[float] = field(default_factory=list)
    readers: list[int] = field(default_factory=list)
    cursors: list[Cursor] = field(default_factory=list)
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)  # (source, reason) -> samples skipped since the last batch
    bad_examples: list[dict[str, str]] = field(default_factory=list)  # {source, key, reason, detail} of some of them

    def __len__(self) -> int:
        return self.frames.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipBatch:
        return replace(self, frames=self.frames.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        return replace(self, frames=self.frames.pin_memory())

    @staticmethod
    def collate(clips: Sequence[Clip]) -> ClipBatch:
        """Stack clips; all must share one shape (f h w c)."""
        return ClipBatch(
            frames=torch.stack([clip.frames for clip in clips]),  # (b f h w c)
            captions=[clip.caption for clip in clips],
            keys=[clip.key for clip in clips],
            sources=[clip.source for clip in clips],
            indices=[clip.index for clip in clips],
            starts=[clip.start for clip in clips],
            readers=[clip.reader for clip in clips],
            cursors=[clip.cursor for clip in clips],
        )


@dataclass
class LatentBatch:
    """Encoded clips, ready for the objective."""

    latents: Tensor  # (b c f h w), scaled
    text: Tensor  # (b n d)
    indices: list[int]

    def __len__(self) -> int:
        return self.latents.shape[0]

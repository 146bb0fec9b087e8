"""What travels from the data to the model, and the alphabet of axes.

b batch, f frames, c channels, h height, w width, n tokens, d width of a token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
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
    text: Tensor | None = None  # the caption's embedding (n d), where it was computed beforehand


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
    text: Tensor | None = None  # the captions' embeddings (b n d), where they were computed beforehand
    empty_text: Tensor | None = None  # and the empty prompt's (n d), for dropped captions

    def __len__(self) -> int:
        return self.frames.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> ClipBatch:
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> ClipBatch:
        return self._each_tensor(lambda tensor: tensor.pin_memory())

    def _each_tensor(self, action: Callable[[Tensor], Tensor]) -> ClipBatch:
        text, empty = (None if tensor is None else action(tensor) for tensor in (self.text, self.empty_text))
        return replace(self, frames=action(self.frames), text=text, empty_text=empty)

    @staticmethod
    def collate(clips: Sequence[Clip]) -> ClipBatch:
        """Stack clips; all must share one shape (f h w c), and all or none have their text embedded."""
        texts = [clip.text for clip in clips if clip.text is not None]
        return ClipBatch(
            frames=torch.stack([clip.frames for clip in clips]),  # (b f h w c)
            captions=[clip.caption for clip in clips],
            keys=[clip.key for clip in clips],
            sources=[clip.source for clip in clips],
            indices=[clip.index for clip in clips],
            starts=[clip.start for clip in clips],
            readers=[clip.reader for clip in clips],
            cursors=[clip.cursor for clip in clips],
            text=torch.stack(texts) if texts else None,  # (b n d)
        )


@dataclass
class LatentBatch:
    """Encoded clips, ready for the objective."""

    latents: Tensor  # (b c f h w), scaled
    text: Tensor  # (b n d)
    indices: list[int]

    def __len__(self) -> int:
        return self.latents.shape[0]

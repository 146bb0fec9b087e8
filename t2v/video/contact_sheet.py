"""Videos side by side, each over its caption; moving, or as strips of film."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from t2v.video.writing import Pixels, as_pixels


def contact_sheet(
    videos: Sequence[Tensor | Pixels],
    captions: Sequence[str],
    *,
    columns: int | None = None,
    lines: int = 3,
    margin: int = 4,
    background: int = 255,
    least_width: int = 128,
) -> Tensor:
    """Videos uint8 (f h w c) side by side, each over its caption: uint8 (f H W c). Shorter ones hold their last frame.

    Narrower ones than `least_width` pixels are enlarged by a whole factor, so that captions can be read.
    """
    if not videos or len(videos) != len(captions):
        raise ValueError(
            f"a contact sheet needs as many captions as videos, and at least one: {len(videos)} videos, {len(captions)} captions"
        )
    clips = [as_pixels(video) for video in videos]
    enlarged = math.ceil(least_width / max(clip.shape[2] for clip in clips))
    clips = [clip.repeat(enlarged, axis=1).repeat(enlarged, axis=2) for clip in clips]
    columns = columns or math.ceil(math.sqrt(len(clips)))
    rows = math.ceil(len(clips) / columns)
    height, width = max(clip.shape[1] for clip in clips), max(clip.shape[2] for clip in clips)
    letters = max(9, min(16, width // 16))  # pixels high
    font = ImageFont.load_default(size=letters)
    text_height = lines * (letters + 3)
    cell_height, cell_width = height + text_height + margin, width + margin
    canvas = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), (background,) * 3)
    draw = ImageDraw.Draw(canvas)
    corners = [(margin + k // columns * cell_height, margin + k % columns * cell_width) for k in range(len(clips))]
    for (top, left), caption in zip(corners, captions):
        per_line = max(8, int(width / max(1.0, font.getlength("n"))))
        text = "\n".join(textwrap.wrap(caption, per_line, max_lines=lines, placeholder=" ..."))
        draw.multiline_text((left, top + height + 1), text, font=font, fill=(0 if background > 127 else 255,) * 3, spacing=2)
    sheet = np.repeat(np.asarray(canvas)[None], max(len(clip) for clip in clips), axis=0)  # (f H W c)
    for (top, left), clip in zip(corners, clips):
        held = clip[np.minimum(np.arange(len(sheet)), len(clip) - 1)]
        sheet[:, top : top + clip.shape[1], left : left + clip.shape[2]] = held
    return torch.from_numpy(sheet)


def film_strips(videos: Sequence[Tensor | Pixels], captions: Sequence[str], frames: int = 8) -> Tensor:
    """A still picture, uint8 (H W c): for each video a row of that many frames from its first to its last, over its caption."""
    strips = []
    for clip in map(as_pixels, videos):
        chosen = np.linspace(0, len(clip) - 1, frames).round().astype(int)
        strips.append(np.concatenate(list(clip[chosen]), axis=1)[None])  # (1 h frames*w c)
    return contact_sheet(strips, captions, columns=1, lines=1)[0]

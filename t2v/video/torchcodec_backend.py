"""The same frames by torchcodec, where it is installed."""

from __future__ import annotations

import torch
from torch import Tensor

from t2v.video.bad_sample import BadSample


def decode_torchcodec(data: bytes, seconds: list[float], size: int | None) -> Tensor:
    """The frames at presentation times `seconds`: uint8 (f h w c)."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError) as error:
        raise ValueError(
            "backend=torchcodec: torchcodec is not installed, or finds no FFmpeg: pip install 't2v[torchcodec]' and FFmpeg 4 to 8, "
            f"or take backend=pyav ({str(error).splitlines()[0]})"
        ) from error
    try:
        decoder = VideoDecoder(data, dimension_order="NCHW", num_ffmpeg_threads=1)
        frames = decoder.get_frames_played_at([time + 1e-5 for time in seconds]).data  # (f c h w); past the rounding of the times
    except (RuntimeError, ValueError, IndexError) as error:  # all that it raises on damaged files
        raise BadSample("video_decode", f"torchcodec: {str(error).splitlines()[0]}") from error
    if size is not None:
        side = min(frames.shape[2:])
        top, left = (frames.shape[2] - side) // 2, (frames.shape[3] - side) // 2
        square = frames[:, :, top : top + side, left : left + side]
        frames = torch.nn.functional.interpolate(square, (size, size), mode="bilinear", antialias=True)
    return frames.permute(0, 2, 3, 1).contiguous()

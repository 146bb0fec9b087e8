"""Encode videos once, train on their latents.

    python -m t2v.encode data=webvid output=data/webvid_latents
    python -m t2v.encode data=webvid output=data/webvid_latents text_encoder=vit_h_14       captions, too
    torchrun --nproc-per-node 8 -m t2v.encode data=webvid output=data/webvid_latents
    python -m t2v.train experiment=... data=webvid_latents

Writes one shard of moments per shard of videos; the same command continues where it was stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from t2v.configuration import AT_LEAST_1, entry, require_numbers


def encode(cfg: DictConfig) -> None:
    if cfg.data.get("video") is None:
        raise ValueError("data holds no video stream: choose data=webvid, openvid, ...")
    if cfg.dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype={cfg.dtype} is none of float32, bfloat16, float16")
    require_numbers(cfg, whole={"max_frames": AT_LEAST_1, "num_workers": (0, math.inf)}, fractions={"timeout": (0, math.inf)})
    if not 0 <= cfg.rank < cfg.world:
        raise ValueError(f"rank={cfg.rank} does not exist among world={cfg.world} ranks")
    output = Path(cfg.output)

    import torch

    from t2v.checkpoint import require_writable
    from t2v.data.encoding import encode_shards, jobs_of
    from t2v.pipeline import usable_device

    here = f"cuda:{cfg.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    device = usable_device(cfg.device or here)
    require_writable(output)
    stream = instantiate(cfg.data.video)
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it reports at every import what it cannot do on this machine
    autoencoder = instantiate(cfg.autoencoder).to(device)
    text_encoder = instantiate(cfg.text_encoder).to(device) if cfg.get("text_encoder") is not None else None
    if cfg.dtype is not None:
        autoencoder = autoencoder.to(dtype=getattr(torch, cfg.dtype))
    began, frames, clips, new = time.monotonic(), 0, 0, 0
    skipped: Counter[str] = Counter()
    lost: list[str] = []
    for shard in encode_shards(
        stream,
        autoencoder,
        output,
        text_encoder=text_encoder,
        rank=cfg.rank,
        world=cfg.world,
        num_workers=cfg.num_workers,
        max_frames=cfg.max_frames,
        timeout=cfg.timeout,
    ):
        seconds = time.monotonic() - began
        if shard.was_there:
            print(f"[{shard.done}/{shard.of}] {shard.shard} was there", flush=True)
            began = time.monotonic() if new == 0 else began
            continue
        if shard.lost:
            lost.append(shard.lost)
            print(f"[{shard.done}/{shard.of}] {shard.shard} is not written: {shard.lost}", flush=True)
            continue
        new, clips, frames = new + 1, clips + shard.clips, frames + shard.frames
        skipped += shard.skipped
        left = seconds / new * (shard.of - shard.done)
        print(
            f"[{shard.done}/{shard.of}] {shard.shard}: {shard.clips} clips, {shard.frames} frames"
            + (f", skipped {dict(shard.skipped)}" if shard.skipped else "")
            + f"; {clips / seconds:.1f} clips/s, {frames / seconds:.0f} frames/s, {duration(left)} left",
            flush=True,
        )
    print(f"{output}: {clips} clips, {frames} frames in {new} new shards" + (f", skipped {dict(skipped)}" if skipped else ""))
    jobs = jobs_of(stream, output)
    there = sum(job.output.exists() for job in jobs)
    print(f"rank {cfg.rank} of {cfg.world}: {there} of {len(jobs)} shards are there")
    if lost:  # an OSError: every rank says its own
        raise OSError(
            f"{len(lost)} of {shard.of} shards could not be read to their end and are not written, such as {lost[0]}. "
            "The same command tries them again; those that are damaged where they lie must be mended or left out"
        )
    if there == len(jobs):
        print(f"next: python -m t2v.train experiment=... data=webvid_latents data.video.urls={output}")


def duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


main = entry("encode")(encode)

if __name__ == "__main__":
    main()

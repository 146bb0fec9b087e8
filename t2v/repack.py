"""Make training shards of a folder of files, of zips, or of other shards.

    python -m t2v.repack source=clips captions=clips/captions.csv output=data/webvid
    python -m t2v.repack source=data/webvid output=data/webvid_288 recode=true workers=16

Writes 00000.tar, 00000_stats.json, ... as video2dataset does; the same command continues where it was stopped.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from t2v.configuration import AT_LEAST_1, entry, require_numbers


def repack(cfg: DictConfig) -> None:
    from t2v.checkpoint import require_writable
    from t2v.data import repacking
    from t2v.data.entries import find

    counts = dict.fromkeys(("per_shard", "workers", "gop"), AT_LEAST_1)
    require_numbers(cfg, whole={**counts, "size": (2, 8192), "crf": (0, 51)}, fractions={"fps": (0.1, 240), "segment": (0.1, 86400)})
    source, output = Path(cfg.source), Path(cfg.output)
    if source.resolve() == output.resolve():
        raise ValueError(f"source and output are both {source}: shards are never changed in place")
    chosen = {name: cfg[name] for name in ("size", "fps", "gop", "crf") if cfg[name] is not None}
    if chosen and not cfg.recode:
        given = " ".join(f"{name}={value}" for name, value in chosen.items())
        raise ValueError(f"{given} has no effect: videos are copied as they are. Add recode=true, or leave it out")
    if cfg.segment is not None and not cfg.recode:
        raise ValueError(f"segment={cfg.segment} cuts videos, which needs recode=true")
    entries = find(source, None if cfg.captions is None else Path(cfg.captions))
    require_writable(output)
    recode = repacking.Recode(**chosen) if cfg.recode else None
    print(f"{len(entries)} files", flush=True)
    begin, samples, size = time.monotonic(), 0, 0
    skipped: Counter[str] = Counter()
    for shard in repacking.repack(entries, output, per_shard=cfg.per_shard, recode=recode, segment=cfg.segment, workers=cfg.workers):
        samples, size, skipped = samples + shard.samples, size + shard.size, skipped + shard.skipped
        state = "was there" if shard.was_there else f"{shard.samples} samples, {shard.size / 1e6:.1f} MB"
        print(
            f"[{shard.done}/{shard.of}] {shard.path}: {state}" + (f", skipped {dict(shard.skipped)}" if shard.skipped else ""), flush=True
        )
        for example in shard.examples:
            print(f"    {example}")
    rate = samples / max(1e-9, time.monotonic() - begin)
    print(f"{output}: {samples} new samples, {size / 1e6:.1f} MB, {rate:.1f} a second" + (f", skipped {dict(skipped)}" if skipped else ""))
    print(f"next: python -m t2v.inspect data=webvid paths.webvid={output}")


main = entry("repack")(repack)

if __name__ == "__main__":
    main()

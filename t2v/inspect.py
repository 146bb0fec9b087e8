"""Look at data before training on it.

    python -m t2v.inspect data=webvid
    python -m t2v.inspect data=folder data.video.urls=clips/captions.csv samples=50

Prints members, captions, sizes, durations, what is bad and why, and the bytes/s that training will ask for; writes a contact sheet of
decoded clips (a moving .webp and a still .png).
"""

from __future__ import annotations

import math
from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from t2v.configuration import AT_LEAST_1, entry, require_numbers


def inspect(cfg: DictConfig) -> None:
    streams = {name: cfg.data[name] for name in ("image", "video") if cfg.data.get(name) is not None}
    if not streams:
        raise ValueError("data holds neither an image nor a video stream")
    require_numbers(cfg, whole={"samples": AT_LEAST_1, "sheet": (0, math.inf)}, fractions={"rate": (1e-6, math.inf)})
    output = Path(cfg.output)

    from PIL import Image

    from t2v.checkpoint import require_writable
    from t2v.data.inspection import inspect_stream, pictures
    from t2v.video import contact_sheet, write_animation

    if cfg.sheet:
        require_writable(output)
    for name, node in streams.items():
        found = inspect_stream(instantiate(node), cfg.samples, keep=cfg.sheet)
        print(f"{name}:\n{found.report(cfg.rate)}", flush=True)
        shown = pictures(found.clips)
        if shown:
            sheet = contact_sheet(shown, [clip.caption for clip in found.clips])
            Image.fromarray(sheet[0].numpy()).save(output / f"{name}.png")
            if len(sheet) > 1:
                write_animation(output / f"{name}.webp", sheet, 3)
            print(f"  contact sheet: {output / name}.{'webp' if len(sheet) > 1 else 'png'}")


main = entry("inspect")(inspect)

if __name__ == "__main__":
    main()

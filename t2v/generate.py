"""Make videos from prompts.

    python -m t2v.generate prompt="a red circle moving left slowly on a black background"
    python -m t2v.generate prompts=prompts.txt checkpoint=experiments/shapes/runs/1a2b3c4d sampler=dpm output=videos
    python -m t2v.generate prompt="a panda on a swing" weights=modelscope:DIR

Writes one mp4 a prompt, and a contact sheet where there are several; conf/generate.yaml has every option.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path

from omegaconf import DictConfig

from t2v.configuration import AT_LEAST_1, entry, pipeline_of, require_numbers

SHIPPED = "package:shapes"
FREE_TEXT = ("prompt", "prompts", "checkpoint", "weights", "output", "autoencoder", "text_encoder")  # keys that hold no Hydra syntax


def generate(cfg: DictConfig) -> None:
    prompts = read_prompts(cfg.prompt, cfg.prompts)
    if cfg.checkpoint is not None and cfg.weights is not None:
        raise ValueError(f"checkpoint={cfg.checkpoint} and weights={cfg.weights} exclude each other: leave one out")
    if cfg.weights is not None and not str(cfg.weights).startswith(("diffusers:", "modelscope:")):
        raise ValueError(f"weights={cfg.weights} says no format: write weights=diffusers:DIR or weights=modelscope:DIR, or checkpoint=PATH")
    sizes = dict.fromkeys(("frames", "height", "width", "batch_size"), AT_LEAST_1)
    require_numbers(cfg, whole=sizes, fractions={"fps": (0.1, 240)})
    output = Path(cfg.output)

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("xformers").setLevel(logging.ERROR)  # it reports at every import what it cannot do on this machine
    from t2v import checkpoint

    checkpoint.require_writable(output)
    pipeline = pipeline_of(cfg, cfg.weights or cfg.checkpoint or SHIPPED, cfg.device)
    sampler = pipeline.sampler
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    print(f"{sampler.scheduler}, {sampler.num_steps} steps, guidance {sampler.guidance.scale:g}, seed {cfg.seed}", flush=True)
    began = time.monotonic()
    videos = pipeline(
        prompts,
        seed=cfg.seed,
        num_frames=cfg.frames,
        height=cfg.height,
        width=cfg.width,
        batch_size=cfg.batch_size,
        on_step=show_progress if sys.stderr.isatty() else None,
    )
    seconds = time.monotonic() - began
    fps = pipeline.sample["fps"] if cfg.fps is None else cfg.fps
    for path in write(videos, prompts, output, cfg.seed, fps):
        print(path)
    f, h, w = videos.shape[1:4]
    print(f"{len(prompts)} video{'s' * (len(prompts) > 1)} of {f} frame{'s' * (f > 1)} of {w} x {h} in {seconds:.1f} s")


def read_prompts(prompt: object, path: str | None) -> list[str]:
    if (prompt is None) == (path is None):
        raise ValueError('say what to show: prompt="a red circle moving left", or prompts=FILE with one prompt a line (one of the two)')
    if path is None:
        if not str(prompt).strip():
            raise ValueError("the prompt is empty: say what the video should show")
        return [str(prompt)]
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts={path} is not a text file in UTF-8; write one prompt a line") from error
    except OSError as error:
        raise ValueError(f"prompts={path} cannot be read: {error.strerror or error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts={path} holds no prompt; write one a line")
    return prompts


def show_progress(done: int, of: int) -> None:
    print(f"\r{done} of {of} steps", end="\n" if done == of else "", file=sys.stderr, flush=True)


def write(videos, prompts: list[str], output: Path, seed: int, fps: float) -> list[Path]:  # type: ignore[no-untyped-def]
    """uint8 (b f h w c) -> the files that were written: <number>-<words>-seed<seed>.mp4, and contact-sheet-seed<seed>.mp4 for several."""
    from t2v.video import contact_sheet, write_mp4

    paths = []
    for number, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        paths.append(output / f"{number:04d}-{slug(prompt)}-seed{seed}.mp4")
        write_mp4(paths[-1], video, fps)
    if len(prompts) > 1:
        paths.append(output / f"contact-sheet-seed{seed}.mp4")
        write_mp4(paths[-1], contact_sheet(list(videos), prompts), fps)
    return paths


def slug(prompt: str, length: int = 60) -> str:
    """The prompt's words as a part of a file name."""
    return re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:length].rstrip("-_") or "prompt"


def protect(argument: str) -> str:
    """Quote what a person types after prompt= and the like, so that its commas, brackets and quotes mean nothing to Hydra."""
    key, sign, value = argument.partition("=")
    quoted = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    if key not in FREE_TEXT or not sign or value == "null" or quoted:
        return argument
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)  # backslashes count only before a quote
    value = re.sub(r"\\+$", lambda match: match[0] * 2, value)
    if key == "prompt":
        value = value.replace("${", "\\${")
    return f"{key}='{value}'"


def main() -> None:
    if not {"-m", "--multirun"} & set(sys.argv):  # there, commas part the runs
        sys.argv[1:] = [protect(argument) for argument in sys.argv[1:]]
    entry("generate")(generate)()


if __name__ == "__main__":
    main()

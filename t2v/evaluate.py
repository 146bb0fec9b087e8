"""Measure a model on MSR-VTT (Table 1 of the paper), or the videos that any other model made.

    python -m t2v.evaluate weights=modelscope:DIR protocol=paper_fvd
    python -m t2v.evaluate checkpoint=experiments/base_256/runs/1a2b3c4d protocol=paper_fvd devices=8
    python -m t2v.evaluate videos=DIR protocol=paper_fvd subject="Another Model"
    python -m t2v.evaluate check=true                 are all weights there and right?
    python -m t2v.evaluate compare=[a/results.json,b/results.json]

Killed, it continues where it was when started again. On several machines: torchrun ... -m t2v.evaluate ...; conf/evaluate.yaml has every
option.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from t2v.configuration import entry, pipeline_of

if TYPE_CHECKING:
    from t2v.evaluation import Evaluator

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".ckpt", ".json")
SHIPPED = Path(__file__).with_name("pretrained") / "shapes"


@entry("evaluate")
def main(cfg: DictConfig) -> None:
    if cfg.compare:
        print(comparison(cfg.compare))
    elif cfg.check:
        check(cfg)
    elif cfg.devices > 1 and "RANK" not in os.environ:
        spread(cfg.devices)
    else:
        evaluate(cfg)


def comparison(paths: list[str]) -> str:
    from t2v.evaluation import Results, compare

    return compare([Results.read(Path(path)) for path in paths])


def check(cfg: DictConfig) -> None:
    from t2v.evaluation.check import check as check_weights
    from t2v.evaluation.check import table
    from t2v.evaluation.scores import EXTRACTORS, extractors_of

    names = list(dict.fromkeys(EXTRACTORS.values())) if cfg.get("protocol") is None else extractors_of(list(cfg.protocol.metrics))
    names = [name for name in names if name != "checker"]  # needs nothing
    device = device_of(cfg)
    slow = device.type == "cuda" if cfg.golden == "auto" else bool(cfg.golden)
    lines = check_weights(names, paths(cfg), cfg.download, cfg.allow_unverified, slow, device)
    print(table(lines))
    bad = [line.name for line in lines if not line.good]
    if bad:
        raise ValueError(f"{len(bad)} of {len(lines)} networks cannot be used ({', '.join(bad)}): see the table above")
    print("all weights are there and right")


def evaluate(cfg: DictConfig) -> None:
    if cfg.get("protocol") is None:
        raise ValueError(f"say how to measure: protocol={'|'.join(protocols())}")
    given = [f"{name}={cfg[name]}" for name in ("checkpoint", "weights", "videos") if cfg[name] is not None]
    if len(given) > 1 or (not given and cfg.protocol.dataset != "shapes"):
        raise ValueError(f"say what to measure, one of checkpoint=PATH, weights=modelscope:DIR and videos=DIR; got {given or 'none'}")
    place = cfg.checkpoint or cfg.weights or SHIPPED

    from t2v import checkpoint
    from t2v.evaluation import Evaluator
    from t2v.evaluation.scores import check_protocol, extractors_of
    from t2v.metrics import weights

    protocol = instantiate(cfg.protocol)
    check_protocol(protocol)
    if protocol.dataset not in cfg.datasets:
        raise ValueError(f"protocol {protocol.name} is on {protocol.dataset!r}; there are {', '.join(cfg.datasets)}")
    checkpoint.require_writable(Path(cfg.output))
    dataset = instantiate(cfg.datasets[protocol.dataset])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = device_of(cfg)
    names = extractors_of(protocol.metrics)
    networks = [name for name in names if name != "checker"]
    extractors, found = weights.load(networks, paths(cfg), dict(cfg.metrics.resize), cfg.allow_unverified, cfg.download, device)
    if "checker" in names:
        from t2v.evaluation.shapes import CheckerFeatures

        extractors["checker"] = CheckerFeatures(protocol.fps)
    evaluator = Evaluator(
        protocol,
        dataset,
        extractors,
        Path(cfg.output),
        Path(cfg.cache) if cfg.cache else weights.default_cache(),
        device,
        rank,
        world,
        barrier(world),
        show_progress if rank == 0 else lambda stage, done, of: None,
        [one.name for one in found if not one.verified],
    )
    results = measure_folder(cfg, evaluator) if cfg.videos else measure_model(cfg, evaluator, place)
    if results is not None:
        from t2v.evaluation import summary

        print(summary(results))
        print(f"{cfg.output}: results.json, results.md, page.html, manifest.jsonl")


def measure_folder(cfg: DictConfig, evaluator: Evaluator) -> Any:
    from t2v.evaluation import VideoFolder

    evaluator.write_manifest()  # first, since it says which videos are expected
    folder = VideoFolder(Path(cfg.videos), evaluator.manifest, evaluator.protocol, cfg.take, cfg.fit)
    details = {"videos": str(Path(cfg.videos).resolve()), "take": cfg.take, "fit": cfg.fit, "files": folder.sha256()}
    return evaluator.of_folder(folder, cfg.subject or Path(cfg.videos).resolve().name, details)


def measure_model(cfg: DictConfig, evaluator: Evaluator, place: str | Path) -> Any:
    from t2v.evaluation.videos import generator

    pipeline = pipeline_of(cfg, place, evaluator.device)
    sampler = pipeline.sampler
    details = {
        "model": identity(place),
        "ema": cfg.ema,
        "sampler": sampler.config,  # every field of its guidance, too
        "autoencoder": cfg.autoencoder,
        "text_encoder": cfg.text_encoder,
        "seed": evaluator.protocol.seed,
        "dtype": str(next(pipeline.unet.parameters()).dtype),
    }
    return evaluator.of_model(generator(pipeline, evaluator.protocol), cfg.subject or str(place), details)


def identity(place: str | Path) -> str:
    """Names the weights, wherever they lie: a checkpoint's marker (sizes and hashes), or names and hashes of the files of a folder."""
    import hashlib

    from t2v import checkpoint
    from t2v.weights import sha256

    kind, path = checkpoint.split_place(place)
    if kind is None:
        marker = checkpoint.find(path) / checkpoint.MARKER
        return hashlib.sha256(marker.read_bytes()).hexdigest()[:16]
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in WEIGHT_SUFFIXES)
    listing = "\n".join(f"{file.relative_to(path)}:{sha256(file)}" for file in files)
    return hashlib.sha256(listing.encode()).hexdigest()[:16]


def paths(cfg: DictConfig) -> dict[str, str | None]:
    return {name: cfg.metrics[name] for name in ("i3d", "clip_vit_b32", "inception_v3")}


def device_of(cfg: DictConfig) -> Any:
    import torch

    from t2v.pipeline import usable_device

    if cfg.device is not None:
        return usable_device(cfg.device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def barrier(world: int) -> Any:
    """Ranks share work through files; they only wait for each other, over gloo."""
    if world == 1:
        return lambda: None
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(days=2))  # ranks may be hours apart; a dead one ends all through torchrun
    return dist.barrier


def spread(devices: int) -> None:
    """Start this very command on several GPUs of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m", "t2v.evaluate"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, *sys.argv[1:]])


def protocols() -> list[str]:
    from t2v.configuration import config_dir

    return sorted(path.stem for path in (config_dir() / "protocol").glob("*.yaml"))


def show_progress(stage: str, done: int, of: int) -> None:
    end = "\n" if done == of or not sys.stderr.isatty() else ""
    print(f"\r{stage}: {done} of {of} videos", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

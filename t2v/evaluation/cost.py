"""How long measuring takes on this machine: the stages of `protocol=paper_fvd` on made-up videos and untrained networks of the right size.

    python -m t2v.evaluation.cost [videos] [cuda|cpu]

For timing only: what it computes is thrown away.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from t2v.evaluation.protocol import Manifest, Protocol, Row
from t2v.evaluation.scores import measure
from t2v.evaluation.videos import write_strip
from t2v.metrics import i3d_weights
from t2v.metrics.clip import MODELS, Clip
from t2v.metrics.features import ClipFeatures, Extractor, I3dFeatures, InceptionFeatures, MotionFeatures
from t2v.metrics.i3d import InceptionI3d
from t2v.metrics.inception import FidInception

CHUNK = 8


def networks(device: str) -> dict[str, Extractor]:
    import open_clip

    clip = Clip(open_clip.create_model(MODELS["clip_vit_b32"], pretrained=None, load_weights=False), open_clip.get_tokenizer("ViT-B-32"))
    names = i3d_weights.key_maps()[0]
    i3d = i3d_weights.build({name: tensor for name, tensor in InceptionI3d().state_dict().items() if name in names})
    extractors: list[Extractor] = [
        I3dFeatures(i3d, "none"),
        ClipFeatures(clip, "none"),
        InceptionFeatures(FidInception().eval().requires_grad_(False), "none"),
        MotionFeatures(),
    ]
    return {extractor.name: extractor.to(device) for extractor in extractors}


def timed(name: str, work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    print(f"{name:60s} {seconds:8.2f} s", flush=True)
    return seconds


def cost(videos: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    chunk = torch.randint(0, 256, (CHUNK, 16, 256, 256, 3), dtype=torch.uint8, generator=generator)
    extractors = networks(device)
    features, total = {}, 0.0
    for name, extractor in extractors.items():
        extractor(chunk[:1].to(device))  # the first call chooses kernels

        def run(extractor: Extractor = extractor) -> torch.Tensor:
            parts = [extractor(chunk.to(device)).cpu() for _ in range(videos // CHUNK)]
            return torch.cat(parts)

        total += timed(f"features {name}", run, device)
        shape = extractor(chunk[:1].to(device)).shape[1:]
        features[name] = torch.randn(videos, *shape, generator=generator)
    rows = tuple(Row(i, f"video{i}", i, "a caption", i) for i in range(videos))
    identities = {name: {"name": "untrained"} for name in extractors}
    captions = torch.randn(videos, 512, generator=generator)
    manifest = Manifest({}, rows)
    for metrics in (("fvd",), ("fid_vid_clip_vit_b32",), ("fid_vid_inception_v3",), ("clipsim", "temporal_consistency", "dynamics")):
        protocol = Protocol("cost", metrics)

        def statistics(protocol: Protocol = protocol) -> object:
            return measure(protocol, manifest, identities, features, features, None, captions, device)

        total += timed(f"statistics {', '.join(metrics)}", statistics, device)

    def strips() -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(CHUNK) as writers:
            list(writers.map(lambda i: write_strip(Path(folder) / f"{i}.png", chunk[i % CHUNK]), range(videos)))

    total += timed("lossless strips (noise: the worst case)", strips, device)
    print(f"{'together, ' + str(videos) + ' videos':60s} {total:8.2f} s, {1000 * total / videos:.0f} ms a video")


if __name__ == "__main__":
    arguments = dict(enumerate(sys.argv))
    cost(int(arguments.get(1, 128)), arguments.get(2, "cuda" if torch.cuda.is_available() else "cpu"))

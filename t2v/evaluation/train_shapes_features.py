"""Train the small network behind `fvd_shapes` (t2v/metrics/shapes_features.py) to name the attributes of procedural clips.

    python -m t2v.evaluation.train_shapes_features [FILE]

One run, fixed seed, CPU. FILE defaults to the shipped t2v/pretrained/shapes_features/model.safetensors. Clips are drawn straight from the
generator, not through H.264; light noise keeps the network from living on exact colours.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from t2v.data.shape_world import BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SPEEDS, Spec, draw, random_video
from t2v.data.shapes import held_out_specs, render
from t2v.metrics.shapes_features import SHIPPED, SIZE, ShapesFeatures, ShapesNetwork, prepare

CLASSES = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "background": list(BACKGROUNDS),
    "direction": list(DIRECTIONS),
    "speed": list(SPEEDS),
}
FRAMES, FPS = 16, 3.0
POOL, STEPS, BATCH = 2000, 1100, 32


def clip(spec: Spec) -> Tensor:
    """uint8 (f h w c), drawn at the network's size."""
    return torch.stack([torch.from_numpy(draw(spec, 0.5 + k / FPS, SIZE, SIZE)) for k in range(FRAMES)])


def labels(specs: list[Spec]) -> dict[str, Tensor]:
    return {name: torch.tensor([values.index(getattr(spec, name)) for spec in specs]) for name, values in CLASSES.items()}


def augment(clips: Tensor, generator: torch.Generator) -> Tensor:
    """(b f c h w): noise of a random strength per clip."""
    strength = torch.rand(clips.shape[0], 1, 1, 1, 1, generator=generator) * 0.08
    return clips + torch.randn(clips.shape, generator=generator) * strength


def train(path: Path) -> None:
    began = time.perf_counter()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    rng = random.Random("shapes features")
    specs = [random_video(rng) for _ in range(POOL)]
    clips = torch.cat([prepare(clip(spec)[None]) for spec in specs])  # (n f c h w)
    truth = labels(specs)
    print(f"{POOL} clips drawn in {time.perf_counter() - began:.0f} s", flush=True)
    network = ShapesNetwork({name: len(values) for name, values in CLASSES.items()})
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for step in range(STEPS):
        rows = torch.randint(POOL, (BATCH,), generator=generator)
        guess = network.logits(augment(clips[rows], generator))
        loss = torch.stack([F.cross_entropy(guess[name], truth[name][rows]) for name in CLASSES]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}, path)
    print(f"{path}: {path.stat().st_size:,} bytes, {time.perf_counter() - began:.0f} s")
    print("held-out clips, as read from H.264:", ", ".join(f"{name} {share:.2f}" for name, share in accuracy(path).items()))


@torch.no_grad()
def accuracy(path: Path, videos: int = 128) -> dict[str, float]:
    """Share of held-out clips of which each attribute is named right."""
    network = ShapesFeatures.shipped(path).network
    specs = held_out_specs(videos, seed=1, kind="seen")
    truth = labels(specs)
    guess = network.logits(torch.cat([prepare(render(spec, FRAMES, FPS, 64)[None]) for spec in specs]))
    return {name: float((guess[name].argmax(1) == truth[name]).double().mean()) for name in CLASSES}


if __name__ == "__main__":
    train(Path(sys.argv[1]) if len(sys.argv) > 1 else SHIPPED)

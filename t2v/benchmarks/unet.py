"""what=unet: forward and backward of VideoUNet and diffusers' class, same configuration and weights, interleaved in one process.

Wall and CPU time of each round, and the largest sum of tensors that the backward pass keeps (what decides the batch size).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from t2v.benchmarks.parity import SMALL, build
from t2v.benchmarks.random_parts import peer_config
from t2v.models.convolution import channels_last

Row = dict[str, Any]


def unet(
    config: Mapping[str, Any] | None = None,
    clips: int = 2,
    frames: int = 16,
    size: int = 16,
    rounds: int = 9,
    threads: int | None = None,
    device: str | None = None,
) -> list[Row]:
    """Rows {network, wall_ms, cpu_ms, kept_MB}, medians over rounds, and one of the medians of the rounds' ratios."""
    import diffusers

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    config = SMALL if config is None else config
    ours = build(device, config, seed=0).train()
    channels_last(ours)  # as in training
    peer_class: Any = diffusers.UNet3DConditionModel
    theirs = peer_class(**peer_config(config)).to(device).train()
    theirs.load_state_dict(ours.state_dict())
    sample = torch.randn(clips, 4, frames, size, size, device=device)
    text = torch.randn(clips, 77, ours.config["cross_attention_dim"], device=device)
    timestep = torch.randint(0, 1000, (clips,), device=device)
    networks: dict[str, nn.Module] = {"t2v": ours, "diffusers": theirs}

    def step(network: nn.Module) -> None:
        output = network(sample, timestep, text)
        (output if isinstance(output, Tensor) else output.sample).square().mean().backward()
        network.zero_grad()
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for turn in range(rounds + 1):  # the first warms up
        for name, network in networks.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step(network)
            if turn:
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows: list[Row] = []
    for name, network in networks.items():
        wall_ms, cpu_ms = (round(1e3 * statistics.median(times), 1) for times in zip(*spent[name], strict=True))
        kept = kept_bytes(network, sample, timestep, text) / 2**20
        rows.append({"network": name, "wall_ms": wall_ms, "cpu_ms": cpu_ms, "kept_MB": round(kept, 1)})
    pairs = list(zip(spent["diffusers"], spent["t2v"], strict=True))
    ratios = [statistics.median(b[i] / a[i] for b, a in pairs) for i in (0, 1)]
    rows.append(
        {
            "network": "diffusers / t2v",
            "wall_ms": round(ratios[0], 2),
            "cpu_ms": round(ratios[1], 2),
            "kept_MB": round(rows[1]["kept_MB"] / rows[0]["kept_MB"], 2),
        }
    )
    return rows


def kept_bytes(network: nn.Module, *inputs: Tensor) -> int:
    """Bytes of all different storages that one forward pass keeps for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        alive.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        network(*inputs)
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)

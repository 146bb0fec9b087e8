"""what=parity: is the network diffusers' network, and is every attention backend as exact as PyTorch's own? Issue: experiments/unet_parity.

Two questions, in rows {what, ..., error, bound, fine}:
network   same random weights in VideoUNet and UNet3DConditionModel: fp32 (TF32 off) relative difference; each one's bf16 error against its
          fp32 output, ours at most 1.1 times theirs
attention forward and gradients of temporal attention in 16 bits against float64: each backend at most 1.5 times sdpa's own error
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from t2v.models.attention import check_backend, over_frames
from t2v.models.kernels import Fusable
from t2v.models.kernels.temporal_attention import temporal_attention
from t2v.models.unet import VideoUNet

Row = dict[str, Any]
SHAPES = (
    (2, 16, 1024, 5, 64),
    (8, 16, 64, 20, 64),
    (1, 24, 256, 8, 64),
    (90, 2, 1024, 5, 64),
)  # b f n h d; the last has > 65,535 sequences
SMALL: dict[str, Any] = {
    "block_out_channels": (64, 128, 128, 128),
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "cross_attention_dim": 64,
}


def parity(
    device: str | None = None,
    config: Mapping[str, Any] | None = None,
    clips: int = 2,
    frames: int = 16,
    size: int = 32,
    attention_shapes: Sequence[tuple[int, int, int, int, int]] = SHAPES,
) -> Iterator[Row]:
    """All rows. On a GPU the full network unless `config` gives another; on a CPU a small one, and sdpa only."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config is None:
        config = {} if device.startswith("cuda") else SMALL
    yield from networks(device, config, clips, frames, size)
    for shape in attention_shapes if device.startswith("cuda") else [s for s in attention_shapes if s[0] * s[2] <= 4096]:
        yield from attentions(device, *shape)


def networks(device: str, config: Mapping[str, Any], clips: int, frames: int, size: int, seed: int = 0) -> Iterator[Row]:
    """Our network against diffusers', sample (clips 4 frames size size)."""
    import diffusers

    ours = build(device, config, seed)
    peer_class: Any = diffusers.UNet3DConditionModel
    with torch.device(device):
        theirs = peer_class(**config).eval()
    theirs.load_state_dict(ours.state_dict())
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(clips, ours.config["in_channels"], frames, size, size, generator=generator).to(device)
    text = torch.randn(clips, 77, ours.config["cross_attention_dim"], generator=generator).to(device)
    timestep = torch.randint(0, 1000, (clips,), generator=generator).to(device)

    def outputs(autocast: bool) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            return ours(sample, timestep, text).double(), theirs(sample, timestep, text).sample.double()

    backends = list(usable("xformers", "triton", head_dim=ours.config["attention_head_dim"], device=device))
    ways = [("sdpa", True), *((backend, True) for backend in backends)] + [("sdpa", False)] * device.startswith("cuda")
    exact, exact_peer = torch.empty(0), torch.empty(0)  # in float32
    for autocast in (False, True):
        with tf32_off():
            for backend, fused in ways:
                set_backend(ours, backend, fused)
                name = f"network, {'bfloat16 against float32' if autocast else 'float32 against diffusers'}, {backend}"
                name += "" if fused else ", fused_kernels=false"
                try:
                    found, peer = outputs(autocast)
                except ValueError as error:  # this backend has no kernel for this shape and type
                    yield {"what": name, "refused": str(error)}
                    continue
                if not autocast:
                    exact, exact_peer = (found, peer) if backend == "sdpa" and fused else (exact, exact_peer)
                    yield row(name, relative(found, peer), 1e-4, device=device, parameters=count(ours))
                else:
                    peers_own = relative(peer, exact_peer)
                    yield row(name, relative(found, exact), 1.1 * peers_own, device=device, diffusers=peers_own)


def attentions(device: str, b: int, f: int, n: int, h: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Row]:
    """Temporal attention of each backend that runs here on (b f n h d) tokens of `dtype`, against the same numbers in float64."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, grad = (torch.randn(b, f, n, h, d, generator=generator, device=device).to(dtype) for _ in range(4))
    names = ("output", "dq", "dk", "dv")
    exact = evaluate("sdpa", q.double(), k.double(), v.double(), grad.double(), parts=b)
    base = [relative(x, y) for x, y in zip(evaluate("sdpa", q, k, v, grad), exact, strict=True)]
    rows = [row(f"attention, sdpa, {name}", e, float("inf"), shape=[b, f, n, h, d]) for name, e in zip(names, base, strict=True)]
    for backend in usable("xformers", "triton", head_dim=d, device=device):
        try:
            found = evaluate(backend, q, k, v, grad)
        except ValueError as error:  # this backend has no kernel for this shape, which is an answer too
            rows.append({"what": f"attention, {backend}", "shape": [b, f, n, h, d], "refused": str(error)})
            continue
        for name, x, y, own in zip(names, found, exact, base, strict=True):
            rows.append(row(f"attention, {backend}, {name}", relative(x, y), 1.5 * own, shape=[b, f, n, h, d]))
    return rows


def evaluate(backend: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, parts: int = 1) -> list[Tensor]:
    """Output and gradients, in `parts` along b where memory is short."""
    results = []
    for inputs in zip(*(t.chunk(parts) for t in (q, k, v, grad)), strict=True):
        leaves = [t.detach().requires_grad_() for t in inputs[:3]]
        packed = backend == "triton"
        q, k, v = leaves
        output = temporal_attention(torch.stack(leaves, 3)) if packed else over_frames(q, k, v, backend)
        results.append((output.detach(), *torch.autograd.grad(output, leaves, inputs[3])))
    return [torch.cat(tensors) for tensors in zip(*results, strict=True)]


def build(device: str, config: Mapping[str, Any], seed: int) -> VideoUNet:
    """Our network with random weights, also where a fresh one has zeros, so that every layer counts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = VideoUNet(**config).eval()
        for parameter in unet.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return unet.to(device)


def set_backend(unet: nn.Module, backend: str, fused: bool) -> None:
    for module in unet.modules():
        if hasattr(module, "backend"):
            module.backend = backend  # type: ignore[assignment]
        if isinstance(module, Fusable):
            module.fused_kernels = fused


def usable(*backends: str, head_dim: int, device: str) -> Iterator[str]:
    if not device.startswith("cuda"):
        return
    for backend in backends:
        try:
            check_backend(backend, head_dim)
        except ValueError as error:
            print(f"left out: {error}")
            continue
        yield backend


def row(what: str, error: float, bound: float, **more: Any) -> Row:
    return {"what": what, **more, "error": error, "bound": bound, "fine": error <= bound}


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@contextmanager
def tf32_off() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

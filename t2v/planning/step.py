"""One optimizer step of the text-to-video module on tensors without data: what is alive when, and how much is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from t2v.diffusion.objective import DenoisingLoss
from t2v.models.autoencoder import Autoencoder
from t2v.models.kernels import PlannedGPU, planned_gpu
from t2v.models.text_encoder import TOKENS, TextEncoder
from t2v.planning.autocast import GPUFunctions
from t2v.planning.live_bytes import LiveBytes

PRECISIONS = {"bf16-mixed": torch.bfloat16, "32-true": None}


@dataclass(frozen=True)
class Parts:
    """The module's parts, on meta."""

    unet: nn.Module
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    objective: DenoisingLoss


@dataclass(frozen=True)
class Step:
    """Beside weights, optimizer states and encoders: bytes by kind at the moment when most is alive."""

    at_peak: Mapping[str, int]
    operations: Mapping[str, int]  # by stream, of one micro-batch

    @property
    def peak(self) -> int:
        return sum(self.at_peak.values())


ENCODING = "encoders' work"
COPIES, GRADIENTS, BACKWARD = "16-bit copies of the weights", "gradients", "backward's work"
ACTIVATIONS = "activations"


def activations_of(stream: str) -> str:
    return f"{ACTIVATIONS} of {stream}s"


def step(
    parts: Parts, clips: Mapping[str, tuple[int, int, int, int]], *, precision: str, keeps_gradients: bool, kernels: bool = False
) -> Step:
    """`clips`: stream -> (b f h w) in pixels of one micro-batch; all of them share one backward pass, as in `training_step`.

    `keeps_gradients`: they are there all the time (accumulation, DDP's buckets), not only from the backward pass to the optimizer's step.
    `kernels`: the network takes the way that it takes on a GPU.
    Raises ValueError for a precision that is not counted.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={precision} cannot be planned for: use one of {', '.join(PRECISIONS)}")
    networks = (parts.unet, parts.autoencoder.model, parts.text_encoder.tower)
    live = LiveBytes(tensor for network in networks for tensor in (*network.parameters(), *network.buffers()))
    functions = GPUFunctions(PRECISIONS[precision], lambda copy: live.rename(copy, COPIES))
    parameters = [parameter for parameter in parts.unet.parameters() if parameter.requires_grad]
    meta = torch.device("meta")
    with live, live.kind(ENCODING), on_gpu(PlannedGPU(PRECISIONS[precision]) if kernels else None):
        hooks = [p.register_post_accumulate_grad_hook(lambda p: live.rename(p.grad, GRADIENTS)) for p in parameters]  # type: ignore[arg-type]
        if keeps_gradients:
            with live.kind(GRADIENTS):  # of the micro-batch before
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
        once: Counter[str] = Counter()
        forward: Counter[str] = Counter()
        with functions:
            loss = torch.zeros((), device=meta)
            for stream, (b, f, h, w) in sorted(clips.items(), key=lambda item: item[1][1], reverse=True):  # as TextToVideoModule does
                done = live.operations
                with torch.no_grad():
                    frames = torch.empty(b, f, h, w, 3, dtype=torch.uint8, device=meta)
                    moments = parts.autoencoder.moments(frames)  # (b f h w 2c)
                    latents = parts.autoencoder.sample(moments)  # (b c f h w)
                    text = parts.text_encoder.encode_tokens(torch.zeros(b, TOKENS, dtype=torch.long, device=meta))  # (b n d)
                    noise = torch.empty(latents.shape, device=meta)
                once[stream], done = live.operations - done, live.operations
                with live.kind(activations_of(stream)):
                    timestep = torch.zeros(b, dtype=torch.long, device=meta)
                    loss = loss + parts.objective(parts.unet, latents, text, timestep, noise).sum()
                forward[stream] = live.operations - done
                del frames, moments, latents, text, noise, timestep
            functions.forget()
            done = live.operations
            with live.kind(BACKWARD):
                backward_pass(loss)
            backward = live.operations - done
        for parameter, hook in zip(parameters, hooks, strict=True):
            parameter.grad = None
            hook.remove()
    operations = {stream: once[stream] + forward[stream] + backward * forward[stream] // forward.total() for stream in clips}
    return Step({kind: size for kind, size in live.at_peak.items() if size}, operations)


@contextmanager
def on_gpu(planned: PlannedGPU | None) -> Iterator[None]:
    token = planned_gpu.set(planned)
    try:
        yield
    finally:
        planned_gpu.reset(token)


def backward_pass(loss: Tensor) -> None:
    """loss.backward() from the engine itself: the public function is one call to a function mode, which then misses what is recomputed."""
    seed = torch.ones_like(loss)
    torch.autograd.graph._engine_run_backward((loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True)

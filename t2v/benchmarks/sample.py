"""what=sample: prompts to uint8 frames by TextToVideoPipeline itself, random weights, against diffusers' pipeline of the same model.

A call is all of it: text encoder, denoising steps with guidance, decoding, frames on the CPU. The peer is handed the text's embeddings.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from t2v.benchmarks.measuring import Row, attempt, ceilings, check_peer, default_device, peak_memory, speed, timed, write_profile
from t2v.benchmarks.random_parts import (
    backend_for,
    config_for,
    kl_config,
    random_autoencoder,
    random_kl,
    random_peer,
    random_text_encoder,
    random_unet,
)
from t2v.diffusion.sampling import Sampler
from t2v.models.convolution import channels_last
from t2v.models.frozen import Frozen
from t2v.models.text_encoder import TOKENS
from t2v.pipeline import TextToVideoPipeline, default_dtype
from t2v.training.operations import autoencoder_tflop, unet_tflop

PROMPT = "a red circle moving left slowly on a black background"
STEPS = {"ddim": 50, "dpm++": 20}


def sample(
    config: Mapping[str, Any] | None = None,
    prompts: Sequence[int] = (1, 16),
    steps: Mapping[str, int] | None = None,
    frames: int = 16,
    size: int = 32,
    attention_backend: str | None = None,
    cuda_graph: bool = True,
    compile: bool = False,
    versus: str | None = None,
    compile_peer: bool = False,
    cudnn_benchmark: bool = False,
    rounds: int = 5,
    seconds: float = 20,
    profile: str | None = None,
    device: str | None = None,
) -> Iterator[Row]:
    """A row for each sampler of `steps` ({name: steps}), number of prompts at once, and network. `size` of the latents.

    `profile`: a file for the kernels of two of our steps and the decoding, at the last number of prompts.
    """
    check_peer(versus, compile_peer)
    torch.backends.cudnn.benchmark = cudnn_benchmark  # off in generate and evaluate, where a seed is to give the same bits again
    place = torch.device(device) if device else default_device()
    config = config_for(place, config)
    best = ceilings(place)
    if best:
        yield {"what": "ceiling", **best}
    latents = (4, frames, size, size)
    text = (TOKENS, config.get("cross_attention_dim", 1024))
    a_step = {"t2v": unet_tflop(config, latents, text, texts=2), "diffusers": 2 * unet_tflop(config, latents, text)}
    decoding = autoencoder_tflop(kl_config(None, place), latents)[1]
    shape = (frames, size)
    networks: dict[str, Callable[[], Any]] = {"t2v": partial(our_pipeline, config, place, shape, attention_backend, cuda_graph, compile)}
    if versus:
        networks["diffusers"] = partial(peers_pipeline, config, place, shape, compile_peer)
    limits = {"rounds": rounds, "seconds": seconds}
    for name, make in networks.items():
        pipeline = make()
        for scheduler, count in (steps or STEPS).items():
            for batch in prompts:
                known = {"network": name, "compiled": compile if name == "t2v" else compile_peer}
                known |= {"sampler": scheduler, "steps": count, "prompts": batch}
                call = partial(pipeline, Sampler(scheduler, count), batch)
                measure = partial(measured, call, place, batch, count * a_step[name] + decoding, best, limits)
                yield attempt(known, measure, may_fail=name != "t2v")
        if name == "t2v":
            short = partial(pipeline, Sampler(num_steps=2), prompts[-1])
            yield {"what": "mp4 of one video", "ms": mp4_ms(short()[0])}
            if profile is not None:
                write_profile(short, place, Path(profile))
        del pipeline, call, measure


def measured(
    call: Callable[[], Any], device: torch.device, batch: int, work: float, best: Mapping[str, float], limits: dict[str, Any]
) -> Row:
    timing = timed(call, device, warmup=0, **limits)
    return {**speed(timing, batch, work, best), **peak_memory(device)}


def our_pipeline(
    config: Mapping[str, Any],
    device: torch.device,
    shape: tuple[int, int],
    attention_backend: str | None,
    cuda_graph: bool,
    compile: bool,
) -> Callable[[Sampler, int], torch.Tensor]:
    """(sampler, number of prompts) -> uint8 (b f h w c)."""
    dtype = default_dtype(device)
    unet = random_unet(config, device, dtype, attention_backend=backend_for(device, config, attention_backend)).eval()
    unet.requires_grad_(False)
    channels_last(unet)  # as TextToVideoPipeline.to
    if compile:
        unet.compile(dynamic=False)
    frozen = Frozen(random_autoencoder(None, device, dtype), random_text_encoder(unet.config["cross_attention_dim"], device, dtype))
    frames, size = shape
    pixels = size * frozen.autoencoder.factor
    size_of_all = {"frames": frames, "height": pixels, "width": pixels, "fps": 8}
    pipeline = TextToVideoPipeline(unet, frozen, sample=size_of_all, cuda_graph=cuda_graph)

    def call(sampler: Sampler, batch: int) -> torch.Tensor:
        pipeline.sampler = sampler
        return pipeline([PROMPT] * batch, batch_size=batch)

    return call


def peers_pipeline(
    config: Mapping[str, Any], device: torch.device, shape: tuple[int, int], compiled: bool
) -> Callable[[Sampler, int], torch.Tensor]:
    """diffusers' TextToVideoSDPipeline in the same precision, with the same schedulers."""
    from diffusers.pipelines.deprecated.text_to_video_synthesis.pipeline_text_to_video_synth import TextToVideoSDPipeline
    from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler

    dtype = default_dtype(device)
    unet = random_peer(config, device, dtype).eval().requires_grad_(False)
    if compiled:
        unet.compile(dynamic=False)
    betas: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    ddim: Any = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False)
    dpm: Any = DPMSolverMultistepScheduler(**betas)
    schedulers = {"ddim": ddim, "dpm++": dpm}
    kl = random_kl(None, device, dtype)
    pipeline: Any = TextToVideoSDPipeline(kl, None, None, unet, schedulers["ddim"])  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    frames, size = shape
    pixels = size * pipeline.vae_scale_factor
    text = torch.randn(1, TOKENS, unet.config.cross_attention_dim, device=device, dtype=dtype)

    def call(sampler: Sampler, batch: int) -> torch.Tensor:
        pipeline.scheduler = schedulers[sampler.scheduler]
        embeddings = text.expand(batch, -1, -1).contiguous()
        made = pipeline(
            height=pixels,
            width=pixels,
            num_frames=frames,
            num_inference_steps=sampler.num_steps,
            prompt_embeds=embeddings,
            negative_prompt_embeds=embeddings,
            output_type="pt",
        )
        return (made.frames * 255).round().to(torch.uint8).cpu()  # as ours: bytes on the CPU

    return call


def mp4_ms(video: torch.Tensor) -> float:
    """Writing uint8 (f h w c) at 8 fps; beside the call, because it can run while the next video is made."""
    from t2v.video import write_mp4

    began = time.perf_counter()
    write_mp4(io.BytesIO(), video, 8)
    return 1e3 * (time.perf_counter() - began)

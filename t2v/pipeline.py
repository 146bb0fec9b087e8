"""Prompts -> videos (Figure 2, inference): the place where networks and diffusion meet for sampling."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2v import checkpoint
from t2v.diffusion.guidance import ClassifierFreeGuidance
from t2v.diffusion.randomness import generator_of
from t2v.diffusion.recording import Recordings
from t2v.diffusion.sampling import Sampler
from t2v.diffusion.schedule import NoiseSchedule
from t2v.models.convolution import channels_last
from t2v.models.frozen import Frozen

MAX_TOKENS = 77  # N_p, start and end included
RELEASED_SAMPLE = {"frames": 16, "height": 256, "width": 256, "fps": 8}  # of ModelScope's own pipeline


class TextToVideoPipeline:
    """A UNet, the frozen parts and a sampler, ready to be called.

    `sample` is what is made where a call does not say: frames, height, width, and the fps to write them at. Nothing is moved or copied
    here: the UNet may be a wrapped or sharded one that is being trained. `cuda_graph`: its calls are recorded on a GPU and replayed; their
    memory is kept until the pipeline goes.
    """

    def __init__(
        self,
        unet: nn.Module,
        frozen: Frozen,
        sampler: Sampler | None = None,
        *,
        sample: Mapping[str, int | float] | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.unet = unet
        self.frozen = frozen
        self.sampler = sampler or Sampler()
        self.sample = {**RELEASED_SAMPLE, **(sample or {})}
        self.recordings = Recordings() if cuda_graph else None

    @classmethod
    def from_pretrained(
        cls,
        place: str | Path,
        *,
        ema: bool = True,
        sampler: Sampler | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        autoencoder: str | None = None,
        text_encoder: str | None = None,
        unet_options: Mapping[str, Any] | None = None,
        cuda_graph: bool = True,
    ) -> TextToVideoPipeline:
        """From a checkpoint folder, a run (its newest checkpoint), `package:shapes` (comes with t2v), `diffusers:DIR` or `modelscope:DIR`.

        `ema`: the averaged weights, where there are both. `device`: the GPU if there is one. `dtype`: bfloat16 on GPUs that have it, else
        float32. `autoencoder`, `text_encoder`: where their weights lie, if not where the checkpoint says. Raises ValueError.
        """
        device = default_device() if device is None else usable_device(device)
        kind, folder = checkpoint.split_place(place)
        options: dict[str, Any] = {"device": device, "autoencoder": autoencoder, "text_encoder": text_encoder, "unet_options": unet_options}
        if kind is None:
            unet, frozen, card = checkpoint.read_model(folder, ema, **options)
            pipeline = cls(unet, frozen, sampler or sampler_of(card), sample=card.sample, cuda_graph=cuda_graph)
        else:
            model = checkpoint.read_foreign(kind, folder, **options)
            schedule = NoiseSchedule(**model.schedule)  # type: ignore[arg-type]
            pipeline = cls(model.unet, model.frozen, sampler or Sampler(schedule=schedule), sample=model.sample, cuda_graph=cuda_graph)
        return pipeline.to(device, default_dtype(device) if dtype is None else dtype)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> TextToVideoPipeline:
        """Move the networks. The sampler's own state stays float32."""
        if self.recordings is not None:
            self.recordings.clear()
        self.unet.to(device=device, dtype=dtype)
        channels_last(self.unet)
        self.frozen.to(device, dtype)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 8,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Eq. 2 to 4 and the sampling loop: uint8 (b f h w c) on the CPU; (f h w c) where `prompts` is one string.

        The noise of a video is keyed by (seed, its index), so it does not depend on the prompts beside it; `indices` are 0..b-1 unless
        given, for callers who go through a longer list in parts. `batch_size` videos are made at once. `on_step(done, of)` counts the
        network's passes over all batches. Raises ValueError for empty prompts and for sizes that cannot be; warns where a prompt is cut.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        indices = list(range(len(texts))) if indices is None else list(indices)
        f, h, w = self._latent_shape(num_frames, height, width)
        if len(indices) != len(texts):
            raise ValueError(f"{len(indices)} indices for {len(texts)} prompts; give one a prompt")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
        for message in self.check_prompts(texts):
            warnings.warn(message, stacklevel=2)
        unet = self.unet if self.recordings is None else self.recordings.of(self.unet)
        parameter = next(self.unet.parameters())
        device, dtype = parameter.device, parameter.dtype
        empty = self.frozen.text_encoder.encode([""]).to(device, dtype)
        total = -(-len(texts) // batch_size) * self.sampler.num_steps
        videos = []
        for first in range(0, len(texts), batch_size):
            rows = slice(first, first + batch_size)
            keys = [("sample", seed, index) for index in indices[rows]]
            noise = self.sampler.schedule.noise(keys, (self.frozen.autoencoder.channels, f, h, w))
            latents = self.sampler.sample(
                unet,
                noise.to(device),
                self.frozen.text_encoder.encode(texts[rows]).to(device, dtype),  # Eq. 3
                empty,
                generators=[generator_of("step", seed, index) for index in indices[rows]],
                on_step=on_step and (lambda done, of, before=first // batch_size: on_step(before * of + done, total)),  # type: ignore[misc]
            )
            broken = [indices[first + row] for row, fine in enumerate(latents.isfinite().flatten(1).all(1).tolist()) if not fine]
            if broken:  # as pixels they would be black
                raise ValueError(f"the model gave NaN or infinity for prompts {broken}: its weights are broken, or too large for {dtype}")
            videos.append(self.frozen.autoencoder.decode(latents).cpu())  # Eq. 2: (b f h w c)
        return videos[0][0] if isinstance(prompts, str) else torch.cat(videos)

    def check_prompts(self, prompts: Sequence[str]) -> list[str]:
        """Raise ValueError for an empty prompt; return a line for each that the text encoder will cut."""
        if not prompts:
            raise ValueError("there is no prompt; give at least one")
        for number, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompt {number} is empty ({prompt!r}): say what the video should show")
        counts = self.frozen.text_encoder.token_counts(list(prompts))
        return [
            f"prompt {number} has {count} tokens, of which the first {MAX_TOKENS} are read: {prompt[:60]!r}..."
            for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
            if count > MAX_TOKENS
        ]

    def _latent_shape(self, frames: int | None, height: int | None, width: int | None) -> tuple[int, int, int]:
        wanted = {"num_frames": frames, "height": height, "width": width}
        default = {"num_frames": self.sample["frames"], "height": self.sample["height"], "width": self.sample["width"]}
        sizes = {name: int(default[name]) if value is None else value for name, value in wanted.items()}
        factor = self.frozen.autoencoder.factor
        for name, size in sizes.items():
            step = 1 if name == "num_frames" else factor
            if isinstance(size, bool) or not isinstance(size, int) or size < step or size % step:
                near = max(step, round(size / step) * step)
                raise ValueError(
                    f"{name} is {size}; "
                    + ("a video has at least 1 frame" if step == 1 else f"the autoencoder works in squares of {factor} pixels: take {near}")
                )
        return sizes["num_frames"], sizes["height"] // factor, sizes["width"] // factor


def sampler_of(card: checkpoint.ModelCard) -> Sampler:
    """The sampler that model.json recommends, on the schedule that the model was trained with."""
    values = {**card.sampler, "guidance": ClassifierFreeGuidance(**card.sampler["guidance"])}
    return Sampler(**values, schedule=NoiseSchedule(**card.schedule))  # type: ignore[arg-type]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(device: torch.device | str) -> torch.device:
    """Raise ValueError for a device that this machine or this build of torch does not have."""
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device} is unknown; there are cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device} is not here: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; use device=cpu")
    return device


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it fast."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32

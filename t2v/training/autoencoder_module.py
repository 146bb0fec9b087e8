"""The training of the small autoencoder of `shapes`: python -m t2v.train experiment=shapes_autoencoder

Every other experiment takes a trained autoencoder ("VQGAN" in Eqs. 1 and 2 of the paper) and keeps it frozen. This one makes one:
diffusers' AutoencoderKL on single frames, reconstruction plus a small KL term, without a discriminator, which flat shapes do not need.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from t2v.batch import ClipBatch
from t2v.checkpoint import AutoencoderCard, Part
from t2v.data.checker import Score, score
from t2v.data.shapes import held_out_images, held_out_specs, render
from t2v.diffusion.randomness import normal
from t2v.training.checkpoints import count_batches, lay_out_like_parameters, stop_between_steps
from t2v.training.ema import EMA
from t2v.training.learning_rate import scheduled
from t2v.training.mixture import StepPlan


class AutoencoderModule(LightningModule):
    """Learns to reconstruct the frames of the batch, each frame for itself; images and videos weigh as the mixture says."""

    measures = ("loss", "kl", "optimizer")

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        lr_schedule: Callable[[int], float],
        ema: EMA,
        kl_weight: float = 1e-4,
        initial_log_variance: float = -6.0,
        window: int = 0,
        window_steps: int = 0,
        faint: float = 0.01,
        latent_noise: float = 0.0,
        sharpness: float = 0.0,
        start: str | None = None,
        decoder_only: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kl_weight < 0:
            raise ValueError(f"module.kl_weight is {kl_weight}: it is the weight of the KL term per latent value, at least 0")
        if latent_noise < 0 or sharpness < 0:
            raise ValueError(f"module.latent_noise is {latent_noise} and module.sharpness {sharpness}: both are at least 0")
        if decoder_only and start is None:
            raise ValueError("module.decoder_only=true keeps the encoder of module.start=FOLDER, which is not given")
        self.factor = 2 ** (len(autoencoder.config["block_out_channels"]) - 1)  # pixels per latent pixel
        if window_steps and (window < self.factor or window % self.factor):
            raise ValueError(f"module.window is {window}: the autoencoder's factor {self.factor} must divide it, unless window_steps is 0")
        self.autoencoder = autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-arg]
        if start is None:
            self.initialise(initial_log_variance)
        else:
            earlier = AutoencoderKL.from_pretrained(start).float()
            self.autoencoder.load_state_dict(earlier.state_dict())
            self.autoencoder.register_to_config(scaling_factor=earlier.config["scaling_factor"])
        if decoder_only:  # latents stay what they are: whatever was trained on them goes on to fit
            for part in (self.autoencoder.encoder, self.autoencoder.quant_conv):
                part.requires_grad_(False)
        self.decoder_only = decoder_only
        self.average = copy.deepcopy(self.autoencoder).eval().requires_grad_(False)
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.ema = ema
        self.kl_weight = kl_weight
        self.window = window  # pixels; for the first `window_steps` steps only the busiest window of each frame is learned from
        self.window_steps = window_steps
        self.faint = faint  # variance (on a scale of -1..1) below which a frame's errors weigh fully
        self.latent_noise = latent_noise  # standard deviation, in units of that of the batch's latents
        self.sharpness = sharpness  # weight of errors of the differences between neighbouring pixels, i.e. of outlines
        self.seed = seed

    @torch.no_grad()
    def initialise(self, log_variance: float) -> None:
        """A narrow posterior, since one of variance 1 would drown the latents at first; and residual blocks that pass on what they get."""
        self.autoencoder.quant_conv.bias[self.autoencoder.config["latent_channels"] :] = log_variance
        for layer in self.autoencoder.modules():
            if isinstance(layer, ResnetBlock2D):
                for parameter in layer.conv2.parameters():
                    parameter.zero_()

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(p for p in self.autoencoder.parameters() if p.requires_grad)
        return scheduled(optimizer, self.lr_schedule)

    @property
    def plan(self) -> StepPlan:
        return self.trainer.datamodule.plan(self.trainer.world_size)  # type: ignore[attr-defined]

    def losses(self, frames: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Frames (b c h w) in [-1, 1], noise like the latents -> reconstruction and KL terms, each (b,)."""
        posterior = self.autoencoder.encode(frames).latent_dist
        # a generated latent is never exact: what the decoder must tell apart has to lie further apart than this noise
        spread = (posterior.var + (self.latent_noise * posterior.mean.detach().std()).square()).sqrt()
        difference = self.autoencoder.decode(posterior.mean + spread * noise).sample - frames
        # mostly squared: an absolute error is content with the background where a small shape may or may not be
        error = (difference.square() + 0.1 * difference.abs()).mean((1, 2, 3))
        for axis in (2, 3):
            error = error + self.sharpness * difference.diff(dim=axis).square().mean((1, 2, 3))
        contrast = frames.flatten(2).var(2).mean(1)  # otherwise faint shapes, such as teal on gray, would not be worth their corners
        reconstruction = error * self.faint / (contrast + self.faint)
        return reconstruction, posterior.kl() / noise[0].numel()

    def training_step(self, batch: dict[str, ClipBatch], batch_idx: int) -> Tensor:
        plan = self.plan
        loss = torch.zeros((), device=self.device)
        for stream, clips in batch.items():
            if len(clips) == 0:
                continue
            b, f = clips.frames.shape[:2]
            frames = to_unit(clips.frames).flatten(0, 1)  # (b*f c h w)
            if self.global_step < self.window_steps:
                frames = busiest(frames, self.window)
            h, w = frames.shape[-2:]
            keys = [(self.seed, "posterior", self.global_step, stream, index) for index in clips.indices]
            noise = normal(keys, (f, self.autoencoder.config["latent_channels"], h // self.factor, w // self.factor)).to(self.device)
            reconstruction, kl = self.losses(frames, noise.flatten(0, 1))  # (b*f,)
            loss = loss + plan.scale(stream) * (reconstruction + self.kl_weight * kl).sum() / f
            self.log_dict({f"loss/{stream}": reconstruction.detach().mean(), f"kl/{stream}": kl.detach().mean()}, batch_size=b)
        self.log("optimizer/lr", self.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]
        self.trainer.datamodule.consumed(batch)  # type: ignore[attr-defined]
        return loss

    def describe(self, step: int) -> AutoencoderCard:
        """What model.json says of a checkpoint."""
        arguments = {name: value for name, value in self.autoencoder.config.items() if not name.startswith("_")}
        return AutoencoderCard(Part("AutoencoderKL", json.loads(json.dumps(arguments))), step)

    def on_train_start(self) -> None:
        lay_out_like_parameters(self.trainer.optimizers[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        stop_between_steps(self.trainer, batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count_batches(checkpoint, self.plan.accumulate)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The average follows at once, before any callback can save it."""
        super().optimizer_step(*args, **kwargs)
        self.ema.update(list(self.average.parameters()), list(self.autoencoder.parameters()), self.global_step + 1)


class AutoencoderScore(Callback):
    """At the end: what the average is worth on held-out frames, and <run>/autoencoder: a diffusers folder in half precision, its
    scaling_factor the measured 1 / (standard deviation of the latents); that of `start` where only the decoder was trained."""

    measures = ("autoencoder",)

    def __init__(self, clips: int = 96, images: int = 512, frames: int = 16, fps: float = 3.0, size: int = 64, seed: int = 1) -> None:
        self.clips, self.images, self.frames, self.fps, self.size, self.seed = clips, images, frames, fps, size, seed

    def evaluate(self, trainer: Trainer, module: LightningModule) -> str:
        assert isinstance(module, AutoencoderModule)
        stored = copy.deepcopy(module.average).half()  # what is kept is what is measured
        model = copy.deepcopy(stored).float()
        report = measure(model, clips=self.clips, images=self.images, frames=self.frames, fps=self.fps, size=self.size, seed=self.seed)
        if not module.decoder_only:
            stored.register_to_config(scaling_factor=round(1 / report["latent_std"], 4))
        if trainer.is_global_zero:
            stored.save_pretrained(Path(trainer.default_root_dir) / "autoencoder")
            (Path(trainer.default_root_dir) / "autoencoder_score.json").write_text(json.dumps(report, indent=1) + "\n")
        for name, value in report.items():
            trainer.callback_metrics[f"autoencoder/{name}"] = torch.tensor(value)
        lines = [
            "| on held-out frames | |",
            "|---|---|",
            *(f"| {name.replace('_', ' ')} | {value:.4g} |" for name, value in report.items()),
        ]
        return "\n".join(lines)


@torch.no_grad()
def measure(
    model: AutoencoderKL, *, clips: int = 96, images: int = 512, frames: int = 16, fps: float = 3.0, size: int = 64, seed: int = 1
) -> dict[str, float]:
    """Reconstruct (from posterior means) held-out clips of what videos show, half as many of what only images show, and held-out images.

    PSNR in dB of the mean squared error over all frames, and of the worst frame. `checker_*`: the share of samples with all attributes
    right, on originals and on reconstructions. Latents: mean and standard deviation of posterior samples before scaling.
    """
    decks = {
        "clips": held_out_specs(clips, seed),
        "clips_of_image_only": held_out_specs(clips // 2, seed, "image_only"),
        "images": held_out_images(images, seed),
    }
    report: dict[str, float] = {}
    latents = []
    for name, chosen in decks.items():
        truth = [render(spec, frames, fps, size) for spec in chosen]
        pictures = []
        for some in truth:
            posterior = model.encode(to_unit(some).to(model.device)).latent_dist
            latents.append(posterior.sample(torch.Generator(model.device).manual_seed(seed)).flatten())
            pictures.append(from_unit(model.decode(posterior.mean).sample).cpu())
        errors = torch.cat([(a.float() - b.float()).square().mean((1, 2, 3)) for a, b in zip(truth, pictures)])  # (frames,)
        report[f"psnr_{name}"] = psnr(float(errors.mean()))
        report[f"psnr_{name}_worst_frame"] = psnr(float(errors.max()))
        table: Score = score(pictures, chosen, fps, real=truth)
        report[f"checker_{name}_original"], report[f"checker_{name}_reconstructed"] = table["all"].ceiling, table["all"].accuracy
    values = torch.cat(latents)
    report["latent_mean"], report["latent_std"] = float(values.mean()), float(values.std())
    return report


def to_unit(frames: Tensor) -> Tensor:
    """uint8 (... h w c) -> float (... c h w) in [-1, 1]."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


def from_unit(frames: Tensor) -> Tensor:
    """float (... c h w) in [-1, 1] -> uint8 (... h w c)."""
    return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def busiest(frames: Tensor, side: int) -> Tensor:
    """(b c h w) -> (b c side side): of the windows half a side apart, the one that varies most. Flat background teaches little."""
    windows = frames.unfold(2, side, side // 2).unfold(3, side, side // 2)  # (b c rows columns side side)
    windows = windows.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)  # (b n c side side)
    best = windows.var((3, 4)).sum(2).argmax(1)
    return windows[torch.arange(len(frames), device=frames.device), best]


def psnr(squared_error: float) -> float:
    """In dB, of a mean squared error on the scale of 0..255."""
    return 10 * math.log10(255**2 / max(squared_error, 1e-6))

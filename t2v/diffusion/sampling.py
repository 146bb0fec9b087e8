"""The reverse process: from Z_T to Z_0 in a few steps (section 4.1.2: DDIM, 50 steps, classifier-free guidance).

The update rules are diffusers' schedulers. A sampler sees denoise(z, t) only: neither the network, nor its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from t2v.diffusion.guidance import ClassifierFreeGuidance
from t2v.diffusion.objective import Denoiser
from t2v.diffusion.schedule import PREDICTIONS, NoiseSchedule

CLASSES: dict[str, Any] = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "ddpm": DDPMScheduler}
# What the released model sets beside the schedule: x_0 is never clipped, and the last step ends at abar[0] instead of 1.
EXTRAS: dict[str, dict[str, Any]] = {
    "ddim": {"clip_sample": False, "set_alpha_to_one": False},
    "dpm++": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "ddpm": {"clip_sample": False},
}


@dataclass(frozen=True)
class Sampler:
    """Holds no state between calls, so that one object serves training, evaluation and threads."""

    scheduler: str = "ddim"  # ddim (eta 0) | dpm++ (second-order multistep) | ddpm (ancestral: draws noise at every step)
    num_steps: int = 50
    guidance: ClassifierFreeGuidance = field(default_factory=ClassifierFreeGuidance)
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule)
    spacing: str = "leading"  # as released; "trailing" starts at T itself, better for few steps (Lin et al. 2023, table 2)

    def __post_init__(self) -> None:
        if self.scheduler not in CLASSES:
            raise ValueError(f"scheduler '{self.scheduler}' is unknown; there are {', '.join(CLASSES)}")
        if self.stochastic and self.schedule.shared_noise:
            raise ValueError(
                f"{self.scheduler} draws noise for each frame alone at every step, but the model was trained with "
                f"schedule.shared_noise={self.schedule.shared_noise}: use ddim or dpm++"
            )
        if self.spacing not in ("leading", "trailing"):
            raise ValueError(f"spacing '{self.spacing}' is unknown; there are leading, trailing")
        largest = self.schedule.num_timesteps - (self.scheduler == "dpm++")  # dpm++ divides the schedule into one part more
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or not 1 <= self.num_steps <= largest:
            raise ValueError(
                f"num_steps is {self.num_steps!r}; {self.scheduler} on a schedule of {self.schedule.num_timesteps} takes 1 to {largest}"
            )

    @property
    def stochastic(self) -> bool:
        """Whether steps draw noise, so that `sample` needs generators."""
        return self.scheduler == "ddpm"

    @property
    def config(self) -> dict[str, Any]:
        """What model.json stores; the schedule stands beside it."""
        return {"scheduler": self.scheduler, "num_steps": self.num_steps, "guidance": asdict(self.guidance), "spacing": self.spacing}

    @property
    def timesteps(self) -> list[int]:
        """The visited steps, falling; 981, 961, ..., 1 for 50 steps of DDIM."""
        return [int(t) for t in self._scheduler().timesteps]

    def _scheduler(self) -> Any:
        total = self.schedule.num_timesteps
        parts = self.num_steps + (self.scheduler == "dpm++")
        last_multiple = (parts - 1) * (total // parts)
        scheduler = CLASSES[self.scheduler](
            num_train_timesteps=total,
            beta_schedule="scaled_linear",
            beta_start=self.schedule.beta_start,
            beta_end=self.schedule.beta_end,
            prediction_type=PREDICTIONS[self.schedule.prediction],
            timestep_spacing=self.spacing,
            steps_offset=min(1, total - 1 - last_multiple),  # 1, as released, except where that would step past T
            **EXTRAS[self.scheduler],
        )
        scheduler.set_timesteps(self.num_steps)  # stays on the CPU: reading a timestep must not wait for the GPU
        return scheduler

    @torch.inference_mode()
    def sample(
        self,
        unet: Denoiser,
        noise: Tensor,
        text: Tensor,
        empty_text: Tensor,
        *,
        generators: Sequence[torch.Generator] | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Z_T = noise (b c f h w), text (b n d), empty_text (n d), (1 n d) or (b n d) -> Z_0 (b c f h w), in the noise's dtype.

        The state stays in the noise's dtype (float32); the network is fed in the text's. `generators`: one a sample, for
        stochastic schedulers. `on_step(done, of)` is called after each step.
        """
        if not len(noise) == len(text):
            raise ValueError(f"noise for {len(noise)} clips and text for {len(text)} prompts; give one prompt a clip")
        if self.stochastic and (generators is None or len(generators) != len(noise)):
            given = "none" if generators is None else len(generators)
            raise ValueError(f"{self.scheduler} draws noise at every step: give a generator for each of {len(noise)} clips, not {given}")
        denoise = self.guidance(unet, text, empty_text)
        scheduler = self._scheduler()
        options = {"generator": list(generators)} if self.stochastic and generators else {}
        z = noise * scheduler.init_noise_sigma
        for done, timestep in enumerate(scheduler.timesteps.tolist(), start=1):
            predicted = denoise(z, torch.full((len(z),), timestep, device=z.device))  # Eq. 4
            z = scheduler.step(predicted.to(z.dtype), timestep, z, **options).prev_sample
            if on_step is not None:
                on_step(done, len(scheduler.timesteps))
        return z

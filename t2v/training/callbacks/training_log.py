"""Scalars of the training for TensorBoard: losses, rates, speed, memory, skipped samples. Equal collectives on every rank."""

from __future__ import annotations

import json
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from t2v.batch import ClipBatch
from t2v.ranks import connected, from_all
from t2v.training.callbacks import at_least_one
from t2v.training.operations import autoencoder_tflop, ceiling_tflop_per_s, unet_tflop
from t2v.training.sharding import is_sharded, local, within

QUANTILES = 4
AT_ONCE = 1 << 24  # elements of parameters that are looked at together: few launches, little memory
Shapes = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Latents (c f h w) and text (n d) of a sample, and whether the training encodes it."""


class TrainingLog(Callback):
    """Every `every_n_steps` optimizer steps: loss of images and of videos, loss by quarter of the timesteps, learning rate, gradient norm,
    update-to-weight ratio, clips/s and images/s, share of the time spent waiting for data, peak memory (of the rank that has most), skipped
    samples by reason (of all ranks and sessions); for each
    GPU clips/s, images/s, TFLOP/s and their share of the ceiling. What other callbacks take (samples, scores, checkpoints) is in none of
    them but in `speed/callbacks`, its share of all time.

    TFLOP/s are of the network (forward, and twice that backward) and of the autoencoder where it encodes, counted once for each shape;
    what is recomputed to save memory does not count. `ceiling` is the best that one GPU reaches, in TFLOP/s; measured if None. Logged once:
    seconds from the trainer's set-up to the end of the first step, and of these the first step's own, with all compiling.
    """

    measures = ("loss", "loss_by_timestep", "speed")

    def __init__(self, every_n_steps: int = 10, ceiling: float | None = None) -> None:
        if ceiling is not None and ceiling <= 0:
            raise ValueError(f"callbacks.training_log.ceiling is {ceiling}: it is in TFLOP/s, above 0; leave it out to have it measured")
        self.every_n_steps = at_least_one("training_log.every_n_steps", every_n_steps)
        self.ceiling = ceiling
        self.trained: Counter[Shapes] = Counter()  # samples on this rank since the last log
        self.work: dict[Shapes, float] = {}  # TFLOP of training on one sample
        self.first_step: dict[str, float] = {}  # its scalars, until they are logged
        self.bad: Counter[tuple[str, str]] = Counter()  # on this rank in this session
        self.bad_before: Counter[tuple[str, str]] = Counter()  # on all ranks, in the sessions before
        self.rates: dict[str, float] = {}  # of the last step
        self.seen: Counter[str] = Counter()
        self.losses: list[tuple[str, Tensor, Tensor]] = []  # (stream, timesteps, losses) since the last log
        self.waited = self.aside = 0.0  # seconds since the last log: for data, and in other callbacks
        self.since = self.batch_ended = self.set_up_at = time.perf_counter()
        self.logged_step = self.started_at = 0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.set_up_at = time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.ceiling is None:
            self.ceiling = ceiling_tflop_per_s(module.device)
        self.since = self.batch_ended = time.perf_counter()
        self.logged_step = self.started_at = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: dict[str, ClipBatch], batch_idx: int) -> None:
        self.waited += time.perf_counter() - module.callbacks_done_at
        self.aside += module.callbacks_done_at - self.batch_ended

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        self.rates = {group["name"]: group["lr"] for group in optimizer.param_groups}  # the schedule moves on before the step is logged

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: dict[str, ClipBatch], batch_idx: int) -> None:
        for stream, clips in batch.items():
            self.seen[stream] += len(clips)
            self.bad.update(clips.bad)
            if clips.bad_examples:
                self._write_examples(trainer, clips.bad_examples)
        micro_batches = module.micro_batches[-len(batch) :]
        self.losses += [(m.stream, m.timestep[: len(m.losses)], m.losses) for m in micro_batches]
        for m in micro_batches:
            clips = batch[m.stream]
            shapes = tuple(m.encoded.latents.shape[1:]), tuple(m.encoded.text.shape[1:]), not clips.frames.is_floating_point()
            self.trained[shapes] += len(clips)
        step = trainer.global_step
        if step == self.started_at + 1 and self.logged_step == self.started_at and not self.first_step:
            now = time.perf_counter() - self.aside
            self.first_step = {"speed/startup_seconds": now - self.set_up_at, "speed/first_step_seconds": now - self.since}
        if step > self.logged_step and step % self.every_n_steps == 0:
            self.logged_step = step
            self._log(trainer, module, step)
        self.batch_ended = time.perf_counter()

    def _log(self, trainer: Trainer, module: Any, step: int) -> None:
        now = time.perf_counter()
        scalars = _mean_losses(self.losses, module.objective.schedule.num_timesteps, module.device)
        self.losses.clear()
        counted_in, done = self._count(module)
        seen = torch.tensor([float(self.seen["image"]), float(self.seen["video"]), done], device=module.device)
        if connected():
            dist.all_reduce(seen)
        for group in trainer.optimizers[0].param_groups:
            name = group["name"]
            scalars[f"optimizer/lr_{name}"] = self.rates[name]
            scalars[f"optimizer/update_to_weight_{name}"] = update_to_weight(trainer.optimizers[0], {**group, "lr": self.rates[name]})
        if module.watch.norm is not None:
            scalars["optimizer/gradient_norm"] = float(module.watch.norm)
        trained_for = now - self.since - self.aside
        images, clips, tflop = (seen / trained_for).tolist()
        scalars["speed/images_per_second"], scalars["speed/clips_per_second"] = images, clips
        per_gpu = {"images_per_second": images, "clips_per_second": clips, "tflop_per_second": tflop}
        scalars |= {f"speed/{name}_per_gpu": value / trainer.world_size for name, value in per_gpu.items()}
        if self.ceiling is not None:
            scalars["speed/of_ceiling"] = tflop / trainer.world_size / self.ceiling
        scalars |= self.first_step
        self.first_step = {}
        scalars["speed/data_wait"] = self.waited / trained_for
        scalars["speed/callbacks"] = self.aside / (now - self.since)
        scalars["memory/peak_gb"] = max(from_all(peak_memory_gb(module.device)))
        for (source, reason), count in self._all_bad().items():
            scalars[f"skipped/{source}/{reason}"] = count
        if trainer.logger is not None:
            trainer.logger.log_metrics(scalars, step)
        trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in scalars.items() if name.startswith(("loss", "speed"))}
        )
        self.since, self.waited, self.aside = now + counted_in, 0.0, 0.0
        self.seen.clear()
        self.trained.clear()

    def _count(self, module: Any) -> tuple[float, float]:
        """Seconds that counting took (some, at the first log), and TFLOP of training on this rank since the last log."""
        began = time.perf_counter()
        for shapes in self.trained.keys() - self.work.keys():
            latents, text, encoded = shapes
            self.work[shapes] = 3 * unet_tflop(module.unet.config, latents, text)
            if encoded:
                self.work[shapes] += autoencoder_tflop(module.frozen.autoencoder.model.config, latents)[0]
        return time.perf_counter() - began, sum(count * self.work[shapes] for shapes, count in self.trained.items())

    def _write_examples(self, trainer: Trainer, examples: list[dict[str, str]]) -> None:
        path = Path(trainer.default_root_dir) / f"bad_samples_rank{trainer.global_rank}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)

    def _all_bad(self) -> Counter[tuple[str, str]]:
        return sum(from_all(self.bad), self.bad_before)

    def state_dict(self) -> dict[str, Any]:
        """All ranks must call it together, as they do for a checkpoint."""
        return {"bad": [[source, reason, count] for (source, reason), count in self._all_bad().items()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bad_before = Counter({(source, reason): count for source, reason, count in state_dict["bad"]})


def _mean_losses(losses: list[tuple[str, Tensor, Tensor]], num_timesteps: int, device: torch.device) -> dict[str, float]:
    """Means over all samples of all ranks since the last log. Sums and counts travel, so that uneven shares weigh by count."""
    names = [f"loss/{stream}" for stream in ("image", "video")]
    names += [f"loss_by_timestep/{stream}_q{q}" for stream in ("image", "video") for q in range(QUANTILES)]
    table = torch.zeros(len(names), 2, dtype=torch.float64)
    for stream, timesteps, values in losses:
        s = ("image", "video").index(stream)
        values = values.double().cpu()
        table[s] += torch.tensor([values.sum(), len(values)])
        rows = 2 + s * QUANTILES + (timesteps.cpu() * QUANTILES // num_timesteps)
        table[:, 0].index_add_(0, rows, values)
        table[:, 1].index_add_(0, rows, torch.ones_like(values))
    if connected():
        on_device = table.float().to(device)
        dist.all_reduce(on_device)
        table = on_device.double().cpu()
    return {name: float(total / count) for name, (total, count) in zip(names, table, strict=True) if count > 0}


@torch.no_grad()
def update_to_weight(optimizer: Optimizer, group: dict[str, Any]) -> float:
    """|last update| / |weights| of a parameter group, from Adam's moments; about 1e-3 is healthy, 0 means that nothing is learned."""
    with_state = [p for p in group["params"] if "exp_avg" in optimizer.state.get(p, {})]
    if not with_state:
        return 0.0
    beta1, beta2 = group["betas"]
    step = float(optimizer.state[with_state[0]]["step"])
    squares = torch.zeros(2, device=with_state[0].device)
    for parameters in within(AT_ONCE, with_state):
        weights = local(parameters)
        means, squared = (local([optimizer.state[p][name] for p in parameters]) for name in ("exp_avg", "exp_avg_sq"))
        deviations = torch._foreach_sqrt(torch._foreach_div(squared, 1 - beta2**step))
        torch._foreach_add_(deviations, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(means, 1 - beta1**step), deviations)
        torch._foreach_add_(updates, weights, alpha=group["weight_decay"])
        squares += torch.stack([torch.stack(torch._foreach_norm(tensors)).square().sum() for tensors in (updates, weights)])
    if is_sharded(with_state[0]):
        dist.all_reduce(squares)
    update, weight = squares.tolist()
    return group["lr"] * (update / weight) ** 0.5 if weight else 0.0


def peak_memory_gb(device: torch.device) -> float:
    """Of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

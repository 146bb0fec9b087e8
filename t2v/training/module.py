"""The training of ModelScopeT2V (sections 3.1 and 4.1): encode, add noise, predict it, Eq. 5, AdamW, EMA."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from t2v import checkpoint
from t2v.batch import ClipBatch, LatentBatch
from t2v.checkpoint import ModelCard
from t2v.diffusion.objective import DenoisingLoss
from t2v.diffusion.randomness import normal, seed_of, uniform
from t2v.diffusion.sampling import Sampler
from t2v.diffusion.timesteps import ShiftedTimesteps, UniformTimesteps
from t2v.models.autoencoder import Autoencoder
from t2v.models.convolution import channels_last
from t2v.models.frozen import Frozen
from t2v.models.text_encoder import TextEncoder
from t2v.pipeline import TextToVideoPipeline
from t2v.training.checkpoints import count_batches, lay_out_like_parameters, stop_between_steps
from t2v.training.compiling import compile_blocks, require_compilable, require_compiler
from t2v.training.ema import EMA
from t2v.training.gathering import GatheredNetwork
from t2v.training.graphs import RecordedNetwork, own_gradients, require_recordable
from t2v.training.learning_rate import scheduled
from t2v.training.mixture import StepPlan
from t2v.training.nan_watch import MicroBatch, Model, NanWatch
from t2v.training.sharding import is_sharded, local, make_room_for_gathering, materialise, own_rows, take_gradients
from t2v.training.strategies import FullyShardedStrategy, how_gathered, weights_stay

TEMPORAL_MODULES = ("temp_convs", "temp_attentions", "transformer_in")
ELEMENT_BY_ELEMENT = (optim.Adagrad, optim.Adam, optim.Adamax, optim.NAdam, optim.RAdam, optim.RMSprop, optim.SGD)  # AdamW is an Adam


class TextToVideoModule(LightningModule):
    """Bundles the frozen VQGAN and text encoder with the 3D UNet and its EMA.

    Timestep, noise, posterior sample and caption dropout are keyed by (seed, optimizer step, stream, global sample index): they do not
    depend on the number of ranks, workers or micro-batches. Dropout inside the network is reseeded for each micro-batch by
    (seed, optimizer step, micro-batch, rank), so that a resumed run needs no saved generator.
    """

    def __init__(
        self,
        unet: nn.Module,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        objective: DenoisingLoss,
        sampler: Sampler,
        optimizer: Callable[[Iterable[Any]], Optimizer],
        lr_schedule: Callable[[int], float],
        ema: EMA,
        sample: dict[str, int],
        init: Callable[[nn.Module], None] | None = None,
        timesteps: UniformTimesteps | ShiftedTimesteps | None = None,
        caption_dropout: float = 0.1,
        temporal_lr_factor: float = 1.0,
        seed: int = 0,
        cuda_graphs: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= caption_dropout < 1:
            raise ValueError(f"module.caption_dropout is {caption_dropout}: it is a share of the captions, in [0, 1)")
        on_meta = next(unet.parameters()).is_meta
        if init is not None:
            init(unet)
        self.init = init if on_meta else None  # on meta it has only raised what there was to raise; see configure_model
        self.unet = unet
        self.ema_unet = copy.deepcopy(unet).eval().requires_grad_(False)
        self.frozen = Frozen(autoencoder, text_encoder)  # outside the module tree: never trained, wrapped or saved
        self.objective = objective
        self.timesteps = timesteps or UniformTimesteps()
        self.sampler = replace(sampler, schedule=objective.schedule)  # sampled on the schedule that it is trained with
        self.make_optimizer = optimizer
        self.lr_schedule = lr_schedule
        self.ema = ema
        self.sample = dict(sample)  # frames, height, width, fps of what this model makes by default
        self.caption_dropout = caption_dropout
        self.temporal_lr_factor = temporal_lr_factor
        self.seed = seed
        self.cuda_graphs = cuda_graphs
        self.compiler = compile  # a backend of torch.compile
        if compile is not None:
            require_compilable(unet, compile)
        self.recorded: RecordedNetwork | None = None
        self.gather: Callable[..., GatheredNetwork] | None = None  # of this rank's rows: strategy=fsdp with gather=step
        self.gathered: GatheredNetwork | None = None  # what a step's passes go through then
        self.frozen_in_bfloat16 = False  # weights and all, as t2v.generate runs them, instead of autocast's float32 norms
        self.trained: dict[str, nn.Parameter] = {}  # what the optimizer steps on: the parameters, or this rank's rows of each
        self.micro_batches: list[MicroBatch] = []  # of the optimizer step under way, or just done
        self.watch = NanWatch()
        self.callbacks_done_at = 0.0  # when those of the last step were: what passes from there to the next is waiting for data

    # -- set-up ---------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        device = self.trainer.strategy.root_device  # the module itself is moved later
        if self.cuda_graphs and weights_stay(how_gathered(self.trainer.strategy)):
            require_recordable(self.unet, self.compiler)
        if self.compiler is not None:
            require_compiler(self.compiler, device)
        self.frozen_in_bfloat16 = device.type == "cuda" and self.trainer.precision_plugin.precision == "bf16-mixed"
        self.frozen.to(device, torch.bfloat16 if self.frozen_in_bfloat16 else None)
        self.trainer.datamodule.check(self.frozen)  # type: ignore[attr-defined]

    def configure_model(self) -> None:
        """Networks that came without memory get it on their device. Where the strategy divides them between ranks, the average is divided
        like the network."""
        strategy = self.trainer.strategy
        on_meta = next(self.unet.parameters()).is_meta
        plain = copy.deepcopy(self.unet).to("meta") if how_gathered(strategy) == "step" else None
        if self.init is not None:  # files hold whole tensors: the network is whole, too, for a moment
            materialise(self.unet, strategy.root_device, self.seed)
            torch.manual_seed(self.seed)  # what it draws is the same on every rank
            self.init(self.unet)
        if self.compiler is not None and plain is None:
            compile_blocks(self.unet, self.compiler)  # not the average: every way to sample has a shape of its own
        if isinstance(strategy, FullyShardedStrategy):
            for network in (self.unet, self.ema_unet):
                strategy.shard(network)
        if on_meta:
            if self.init is None:
                materialise(self.unet, strategy.root_device, self.seed)
            self.ema_unet.to_empty(device=strategy.root_device)
            self.ema.start(self.ema_unet, self.unet)
        if plain is not None and isinstance(strategy, FullyShardedStrategy):
            make_room_for_gathering(self.unet)  # before anyone takes its rows, which FSDP may move when it first gathers
            self.gather = partial(strategy.gathered, plain, self.compiler)
        if not isinstance(strategy, FullyShardedStrategy):
            for network in (self.unet, self.ema_unet):
                channels_last(network)

    def cpu(self) -> Self:
        """Lightning calls it at the end, also of a training that failed before its networks had memory: an error of its own would hide
        the first one."""
        return self if next(self.unet.parameters()).is_meta else super().cpu()

    @property
    def recordings(self) -> int:
        """How many shapes of input have CUDA graphs."""
        recorded = self.recorded if self.gathered is None else self.gathered
        return 0 if recorded is None else recorded.recordings

    def record_network(self) -> None:
        """cuda_graphs: from now on, the network runs as CUDA graphs. Between ranks the exchange of gradients waits for the whole backward
        pass then, which takes less than the launches did (experiments/scaling)."""
        require_recordable(self.unet, self.compiler)
        if self.gathered is not None:
            self.gathered.record()
        else:
            self.recorded = RecordedNetwork(self.unet)

    def configure_optimizers(self) -> Any:
        self.trained = {name: own_rows(parameter) for name, parameter in self.unet.named_parameters()}
        temporal = {name: any(part in name for part in TEMPORAL_MODULES) for name in self.trained}
        base = self.make_optimizer([{"params": []}]).defaults["lr"] if self.temporal_lr_factor != 1 else None
        groups: list[dict[str, Any]] = [
            {"name": "spatial", "params": [p for n, p in self.trained.items() if not temporal[n]]},
            {"name": "temporal", "params": [p for n, p in self.trained.items() if temporal[n]]},
        ]
        if base is not None:
            groups[1]["lr"] = base * self.temporal_lr_factor
        optimizer = self.make_optimizer([group for group in groups if group["params"]])
        if is_sharded(next(iter(self.trained.values()))) and not isinstance(optimizer, ELEMENT_BY_ELEMENT):
            raise ValueError(
                f"strategy=fsdp steps on each rank's rows, but {type(optimizer).__name__} looks at whole weights: "
                "use optimizer=adamw, or strategy=ddp"
            )
        self.gathered = None if self.gather is None else self.gather(list(self.trained.values()))
        return scheduled(optimizer, self.lr_schedule)

    @property
    def plan(self) -> StepPlan:
        return self.trainer.datamodule.plan(self.trainer.world_size)  # type: ignore[attr-defined]

    # -- one step -------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, stream: str, clips: ClipBatch) -> LatentBatch:
        """Eq. 1 and Eq. 3. Frames -> moments (slow; may be done offline) -> latents (a sample of the posterior), captions -> text."""
        autoencoder, text_encoder = self.frozen.autoencoder, self.frozen.text_encoder
        precomputed = clips.frames.is_floating_point()  # t2v.encode stored the moments instead of the frames
        moments = clips.frames.float() if precomputed else autoencoder.moments(clips.frames)  # (b f h w 2c)
        _, f, h, w, c = moments.shape
        noise = sent(normal(self._keys("posterior", stream, clips), (c // 2, f, h, w)), moments.device)
        dropped = uniform(self._keys("caption", stream, clips)) < self.caption_dropout
        latents = autoencoder.sample(moments, noise)
        if clips.text is not None and clips.empty_text is not None:  # t2v.encode stored the embeddings, too
            text = torch.where(sent(dropped, clips.text.device)[:, None, None], clips.empty_text, clips.text)  # (b n d)
            return LatentBatch(latents, text.to(latents), clips.indices)
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), clips.captions, strict=True)]
        return LatentBatch(latents, text_encoder.encode(captions), clips.indices)

    def training_step(self, batch: dict[str, ClipBatch], batch_idx: int) -> Tensor:
        if batch_idx % self.plan.accumulate == 0:
            self.micro_batches.clear()
            if self.gathered is not None:
                self.gathered.gather()
        known, done = self.recordings, len(self.micro_batches)
        loss = self.loss_of(batch, batch_idx)
        if self.recordings != known:  # once more, for between a replay and its backward pass nothing may be recorded
            del self.micro_batches[done:]
            loss = self.loss_of(batch, batch_idx)
        self.trainer.datamodule.consumed(batch)  # type: ignore[attr-defined]
        return loss

    def loss_of(self, batch: dict[str, ClipBatch], batch_idx: int) -> Tensor:
        """Eq. 5 of all streams of a micro-batch, weighted: 0-d."""
        plan = self.plan
        torch.manual_seed(seed_of(self.seed, "dropout", self.global_step, batch_idx % plan.accumulate, self.global_rank))
        loss = torch.zeros((), device=self.device)
        # The backward pass goes the other way: with the most frames last there, gradients are whole, and on their way to the other ranks,
        # from the first layer that it passes. By shape, not by number of clips: the order must be every rank's.
        for stream, clips in sorted(batch.items(), key=lambda item: item[1].frames.shape[1], reverse=True):
            weight = plan.scale(stream) if len(clips) else 0.0
            trained = self.predict(stream, clips if len(clips) else stand_in(clips))
            loss = loss + weight * trained.losses.sum()
            self.micro_batches.append(replace(trained, keys=clips.keys, losses=trained.losses.detach()[: len(clips)]))
        return loss

    def predict(self, stream: str, clips: ClipBatch) -> MicroBatch:
        """Eq. 5 for each of b clips."""
        kind = self.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and not self.frozen_in_bfloat16):
            encoded = self.encode(stream, clips)
        timestep = self.timesteps(self._keys("timestep", stream, clips), self.objective.schedule.num_timesteps)
        noise = self.objective.schedule.noise(self._keys("noise", stream, clips), encoded.latents.shape[1:])
        timestep, noise = sent(timestep, self.device), sent(noise, self.device)
        network = self.gathered.of(stream) if self.gathered is not None else self.recorded or self.unet
        losses = self.objective(network, encoded.latents, encoded.text, timestep, noise)  # (b,)
        return MicroBatch(stream, clips.keys, encoded, timestep, noise, losses)

    def on_after_backward(self) -> None:
        if self.gathered is not None:
            self.gathered.give_gradients()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        take_gradients(self.watched.parameters)
        self.watch.look(self.watched, optimizer, self.global_step, self.micro_batches)

    @cached_property
    def watched(self) -> Model:
        """The network and its parameters, looked up once: a walk over all modules takes as long as a small network's step."""
        return Model(self.unet, list(self.trained.values()), self.loss_in_its_precision)

    def loss_in_its_precision(self, *inputs: Any) -> Tensor:
        """The objective, also where Lightning has left the step's autocast."""
        with self.trainer.precision_plugin.forward_context():
            return self.objective(*inputs)

    @cached_property
    def rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's rows of the average's parameters and of the network's, looked up after the first step."""
        stale = [name for name, p in self.unet.named_parameters() if local([p])[0].data_ptr() != self.trained[name].data_ptr()]
        assert not stale, f"FSDP has moved {len(stale)} parameters after the optimizer was made, such as {stale[0]}"
        return local(self.ema_unet.parameters()), list(self.watched.parameters)

    def update_average(self, step: int) -> None:
        self.ema.update(*self.rows, step)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By the norm that was just taken over all ranks. Lightning's own would refuse a fused optimizer in mixed precision, and sharded
        networks."""
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            raise ValueError("trainer.gradient_clip_algorithm=value is not supported here: leave it out, or use norm")
        assert self.watch.norm is not None
        factor = (gradient_clip_val / self.watch.norm.clamp(min=1e-12)).clamp(max=1)
        torch._foreach_mul_([p.grad for p in self.watched.parameters if p.grad is not None], factor)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The average follows at once, before any callback can save or sample it. Gradients go at once, too: Lightning would keep them
        through the next forward pass, where memory is shortest."""
        super().optimizer_step(*args, **kwargs)
        self.update_average(self.global_step + 1)
        self.forget_gradients()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Nothing: they are gone."""

    def forget_gradients(self) -> None:
        if self.recorded is None or self.plan.accumulate == 1:
            for parameter in self.watched.parameters:
                parameter.grad = None
        else:  # recorded passes of several micro-batches must not write into each other's
            own_gradients(self.watched.parameters)

    def _keys(self, purpose: str, stream: str, clips: ClipBatch) -> list[tuple[Any, ...]]:
        step = self.global_step  # asks five objects: not once a sample
        return [(self.seed, purpose, step, stream, index) for index in clips.indices]

    # -- sampling and saving --------------------------------------------------------------------------------------------------------

    def pipeline(self, sampler: Sampler | None = None) -> TextToVideoPipeline:
        """The model as it would be exported now: EMA weights, nothing swapped."""
        sampler = self.sampler if sampler is None else replace(sampler, schedule=self.objective.schedule)
        return TextToVideoPipeline(self.ema_unet, self.frozen, sampler, sample=self.sample)

    def describe(self, step: int) -> ModelCard:
        """What model.json says of a checkpoint."""
        return checkpoint.describe(self.unet, self.frozen, self.sampler, sample=self.sample, step=step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        stop_between_steps(self.trainer, batch_idx)
        self.callbacks_done_at = time.perf_counter()  # theirs come first

    def on_train_start(self) -> None:
        self.callbacks_done_at = time.perf_counter()
        gather = how_gathered(self.trainer.strategy)
        if self.cuda_graphs and self.device.type == "cuda" and weights_stay(gather):
            self.record_network()
            self.forget_gradients()
        elif self.cuda_graphs and self.trainer.is_global_zero:
            moving = f"strategy.gather={gather} gathers weights to another place each time, where no CUDA graph finds them"
            print(f"graphs   none: {'there is no NVIDIA GPU' if weights_stay(gather) else moving}", flush=True)
        lay_out_like_parameters(self.trainer.optimizers[0])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.watch.settle(self.watched)

    def on_train_end(self) -> None:
        self.watch.settle(self.watched)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        count_batches(checkpoint, self.plan.accumulate)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """From the CPU to a GPU, without waiting for what that is still doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def stand_in(none: ClipBatch) -> ClipBatch:
    """One black clip in place of an empty micro-batch: it weighs nothing, but lets every rank take part in the same exchanges."""
    frames = none.frames.new_zeros((1, *none.frames.shape[1:]))  # (1 f h w c)
    return replace(none, frames=frames, captions=[""], keys=[""], sources=[""], indices=[0], text=None, empty_text=None)

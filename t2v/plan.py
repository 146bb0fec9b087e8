"""Before any GPU hour is spent: memory, time, disk, and every set-up error that can be seen, for any training command.

    python -m t2v.plan experiment=base_256 trainer.devices=8 trainer.num_nodes=10
    python -m t2v.plan experiment=base_256 strategy=fsdp hardware=h200 micro_batch.video=12 unet.gradient_checkpointing=attention

Takes what t2v.train takes, and hardware=. Nothing is built but tensors without data; no weights are read, no data are drawn.
Exit code 1 where something would stop the training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from t2v.configuration import entry

if TYPE_CHECKING:
    from t2v.planning.findings import Finding
    from t2v.planning.step import Parts
    from t2v.training.mixture import JointMixture, StepPlan


def plan(cfg: DictConfig) -> None:
    from t2v.planning.findings import Finding
    from t2v.planning.report import problems

    logging.getLogger("xformers").setLevel(logging.ERROR)
    found = [Finding(f"{key} is not set", f"{key}=VALUE") for key in missing(cfg)]
    if not found:
        examine(cfg, found)
    print("\n".join(problems(found)))
    errors = sum(finding.error for finding in found)
    if errors:
        raise ValueError(f"{errors} set-up error{'s' * (errors > 1)}: see above, with what mends each")


def missing(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys that are still ???, those that only refer to them left out."""
    for key in map(str, node):
        child = node._get_node(key)
        if OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield prefix + key
        elif isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from missing(child, f"{prefix}{key}.")


def examine(cfg: DictConfig, found: list[Finding]) -> None:
    """Prints the plan; what is wrong with it goes to `found`."""
    from t2v.planning import findings
    from t2v.training.mixture import JointMixture

    ranks = count_ranks(cfg, found)
    choices: Any = HydraConfig.get().runtime.choices
    print(f"plan     {choices.experiment} on {ranks} x {cfg.hardware.name}, strategy={choices.strategy}, {type_name(cfg.mixture)}")
    problem = list(findings.attempt(lambda: step_plan(cfg, made(cfg.mixture), ranks), "the last words of the message"))
    found += problem
    mixture: JointMixture = JointMixture(cfg.mixture.image_weight) if problem else made(cfg.mixture)
    steps = step_plan(cfg, mixture, 1 if problem else ranks)  # a set-up that cannot be divided is still worth counting on one GPU
    found += findings.ranks_of_the_mixture(mixture, steps.world)
    micro = describe_step(cfg, mixture, steps)
    found += data_problems(cfg, mixture, steps.world)
    if cfg.get("unet") is None:
        autoencoder_training(cfg, found)
    else:
        text_to_video(cfg, mixture, steps, micro, found)


def made(node: DictConfig) -> Any:
    """instantiate, with the constructor's own error."""
    try:
        return instantiate(node)
    except InstantiationException as error:
        raise error.__cause__ or error from None


def type_name(node: DictConfig) -> str:
    return str(node["_target_"]).rsplit(".", 1)[-1]


def count_ranks(cfg: DictConfig, found: list[Finding]) -> int:
    from t2v.planning.findings import Finding

    devices, nodes = cfg.trainer.devices, int(cfg.trainer.num_nodes)
    if not isinstance(devices, int):
        found.append(Finding(f"trainer.devices={devices} is counted as 1", "trainer.devices=NUMBER", error=False))
        devices = 1
    if devices < 1 or nodes < 1:
        found.append(Finding(f"{nodes} nodes of {devices} devices", "trainer.devices=1 trainer.num_nodes=1, or more"))
        return 1
    return devices * nodes


def step_plan(cfg: DictConfig, mixture: JointMixture, ranks: int) -> StepPlan:
    from t2v.training.mixture import STREAMS, StepPlan

    streams = [stream for stream in STREAMS if mixture.weights[stream] > 0]
    for stream in streams:
        if cfg.data.get(stream) is None:
            raise ValueError(f"data has no {stream} stream: choose a data= with one, or mixture.image_weight={int(stream == 'video')}")
        if cfg.batch[stream] < 1:
            raise ValueError(f"batch.{stream} is {cfg.batch[stream]}: give at least 1, or mixture.image_weight={int(stream == 'video')}")
    return StepPlan.of(mixture, {s: cfg.batch[s] for s in streams}, {s: cfg.micro_batch[s] for s in streams}, ranks)


def describe_step(cfg: DictConfig, mixture: JointMixture, steps: StepPlan) -> list[dict[str, int]]:
    """Prints what a step takes; returns the micro-batches of the different kinds of ranks, samples by stream."""
    from t2v.planning.report import counted

    kinds: list[dict[str, int]] = []
    for rank in range(min(steps.world, 2)):  # with mixture=rank the first two differ; otherwise all are alike
        streams = mixture.roles(rank, steps.world)
        shares = {stream: -(-steps.global_batch[stream] // role.world) for stream, role in streams.items()}
        micro = {stream: -(-share // steps.accumulate) for stream, share in shares.items()}
        if micro not in kinds:
            kinds.append(micro)
            whole = ", ".join(f"{share} {stream}s" for stream, share in shares.items())
            each = " + ".join(f"{size} {stream}s" for stream, size in micro.items())
            print(f"a rank   at most {whole} a step, in {steps.accumulate} micro-batch{'es' * (steps.accumulate > 1)} of at most {each}")
    total = ", ".join(f"{count} {stream}s (weight {steps.weights[stream]:.3g})" for stream, count in steps.global_batch.items())
    print(f"a step   {total} on all ranks")
    seen = ", ".join(f"{counted(count * cfg.trainer.max_steps)} {stream}s" for stream, count in steps.global_batch.items())
    print(f"in all   {cfg.trainer.max_steps} steps, {seen}")
    return kinds


def data_problems(cfg: DictConfig, mixture: JointMixture, ranks: int) -> list[Finding]:
    from t2v.planning import findings

    found: list[Finding] = []
    for stream, weight in mixture.weights.items():
        node = cfg.data.get(stream)
        if node is None or weight == 0:
            continue
        shards: list[str] = []
        problem = list(findings.attempt(lambda: shards.extend(shards_of(node)), f"data.{stream}.urls=FOLDER or paths.data=FOLDER"))  # noqa: B023
        found += problem
        readers, hosts, workers = node.num_readers if "num_readers" in node else 64, mixture.world_of(stream, ranks), cfg.loader.num_workers
        if not problem:
            drawn = OmegaConf.is_dict(node.get("urls"))  # made at first use
            print(f"{stream + 's':<9}{len(shards)} shards, {readers} readers on {hosts} ranks x {workers} workers")
            found += findings.readers_and_shards(
                stream,
                shards,
                readers,
                hosts,
                workers,
                lambda url: not drawn and "://" not in url and not Path(url).exists(),  # noqa: B023
            )
    return found


def shards_of(node: DictConfig) -> list[str]:
    """The shards of a data node. Those that would be drawn at first use are only counted."""
    if OmegaConf.is_dict(node.get("urls")):
        drawn = node.urls
        return [f"{drawn.root}/{number:05}.tar" for number in range(-(-drawn.count // drawn.get("samples_per_shard", 32)))]
    return [url for shards in made(node).shards for url in shards]


def text_to_video(cfg: DictConfig, mixture: JointMixture, steps: StepPlan, micro: list[dict[str, int]], found: list[Finding]) -> None:
    from t2v.planning import findings, report
    from t2v.planning.length import Length
    from t2v.planning.memory import GIB, Layout, by_recomputation, micro_batch_that_fits, sets_the_peak, ways_that_fit
    from t2v.training.sharding import size_of
    from t2v.training.strategies import weights_stay

    parts = build(cfg, found)
    if parts is None:
        return
    sizes = {f"data.{stream}.size": cfg.data[stream].size for stream in steps.global_batch}
    sizes |= {"sample.height": cfg.sample.height, "sample.width": cfg.sample.width}
    wrong = list(findings.sizes("frames", sizes, parts.autoencoder.factor))
    found += wrong
    trained = sum(parameter.numel() for parameter in parts.unet.parameters())
    frozen = sum(p.numel() for module in (parts.autoencoder.model, parts.text_encoder.tower) for p in module.parameters())
    print(f"network  {trained:,} parameters trained, {frozen:,} frozen")
    gather = cfg.strategy.gather if fully_sharded(cfg) else None
    layout = Layout(
        steps.world,
        gather,
        moments_of(cfg.optimizer),
        steps.accumulate,
        str(cfg.trainer.precision),
        kernels=bool(cfg.hardware.gpu),
        cuda_graphs=cfg.module.cuda_graphs and bool(cfg.hardware.gpu) and weights_stay(gather),
    )
    weights = size_of(parts.unet)
    checkpoint = (2 + layout.moments) * weights
    keep, every = cfg.callbacks.checkpoints.keep, cfg.callbacks.checkpoints.every_n_steps
    found += findings.run_folder(Path(cfg.paths.experiments), (keep + 1) * checkpoint)
    if wrong:
        return

    limit = int(cfg.hardware.memory_gib * cfg.hardware.usable * GIB)
    chosen = str(cfg.unet.gradient_checkpointing)
    operations: dict[str, float] = {}
    for samples in micro:
        clips = {
            stream: (count, cfg.data[stream].get("num_frames", 1), cfg.data[stream].size, cfg.data[stream].size)
            for stream, count in samples.items()
        }
        modes = by_recomputation(parts, clips, layout)
        memory = modes[chosen].memory
        operations |= {stream: total / samples[stream] for stream, total in modes[chosen].operations.items()}
        print(f"memory   of one {cfg.hardware.name}, GiB, {' + '.join(f'{count} {stream}s' for stream, count in samples.items())} at once")
        print("\n".join(report.memory_table(memory, limit)))
        mends = []
        for which, mode in modes.items():
            most = {stream: micro_batch_that_fits(mode.memory, stream, count, limit) for stream, count in samples.items()}
            uncounted = {stream: "" if sets_the_peak(mode.memory, stream) else " or more, not counted" for stream in samples}
            room = ", ".join(f"micro_batch.{stream}={size}{uncounted[stream]}" for stream, size in most.items())
            print(f"  gradient_checkpointing={which:<12}{sum(mode.memory.values()) / GIB:8.1f} GiB; each alone up to {room}")
            if which == chosen:
                mends += [f"micro_batch.{stream}={size}" for stream, size in most.items() if size > 0]
        mends += ways_that_fit(modes, chosen, layout.cuda_graphs, limit)
        found += findings.memory(sum(memory.values()), limit, cfg.hardware.name, mends)

    tflops = cfg.hardware.tflops_with_cuda_graphs if layout.cuda_graphs else cfg.hardware.tflops
    length = Length(steps, cfg.trainer.max_steps, operations, tflops)
    seconds = length.seconds_per_step(mixture)
    speed = ", ".join(f"{tflops * 1e12 / count:.3g} {stream}s" for stream, count in operations.items())
    bound = "" if trained >= cfg.hardware.busy_from else "at least (small layers leave it idle) "
    whole = report.duration(seconds * cfg.trainer.max_steps)
    print(f"time     {bound}{whole}, {report.duration(seconds)} a step; one GPU makes {speed} a second")
    print(f"         at {tflops} TFLOP/s ({cfg.hardware.source}), no time lost between GPUs")
    print(f"disk     {checkpoint / 1e9:.3g} GB a checkpoint, every {every} steps ({report.duration(seconds * every)}), {keep} kept")
    if cfg.callbacks.checkpoints.background:
        sizes_of_two = [1 << (parameter.numel() * parameter.element_size() - 1).bit_length() for parameter in parts.unet.parameters()]
        pinned = (2 + layout.moments) * sum(sizes_of_two) / (1 if gather is None else steps.world)  # CUDA gives it out in powers of two
        each = f"{pinned / 1e9:.3g} GB of pinned host memory on {'the first' if gather is None else 'every'} rank"
        print(f"         written while training goes on, from {each} (callbacks.checkpoints.background=false: none, but training waits)")


def build(cfg: DictConfig, found: list[Finding]) -> Parts | None:
    """The module's parts on meta; missing weights go to `found` and are stood in for by the public ones' shapes."""
    import torch

    from t2v.planning import findings
    from t2v.planning.parts import autoencoder_without_data, find, text_encoder_without_data
    from t2v.planning.step import Parts

    built: list[Any] = []

    def network() -> None:
        with torch.device("meta"):
            built.append(made(cfg.unet))

    problems = list(findings.attempt(network, "unet.NAME=VALUE, see conf/unet"))
    found += problems
    if problems:
        return None
    found += findings.attempt(lambda: ways_to_run(built[0], cfg), "the last words of the message")
    autoencoder = find("autoencoder", cfg.autoencoder.source, "autoencoder.source=FOLDER, or T2V_WEIGHTS in the environment")
    text_file: Any = None
    if type_name(cfg.text_encoder) == "pretrained":
        text_file = find("text_encoder", cfg.text_encoder.path, "text_encoder.path=FILE, or T2V_WEIGHTS in the environment")
    init: Any = None
    if cfg.init is not None and type_name(cfg.init) in ("AllWeights", "SpatialWeights"):  # of a run of this repository
        found += findings.attempt(lambda: made(cfg.init).check(built[0]), "init.path=RUN, or the network's settings")
    elif cfg.init is not None:
        name = "sd21" if type_name(cfg.init) == "FromStableDiffusion" else "unet"
        init = find(name, cfg.init.path, "init.path=FOLDER, or init.download=true", cfg.init.download, cfg.init.get("repositories"))
    found += [place for place in (autoencoder, text_file, init) if isinstance(place, findings.Finding)]
    parts = Parts(
        built[0],
        autoencoder_without_data(autoencoder if isinstance(autoencoder, Path) else None),
        text_encoder_without_data({} if type_name(cfg.text_encoder) == "pretrained" else cfg.text_encoder),
        made(cfg.objective),
    )
    for ours, theirs, key in (
        (cfg.unet.cross_attention_dim, parts.text_encoder.width, "unet.cross_attention_dim"),
        (cfg.unet.in_channels, parts.autoencoder.channels, "unet.in_channels"),
    ):
        if ours != theirs:
            found.append(findings.Finding(f"{key} is {ours}, but the frozen encoder gives {theirs}", f"{key}={theirs}"))
            return None
    return parts


def fully_sharded(cfg: DictConfig) -> bool:
    return not isinstance(cfg.strategy, str) and type_name(cfg.strategy) == "FullyShardedStrategy"


def ways_to_run(unet: Any, cfg: DictConfig) -> None:
    """Raises ValueError where the network cannot be recorded or compiled as the configuration asks for."""
    from t2v.training.compiling import require_compilable
    from t2v.training.graphs import require_recordable
    from t2v.training.strategies import weights_stay

    if cfg.module.cuda_graphs and weights_stay(cfg.strategy.gather if fully_sharded(cfg) else None):
        require_recordable(unet, cfg.module.compile)
    if cfg.module.compile is not None:
        require_compilable(unet, cfg.module.compile)


def moments_of(optimizer: DictConfig) -> int:
    """How many tensors the optimizer keeps per parameter, seen on a parameter of two numbers."""
    import torch

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    optimizing = made(optimizer)([parameter])
    optimizing.step()
    return sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in optimizing.state[parameter].values())


def autoencoder_training(cfg: DictConfig, found: list[Finding]) -> None:
    import torch

    from t2v.planning import findings
    from t2v.training.sharding import size_of

    with torch.device("meta"):
        network = made(cfg.module.autoencoder)
    states = (3 + moments_of(cfg.optimizer)) * size_of(network)  # weights, gradients, average
    print(f"network  {sum(parameter.numel() for parameter in network.parameters()):,} parameters trained")
    print(f"memory   {states / 2**20:.1f} MiB of weights, gradients, optimizer and average; activations are counted for text-to-video only")
    found += findings.run_folder(Path(cfg.paths.experiments), states)


main = entry("plan", complete=False)(plan)  # what is missing is among its findings

if __name__ == "__main__":
    main()

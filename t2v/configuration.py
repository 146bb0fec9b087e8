"""Entry points and Hydra: where `conf/` lies, the run folder's default name, and errors that fit on one line.

Only entry points import this; everything below them receives objects and plain arguments.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    import torch

    from t2v.pipeline import TextToVideoPipeline

IGNORED_IN_RUN_NAMES = (
    "resume",
    "run",
    "paths.",
    "paths/",
    "trainer=",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accelerator",
    "hydra.",
    "hydra/",
)
"""Overrides that say where and how a run happens, not which run it is."""


class UserError(ValueError):
    """Something that the user can mend; the message says what and how."""


FOR_USERS = (ValueError, OSError, KeyboardInterrupt, HydraException, OmegaConfBaseException)
"""What a user can mend, in one line; anything else is a bug, which shows where it happened."""

STARTED_BY = os.getppid()  # remembered: it may be gone when this rank fails, too


def _remember_what_started_this() -> None:
    global STARTED_BY
    STARTED_BY = os.getppid()


os.register_at_fork(after_in_child=_remember_what_started_this)


def config_dir() -> Path:
    """conf/ beside the package in a checkout, t2v/conf in an installed wheel."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "conf", package.parent / "conf"):
        if (candidate / "train.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/ beside or inside {package}: reinstall t2v")


def run_name(overrides: list[str]) -> str:
    """Eight hexadecimal digits that name a run: the same overrides in any order, on any number of devices, give the same name."""
    relevant = sorted(override for override in overrides if not override.lstrip("+~").startswith(IGNORED_IN_RUN_NAMES))
    return hashlib.sha256("\n".join(relevant).encode()).hexdigest()[:8]


def _run_name_of_this_job() -> str:
    return run_name(list(HydraConfig.get().overrides.task)) if HydraConfig.initialized() else "unnamed"


def _precision_of_this_machine() -> str:
    """bf16 autocast where a GPU has bf16; float32 on the CPU."""
    import torch

    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def _in_slurm(name: str, otherwise: int | str) -> int | str:
    """nodes, or tasks_per_node, of the SLURM job that this process is part of."""
    from t2v.training.slurm import Allocation

    allocation = Allocation.of()
    return otherwise if allocation is None else getattr(allocation, name)


def _in_step(name: str, otherwise: int) -> int:
    """SLURM's number for this process where srun started it."""
    from t2v.training.slurm import in_step

    return in_step(name, otherwise)


def _number_of_tasks(devices: int | str) -> int:
    if not isinstance(devices, int):
        raise ValueError(
            f"hydra/launcher=slurm starts one task per GPU, but trainer.devices is {devices}: give a number, or trainer=a100_1x8"
        )
    return devices


OmegaConf.register_new_resolver("in_slurm", _in_slurm, replace=True)
OmegaConf.register_new_resolver("in_step", _in_step, replace=True)
OmegaConf.register_new_resolver("tasks", _number_of_tasks, replace=True)
OmegaConf.register_new_resolver("run_name", _run_name_of_this_job, replace=True)
OmegaConf.register_new_resolver("precision", _precision_of_this_machine, replace=True, use_cache=True)


def entry(config_name: str, complete: bool = True) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make `main(cfg)` a Hydra entry point on conf/<config_name>.yaml whose foreseeable errors end in one line and exit code 1.

    HYDRA_FULL_ERROR=1 shows the traceback as well. `complete`: every key must have a value.
    """

    def decorate(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
        show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"

        @functools.wraps(main)
        def task(cfg: DictConfig) -> Any:
            try:
                if complete and (missing := OmegaConf.missing_keys(cfg)):
                    raise ValueError(f"{', '.join(sorted(missing))} not given: write {min(missing)}=VALUE")
                if wrong := values_of_other_kinds(config_name, list(HydraConfig.get().overrides.task)):
                    raise ValueError("; ".join(wrong))
                with _environment("HYDRA_FULL_ERROR", "1" if show_traceback else None):  # as the user has it: main may start ranks
                    return main(cfg)
            except FOR_USERS as error:
                if show_traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                _exit_with(error)

        @functools.wraps(main)
        def run() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(_help(main, config_name))
                return
            try:
                with _environment("HYDRA_FULL_ERROR", "1"):  # so that errors reach this function instead of Hydra's own report
                    hydra.main(config_path=str(config_dir()), config_name=config_name, version_base="1.3")(task)()
            except (ValueError, HydraException, OmegaConfBaseException) as error:  # one of Hydra's is an OSError, too
                if show_traceback:
                    raise
                _exit_with(error)
            except OSError as error:  # the task reports its own: this is Hydra making the run's folder
                if show_traceback:
                    raise
                place = "paths.experiments" if config_name == "train" else "hydra.run.dir"
                _exit_with(OSError(f"cannot make the run's folder: {error}. Choose another place with {place}=FOLDER"))

        return run

    return decorate


def dtype_of(name: str) -> torch.dtype:
    """ValueError for one in which no weights are kept."""
    import torch

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in types:
        raise ValueError(f"dtype={name} is unknown; there are {', '.join(types)}")
    return types[name]


KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
KINDS |= {str: "a word", dict: "a group of keys", type(None): "nothing"}
FRACTIONS = {"fps", "seconds", "timeout", "rate", "limit_val_batches", "tflops", "tflops_with_cuda_graphs"}
"""Keys that take them also where conf/ has a whole number."""
OF_ANY_KIND = {"trainer.devices"}  # a number in SLURM; Lightning takes words and lists, too
NEVER_NULL = {"seed"}


def values_of_other_kinds(config_name: str, overrides: list[str]) -> list[str]:
    """What is wrong with values that cannot stand where conf/ has a number, true or false, or a list. null can, and interpolations can."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = [override for override in parsed if (config_dir() / override.key_or_group).is_dir()]
    try:
        usual = _composed(config_name, [str(override.input_line) for override in groups])
    except (HydraException, OmegaConfBaseException):  # groups from elsewhere: --config-dir, hydra.searchpath
        return []
    wrong: list[str] = []
    for override in parsed:
        given, key = override.value(), override.key_or_group
        if override in groups or override.is_delete() or "${" in str(given) or key in OF_ANY_KIND:
            continue
        if given is None and key not in NEVER_NULL:
            continue
        try:
            default = OmegaConf.select(usual, key)
        except OmegaConfBaseException:  # an interpolation of what is not given
            continue
        default = OmegaConf.to_container(default) if OmegaConf.is_config(default) else default
        kind, wanted = type(given), type(default)
        number = (kind, wanted) == (int, float) or ((kind, wanted) == (float, int) and key.split(".")[-1] in FRACTIONS)
        if wanted in (bool, int, float, list) and kind is not wanted and not number:
            wrong.append(f"{override.input_line} is {KINDS[kind]} where conf/ has {KINDS[wanted]}, {default}")
    return wrong


Bounds = tuple[float, float]
ANY, AT_LEAST_1 = (-math.inf, math.inf), (1, math.inf)


def require_numbers(cfg: DictConfig, whole: Mapping[str, Bounds], fractions: Mapping[str, Bounds]) -> None:
    """ValueError for what is no number, or none within its bounds; null is none of this function's business."""
    for key, (least, most) in {**whole, **fractions}.items():
        value = cfg[key]
        if value is None or (type(value) in ((int,) if key in whole else (int, float)) and least <= value <= most):
            continue
        bounds = "" if least == -math.inf else f" of at least {least:g}" if most == math.inf else f" from {least:g} to {most:g}"
        raise ValueError(f"{key}={value} must be a {'whole ' if key in whole else ''}number{bounds}")


def pipeline_of(cfg: DictConfig, place: str | Path, device: torch.device | str | None) -> TextToVideoPipeline:
    """What lies at `place`, with the dtype, weights and sampler that an entry point's options ask for. ValueError for an unknown dtype."""
    require_numbers(cfg, whole={"steps": ANY}, fractions={"guidance": ANY})  # the sampler knows their bounds
    from hydra.utils import instantiate

    from t2v.diffusion.guidance import ClassifierFreeGuidance
    from t2v.pipeline import TextToVideoPipeline

    pipeline = TextToVideoPipeline.from_pretrained(
        place,
        ema=cfg.ema,
        device=device,
        dtype=None if cfg.dtype is None else dtype_of(cfg.dtype),
        autoencoder=cfg.autoencoder,
        text_encoder=cfg.text_encoder,
        cuda_graph=cfg.cuda_graph,
    )
    sampler = pipeline.sampler
    if cfg.get("sampler") is not None:
        sampler = replace(instantiate(cfg.sampler), schedule=sampler.schedule)
    if cfg.steps is not None:
        sampler = replace(sampler, num_steps=cfg.steps)
    if cfg.guidance is not None:
        sampler = replace(sampler, guidance=ClassifierFreeGuidance(float(cfg.guidance)))
    pipeline.sampler = sampler
    return pipeline


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """An environment variable set (None: absent) for a while."""

    def put(value: str | None) -> None:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    before = os.environ.get(name)
    put(value)
    try:
        yield
    finally:
        put(before)


def groups_of(config_name: str) -> set[str]:
    """The groups that conf/<config_name>.yaml and what it is built on let one choose from."""
    groups: set[str] = set()
    config: Any = OmegaConf.load(config_dir() / f"{config_name}.yaml")
    for entry in config.get("defaults", []):
        if isinstance(entry, str):
            groups |= set() if entry == "_self_" else groups_of(entry)
        else:
            groups |= {str(group) for group in entry if not str(group).startswith("override ")}
    return groups


def _help(main: Callable[[DictConfig], Any], config_name: str) -> str:
    """What the entry point's module says of itself, and every group that it takes, with its options. Needs no composed configuration."""
    lines = [str(sys.modules[main.__module__].__doc__).strip(), "", f"Options of conf/{config_name}.yaml: NAME=VALUE, or a group's choice:"]
    for group in sorted(groups_of(config_name)):
        lines.append(f"  {group}={'|'.join(sorted(path.stem for path in (config_dir() / group).glob('*.yaml')))}")
    return "\n".join([*lines, "--cfg job prints the composed configuration; --hydra-help says what Hydra itself can do."])


def _exit_with(error: BaseException) -> None:
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if not isinstance(error, FOR_USERS):
        raise error  # a bug, not a mistake of the user's: show where
    if _another_rank_says_it() and not isinstance(error, (OSError, KeyboardInterrupt)):  # files may differ between nodes
        time.sleep(5)  # an error code may make SLURM end the first rank before it has spoken
        sys.exit(1)
    if isinstance(error, KeyboardInterrupt):
        print("\nstopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ is not None else error
    messages = [" ".join(str(part).strip().splitlines()) for part in dict.fromkeys((str(error), str(cause))) if str(part).strip()]
    message = re.sub(r"\s+", " ", re.sub(r"Config search path:.*", "", ". ".join(messages)))
    if not _first_says_it():
        print(f"error: {message}{_near_matches(message)}", file=sys.stderr)
    sys.exit(1)


def _another_rank_says_it() -> bool:
    """Until the ranks are connected all of them do the same, so what the user can mend is said by the first."""
    from t2v.training.slurm import first_process

    distributed = sys.modules.get("torch.distributed")
    return not first_process() and not (distributed is not None and distributed.is_available() and distributed.is_initialized())


def _first_says_it(seconds: float = 10) -> bool:
    """Of connected ranks that fail alike the first speaks, and what started this one (the first, or a launcher) then ends. If nothing ends,
    the error is this rank's own."""
    from t2v.training.slurm import first_process

    if first_process():
        return False
    until = time.monotonic() + seconds
    while time.monotonic() < until and os.getppid() == STARTED_BY:
        time.sleep(0.1)
    return os.getppid() != STARTED_BY


def _near_matches(message: str) -> str:
    """For an unknown option of a group, or an unknown key: the names closest to what was typed."""
    option = re.search(r"Could not find '([^']+)/([^'/]+)'", message)
    if option:
        group, typed = option.groups()
        known = [path.stem for path in (config_dir() / group).glob("*.yaml")]
    else:
        key = re.search(r"Could not override '([^']+)'", message) or re.search(r"Key '([^']+)' is not in struct", message)
        if not key:
            return ""
        typed, known = key.group(1).split("@")[0], list(_known_keys(typed=key.group(1)))
    near = difflib.get_close_matches(typed, known, n=3, cutoff=0.5)
    near += [name for name in known if name.split(".")[-1] == typed.split(".")[-1] and name not in near][: 3 - len(near)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _composed(name: str, overrides: list[str]) -> DictConfig:
    """conf/<name>.yaml, beside what Hydra itself is doing."""
    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose(name, overrides=overrides)
    finally:
        state.hydra = running


def _known_keys(typed: str) -> Iterator[str]:
    """Every dotted key of the configuration as it composes without the override that names `typed`."""
    overrides = [
        arg for arg in sys.argv[1:] if "=" in arg and not arg.startswith("-") and not arg.lstrip("+~").startswith((typed, "hydra"))
    ]
    name = Path(sys.argv[0]).stem.removeprefix("t2v-")
    if not (config_dir() / f"{name}.yaml").is_file():
        return
    try:
        cfg = _composed(name, overrides)
    except (HydraException, OmegaConfBaseException):
        return

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in map(str, node):
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing() and not child._is_interpolation():
                yield from walk(child, f"{prefix}{key}.")

    yield from walk(cfg, "")
    for group in config_dir().iterdir():
        if group.is_dir():
            yield group.name

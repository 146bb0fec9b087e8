"""model.json, the part of a checkpoint that says what its weights are: plain arguments and names from a fixed registry.

It may come from a stranger. So nothing in it is imported, called or formatted by name: every key, name and type is compared with a list
that stands in this file or in a constructor's signature, and whatever is not on it is refused.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
RUNTIME = ("attention_backend", "gradient_checkpointing", "fused_kernels")  # how a network runs, not what it is: never stored
NOT_FROM_FILES = {"download", "device", "dtype"}  # what only the user may decide
COUNTS = {"layers", "layers_per_block", "num_temporal_convs", "num_temporal_attentions"}
MAX_COUNT, MAX_SIZE, MAX_LENGTH = 64, 1 << 16, 64  # no file may ask for a network without end
MAX_BYTES = 1 << 20
SHA256 = re.compile(r"[0-9a-f]{64}")
SAMPLE_LIMITS = {"frames": 4096, "height": 16384, "width": 16384, "fps": 1000}


class CardError(ValueError):
    """model.json is not what this version of t2v writes. One line; the folder is named by the caller."""


def _video_unet() -> Callable[..., Any]:
    from t2v.models.unet import VideoUNet

    return VideoUNet


def _random_text_encoder() -> Callable[..., Any]:
    from t2v.models.text_encoder import TextEncoder

    return TextEncoder.random


def _pretrained_text_encoder() -> Callable[..., Any]:
    from t2v.models.text_encoder import TextEncoder

    return TextEncoder.pretrained


def _autoencoder() -> Callable[..., Any]:
    from t2v.models.autoencoder import Autoencoder

    return Autoencoder.from_pretrained


UNETS: dict[str, Callable[[], Callable[..., Any]]] = {"VideoUNet": _video_unet}
AUTOENCODERS = {"Autoencoder": _autoencoder}
TEXT_ENCODERS = {"TextEncoder.random": _random_text_encoder, "TextEncoder.pretrained": _pretrained_text_encoder}
PLACES = {"Autoencoder": "source", "TextEncoder.pretrained": "path"}  # the argument that says where weights lie, where there are any


@dataclass(frozen=True)
class Part:
    """A network: a name in one of the registries above, its constructor's arguments, and for frozen ones the hash of its weights."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.name, "arguments": self.arguments} | ({"sha256": self.sha256} if self.sha256 else {})


@dataclass(frozen=True)
class ModelCard:
    """The content of model.json. `sample` is the shape and speed that the model is meant for; `notes` is for people, never read back."""

    unet: Part
    autoencoder: Part
    text_encoder: Part
    schedule: dict[str, Any]
    sampler: dict[str, Any]
    sample: dict[str, int | float]
    step: int
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": self.step,
            "unet": self.unet.to_dict(),
            "autoencoder": self.autoencoder.to_dict(),
            "text_encoder": self.text_encoder.to_dict(),
            "schedule": self.schedule,
            "sampler": self.sampler,
            "sample": self.sample,
            "notes": self.notes,
        }

    @classmethod
    def from_dict(cls, values: object) -> ModelCard:
        """Raises CardError for anything unknown, missing or of another type."""
        if isinstance(values, dict) and "kind" in values:
            raise CardError(f"it is a training's checkpoint of another kind ({_short(values['kind'])}), not a text-to-video model")
        card = _mapping(
            values,
            "model.json",
            required={"format", "step", "unet", "autoencoder", "text_encoder", "schedule", "sampler", "sample"},
            optional={"notes"},
        )
        if card["format"] != FORMAT:
            raise CardError(f"its format is {card['format']!r}, this version of t2v reads {FORMAT}")
        if not _is_int(card["step"]) or card["step"] < 0:
            raise CardError(f"step is {card['step']!r}, not a count")
        sample = _numbers(card["sample"], "sample", set(SAMPLE_LIMITS))
        for name, limit in SAMPLE_LIMITS.items():
            if not 0 < sample[name] <= limit or (name != "fps" and not _is_int(sample[name])):
                raise CardError(f"sample.{name} is {sample[name]!r}, it must lie in 1..{limit}")
        sampler = _mapping(card["sampler"], "sampler", required={"scheduler", "num_steps", "guidance"}, optional={"spacing"})
        _numbers(sampler["guidance"], "sampler.guidance", {"scale"})
        for key in sampler.keys() & {"scheduler", "spacing"}:
            if not isinstance(sampler[key], str):
                raise CardError(f"sampler.{key} is {_short(sampler[key])}, not a name")
        of_schedule = {"num_timesteps", "beta_start", "beta_end"}
        schedule = _mapping(card["schedule"], "schedule", required=of_schedule, optional={"prediction", "shared_noise"})
        _numbers({key: value for key, value in schedule.items() if key != "prediction"}, "schedule", schedule.keys() - {"prediction"})
        if schedule.get("prediction", "noise") not in ("noise", "velocity"):
            raise CardError(f"schedule.prediction is {_short(schedule['prediction'])}, neither noise nor velocity")
        if not 0 <= schedule.get("shared_noise", 0) < 1:
            raise CardError(f"schedule.shared_noise is {schedule['shared_noise']}, it must lie in 0 to below 1")
        for where, count in (("sampler.num_steps", sampler["num_steps"]), ("schedule.num_timesteps", schedule["num_timesteps"])):
            if not _is_int(count) or not 1 <= count <= MAX_SIZE:
                raise CardError(f"{where} is {_short(count)}, it must lie in 1..{MAX_SIZE}")
        _plain(card.get("notes", {}), "notes")
        return cls(
            unet=_part(card["unet"], "unet", UNETS, hashed=False),
            autoencoder=_part(card["autoencoder"], "autoencoder", AUTOENCODERS, hashed=True),
            text_encoder=_part(card["text_encoder"], "text_encoder", TEXT_ENCODERS, hashed=True),
            schedule={**schedule, "prediction": schedule.get("prediction", "noise")},  # earlier versions wrote none
            sampler=sampler,
            sample=sample,
            step=card["step"],
            notes=_mapping(card.get("notes", {}), "notes", required=set(), optional=None),
        )

    @classmethod
    def read(cls, path: Path) -> ModelCard:
        """Raises CardError where the file is too large, not JSON, or not a card."""
        return cls.from_dict(_read(path))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


@dataclass(frozen=True)
class AutoencoderCard:
    """model.json of an autoencoder that is being trained: its own training continues from it, nothing else reads it."""

    autoencoder: Part
    step: int

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "kind": "autoencoder", "step": self.step, "autoencoder": self.autoencoder.to_dict()}

    @classmethod
    def from_dict(cls, values: object) -> AutoencoderCard:
        """Raises CardError for anything unknown, missing or of another type."""
        card = _mapping(values, "model.json", required={"format", "kind", "step", "autoencoder"}, optional=set())
        if (card["format"], card["kind"]) != (FORMAT, "autoencoder") or not _is_int(card["step"]) or card["step"] < 0:
            raise CardError("it is not the checkpoint of an autoencoder in training")
        part = _mapping(card["autoencoder"], "autoencoder", required={"class", "arguments"}, optional=set())
        arguments = _mapping(part["arguments"], "autoencoder.arguments", required=set(), optional=None)
        _plain(arguments, "autoencoder.arguments")
        return cls(Part(str(part["class"]), arguments), card["step"])

    @classmethod
    def read(cls, path: Path) -> AutoencoderCard:
        return cls.from_dict(_read(path))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def build(part: Part, registry: Mapping[str, Callable[[], Callable[..., Any]]], **more: Any) -> Any:
    """Call the registered constructor. `more` are this process's own choices and win over the card's arguments."""
    return registry[part.name]()(**{**part.arguments, **more})


def _read(path: Path) -> object:
    if path.stat().st_size > MAX_BYTES:
        raise CardError(f"it has {path.stat().st_size} bytes; a model.json has at most {MAX_BYTES}")
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except CardError:
        raise
    except (ValueError, RecursionError) as error:
        raise CardError(f"it is not JSON ({type(error).__name__})") from error


def _part(values: object, where: str, registry: Mapping[str, Callable[[], Callable[..., Any]]], *, hashed: bool) -> Part:
    part = _mapping(values, where, required={"class", "arguments"} | ({"sha256"} if hashed else set()), optional=set())
    name = part["class"]
    if not isinstance(name, str) or name not in registry:
        raise CardError(f"{where}.class is {_short(name)}; known are {', '.join(registry)}")
    known = set(inspect.signature(registry[name]()).parameters) - NOT_FROM_FILES
    arguments = _mapping(part["arguments"], f"{where}.arguments", required=set(), optional=known)
    for key, value in arguments.items():
        _plain(value, f"{where}.arguments.{key}", depth=2)
        for number in value if isinstance(value, list) else [value]:
            limit = MAX_COUNT if key in COUNTS else MAX_SIZE
            if isinstance(number, int | float) and key != "seed" and not -limit <= number <= limit:
                raise CardError(f"{where}.arguments.{key} is {_short(value)}, beyond {limit}")
        if isinstance(value, list | dict) and len(value) > MAX_LENGTH:
            raise CardError(f"{where}.arguments.{key} has {len(value)} entries, at most {MAX_LENGTH} make sense")
    if hashed and not (isinstance(part["sha256"], str) and SHA256.fullmatch(part["sha256"])):
        raise CardError(f"{where}.sha256 is {_short(part['sha256'])}, not 64 hexadecimal digits")
    return Part(name, {key: value for key, value in arguments.items() if key not in RUNTIME}, part.get("sha256"))


def _mapping(values: object, where: str, *, required: set[str], optional: set[str] | None) -> dict[str, Any]:
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CardError(f"{where} is {_short(values)}, not an object")
    if missing := sorted(required - values.keys()):
        raise CardError(f"{where} lacks {', '.join(missing)}")
    if optional is not None and (unknown := sorted(values.keys() - required - optional)):
        raise CardError(f"{where} has unknown keys: {', '.join(_short(key) for key in unknown[:5])}")
    return values


def _numbers(values: object, where: str, keys: set[str]) -> dict[str, int | float]:
    numbers = _mapping(values, where, required=keys, optional=set())
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CardError(f"{where}.{key} is {_short(value)}, not a number")
    return numbers


def _plain(value: object, where: str, depth: int = 8) -> None:
    """Null, booleans, numbers, strings, and lists or objects of them."""
    if value is None or isinstance(value, bool | int | float | str):
        return
    if depth == 0 or not isinstance(value, list | dict):
        raise CardError(f"{where} is {_short(value)}, not a plain value")
    for inner in value.values() if isinstance(value, dict) else value:
        _plain(inner, where, depth - 1)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise CardError("a key stands twice in one object")
    return values


def _no_constant(name: str) -> float:
    raise CardError(f"{name} is not a number that JSON knows")

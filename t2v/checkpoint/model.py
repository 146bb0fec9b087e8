"""Networks in and out of a checkpoint's files: names and shapes are compared before any memory is spent, hashes before any use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from t2v.checkpoint.card import AUTOENCODERS, PLACES, RUNTIME, TEXT_ENCODERS, UNETS, AutoencoderCard, CardError, ModelCard, Part, build
from t2v.checkpoint.folder import CARD, EMA, UNET, CheckpointError, find

if TYPE_CHECKING:
    from t2v.diffusion.sampling import Sampler
    from t2v.models.frozen import Frozen

AnyCard = TypeVar("AnyCard", ModelCard, AutoencoderCard)


def save_weights(network: nn.Module | Mapping[str, Tensor], path: Path, dtype: torch.dtype | None = None) -> None:
    """Weights as safetensors, on the CPU, floating ones cast to `dtype` if given."""
    state = network.state_dict() if isinstance(network, nn.Module) else network
    cast = {name: value.to("cpu", dtype if value.is_floating_point() else None).contiguous() for name, value in state.items()}
    save_file(cast, path, metadata={"format": "pt"})


def describe(
    unet: nn.Module,
    frozen: Frozen,
    sampler: Sampler,
    *,
    sample: Mapping[str, int | float],
    step: int,
    notes: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of a model as it stands. `sample`: frames, height, width and fps of what it makes by default."""
    name = next(base.__name__ for base in type(unet).__mro__ if base.__name__ in UNETS)  # a sharded network has a class of its own
    arguments = {key: value for key, value in unet.config.items() if key not in RUNTIME}  # type: ignore[operator, union-attr]
    return ModelCard(
        unet=Part(name, arguments),
        autoencoder=Part("Autoencoder", dict(frozen.autoencoder.config), frozen.autoencoder.sha256()),
        text_encoder=Part(frozen.text_encoder.kind, dict(frozen.text_encoder.config), frozen.text_encoder.sha256()),
        schedule=sampler.schedule.config,
        sampler=sampler.config,
        sample=dict(sample),
        step=step,
        notes=dict(notes or {}),
    )


def read_card(folder: Path | str, kind: type[AnyCard] = ModelCard) -> AnyCard:  # type: ignore[assignment]
    """model.json, every value of it checked. Raises CheckpointError."""
    path = Path(folder) / CARD
    try:
        return kind.read(path)
    except CardError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def read_model(
    folder: Path | str,
    ema: bool = True,
    *,
    device: torch.device | str = "cpu",
    unet_options: Mapping[str, Any] | None = None,
    autoencoder: str | None = None,
    text_encoder: str | None = None,
) -> tuple[nn.Module, Frozen, ModelCard]:
    """The model of a checkpoint: (unet in eval mode on `device`, float32; frozen parts on the CPU; its card).

    `ema` takes the averaged weights where the checkpoint has them (a released model may hold one set only). `unet_options` are choices of
    this process, such as attention_backend. `autoencoder` and `text_encoder` say where those weights lie here, where the card's own place
    does not exist; their hash must be the card's all the same. Raises CheckpointError.
    """
    from t2v.models.frozen import Frozen

    folder = find(folder)
    card = read_card(folder)
    unet = build_unet(card, folder / (EMA if ema and (folder / EMA).exists() else UNET), device, unet_options)
    frozen = Frozen(
        _frozen_part(folder, "autoencoder", card.autoencoder, AUTOENCODERS, autoencoder),
        _frozen_part(folder, "text encoder", card.text_encoder, TEXT_ENCODERS, text_encoder),
    )
    wanted, given = card.unet.arguments.get("cross_attention_dim", frozen.text_encoder.width), frozen.text_encoder.width
    if wanted != given:
        raise CheckpointError(f"{folder / CARD}: the network reads text of width {wanted}, the text encoder writes width {given}")
    return unet, frozen, card


def build_unet(
    card: ModelCard, weights: Path, device: torch.device | str = "cpu", unet_options: Mapping[str, Any] | None = None
) -> nn.Module:
    """The card's network with `weights` in it, float32, in eval mode. Nothing is allocated before names and shapes are known to agree."""
    with torch.device("meta"):
        try:
            unet = build(card.unet, UNETS, **(unet_options or {}))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{weights.with_name(CARD)} describes a network that cannot be built: {error}") from error
    compare(unet, weights)
    with safe_open(weights, "pt") as file:
        return fill(unet, {name: file.get_tensor(name) for name in file.keys()}, device)  # noqa: SIM118 (not a mapping)


def fill(network: nn.Module, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> nn.Module:
    """Give memory on `device` to a network built on meta, and `state` to it, cast to the network's types. Eval mode."""
    kept = network.state_dict().keys()
    assert kept == state.keys()
    assert all(name in kept for name, _ in network.named_buffers()), "a buffer outside the state dict would stay uninitialised"
    network = network.to_empty(device=device)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.copy_(state[name])
    return network.eval()


def load_weights(network: nn.Module, path: Path) -> None:
    """Copy a safetensors file into a network of the same names and shapes, whatever the two types; CheckpointError if they differ."""
    compare(network, path)
    state = network.state_dict()
    with torch.no_grad(), safe_open(path, "pt") as file:
        for name, value in state.items():
            value.copy_(file.get_tensor(name))


def compare(network: nn.Module, path: Path) -> None:
    """Raise CheckpointError unless the file holds exactly the network's names and shapes. Reads the file's header only."""
    try:
        with safe_open(path, "pt") as file:
            stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}): copy it again, or use another checkpoint"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    problems = [
        f"{len(names)} {what} (such as {min(names)}{detail(min(names))})"
        for what, names, detail in (
            ("weights are missing", wanted.keys() - stored.keys(), lambda name: ""),
            ("are not in the network", stored.keys() - wanted.keys(), lambda name: ""),
            (
                "have another shape",
                {name for name in wanted.keys() & stored.keys() if wanted[name] != stored[name]},
                lambda name: f": {stored[name]} in the file, {wanted[name]} in the network",
            ),
        )
        if names
    ]
    if problems:
        raise CheckpointError(f"{path} is of another architecture: {'; '.join(problems)}. Use the configuration that it was trained with")


def _frozen_part(folder: Path, what: str, part: Part, registry: Mapping[str, Callable[[], Callable[..., Any]]], place: str | None) -> Any:
    """Build a frozen part and hold it to the hash of what the network was trained with."""
    if place is not None and part.name not in PLACES:
        raise CheckpointError(f"{folder}: its {what} is {part.name}, which reads no file, so '{place}' has no use; leave it out")
    here = {} if place is None else {PLACES[part.name]: place}
    network = build(part, registry, **here)
    found = network.sha256()
    if found != part.sha256:
        raise CheckpointError(
            f"the {what} built here has sha256 {found[:12]}..., but {folder} was trained with {str(part.sha256)[:12]}...: "
            f"give the weights that it was trained with ({what.replace(' ', '_')}=PATH), or train again"
        )
    return network

"""Models as others store them: a folder of diffusers' TextToVideoSDPipeline, or ModelScope's own."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t2v.checkpoint.folder import CheckpointError
from t2v.checkpoint.model import fill
from t2v.diffusion.schedule import PREDICTIONS
from t2v.weights import folder_of

if TYPE_CHECKING:
    from t2v.models.frozen import Frozen

FORMATS = ("diffusers", "modelscope")
FRAMES, FPS = 16, 8  # of the released model
MODELSCOPE_UNET = "text2video_pytorch_model.pth"
MODELSCOPE_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}  # fixed in its code ("linear_sd"), absent from its configuration


@dataclass(frozen=True)
class ForeignModel:
    """`unet` in eval mode, float32; `schedule`: NoiseSchedule's arguments; `sample`: frames, height, width and fps of the release."""

    unet: nn.Module
    frozen: Frozen
    schedule: dict[str, Any]
    sample: dict[str, int | float]


def split_place(place: Path | str) -> tuple[str | None, Path]:
    """`diffusers:DIR`, `modelscope:DIR`, `package:NAME`, or a folder that shows what it is -> ("diffusers", "modelscope" or None for our
    own; folder)."""
    prefix, colon, rest = str(place).partition(":")
    if colon and prefix in FORMATS:
        return prefix, Path(rest).expanduser()
    folder = folder_of(place)
    if (folder / "model_index.json").is_file():
        return "diffusers", folder
    return ("modelscope" if (folder / MODELSCOPE_UNET).is_file() else None), folder


def read_foreign(
    kind: str,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    unet_options: Mapping[str, Any] | None = None,
    autoencoder: str | None = None,
    text_encoder: str | None = None,
) -> ForeignModel:
    """The whole model of a folder. `autoencoder` and `text_encoder` say where those lie, if not in it. Raises ValueError in one line."""
    from t2v.models.autoencoder import Autoencoder
    from t2v.models.frozen import Frozen
    from t2v.models.text_encoder import TextEncoder

    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}: give weights={kind}:DIR with the DIR that holds the {kind} model")
    schedule = diffusers_schedule(folder) if kind == "diffusers" else modelscope_schedule(folder)
    unet = read_unet(kind, folder, device=device, unet_options=unet_options)
    frozen = Frozen(Autoencoder.from_pretrained(autoencoder or folder), TextEncoder.pretrained(text_encoder or folder))
    config: dict[str, Any] = unet.config  # type: ignore[assignment]
    wanted, given = config["cross_attention_dim"], frozen.text_encoder.width
    if wanted != given:
        raise CheckpointError(f"{folder}: its network reads text of width {wanted}, its text encoder writes width {given}")
    side = (config["sample_size"] or 32) * frozen.autoencoder.factor
    return ForeignModel(unet, frozen, schedule, {"frames": FRAMES, "height": side, "width": side, "fps": FPS})


def read_unet(kind: str, folder: Path, *, device: torch.device | str = "cpu", unet_options: Mapping[str, Any] | None = None) -> nn.Module:
    """The denoising network of a folder, float32, in eval mode."""
    from t2v import weights
    from t2v.models.names import unet_state
    from t2v.models.unet import VideoUNet

    try:
        arguments = diffusers_arguments(folder) if kind == "diffusers" else modelscope_arguments(folder)
        with torch.device("meta"):
            unet = VideoUNet(**arguments, **(unet_options or {}))
    except (TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{folder}: the configuration of its network cannot be used ({error})") from error
    file = weights.find("unet", folder)
    try:
        state = unet_state(weights.read(file), {name: tuple(value.shape) for name, value in unet.state_dict().items()})
    except weights.WeightsError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return fill(unet, state, device)


def diffusers_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of VideoUNet from unet/config.json, whose names are the same; options that only we have must not stand there."""
    from t2v.models.unet import EXTRAS, VideoUNet

    path = folder / "unet" / "config.json"
    config = _json(path)
    name = config.get("_class_name", "UNet3DConditionModel")
    if name != "UNet3DConditionModel":
        raise CheckpointError(f"{path} describes a {name}; this model is a UNet3DConditionModel")
    known = inspect.signature(VideoUNet).parameters.keys() - EXTRAS.keys()
    unknown = sorted(key for key, value in config.items() if not key.startswith("_") and key not in known and value is not None)
    if unknown:
        raise CheckpointError(f"{path} has options that VideoUNet does not know: {', '.join(unknown[:8])}")
    return {key: value for key, value in config.items() if key in known}


def diffusers_schedule(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return {}
    config = _json(path)
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    known = {"beta_schedule": ["scaled_linear"], "prediction_type": list(predictions)}
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            wanted = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"{path}: {key} is {config[key]!r}, this model needs {wanted}: it was trained with another objective")
    names = {"num_train_timesteps": "num_timesteps", "beta_start": "beta_start", "beta_end": "beta_end"}
    arguments = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return arguments | {"prediction": predictions[config.get("prediction_type", "epsilon")]}


def modelscope_configuration(folder: Path) -> dict[str, Any]:
    """model.model_cfg of configuration.json; empty if the file is not there: then it is the released model."""
    path = folder / "configuration.json"
    if not path.exists():
        return {}
    configuration: Any = _json(path)
    for key in ("model", "model_cfg"):
        configuration = configuration.get(key, {})
        if not isinstance(configuration, dict):
            raise CheckpointError(f"{path}: {key} holds no options")
    mean = configuration.get("mean_type", "eps")
    if mean != "eps":
        raise CheckpointError(f"{path}: mean_type is {mean!r}, this model needs 'eps': it was trained with another objective")
    return configuration


def modelscope_arguments(folder: Path) -> dict[str, Any]:
    """Arguments of VideoUNet from ModelScope's unet_* options, whose defaults are the released model's."""
    config = modelscope_configuration(folder)
    width, multiples = config.get("unet_dim", 320), config.get("unet_dim_mult", [1, 2, 4, 4])
    scales = config.get("unet_attn_scales", [1, 0.5, 0.25])
    attended = [0.5**level in scales for level in range(len(multiples))]
    return {
        "in_channels": config.get("unet_in_dim", 4),
        "out_channels": config.get("unet_out_dim", 4),
        "block_out_channels": [width * multiple for multiple in multiples],
        "down_block_types": ["CrossAttnDownBlock3D" if here else "DownBlock3D" for here in attended],
        "up_block_types": ["CrossAttnUpBlock3D" if here else "UpBlock3D" for here in reversed(attended)],
        "layers_per_block": config.get("unet_res_blocks", 2),
        "cross_attention_dim": config.get("unet_context_dim", 1024),
        "attention_head_dim": config.get("unet_head_dim", 64),
    }


def modelscope_schedule(folder: Path) -> dict[str, Any]:
    steps = _json_number(modelscope_configuration(folder).get("num_timesteps", 1000))
    return {"num_timesteps": steps, **MODELSCOPE_BETAS, "prediction": "noise"}


def _json_number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"num_timesteps is {value!r}, not a count")
    return value


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the folder is not whole, or not of this format") from error
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}): copy or download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no options")
    return values

"""Writes the model as ModelScope's own library stores it: configuration.json and three files of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t2v.models import autoencoder
from t2v.models.diffusers_folder import diffusers_config, require_noise_of_each_frame, write_json
from t2v.models.frozen import Frozen
from t2v.models.names import ldm_autoencoder_state, modelscope_unet_state

UNET, AUTOENCODER, TEXT_ENCODER = "text2video_pytorch_model.pth", "VQGAN_autoencoder.pth", "open_clip_pytorch_model.bin"
NOTE = """open_clip_pytorch_model.bin holds the layers of CLIP's text tower that this model uses; the last one, which it does not, is zero.
ModelScope's library wants the whole CLIP there: put the original file of OpenCLIP ViT-H/14 (laion2b_s32b_b79k) in its place.
"""


def write(folder: Path, unet: nn.Module, frozen: Frozen, schedule: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Everything into `folder`. Raises ValueError for a structure that ModelScope's code does not have."""
    options = unet_options(unet)
    has = dict(frozen.autoencoder.model.config)
    differing = [name for name, value in autoencoder.SD_CONFIG.items() if name != "sample_size" and _plain(has[name]) != _plain(value)]
    if differing:
        raise ValueError(
            f"the autoencoder's {', '.join(differing)} differ from Stable Diffusion's, which ModelScope has fixed; export to diffusers"
        )
    if schedule.get("prediction", "noise") != "noise":
        raise ValueError(f"this model predicts {schedule['prediction']}; ModelScope's library knows noise only; export to diffusers")
    require_noise_of_each_frame(schedule)
    folder.mkdir(parents=True, exist_ok=True)
    training = {"num_timesteps": schedule.get("num_timesteps", 1000), "mean_type": "eps", "var_type": "fixed_small", "loss_type": "mse"}
    write_json(
        folder / "configuration.json",
        {
            "framework": "pytorch",
            "task": "text-to-video-synthesis",
            "model": {
                "type": "latent-text-to-video-synthesis",
                "model_args": {
                    "ckpt_clip": TEXT_ENCODER,
                    "ckpt_unet": UNET,
                    "ckpt_autoencoder": AUTOENCODER,
                    "max_frames": 16,
                    "tiny_gpu": 1,
                },
                "model_cfg": {**options, **training},
            },
            "pipeline": {"type": "latent-text-to-video-synthesis"},
        },
    )
    cast = lambda state: {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}  # noqa: E731
    torch.save(cast(modelscope_unet_state(unet.state_dict())), folder / UNET)
    vae = cast(ldm_autoencoder_state(frozen.autoencoder.model.state_dict()))
    torch.save({"state_dict": {f"first_stage_model.{name}": value for name, value in vae.items()}}, folder / AUTOENCODER)
    text = cast(frozen.text_encoder.tower.state_dict())
    depth = len(frozen.text_encoder.tower.transformer.resblocks)
    first = "transformer.resblocks.0."
    last = {n.replace(first, f"transformer.resblocks.{depth}."): torch.zeros_like(v) for n, v in text.items() if n.startswith(first)}
    torch.save({**text, **last}, folder / TEXT_ENCODER)
    (folder / "README.md").write_text(NOTE)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def unet_options(unet: nn.Module) -> dict[str, Any]:
    """ModelScope's unet_* options for this network."""
    config = diffusers_config(unet)
    widths = config["block_out_channels"]
    fixed = {"norm_num_groups": 32, "norm_eps": 1e-5, "downsample_padding": 1, "mid_block_scale_factor": 1}
    for name, value in fixed.items():
        if config[name] != value:
            raise ValueError(f"{name}={config[name]} cannot be exported: ModelScope's network has {name}={value}; export to diffusers")
    for width in widths:
        if width % widths[0]:
            raise ValueError(f"width {width} is not a multiple of the first, {widths[0]}, as in ModelScope's network; export to diffusers")
    downwards = [kind == "CrossAttnDownBlock3D" for kind in config["down_block_types"]]
    upwards = [kind == "CrossAttnUpBlock3D" for kind in config["up_block_types"]]
    if downwards != upwards[::-1]:
        raise ValueError(f"levels with attention differ downwards {downwards} and upwards {upwards[::-1]}; export to diffusers")
    return {
        "unet_in_dim": config["in_channels"],
        "unet_dim": widths[0],
        "unet_y_dim": 768,
        "unet_context_dim": config["cross_attention_dim"],
        "unet_out_dim": config["out_channels"],
        "unet_dim_mult": [width // widths[0] for width in widths],
        "unet_num_heads": 8,
        "unet_head_dim": config["attention_head_dim"],
        "unet_res_blocks": config["layers_per_block"],
        "unet_attn_scales": [0.5**level for level, attended in enumerate(downwards) if attended],
        "unet_dropout": 0.1,
        "temporal_attention": "True",
    }

"""Writes the model as diffusers' `TextToVideoSDPipeline` loads it: unet, vae, text_encoder, tokenizer, scheduler, model_index.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from t2v.models.autoencoder import Autoencoder
from t2v.models.frozen import Frozen
from t2v.models.names import hugging_face_text_state
from t2v.models.text_encoder import TOKENS, TextEncoder, tokenizer
from t2v.models.unet import EXTRAS

STRUCTURE = ("num_temporal_convs", "num_temporal_attentions", "temporal_positions")  # extras that change what the weights mean
START, END, PADDING = "<|startoftext|>", "<|endoftext|>", "<|padding|>"


def require_noise_of_each_frame(schedule: Mapping[str, Any]) -> None:
    """ValueError for a model whose frames share noise: no pipeline but ours would begin with such noise."""
    if schedule.get("shared_noise"):
        raise ValueError(f"schedule.shared_noise={schedule['shared_noise']} cannot be exported: elsewhere every frame has noise of its own")


def write(folder: Path, unet: nn.Module, frozen: Frozen, schedule: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """The whole pipeline into `folder`. `schedule`: NoiseSchedule's arguments. Raises ValueError for what diffusers cannot hold."""
    import diffusers

    config = diffusers_config(unet)
    require_noise_of_each_frame(schedule)
    write_weights(folder / "unet", {"_class_name": "UNet3DConditionModel", **config}, unet.state_dict(), dtype)
    write_autoencoder(folder / "vae", frozen.autoencoder, dtype)
    write_text_encoder(folder / "text_encoder", frozen.text_encoder, dtype)
    write_tokenizer(folder / "tokenizer")
    write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": schedule.get("num_timesteps", 1000),
            "beta_start": schedule.get("beta_start", 0.00085),
            "beta_end": schedule.get("beta_end", 0.012),
            "beta_schedule": "scaled_linear",
            "prediction_type": {"noise": "epsilon", "velocity": "v_prediction"}[schedule.get("prediction", "noise")],
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
    )
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "TextToVideoSDPipeline",
            "_diffusers_version": diffusers.__version__,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet3DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def diffusers_config(unet: nn.Module) -> dict[str, Any]:
    """The network's arguments without those that diffusers does not have. Raises ValueError where they change the structure."""
    config: dict[str, Any] = unet.config  # type: ignore[assignment]
    for name in STRUCTURE:
        if config[name] != EXTRAS[name]:
            raise ValueError(
                f"{name}={config[name]} cannot be exported: the released model and diffusers have {name}={EXTRAS[name]}, "
                "and no option for another; keep our own checkpoint"
            )
    return {name: value for name, value in config.items() if name not in EXTRAS}


def write_autoencoder(folder: Path, autoencoder: Autoencoder, dtype: torch.dtype = torch.float32) -> None:
    config = {key: value for key, value in dict(autoencoder.model.config).items() if not key.startswith("_")}
    write_weights(folder, {"_class_name": "AutoencoderKL", **config}, autoencoder.model.state_dict(), dtype)


def write_text_encoder(folder: Path, encoder: TextEncoder, dtype: torch.dtype = torch.float32) -> None:
    """As transformers' CLIPTextModel; written by it, because its names depend on its version."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tower = encoder.tower
    config = CLIPTextConfig(
        vocab_size=tower.token_embedding.weight.shape[0],
        hidden_size=encoder.width,
        intermediate_size=tower.transformer.resblocks[0].mlp.c_fc.weight.shape[0],
        num_hidden_layers=len(tower.transformer.resblocks),
        num_attention_heads=tower.transformer.resblocks[0].attn.num_heads,
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        pad_token_id=0,
        bos_token_id=49406,
        eos_token_id=49407,
    )
    with torch.device("meta"):
        model: Any = CLIPTextModel(config)
    state = hugging_face_text_state({name: value.detach().cpu() for name, value in tower.state_dict().items()})
    wanted = {name for name, _ in model.named_parameters()}
    if not wanted & state.keys():  # newer versions have no `text_model.` in front
        state = {name.removeprefix("text_model."): value for name, value in state.items()}
    model = model.to_empty(device="cpu")
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if name in wanted]  # a buffer of positions is no weight
    assert not missing + unexpected, (missing, unexpected)
    model.to(dtype=dtype).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """CLIP's vocabulary from open_clip in the files of transformers' CLIPTokenizer.

    open_clip pads with id 0, which is "!". Were "!" declared as the padding token, transformers would cut it out of prompts; so a second
    name of id 0 is declared. Typographic quotes and HTML entities, which open_clip repairs first, still give other tokens there.
    """
    bpe = tokenizer()
    renamed = {"<start_of_text>": START, "<end_of_text>": END}
    write_json(folder / "vocab.json", {**{renamed.get(token, token): i for token, i in bpe.encoder.items()}, PADDING: 0})
    merges = sorted(bpe.bpe_ranks, key=bpe.bpe_ranks.__getitem__)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{' '.join(pair)}\n" for pair in merges), encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": PADDING}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, "add_prefix_space": False, **special},
    )


def write_weights(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    write_json(folder / "config.json", config)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

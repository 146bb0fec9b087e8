"""Names of the same weights in the formats that people have. Ours are diffusers'; every other name is a function of ours.

Each table maps our name to the foreign one; reading a foreign file inverts the map over the names of the network that is to be filled,
so both directions agree by construction, and a name without a partner is an error that lists it.

| format                   | UNet                         | autoencoder               | text encoder              |
|--------------------------|------------------------------|---------------------------|---------------------------|
| diffusers, transformers  | ours                         | ours                      | `text_model.encoder.*`    |
| ModelScope               | `temopral_conv` (sic), ...   | `encoder.down.*`, ...     | open_clip's, whole CLIP   |
| Stable Diffusion, 1 file | the same, spatial ones only  | with `first_stage_model.` | `cond_stage_model.model.` |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "transformer_in": "input_blocks.0.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
TEMPORAL = re.compile(r"(^|\.)(temp_convs|temp_attentions|transformer_in)\.")


def is_temporal(name: str) -> bool:
    """Whether a weight of VideoUNet belongs to the 794 temporal ones, which Stable Diffusion does not have."""
    return TEMPORAL.search(name) is not None


def unet_names(names: Iterable[str], modelscope: bool) -> dict[str, str]:
    """Our names -> names in ModelScope's file, or (spatial ones only) in Stable Diffusion's single file without its prefix."""
    names = list(names)
    depth = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})  # layers_per_block
    with_attention = {name.rsplit(".attentions.")[0] for name in names if ".attentions." in name}
    return {name: _unet_name(name, depth, with_attention, modelscope) for name in names if modelscope or not is_temporal(name)}


def _unet_name(name: str, depth: int, with_attention: set[str], modelscope: bool) -> str:
    for ours, theirs in OUTSIDE.items():
        if name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    kinds = {"resnets": 0, "temp_convs": 0, "attentions": 1, "temp_attentions": 2}  # position inside one of their blocks
    if name.startswith("mid_block."):
        _, kind, j, rest = name.split(".", 3)
        position = kinds[kind] + (3 if modelscope else 2) * int(j)  # the second residual block comes after the attentions
        return f"middle_block.{position}.{_inner(kind, rest)}"
    side, b, kind, j, rest = name.split(".", 4)
    first = int(b) * (depth + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + depth + 1}.{'op' if modelscope else '0.op'}.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attended = f"{side}.{b}" in with_attention
        return f"output_blocks.{first + depth}.{(3 if modelscope else 2) if attended else 1}.{rest}"
    block = f"input_blocks.{first + int(j) + 1}" if side == "down_blocks" else f"output_blocks.{first + int(j)}"
    return f"{block}.{kinds[kind]}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind == "resnets":
        layer, end = rest.rsplit(".", 1)
        return f"{RESIDUAL[layer]}.{end}"
    return f"temopral_conv.{rest}" if kind == "temp_convs" else rest


def ldm_autoencoder_names(names: Iterable[str]) -> dict[str, str]:
    """Our (diffusers') autoencoder names -> those of ModelScope's and Stable Diffusion's files, without their prefix."""
    names = list(names)
    levels = len({name.split(".")[2] for name in names if name.startswith("decoder.up_blocks.")})
    inside = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def name_of(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
        for ours, theirs in inside.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        return name

    return {name: name_of(name) for name in names}


def unet_state(state: Mapping[str, Tensor], shapes: Shapes, spatial_only: bool = False) -> dict[str, Tensor]:
    """Weights of a file -> weights by our names and shapes (`shapes`: the network's). Recognises all three formats by their names.

    `spatial_only`: the file is Stable Diffusion's, and exactly the temporal weights may be missing. Raises ValueError that lists others.
    """
    prefix = "model.diffusion_model."
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)} or dict(state)
    wanted = {name: shape for name, shape in shapes.items() if not (spatial_only and is_temporal(name))}
    theirs = {name: name for name in wanted}
    if any(name.startswith("input_blocks.") for name in state):
        theirs = unet_names(wanted, modelscope=not spatial_only)
    return rename(state, {name: theirs[name] for name in wanted}, wanted)


def modelscope_unet_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights -> the content of ModelScope's `text2video_pytorch_model.pth`; temporal projections become Conv1d weights (o c 1)."""
    names = unet_names(state, modelscope=True)
    return {names[name]: value.unsqueeze(-1) if _is_conv1d(name) else value for name, value in state.items()}


def _is_conv1d(name: str) -> bool:
    return is_temporal(name) and name.endswith(("proj_in.weight", "proj_out.weight"))


def autoencoder_state(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Weights of a file -> weights by diffusers' names and shapes. Knows its present and former names, ModelScope's and SD's."""
    prefix = "first_stage_model."
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)} or dict(state)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    theirs = {name: name for name in shapes}
    if any(name.startswith("encoder.down.") for name in state):
        theirs = ldm_autoencoder_names(shapes)
    elif any(".proj_attn." in name for name in state):
        for new, old in former.items():
            theirs = {name: other.replace(f".{new}.", f".{old}.") for name, other in theirs.items()}
    ignored = ("loss.", "model_ema.")  # training's remains in some files
    return rename({name: value for name, value in state.items() if not name.startswith(ignored)}, theirs, shapes)


def ldm_autoencoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' autoencoder weights -> those of ModelScope's `VQGAN_autoencoder.pth`; attention becomes 1 x 1 convolutions."""
    names = ldm_autoencoder_names(state)
    return {names[n]: v[:, :, None, None] if v.ndim == 2 and ".attentions." in n else v for n, v in state.items()}


def rename(state: Mapping[str, Tensor], theirs: Mapping[str, str], shapes: Shapes) -> dict[str, Tensor]:
    """`theirs`: our name -> name in the file. Axes of length 1 may differ; anything else is a ValueError that lists the names."""
    missing = sorted(other for other in theirs.values() if other not in state)
    foreign = sorted(state.keys() - set(theirs.values()))
    if missing or foreign:
        raise ValueError(
            f"it does not hold the weights of this network: {len(missing)} of {len(theirs)} are missing{_some(missing)}, "
            f"{len(foreign)} are unknown{_some(foreign)}; check the file and the network's arguments"
        )
    result = {}
    for name, shape in shapes.items():
        value = state[theirs[name]]
        if tuple(value.shape) != tuple(shape):
            if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
                raise ValueError(
                    f"{theirs[name]} has shape {tuple(value.shape)}, the network needs {tuple(shape)}: it is of another model or size"
                )
            value = value.reshape(shape)
        result[name] = value
    return result


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})" if names else ""


# The text tower. Ours is open_clip's TextTransformer without the last layer and the projection, neither of which is used.

HUGGING_FACE_LAYER: dict[str, str] = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
HUGGING_FACE_OUTSIDE = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def text_tower_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a text encoder's file -> the tower's. Knows open_clip's (alone, in a whole CLIP, in SD's file) and Hugging Face's names.

    open_clip's files hold the last layer, which is left out; Hugging Face's for Stable Diffusion (23 layers) do not.
    """
    if any("encoder.layers." in name for name in state):
        return _from_hugging_face(state)
    for prefix in ("cond_stage_model.model.", "text.", ""):
        if prefix + "token_embedding.weight" in state:
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            break
    outside = ("token_embedding.weight", "positional_embedding", "ln_final.weight", "ln_final.bias")
    missing = [name for name in outside if name not in state]
    layers = {int(name.split(".")[2]) for name in state if name.startswith("transformer.resblocks.")}
    if missing or not layers:
        raise ValueError(f"it holds no CLIP text encoder: {', '.join(missing) or 'transformer.resblocks.*'} missing")
    last = f"transformer.resblocks.{max(layers)}."
    kept = {name: value for name, value in state.items() if name.startswith("transformer.resblocks.") and not name.startswith(last)}
    return {name: state[name] for name in outside} | kept


def _from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in state.items()}
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers."))
    if depth == 24 or "text_projection.weight" in state:  # the whole tower, not Stable Diffusion's 23 layers
        depth -= 1
    result = {}
    try:
        for ours, theirs in HUGGING_FACE_OUTSIDE.items():
            result[ours] = state[theirs]
        for i in range(depth):
            block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for end in ("weight", "bias"):
                for ours, theirs in HUGGING_FACE_LAYER.items():
                    result[f"{block}.{ours}.{end}"] = state[f"{layer}.{theirs}.{end}"]
                result[f"{block}.attn.in_proj_{end}"] = torch.cat([state[f"{layer}.self_attn.{x}_proj.{end}"] for x in "qkv"])
    except KeyError as error:
        raise ValueError(f"its text encoder lacks {error}") from error
    return result


def hugging_face_text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tower's weights -> those of transformers' CLIPTextModel with as many layers, as `TextToVideoSDPipeline` wants it."""
    result = {f"text_model.{theirs}": state[ours] for ours, theirs in HUGGING_FACE_OUTSIDE.items()}
    for name, value in state.items():
        if not name.startswith("transformer.resblocks."):
            continue
        _, _, i, rest = name.split(".", 3)
        layer, (inner, end) = f"text_model.encoder.layers.{i}", rest.rsplit(".", 1) if "in_proj" not in rest else rest.rsplit("_", 1)
        if inner == "attn.in_proj":
            for x, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{layer}.self_attn.{x}_proj.{end}"] = part
        else:
            result[f"{layer}.{HUGGING_FACE_LAYER[inner]}.{end}"] = value
    return result

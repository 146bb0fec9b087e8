"""The text encoder tau, Eq. 3: CLIP's text tower, of which every token's state before the last layer is used, after the final norm.

The released model uses OpenCLIP ViT-H/14: 77 tokens of width 1024 (the paper's N_c = 768 is an unused entry of its configuration),
padded by id 0. A small random tower has the same interface, for models that are trained without downloads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2v.models.names import text_tower_state

TOKENS, VOCABULARY, PADDING = 77, 49_408, 0
VIT_H = {"width": 1024, "layers": 24, "heads": 16}


class TextEncoder:
    """Prompts -> (b 77 d). Its `tower` is open_clip's TextTransformer without the last layer and the projection, which are not used.

    `kind` and `config` are what rebuilds it: `TextEncoder.random(**config)` or `TextEncoder.pretrained(**config)`.
    """

    def __init__(self, tower: nn.Module, kind: str = "", config: Mapping[str, Any] | None = None):
        self.tower: Any = tower.eval().requires_grad_(False)
        self.kind, self.config = kind, dict(config or {})
        self._sha256: str | None = None

    @classmethod
    def random(
        cls,
        seed: int = 0,
        width: int = 128,
        layers: int = 2,
        heads: int = 2,
        token_std: float = 1.0,
        mixing: float = 1.0,
        final_gain: float = 1.0,
    ) -> TextEncoder:
        """A small tower of random weights, the same bits on every machine: uniform numbers times a constant, one rounding each.

        Tokens are large beside what the layers add, so that words stay visible where they stand. Positions and padding are zero: what is
        left at the positions after the end is the sentence that causal attention gathered, as in a trained tower, so that even someone
        who attends to all 77 alike reads it. Order is known by that attention alone. `mixing` is the weight of what the layers add; at 0
        a word is the same vector in every sentence, so that words are learned one by one. `final_gain` is the weight of the final norm:
        how loud text is, and so how soon a network that starts from nothing listens.
        """
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}: use heads that divide the width")
        if layers < 2:
            raise ValueError(f"layers={layers}: at least 2 are needed, because the output is taken before the last one")
        config = {"seed": seed, "width": width, "layers": layers, "heads": heads, "token_std": token_std}
        config |= {"mixing": mixing, "final_gain": final_gain}
        tower = empty_tower(width, layers, heads)
        generator = torch.Generator().manual_seed(seed)
        depth = mixing * (2 * layers) ** -0.5  # open_clip's scales, by which residual branches shrink with depth
        scales = {"in_proj_weight": 1.0, "out_proj.weight": depth, "c_fc.weight": 0.5**0.5, "c_proj.weight": depth}
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                if name == "token_embedding.weight":
                    std = token_std
                elif name == "positional_embedding":
                    std = 0.0
                elif name.endswith(tuple(scales)):
                    std = width**-0.5 * next(scale for end, scale in scales.items() if name.endswith(end))
                else:  # norms and biases
                    parameter.fill_(1.0 if name.endswith("weight") else 0.0)
                    continue
                uniform = torch.rand(parameter.shape, generator=generator)
                parameter.copy_((uniform - 0.5) * (std * 12**0.5))
            tower.token_embedding.weight[PADDING] = 0
            tower.ln_final.weight.fill_(final_gain)
        return cls(tower, "TextEncoder.random", config)

    @classmethod
    def pretrained(cls, path: str | Path | None = None, *, download: bool = False) -> TextEncoder:
        """OpenCLIP ViT-H/14 from a file or folder of open_clip, Hugging Face (23 layers) or ModelScope; searched for if no path is given.

        A tower of another size is accepted where the file says so: heads are width / 64, as in every CLIP text tower.
        """
        from t2v.weights import find, read

        file = find("text_encoder", path, download=download)
        try:
            state = text_tower_state(read(file))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        width, layers = state["token_embedding.weight"].shape[1], len({name.split(".")[2] for name in state if "resblocks" in name}) + 1
        tower = empty_tower(width, layers, heads=max(1, width // 64), vocabulary=state["token_embedding.weight"].shape[0])
        tower.load_state_dict(state)
        return cls(tower, "TextEncoder.pretrained", {"path": str(path) if path is not None else None})

    @property
    def width(self) -> int:
        return int(self.tower.ln_final.weight.shape[0])

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> (b 77 d) in the tower's type. Words beyond the 77th token are cut off."""
        with torch.no_grad():
            return self.encode_tokens(self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> token ids (b 77): start, words, end, then 0."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of texts, not one text: use [{prompts!r}]")
        if not prompts:
            return torch.zeros(0, TOKENS, dtype=torch.long)
        return torch.stack([tokens_of(prompt) for prompt in prompts])

    def encode_tokens(self, ids: Tensor) -> Tensor:
        """Token ids (b 77) -> (b 77 d)."""
        tower = self.tower
        ids = ids.to(tower.positional_embedding.device, non_blocking=True)
        x = tower.token_embedding(ids) + tower.positional_embedding
        for block in tower.transformer.resblocks:
            x = block(x, attn_mask=tower.attn_mask)
        return tower.ln_final(x)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has before the cut, start and end included."""
        return [len(tokenizer().encode(prompt)) + 2 for prompt in prompts]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TextEncoder:
        self.sha256()  # of the weights as loaded, whatever type they are cast to
        self.tower.to(device=device, dtype=dtype)
        return self

    def sha256(self) -> str:
        """Hash of the weights, hexadecimal."""
        if self._sha256 is None:
            self._sha256 = state_sha256(self.tower.state_dict())
        return self._sha256


def empty_tower(width: int, layers: int, heads: int, vocabulary: int = VOCABULARY) -> Any:
    """open_clip's TextTransformer up to the layer before the last, memory allocated but not filled; the global random state stays."""
    from open_clip.transformer import TextTransformer

    with torch.device("meta"):
        tower: Any = TextTransformer(
            context_length=TOKENS, vocab_size=vocabulary, width=width, heads=heads, layers=layers - 1, output_dim=0, proj_type="none"
        )
    tower.to_empty(device="cpu")
    tower.attn_mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)  # a buffer that no state dict holds
    return tower


@lru_cache(maxsize=16_384)
def tokens_of(prompt: str) -> Tensor:
    """(77,) token ids. Remembered, because few captions are many steps' captions, as the empty one is of all."""
    return tokenizer()([prompt], context_length=TOKENS)[0]


def tokenizer() -> Any:
    """CLIP's byte-pair tokenizer with its vocabulary, from open_clip."""
    from open_clip import tokenizer as module

    return module._tokenizer


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash of names, shapes and float32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from t2v.models.attention import TemporalAttention, attend


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (b m h d), (b n h d)."""
    scores = torch.einsum("bmhd,bnhd->bhmn", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v)


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def same(a: Tensor, b: Tensor, leaves: list[Tensor]) -> None:
    grad = torch.randn(a.shape, dtype=a.dtype, generator=torch.Generator().manual_seed(1))
    for x, y in zip((a, *torch.autograd.grad(a, leaves, grad)), (b, *torch.autograd.grad(b, leaves, grad)), strict=True):
        assert (x - y).abs().max() <= 1e-12


@pytest.mark.parametrize("words", [5, 16, 17, 77, 80])
def test_any_number_of_keys_is_attention_with_gradients(words: int) -> None:
    q, k, v = tokens(2, 9, 3, 8), tokens(2, words, 3, 8), tokens(2, words, 3, 8) * 2
    leaves = [q, k, v]
    same(attend(q, k, v), plain(q, k, v), leaves)


@pytest.mark.parametrize(("f", "n"), [(2, 6), (3, 7), (5, 6), (8, 4), (8, 1)])
def test_few_frames_of_several_pixels_at_once_are_each_pixels_own(f: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = TemporalAttention(24, 3, 8).double(), tokens(2, f, n, 24)
    leaves = [x, *attention.parameters()]
    together, _ = attention(x)
    monkeypatch.setattr("t2v.models.attention.on_a_plain_cpu", lambda x: False)
    monkeypatch.setattr(attention, "attend_over_few_frames", None)  # not taken now
    apart, _ = attention(x)
    same(together, apart, leaves)


def test_other_backends_are_not_replaced() -> None:
    attention = TemporalAttention(24, 3, 8, backend="xformers").double()
    with pytest.raises(ValueError, match="xformers"):
        attention(tokens(1, 2, 4, 24))

from __future__ import annotations

import pytest
import torch
from small_unets import TWO_LEVELS, inputs, pair
from torch import Tensor

from t2v.models.attention import Attention, TemporalAttention, attend
from t2v.models.kernels.temporal_attention import PlainTemporalAttention, temporal_attention
from t2v.models.unet import VideoUNet


def tokens(f: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(f)
    return [torch.randn(2, f, 6, 3, 16, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("f", [2, 5, 16, 33])
def test_the_kernels_plain_twin_is_attention(f: int, dtype: torch.dtype, bound: float) -> None:
    q, k, v = tokens(f, dtype)
    ours = PlainTemporalAttention.apply(torch.stack([q, k, v], 3))
    theirs = attend(*(t.flatten(2, 3) for t in (q, k, v))).view(q.shape)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, (q, k, v), grad)), (theirs, *torch.autograd.grad(theirs, (q, k, v), grad)), strict=True
    ):
        assert (a - b).abs().max() <= bound


def test_the_twin_passes_gradcheck() -> None:
    qkv = torch.randn(1, 3, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PlainTemporalAttention.apply, (qkv,))


def test_a_network_on_the_twin_equals_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that the fused kernel takes through the network, with the twin in its place."""
    monkeypatch.setattr("t2v.models.attention.temporal_attention", PlainTemporalAttention.apply)
    ours, theirs = pair(TWO_LEVELS)
    for module in ours.modules():
        if isinstance(module, Attention):
            module.backend = "triton"
    args = inputs(2, 5, 8, 8)
    a, b = ours(*args), theirs(*args).sample
    assert (a - b).abs().max() <= 1e-12 * max(1, b.abs().max())
    names = [n for n, _ in ours.named_parameters()]
    of_theirs = dict(theirs.named_parameters())
    for x, y in zip(
        torch.autograd.grad(a.square().sum(), list(ours.parameters())),
        torch.autograd.grad(b.square().sum(), [of_theirs[n] for n in names]),
        strict=True,
    ):
        assert (x - y).abs().max() <= 1e-10 * max(1, y.abs().max())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what is refused elsewhere")
@pytest.mark.parametrize("backend", ["xformers", "triton"])
def test_backends_are_refused_where_they_cannot_run(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend}.*GPU.*'sdpa'"):
        VideoUNet(**TWO_LEVELS, attention_backend=backend)
    with torch.device("meta"):  # planning for another machine is allowed
        unet = VideoUNet(**TWO_LEVELS, attention_backend=backend)
    assert unet.config["attention_backend"] == backend


def test_backends_refuse_tensors_on_the_cpu_and_too_many_frames() -> None:
    q, k, v = tokens(2)
    with pytest.raises(ValueError, match=r"triton.*cpu.*sdpa"):
        temporal_attention(torch.stack([q, k, v], 3))
    with pytest.raises(ValueError, match=r"xformers.*cpu.*sdpa"):
        attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), "xformers")
    with pytest.raises(ValueError, match=r"triton.*cpu"):
        TemporalAttention(32, 2, 16, backend="triton")(torch.randn(1, 3, 4, 32))
    with torch.device("meta"), pytest.raises(ValueError, match=r"16, 32, 64 or 128, not attention_head_dim=8"):
        VideoUNet(**{**TWO_LEVELS, "attention_head_dim": 8}, attention_backend="triton")

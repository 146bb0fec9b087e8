import pytest
import torch
from torch import Tensor

from t2v.diffusion.guidance import ClassifierFreeGuidance


class Network:
    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def __call__(self, z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        assert len(z) == len(t)
        self.batches.append((len(z), len(text)))
        z, t = (x.repeat(len(text) // len(x), *[1] * (x.ndim - 1)) for x in (z, t))
        return z * 0.1 + text.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1) + t.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("empty_shape", [(5, 8), (1, 5, 8), (2, 5, 8)])
def test_both_halves_in_one_batch(empty_shape: tuple[int, ...]) -> None:
    network, text, empty = Network(), torch.randn(2, 5, 8), torch.randn(empty_shape)
    z, t = torch.randn(2, 4, 3, 2, 2), torch.tensor([7, 9])
    result = ClassifierFreeGuidance(9.0)(network, text, empty)(z, t)
    assert network.batches == [(2, 4)]
    conditional, unconditional = network(z, t, text), network(z, t, empty.expand(2, 5, 8))
    torch.testing.assert_close(result, unconditional + 9 * (conditional - unconditional))


def test_scale_one_skips_the_unconditional_half() -> None:
    network, text = Network(), torch.randn(2, 5, 8)
    z, t = torch.randn(2, 4, 3, 2, 2), torch.tensor([7, 9])
    result = ClassifierFreeGuidance(1.0)(network, text, torch.randn(5, 8))(z, t)
    assert network.batches == [(2, 2)]
    assert torch.equal(result, network(z, t, text))


def test_the_network_is_fed_in_the_texts_type() -> None:
    types: list[torch.dtype] = []

    def network(z: Tensor, t: Tensor, text: Tensor) -> Tensor:
        types.extend([z.dtype, text.dtype])
        return z.expand(len(text), -1, -1, -1, -1)

    for scale in (1.0, 3.0):
        ClassifierFreeGuidance(scale)(network, torch.zeros(1, 2, 2, dtype=torch.bfloat16), torch.zeros(2, 2))(
            torch.zeros(1, 4, 1, 2, 2), torch.tensor([1])
        )
    assert set(types) == {torch.bfloat16}


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_refusals(scale: float) -> None:
    with pytest.raises(ValueError, match="guidance scale"):
        ClassifierFreeGuidance(scale)

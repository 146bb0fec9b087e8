"""I3D: its tensors, the clips it takes, its padding, and its weights in every container that people have."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import functional_i3d
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from t2v.metrics import i3d_weights
from t2v.metrics.crc32c import crc32c
from t2v.metrics.i3d import InceptionI3d, same_pad


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """The 230 tensors with plausible statistics."""
    torch.manual_seed(seed)
    state = InceptionI3d().state_dict()
    wanted = i3d_weights.key_maps()[0]
    state = {name: tensor for name, tensor in state.items() if name in wanted}
    ranges = {"running_var": (0.1, 1.1), "running_mean": (-0.1, 0.1), "bn.bias": (-0.1, 0.3)}
    for name, tensor in state.items():
        for ending, (low, high) in ranges.items():
            if name.endswith(ending):
                tensor.uniform_(low, high)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="module")
def network(state: dict[str, Tensor]) -> InceptionI3d:
    return i3d_weights.build(state)


def clip(frames: int, size: int = 224) -> Tensor:
    return torch.rand(1, 3, frames, size, size, generator=torch.Generator().manual_seed(frames)) * 2 - 1


class TestNetwork:
    def test_holds_the_230_tensors_of_the_original(self, state: dict[str, Tensor]) -> None:
        checksums = json.loads(i3d_weights.CHECKSUMS.read_text())["tensors"]
        assert set(i3d_weights.key_maps()[1].values()) == set(checksums)
        assert len(checksums) == 230
        assert sum(tensor.numel() for tensor in state.values()) == 12_704_544
        with torch.device("meta"):
            assert sum(p.numel() for p in InceptionI3d().parameters()) == 12_697_264
        norms = [m for m in i3d_weights.build(state).modules() if isinstance(m, torch.nn.BatchNorm3d)]
        assert len(norms) == 57
        assert {norm.eps for norm in norms} == {1e-3}

    def test_takes_nine_frames_or_more(self, network: InceptionI3d) -> None:
        with pytest.raises(ValueError, match="at least 9 frames, got 8"):
            network(clip(8))
        assert network(clip(9)).shape == (1, 400)

    @pytest.mark.parametrize("frames", [9, 16, 17])
    def test_gives_the_logits_of_a_functional_reference(self, network: InceptionI3d, state: dict[str, Tensor], frames: int) -> None:
        """9, 16, 17 frames: odd, even and odd again at the temporal strides, so that each pads differently."""
        x = clip(frames)
        got, want = network(x), functional_i3d.logits(state, x)
        assert got.std() > 0.01
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.std()))

    def test_sees_time(self, network: InceptionI3d) -> None:
        x = clip(9)
        logits = network(torch.cat([x, x.flip(2)]))
        assert logits.shape == (2, 400)
        assert not torch.allclose(logits[0], logits[1], rtol=1e-3)

    @pytest.mark.parametrize("size", [192, 256])
    def test_takes_224_pixels_only(self, network: InceptionI3d, size: int) -> None:
        with pytest.raises(ValueError, match=f"got {size} x {size}"):
            network(clip(16, size))


@pytest.mark.parametrize(
    ("kernel", "stride"), [((7, 7, 7), (2, 2, 2)), ((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 2, 2)), ((2, 2, 2), (2, 2, 2))]
)
def test_same_padding_against_a_naive_one(kernel: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Output o of n looks at inputs o*s - before ... of a tape that is zero outside: written out for frames 5 to 17 and odd sizes."""
    for frames, size in itertools.product((5, 8, 9, 13, 16, 17), (7, 8)):
        x = torch.randn(1, 1, frames, size, size)
        weight = torch.randn(1, 1, *kernel)
        got = F.conv3d(same_pad(x, kernel, stride), weight, stride=stride)
        outputs = [-(-n // s) for n, s in zip(x.shape[2:], stride)]
        assert list(got.shape[2:]) == outputs
        before = [max((o - 1) * s + k - n, 0) // 2 for o, n, k, s in zip(outputs, x.shape[2:], kernel, stride)]
        for place in (tuple(0 for _ in outputs), tuple(o - 1 for o in outputs), tuple(o // 2 for o in outputs)):
            total = 0.0
            for tap in itertools.product(*(range(k) for k in kernel)):
                at = [p * s - b + t for p, s, b, t in zip(place, stride, before, tap)]
                if all(0 <= a < n for a, n in zip(at, x.shape[2:])):
                    total += float(x[0, 0, at[0], at[1], at[2]] * weight[(0, 0, *tap)])
            assert float(got[(0, 0, *place)]) == pytest.approx(total, abs=1e-3)


class TestWeights:
    def test_both_key_maps_round_trip(self, state: dict[str, Tensor]) -> None:
        theirs = i3d_weights.to_hassony2(state)
        assert "mixed_5b.branch_2.1.conv3d.weight" in theirs
        back = i3d_weights.from_hassony2(theirs)
        again = i3d_weights.from_piergiaj(state)
        for name, tensor in state.items():
            assert torch.equal(back[name], tensor)
            assert torch.equal(again[name], tensor)

    def test_every_container_gives_the_same_network(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        ones = {f"{n}.batch3d.weight": torch.ones(1) for n in ("conv3d_1a_7x7",)}

        class Scripted(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, tensor in (i3d_weights.to_hassony2(state) | ones).items():
                    parent: torch.nn.Module = self
                    *path, leaf = name.split(".")
                    for part in path:
                        if not hasattr(parent, part):
                            parent.add_module(part, torch.nn.Module())
                        parent = getattr(parent, part)
                    parent.register_buffer(leaf, tensor)

            def forward(self, x: Tensor) -> Tensor:
                return x

        torch.jit.script(Scripted()).save(str(tmp_path / "i3d_torchscript.pt"))
        torch.save(state, tmp_path / "i3d_pretrained_400.pt")
        save_file(state, tmp_path / "i3d.safetensors")
        for name in ("i3d_torchscript.pt", "i3d_pretrained_400.pt", "i3d.safetensors"):
            read = i3d_weights.read(tmp_path / name)
            assert all(torch.equal(read[key], tensor) for key, tensor in state.items()), name

    def test_another_network_is_refused(self, state: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match="1 tensors missing"):
            i3d_weights.from_piergiaj({k: v for k, v in state.items() if k != "logits.conv3d.bias"})
        with pytest.raises(ValueError, match="1 unknown"):
            i3d_weights.from_piergiaj(state | {"head.weight": torch.ones(1)})
        with pytest.raises(ValueError, match="no batch-norm scale"):
            i3d_weights.from_piergiaj(state | {"Conv3d_1a_7x7.bn.weight": torch.full((64,), 2.0)})
        kinetics_600 = state | {"logits.conv3d.weight": torch.zeros(600, 1024, 1, 1, 1)}
        with pytest.raises(ValueError, match=r"\(600, 1024"):
            i3d_weights.build(kinetics_600)

    def test_one_flipped_bit_is_found(self, state: dict[str, Tensor]) -> None:
        some = {ours: theirs for ours, theirs in i3d_weights.key_maps()[1].items() if ours.startswith(("Mixed_4c", "logits"))}
        own = {theirs: i3d_weights.checksum(state[ours]) for ours, theirs in some.items()}
        assert len(own) == 26
        assert i3d_weights.wrong_checksums(state, own) == []
        damaged = dict(state)
        damaged["Mixed_4c.b1b.conv3d.weight"] = state["Mixed_4c.b1b.conv3d.weight"].clone()
        damaged["Mixed_4c.b1b.conv3d.weight"].view(torch.int32).view(-1)[77] ^= 1
        assert i3d_weights.wrong_checksums(damaged, own) == ["Mixed_4c.b1b.conv3d.weight"]
        assert len(i3d_weights.wrong_checksums(state)) == 230  # random weights are not DeepMind's


def test_crc32c_of_the_standard_vector_and_of_long_data() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"\0" * 32) == 0x8A9136AA
    data = bytes(range(256)) * 100 + b"tail"
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F63B78 if register & 1 else 0)
    assert crc32c(data) == register ^ 0xFFFFFFFF

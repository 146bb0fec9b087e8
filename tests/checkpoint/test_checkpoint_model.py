import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import UNET, TinyAutoencoder, TinyTextEncoder, tiny_card, tiny_frozen, tiny_unet

from t2v import checkpoint
from t2v.checkpoint import CheckpointError, Part
from t2v.diffusion.guidance import ClassifierFreeGuidance
from t2v.diffusion.sampling import Sampler
from t2v.models.unet import VideoUNet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parts = {
        "unet.safetensors": lambda path: checkpoint.save_weights(tiny_unet(1), path),
        "ema.safetensors": lambda path: checkpoint.save_weights(tiny_unet(2), path),
    }
    return checkpoint.write(tmp_path / "step-7", parts, tiny_card())


def renew_marker(folder: Path) -> None:
    """As an attacker would, who makes the rest consistent."""
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "complete"}
    (folder / "complete").write_text(json.dumps({"format": 1, "files": files, "sha256": {}}))


def change_card(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "model.json").read_text())
    change(values)
    (folder / "model.json").write_text(json.dumps(values))
    renew_marker(folder)


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def test_the_model_comes_back(folder: Path) -> None:
    before = torch.get_rng_state()
    unet, frozen, card = checkpoint.read_model(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert card == tiny_card()
    assert equal(unet, tiny_unet(2))
    assert not unet.training
    assert frozen.text_encoder.width == 32
    assert frozen.autoencoder.channels == 4
    assert equal(checkpoint.read_model(folder, ema=False)[0], tiny_unet(1))
    inputs = torch.randn(1, 4, 3, 4, 4), torch.tensor([5]), torch.randn(1, 7, 32)
    with torch.no_grad():
        assert torch.equal(unet(*inputs), tiny_unet(2)(*inputs))


def test_one_set_of_weights_in_half_precision_is_enough(tmp_path: Path) -> None:
    write = {"unet.safetensors": lambda path: checkpoint.save_weights(tiny_unet(1), path, torch.float16)}
    folder = checkpoint.write(tmp_path / "step-7", write, tiny_card())
    assert {value.dtype for value in load_file(folder / "unet.safetensors").values()} == {torch.float16}
    unet = checkpoint.read_model(folder)[0]
    assert {value.dtype for value in unet.state_dict().values()} == {torch.float32}
    for ours, theirs in zip(unet.state_dict().values(), tiny_unet(1).state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.half().float())


def test_options_of_this_process(folder: Path) -> None:
    unet = checkpoint.read_model(folder, unet_options={"gradient_checkpointing": "all"})[0]
    assert unet.gradient_checkpointing == "all"
    with pytest.raises(CheckpointError, match="cannot be built"):
        checkpoint.read_model(folder, unet_options={"attention_backend": "magic"})


def test_other_architecture(folder: Path) -> None:
    change_card(folder, lambda card: card["unet"]["arguments"].update(block_out_channels=[32, 128]))
    with pytest.raises(CheckpointError, match=r"of another architecture: \d+ have another shape \(such as .*\(.*\) in the file") as caught:
        checkpoint.read_model(folder)
    assert "\n" not in str(caught.value)
    change_card(folder, lambda card: card["unet"]["arguments"].update(block_out_channels=[32, 64], num_temporal_convs=0))
    with pytest.raises(CheckpointError, match=r"\d+ are not in the network \(such as .*temp_convs"):
        checkpoint.read_model(folder)
    change_card(folder, lambda card: card["unet"]["arguments"].update(layers_per_block=2, num_temporal_convs=4))
    with pytest.raises(CheckpointError, match=r"\d+ weights are missing"):
        checkpoint.read_model(folder)
    change_card(folder, lambda card: card["unet"]["arguments"].update(block_out_channels=[33, 64]))
    with pytest.raises(CheckpointError, match=r"cannot be built: block_out_channels\[0\]=33"):
        checkpoint.read_model(folder)


def test_a_huge_network_is_refused_before_it_takes_memory(folder: Path) -> None:
    change_card(folder, lambda card: card["unet"]["arguments"].update(block_out_channels=[65536, 65536]))
    with pytest.raises(CheckpointError, match="another architecture"):
        checkpoint.read_model(folder)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b"", b"\x00" * 100, b"\xff" * 100], ids=["pickle", "empty", "zeros", "ones"])
def test_weights_that_are_no_safetensors(folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "ema.safetensors").write_bytes(content)
    renew_marker(folder)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        checkpoint.read_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_truncated_weights_are_noticed_with_and_without_the_marker(folder: Path) -> None:
    whole = (folder / "ema.safetensors").read_bytes()
    (folder / "ema.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=f"has {len(whole) - 100} bytes instead of {len(whole)}"):
        checkpoint.read_model(folder)
    renew_marker(folder)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        checkpoint.read_model(folder)


def test_frozen_parts_are_held_to_their_hash(folder: Path) -> None:
    change_card(folder, lambda card: card["text_encoder"]["arguments"].update(seed=3))
    expected = f"text encoder built here has sha256 {TinyTextEncoder(3).sha256()[:12]}"
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        checkpoint.read_model(folder)
    change_card(folder, lambda card: card["text_encoder"]["arguments"].update(seed=0))
    checkpoint.read_model(folder)
    change_card(folder, lambda card: card["autoencoder"].update(sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"autoencoder built here .* trained with 000000000000\.\.\."):
        checkpoint.read_model(folder)
    change_card(folder, lambda card: [card["autoencoder"].update(sha256=TinyAutoencoder().sha256()), narrow_text(card["text_encoder"])])
    with pytest.raises(CheckpointError, match="reads text of width 32, the text encoder writes width 16"):
        checkpoint.read_model(folder)


def narrow_text(part: dict[str, Any]) -> None:
    part["arguments"]["width"] = 16
    part["sha256"] = TinyTextEncoder(0, 16).sha256()


def test_a_stranger_runs_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('imported', 'w')")
    for name in ("evil.main", "builtins.exec", "t2v.checkpoint.read_model"):
        change_card(folder, lambda card, name=name: card["unet"].update({"class": name}))
        with pytest.raises(CheckpointError, match="known are VideoUNet"):
            checkpoint.read_model(folder)
    change_card(folder, lambda card: card["unet"].update({"class": "VideoUNet", "_target_": "evil.main"}))
    with pytest.raises(CheckpointError, match="unknown keys"):
        checkpoint.read_model(folder)
    assert not (tmp_path / "imported").exists()


def test_a_place_for_a_part_that_has_none(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text encoder is TextEncoder.random, which reads no file"):
        checkpoint.read_model(folder, text_encoder="somewhere")


def test_weights_into_an_existing_network(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    checkpoint.save_weights(tiny_unet(1), path)
    network = tiny_unet(2)
    checkpoint.load_weights(network, path)
    assert equal(network, tiny_unet(1))
    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"another architecture: \d+ weights are missing .*; 1 are not in the network \(such as a\)"):
        checkpoint.load_weights(network, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load_weights(network, tmp_path / "nowhere")
    assert Part("VideoUNet", {}).to_dict() == {"class": "VideoUNet", "arguments": {}}


def test_a_model_describes_itself() -> None:
    sampler = Sampler("ddim", 3, ClassifierFreeGuidance(2.0))
    card = checkpoint.describe(tiny_unet(gradient_checkpointing="all"), tiny_frozen(), sampler, sample=tiny_card().sample, step=7)
    assert checkpoint.ModelCard.from_dict(json.loads(card.to_json())) == card
    assert {key: card.unet.arguments[key] for key in UNET} == UNET
    assert not {"attention_backend", "gradient_checkpointing"} & card.unet.arguments.keys()
    assert (card.autoencoder, card.text_encoder) == (tiny_card().autoencoder, tiny_card().text_encoder)
    assert (card.schedule, card.sampler) == (tiny_card().schedule, tiny_card().sampler)

    class ShardedVideoUNet(VideoUNet):
        pass

    sharded = checkpoint.describe(ShardedVideoUNet(**UNET), tiny_frozen(), sampler, sample=tiny_card().sample, step=7)
    assert sharded.unet.name == "VideoUNet"

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_card

from t2v.checkpoint import CardError, CheckpointError, ModelCard, read_card


def changed(path: str, value: Any) -> dict[str, Any]:
    values = json.loads(tiny_card().to_json())
    *parents, last = path.split(".")
    node = values
    for name in parents:
        node = node[name]
    node[last] = value
    return values


def test_round_trip(tmp_path: Path) -> None:
    card = tiny_card(notes={"experiment": "shapes", "scores": [1, 2.5, None]})
    (tmp_path / "model.json").write_text(card.to_json())
    assert read_card(tmp_path) == card
    assert "_target_" not in card.to_json()


def test_how_a_network_runs_is_not_stored() -> None:
    card = ModelCard.from_dict(changed("unet.arguments.attention_backend", "triton"))
    assert card == tiny_card()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "its format is 2"),
        ("format", None, "its format is None"),
        ("step", -1, "step is -1"),
        ("step", True, "step is True"),
        ("surprise", 1, "unknown keys: 'surprise'"),
        ("_target_", "os.system", "unknown keys: '_target_'"),
        ("unet", "VideoUNet", "unet is 'VideoUNet', not an object"),
        ("unet.class", "os.system", "unet.class is 'os.system'; known are VideoUNet"),
        ("unet.class", "t2v.models.unet.VideoUNet", "known are VideoUNet"),
        ("unet.class", ["VideoUNet"], "known are VideoUNet"),
        ("unet.class", "__class__", "known are VideoUNet"),
        ("text_encoder.class", "VideoUNet", "known are TextEncoder.random"),
        ("unet._target_", "os.system", "unknown keys: '_target_'"),
        ("unet.arguments._target_", "os.system", "unknown keys: '_target_'"),
        ("unet.arguments.__class__", "x", "unknown keys: '__class__'"),
        ("unet.arguments.act_fn", {"_target_": {"a": {"b": {"c": 1}}}}, "not a plain value"),
        ("unet.arguments.block_out_channels", [10**9], "beyond 65536"),
        ("unet.arguments.block_out_channels", [32] * 100, "100 entries"),
        ("unet.arguments.layers_per_block", 10**6, "beyond 64"),
        ("text_encoder.arguments.download", True, "unknown keys: 'download'"),
        ("text_encoder.sha256", "abc", "not 64 hexadecimal digits"),
        ("autoencoder.sha256", None, "not 64 hexadecimal digits"),
        ("schedule.num_timesteps", "1000", "not a number"),
        ("schedule.beta_start", float("nan"), "not a number"),
        ("sampler.guidance", 9.0, "sampler.guidance is 9.0, not an object"),
        ("sampler.scheduler", ["ddim"], "not a name"),
        ("sampler.num_steps", 0, "1..65536"),
        ("schedule.prediction", "sample", "neither noise nor velocity"),
        ("schedule.shared_noise", 1.5, "0 to below 1"),
        ("schedule.num_timesteps", 1000.0, "1..65536"),
        ("schedule.num_timesteps", 10**9, "1..65536"),
        ("sampler.eta", 0.0, "unknown keys: 'eta'"),
        ("sample.frames", 10**9, "1..4096"),
        ("sample.frames", 1.5, "1..4096"),
        ("sample.fps", 0, "1..1000"),
        ("notes", [1], "not an object"),
    ],
)
def test_refusals(path: str, value: Any, message: str) -> None:
    with pytest.raises(CardError) as caught:
        ModelCard.from_dict(changed(path, value))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["step", "unet", "sample"])
def test_missing_keys(key: str) -> None:
    values = tiny_card().to_dict()
    del values[key]
    with pytest.raises(CardError, match=f"lacks {key}"):
        ModelCard.from_dict(values)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[1, 2]",
        b"null",
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b"[" * 100_000,
        b'{"format": ' + b"9" * 10_000 + b"}",
        b"\x80\x04\x95cos\nsystem\n(S'echo'\ntR.",
        b"\xff\xfe\x00",
        b" " * (1 << 21),
    ],
)
def test_foreign_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.json cannot be used") as caught:
        read_card(tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_missing_card(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.json cannot be read: No such file"):
        read_card(tmp_path)

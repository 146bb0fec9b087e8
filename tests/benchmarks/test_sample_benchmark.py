from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from t2v.benchmarks import encode as encoding
from t2v.benchmarks import sample as sampling
from t2v.benchmarks.encode import encode
from t2v.benchmarks.random_parts import SMALL, kl_config
from t2v.benchmarks.sample import sample
from t2v.training.operations import autoencoder_tflop, unet_tflop

CPU = torch.device("cpu")
QUICK: dict[str, Any] = {"frames": 2, "size": 4, "rounds": 1, "seconds": 5, "device": "cpu"}


def test_a_row_for_each_sampler_number_of_prompts_and_network(tmp_path: Path) -> None:
    rows = list(sample(**QUICK, prompts=[1, 2], steps={"ddim": 2, "dpm++": 1}, versus="diffusers", profile=str(tmp_path / "kernels.txt")))
    (mp4,) = [row for row in rows if "ms" in row]
    assert mp4["ms"] > 0
    rows.remove(mp4)
    assert [(row["network"], row["sampler"], row["prompts"]) for row in rows] == [
        (name, sampler, batch) for name in ("t2v", "diffusers") for sampler in ("ddim", "dpm++") for batch in (1, 2)
    ]
    for row in rows:
        shapes = (4, 2, 4, 4), (77, 64)
        a_step = unet_tflop(SMALL, *shapes, texts=2) if row["network"] == "t2v" else 2 * unet_tflop(SMALL, *shapes)
        work = row["steps"] * a_step + autoencoder_tflop(kl_config(None, CPU), (4, 2, 4, 4))[1]
        assert row["tflop_per_s"] == pytest.approx(row["clips_per_s"] * work)
    assert "aten::addmm" in (tmp_path / "kernels.txt").read_text()


@pytest.mark.parametrize("on", [True, False])
def test_settings_reach_what_is_measured(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Spy(sampling.TextToVideoPipeline):
        def __init__(self, *parts: Any, cuda_graph: bool, **options: Any) -> None:
            made.append(cuda_graph)
            super().__init__(*parts, cuda_graph=cuda_graph, **options)

    monkeypatch.setattr(sampling, "TextToVideoPipeline", Spy)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not on)
    list(sample(**QUICK, prompts=[1], steps={"ddim": 1}, cuda_graph=on, cudnn_benchmark=on))
    assert made == [on]
    assert torch.backends.cudnn.benchmark is on


def test_encoding_and_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(encode(**QUICK, batches=[1, 2], versus="diffusers"))
    assert all(row["fine"] and 1e-3 < row["error"] < 0.1 for row in rows[:2])
    rows = rows[2:]
    assert [(row["direction"], row["clips"], row["network"]) for row in rows] == [
        (direction, batch, name) for direction in ("encode", "decode") for batch in (1, 2) for name in ("t2v", "diffusers")
    ]
    assert all(row["clips_per_s"] > 0 for row in rows)
    monkeypatch.setattr(encoding, "default_dtype", lambda device: pytest.fail("dtype was given"))
    assert list(encode(**QUICK, batches=[1], directions=["encode"], dtype="float32", options={"max_frames_per_pass": 1}))


def test_options_that_cannot_take_effect_are_errors() -> None:
    for what in (sample, encode):
        for options, words in (({"versus": "others"}, "versus=others"), ({"compile_peer": True}, "no peer")):
            with pytest.raises(ValueError, match=words):
                list(what(**QUICK, **options))  # type: ignore[operator]
    with pytest.raises(ValueError, match="dtype=int8"):
        list(encode(**QUICK, dtype="int8"))


def test_both_autoencoders_answer_alike() -> None:
    torch.manual_seed(0)
    ours = encoding.our_coder(None, CPU, torch.float32, {})
    theirs = encoding.Peer(ours.model)
    pixels, latents = encoding.inputs(ours.factor, CPU, 1, 2, 4)
    torch.testing.assert_close(theirs.moments(pixels).permute(0, 2, 3, 1), ours.moments(pixels)[0])
    difference = theirs.decode(latents).permute(0, 2, 3, 1).int() - ours.decode(latents)[0].int()
    assert difference.abs().max() <= 1

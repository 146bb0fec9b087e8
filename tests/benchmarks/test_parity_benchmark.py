from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from t2v import benchmark
from t2v.benchmarks import parity as module
from t2v.benchmarks.parity import attentions, parity
from t2v.benchmarks.unet import unet
from t2v.models.kernels.temporal_attention import PlainTemporalAttention

TINY = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
}


def test_rows_on_the_cpu_are_fine_and_a_wrong_network_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"device": "cpu", "config": TINY, "clips": 1, "frames": 3, "size": 8, "attention_shapes": [(1, 3, 4, 2, 16)]}
    rows = list(parity(**options))
    assert [row["what"] for row in rows[:2]] == ["network, float32 against diffusers, sdpa", "network, bfloat16 against float32, sdpa"]
    assert rows[0]["error"] < 1e-5
    assert 1e-4 < rows[1]["diffusers"] < 0.1
    assert all(row["fine"] for row in rows)
    assert len(rows) == 6
    monkeypatch.setattr("t2v.models.convolution.GroupNorm.beside", lambda self, x, *_, **__: (x, x))
    assert not next(parity(**options))["fine"]


def test_a_backend_is_held_to_one_and_a_half_times_sdpas_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "usable", lambda *_, **__: iter(["triton"]))
    monkeypatch.setattr(module, "temporal_attention", PlainTemporalAttention.apply)
    rows = attentions("cpu", 1, 8, 4, 2, 16)
    assert [row["what"].split(", ")[1] for row in rows] == ["sdpa"] * 4 + ["triton"] * 4
    assert all(row["fine"] for row in rows)
    monkeypatch.setattr(module, "temporal_attention", lambda qkv: PlainTemporalAttention.apply(qkv) * 1.02)
    assert not any(row["fine"] for row in attentions("cpu", 1, 8, 4, 2, 16)[4:])


def test_the_comparison_of_networks_counts_time_and_kept_tensors() -> None:
    rows = unet(config=TINY, clips=1, frames=2, size=8, rounds=1, device="cpu")
    assert [row["network"] for row in rows] == ["t2v", "diffusers", "diffusers / t2v"]
    assert all(row["wall_ms"] > 0 and row["kept_MB"] > 0 for row in rows)
    assert rows[2]["kept_MB"] >= 1  # no more memory than the peer


def test_the_entry_point_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(benchmark.WHAT, "small", "parity:small")
    monkeypatch.setattr(module, "small", lambda size=1: [{"what": "x", "error": 0.5, "bound": 1.0, "fine": size < 3}], raising=False)
    monkeypatch.setitem(benchmark.WHAT, "network", "parity:network")
    monkeypatch.setattr(module, "network", lambda config: [{"config": config}], raising=False)
    monkeypatch.setitem(benchmark.WHAT, "broken", "parity:broken")
    monkeypatch.setattr(module, "broken", lambda: (({"k": 1 / (1 - k)}) for k in range(2)), raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmark", "what=broken"])
    with pytest.raises(ZeroDivisionError):
        benchmark.main()
    assert capsys.readouterr().out.splitlines()[-2:] == ["k", "1"]
    for arguments, words, code in (
        (["what=small", "+options.size=2", f"output={tmp_path / 'rows.json'}"], "0.5        1          True", None),
        (["what=small", f"output={tmp_path / 'rows.json' / 'rows.json'}"], "a file is where a folder is needed", 1),
        (["what=small", "+options.size=3"], "bound is not kept", 1),
        (["what=nothing"], "what=nothing", 1),
        (["what=small", "+options.sizes=3"], "no option sizes", 1),
        (["what=small", "+options.size=0"], "options.size=0 is to be a number above 0", 1),
        (["what=small", "+options.size=many"], "options.size=many is to be a number above 0", 1),
        (["what=small", "+options.size=true"], "options.size=True is to be no switch", 1),
        (["what=train", "+options.compile=2"], "options.compile=2 is to be true or false", 1),
        (["what=train", "+options.batches=8"], "options.batches=8 is to be a list: options.batches=[8]", 1),
        (["what=train", "+options.batches=[8,0]"], "options.batches=[8, 0] is to be a number above 0", 1),
        (["what=small", "unet=shapes"], "no option config", 1),
        (["what=network", "unet=shapes"], "'block_out_channels': [32, 64]", None),
    ):
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        if code is None:
            benchmark.main()
        else:
            with pytest.raises(SystemExit):
                benchmark.main()
        captured = capsys.readouterr()
        assert words in captured.out + captured.err
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert written["options"] == {"size": 2}

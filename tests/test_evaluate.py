"""The command: a model, a folder, weights that are missing, tables that must not be made."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from tiny_model import read_tiny_parts, tiny_card, tiny_unet

from t2v import checkpoint, evaluate
from t2v.configuration import config_dir

SMALL = (
    "protocol=shapes",
    "protocol.num_videos=9",
    "protocol.num_frames=4",
    "protocol.size=32",
    "protocol.chunk=4",
    "device=cpu",
    "cache=cache",
)
DATA = ("datasets.shapes.videos=10",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    read_tiny_parts(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write = {"unet.safetensors": lambda path: checkpoint.save_weights(tiny_unet(1), path)}
    return checkpoint.write(tmp_path / "models" / "step-7", write, tiny_card())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["t2v-evaluate", *arguments])
    evaluate.main()


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *arguments)
    assert stopped.value.code == 1
    return capsys.readouterr().err


def test_a_checkpoint_then_its_videos_as_a_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *SMALL, *DATA, f"checkpoint={folder}", "output=one", "subject=Ours")
    printed = capsys.readouterr().out
    assert "# Ours" in printed
    assert "fvd_shapes_n9" in printed
    assert "direction_right_n9" in printed
    assert {path.name for path in Path("one").iterdir()} == {
        "results.json", "results.md", "page.html", "manifest.jsonl", "videos", "features",
    }  # fmt: skip
    first = json.loads(Path("one/results.json").read_text())
    assert first["details"]["sampler"] == {"scheduler": "ddim", "num_steps": 3, "guidance": {"scale": 2.0}, "spacing": "leading"}
    run(monkeypatch, *SMALL, *DATA, "videos=one/videos", "output=two", "subject=Theirs")
    second = json.loads(Path("two/results.json").read_text())
    assert [score["value"] for score in first["scores"]] == [score["value"] for score in second["scores"]]
    capsys.readouterr()
    run(monkeypatch, "compare=[one/results.json,two/results.json]")
    assert capsys.readouterr().out.count("\n") == 4


def test_a_folder_begun_by_another_model_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *SMALL, *DATA, f"checkpoint={folder}", "output=one")
    for other in ("guidance=1", "steps=2", "sampler=dpm"):
        assert "use another output folder" in fails(monkeypatch, capsys, *SMALL, *DATA, f"checkpoint={folder}", "output=one", other)


def test_the_same_model_sampled_otherwise_does_not_look_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for output, guidance in (("one", 1), ("two", 4)):
        run(monkeypatch, *SMALL, *DATA, f"checkpoint={folder}", f"output={output}", f"guidance={guidance}", "subject=Ours")
        assert f"guidance.scale {guidance}.0" in Path(output, "results.md").read_text()
    capsys.readouterr()
    run(monkeypatch, "compare=[one/results.json,two/results.json]")
    printed = capsys.readouterr().out
    assert "| Ours (sampler.guidance.scale=1.0) |" in printed
    assert "| Ours (sampler.guidance.scale=4.0) |" in printed


def test_different_protocols_do_not_share_a_table(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *SMALL, *DATA, f"checkpoint={folder}", "output=one")
    run(monkeypatch, *SMALL, *DATA, f"checkpoint={folder}", "output=two", "protocol.seed=1")
    assert "was measured on different videos" in fails(monkeypatch, capsys, "compare=[one/results.json,two/results.json]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say how to measure: protocol=paper_clipsim|paper_fvd"),
        (("protocol=paper_fvd",), "say what to measure"),
        (("protocol=paper_fvd", "videos=a", "weights=modelscope:b"), "say what to measure"),
        (("protocol=paper_fvd", "weights=modelscope:b"), "annotation file"),
        (("protocol=paper_fdv",), "Did you mean paper_fvd"),
        (("protocol=shapes", "protocol.metrics=[fid_vid]"), "Unknown metrics"),
        ((*SMALL, "datasets.shapes.videos=8"), "counts 9 videos, shapes has 8"),
        ((*SMALL, *DATA, "videos=nowhere"), "videos=nowhere is not a folder"),
        ((*SMALL, *DATA, "checkpoint=nowhere"), "nowhere"),
        ((*SMALL, *DATA, "dtype=float8"), "dtype=float8 is unknown"),
    ],
)
def test_mistakes_get_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    printed = fails(monkeypatch, capsys, *arguments)
    assert message in printed
    assert printed.strip().count("\n") == 0


def test_check_lists_every_network_and_fails_without_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("T2V_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    with pytest.raises(SystemExit):
        run(monkeypatch, "check=true")
    out, err = capsys.readouterr()
    for name in ("i3d", "clip_vit_b32", "inception_v3", "shapes", "motion"):
        assert f"| {name} |" in out
    assert "3 of 5 networks cannot be used (i3d, clip_vit_b32, inception_v3)" in err
    run(monkeypatch, "check=true", "protocol=shapes")
    assert "all weights are there and right" in capsys.readouterr().out


def test_presets_are_the_papers() -> None:
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from t2v.evaluation.scores import check_protocol

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        presets = {name: instantiate(compose("evaluate", [f"protocol={name}"]).protocol) for name in evaluate.protocols()}
    for name, preset in presets.items():
        check_protocol(preset)
        assert preset.name == name
    fvd = presets["paper_fvd"]
    assert (fvd.num_videos, fvd.captions, fvd.num_frames, fvd.fps, fvd.size) == (2048, "one", 16, 3, 256)
    assert {"fvd", "fid_vid_clip_vit_b32", "fid_vid_inception_v3", "clipsim"} <= set(fvd.metrics)
    assert (presets["paper_clipsim"].captions, presets["paper_clipsim"].num_videos) == ("all", 2990)
    assert presets["videoldm_2990"].num_videos == 2990
    assert presets["videopoet_30fps"].fps == 30
    assert presets["quick"].num_videos == 256


def test_weights_are_named_by_content_not_by_size(tmp_path: Path) -> None:
    from t2v.evaluate import identity
    from t2v.weights import folder_of

    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unet.safetensors").write_bytes(content)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "unet.safetensors").write_bytes(b"one")
    a, b, c = (identity(f"diffusers:{tmp_path / name}") for name in "abc")
    assert a == c != b
    shipped = folder_of("package:shapes")
    assert identity("package:shapes") == identity(shipped) != a

"""The commands as users type them: repack a folder, look at it; one clear line where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from made_shards import video_bytes, video_sample, write_tar

from t2v.configuration import config_dir
from t2v.encode import encode
from t2v.repack import repack


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_repack_then_inspect(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    for number in range(3):
        (tmp_path / f"clips/{number}.mp4").write_bytes(video_bytes())
    (tmp_path / "clips/captions.jsonl").write_text("".join(f'{{"file": "{k}.mp4", "caption": "a dog, {k}"}}\n' for k in range(3)))
    code, text = run(tmp_path, "t2v.repack", "source=clips", "captions=clips/captions.jsonl", "output=shards", "workers=1")
    assert (code, "3 new samples" in text) == (0, True), text
    code, text = run(tmp_path, "t2v.inspect", "data=webvid", "paths.webvid=shards", "output=looked")
    assert (code, "3 usable (100.0%)" in text, "a dog, 1" in text) == (0, True, True), text
    assert (tmp_path / "looked/video.webp").stat().st_size > 1000
    assert (tmp_path / "looked/video.png").stat().st_size > 100


def test_one_line_for_a_mistake(tmp_path: Path) -> None:
    code, text = run(tmp_path, "t2v.inspect", "data=webvid", "paths.webvid=none")
    assert code == 1
    assert text.strip().startswith("error: webvid: none does not exist")
    assert len(text.strip().splitlines()) == 1


@pytest.mark.parametrize("preset", ["laion_webvid", "relaion", "datacomp", "openvid", "panda70m", "folder", "webvid_latents"])
def test_presets_fit_the_readers(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They fail on the missing data, with one line, not on their configuration."""
    monkeypatch.setenv("T2V_DATA", "none")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        data = compose("inspect", overrides=[f"data={preset}"]).data
    assert set(data) <= {"image", "video"}
    for node in data.values():
        with pytest.raises(InstantiationException) as caught:
            instantiate(node)
        assert isinstance(caught.value.__cause__, ValueError)
        assert "does not exist" in str(caught.value.__cause__)


@pytest.mark.slow
def test_encode_continues(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (8,) * 4, "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    AutoencoderKL(**sizes, norm_num_groups=4, layers_per_block=1).save_pretrained(tmp_path / "autoencoder")
    for shard in range(2):
        write_tar(tmp_path / f"videos/{shard:05d}.tar", [video_sample(shard * 3 + k) for k in range(3)])
    command = [
        "t2v.encode",
        "data=webvid",
        "paths.webvid=videos",
        "data.video.size=32",
        "autoencoder=shapes",
        "autoencoder.source=autoencoder",
    ]
    code, text = run(tmp_path, *command, "output=latents", "num_workers=1")
    assert (code, "6 clips, 144 frames in 2 new shards" in text) == (0, True), text
    assert " frames/s, 0 min " in text
    assert " s left" in text
    code, text = run(tmp_path, *command, "output=latents", "num_workers=0")
    assert (code, "in 0 new shards" in text) == (0, True), text
    code, text = run(tmp_path, *command, "output=latents", "data.video.size=16")
    assert (code, "holds other latents" in text) == (1, True), text
    code, text = run(tmp_path, "t2v.inspect", "data=webvid_latents", "data.video.urls=latents", "data.video.size=32")
    assert (code, "6 usable (100.0%)" in text) == (0, True), text


STEP = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, (0, 1, 0)),
        (STEP, (3, 4, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1, 0)),  # a batch script
        (STEP | {"SLURM_STEP_ID": str(0xFFFFFFFA)}, (0, 1, 0)),  # a shell of salloc
        ({"SLURM_NTASKS": "4", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "2"}, (5, 8, 2)),
    ],
)
def test_who_encodes_what(environment: dict[str, str], ranks: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*STEP, "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("encode", overrides=["data=webvid", "output=out"])
    assert (cfg.rank, cfg.world, cfg.local_rank) == ranks


def test_encode_is_finished_when_all_ranks_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"videos/{shard:05d}.tar", [video_sample(shard)])
    options = ["data=webvid", f"paths.webvid={tmp_path}/videos", "data.video.size=16", "autoencoder=shapes", f"output={tmp_path}/out"]
    said = []
    for rank in range(2):
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            encode(compose("encode", overrides=[*options, "num_workers=0", "world=2", f"rank={rank}"]))
        said.append(capsys.readouterr().out)
    assert ["rank 0 of 2: 2 of 3 shards are there" in said[0], "next:" in said[0]] == [True, False]
    assert ["rank 1 of 2: 3 of 3 shards are there" in said[1], "next: python -m t2v.train" in said[1]] == [True, True]


@pytest.mark.parametrize("option", ["size=64", "fps=6", "gop=3", "crf=30", "segment=2"])
def test_repack_without_recoding_takes_no_options_of_recoding(option: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("repack", overrides=[f"source={tmp_path}", f"output={tmp_path}/out", option])
    with pytest.raises(ValueError, match=rf"{option}.*recode=true"):
        repack(cfg)


BAD = ["crf=good", "crf=52", "size=256.5", "size=0", "gop=0", "segment=long", "segment=0", "fps=nan", "per_shard=0", "workers=-1"]


@pytest.mark.parametrize("option", BAD)
def test_options_of_repacking_are_numbers_in_their_bounds(option: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("repack", overrides=[f"source={tmp_path}", f"output={tmp_path}/out", "recode=true", option])
    with pytest.raises(ValueError, match=rf"{option} must be a (whole )?number (of at least|from)"):
        repack(cfg)
    assert not (tmp_path / "out").exists()

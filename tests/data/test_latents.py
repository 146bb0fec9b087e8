"""Latent shards hold what encoding on the fly gives, window for window; other autoencoders are refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from made_shards import video_bytes, video_sample, write_images, write_tar

from t2v.configuration import config_dir
from t2v.data import encoding
from t2v.data.arrays import pack, pack_moments, read_moments
from t2v.data.encoding import encode_shards
from t2v.data.errors import BadSample, DataQualityError
from t2v.data.folder import read_table
from t2v.data.latents import LatentCard, LatentFrames, webvid_latents
from t2v.data.loader import ClipLoader
from t2v.data.shards import LocalTar
from t2v.data.webvid import webvid
from t2v.encode import encode
from t2v.video import decode_clip


class Autoencoder:
    """Frame by frame, 8 times smaller: block means as means, block deviations as log variances."""

    factor, channels = 8, 3

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain
        self.calls = 0

    def moments(self, frames: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        b, f, h, w, c = frames.shape
        blocks = (frames.float() / 127.5 - 1).view(b, f, h // 8, 8, w // 8, 8, c) * self.gain
        return torch.cat([blocks.mean((3, 5)), blocks.std((3, 5)) - 5], dim=-1)  # (b f h/8 w/8 2c)

    def sha256(self) -> str:
        return f"{self.gain:064.3f}"


class TextEncoder:
    """Five tokens of width 4: the number in the caption, or -1."""

    def __init__(self, name: str = "one") -> None:
        self.name = name

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([torch.full((5, 4), float(prompt.split()[-1]) if prompt else -1.0) for prompt in prompts])

    def sha256(self) -> str:
        return self.name


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for shard in range(3):
        samples = [video_sample(shard * 4 + k) for k in range(4)]
        if shard == 1:
            samples[2][1]["mp4"] = b"<html>" * 50
            samples[3][1]["mp4"] = video_bytes(frames=30)  # 10 frames at 3 fps only
        write_tar(folder / f"{shard:05d}.tar", samples)
    return folder


def stream(folder: Path):
    return webvid(str(folder), num_frames=6, size=16, num_readers=4, limits={"min_samples": 50})


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_are_those_of_the_videos(videos: Path, tmp_path: Path, workers: int) -> None:
    autoencoder = Autoencoder()
    shards = list(encode_shards(stream(videos), autoencoder, tmp_path / "out", num_workers=workers))
    assert [(shard.clips, dict(shard.skipped)) for shard in shards] == [(4, {}), (3, {"video_open": 1}), (4, {})]
    assert json.loads((tmp_path / "out/00001_stats.json").read_text())["successes"] == 3
    latents = webvid_latents(str(tmp_path / "out"), num_frames=6, size=16, num_readers=4, buffer=3)
    latents.check(autoencoder, TextEncoder())
    batches = ClipLoader(latents, global_batch=40)
    batch = next(iter(batches))
    assert batch.frames.shape == (40, 6, 2, 2, 6)
    assert batch.frames.dtype == torch.float16
    assert set(batch.keys) == {f"{k:08d}" for k in range(12) if k != 6}
    assert len(set(batch.starts)) > 10
    for moments, start, caption, key in zip(batch.frames, batch.starts, batch.captions, batch.keys):
        assert caption == f"video {int(key)}"
        data = video_bytes(frames=30) if int(key) == 7 else video_bytes()
        frames, _ = decode_clip(data, num_frames=6, fps=3, size=16, start=start)
        assert torch.allclose(moments.float(), autoencoder.moments(frames[None])[0], atol=4e-3)


def test_encoding_continues_and_divides_among_ranks(videos: Path, tmp_path: Path) -> None:
    autoencoder = Autoencoder()
    out = tmp_path / "out"
    first = encode_shards(stream(videos), autoencoder, out, rank=0, world=2)
    assert next(first).shard.name == "00000.tar"
    first.close()
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00000_stats.json", "dataset.json", "encode.json"]
    assert [shard.shard.name for shard in encode_shards(stream(videos), autoencoder, out, rank=1, world=2)] == ["00001.tar"]
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    autoencoder.calls = 0
    again = list(encode_shards(stream(videos), autoencoder, out))
    assert [shard.was_there for shard in again] == [True, True, False]
    assert autoencoder.calls == 4
    assert all((out / name).read_bytes() == data for name, data in before.items())


def keys(folder: Path) -> list[str]:
    """Of all samples."""
    tars = [LocalTar(str(path)) for path in sorted(folder.glob("*.tar"))]
    return [tar.read(k).key for tar in tars for k in range(len(tar))]


def test_shards_that_come_later_are_encoded_once(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (videos / "00001.tar").rename(tmp_path / "later.tar")
    assert [shard.shard.name for shard in encode_shards(stream(videos), Autoencoder(), out)] == ["00000.tar", "00002.tar"]
    (tmp_path / "later.tar").rename(videos / "00001.tar")
    assert [shard.was_there for shard in encode_shards(stream(videos), Autoencoder(), out)] == [True, False, True]
    assert keys(out) == [f"{k:08d}" for k in range(12) if k != 6]
    (videos / "00000.tar").unlink()  # what was encoded may go
    assert all(shard.was_there for shard in encode_shards(stream(videos), Autoencoder(), out))


def test_shards_of_one_name_do_not_take_each_others_place(videos: Path, tmp_path: Path) -> None:
    both = [f"{videos}/*.tar", str(write_tar(tmp_path / "more/00001.tar", [video_sample(99)]).parent)]
    options = {"num_frames": 6, "size": 16, "num_readers": 4}
    assert len(list(encode_shards(webvid(both, **options), Autoencoder(), tmp_path / "at_once"))) == 4
    list(encode_shards(webvid(both[0], **options), Autoencoder(), tmp_path / "in_turn"))
    again = list(encode_shards(webvid(both, **options), Autoencoder(), tmp_path / "in_turn"))
    assert [shard.was_there for shard in again] == [True, True, True, False]
    for folder in ("at_once", "in_turn"):
        assert sorted(keys(tmp_path / folder)) == [f"{k:08d}" for k in (*range(6), *range(7, 12), 99)]


def test_two_sources_take_different_captions_from_one_shard(tmp_path: Path) -> None:
    shard = str(write_tar(tmp_path / "videos/0.tar", [("1", {"mp4": video_bytes(), "txt": b"one", "json": b'{"other": "two"}'})]))
    both = {"a": {"urls": shard}, "b": {"urls": shard, "caption": "json:other"}}
    for _ in range(2):  # of which the first ends after one of them
        shards = encode_shards(webvid(sources=both, num_frames=6, size=16, num_readers=2), Autoencoder(), tmp_path / "out")
        next(shards)
    assert [encoded.was_there for encoded in shards] == [False]
    captions = [LocalTar(str(path)).read(0).members["txt"] for path in (tmp_path / "out").glob("*.tar")]
    assert sorted(captions) == [b"one", b"two"]


def test_outputs_of_other_data_are_refused(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(encode_shards(stream(videos), Autoencoder(), out))
    other = write_tar(tmp_path / "other/00002.tar", [video_sample(99)])
    with pytest.raises(ValueError, match=rf"00002.tar was webvid {videos}/00002.tar and is webvid {other}. Choose another output="):
        list(encode_shards(stream(other.parent), Autoencoder(), out))
    with pytest.raises(ValueError, match=r"webvid.filters was \[\] and is \['key > 1'\]"):
        list(encode_shards(webvid(str(videos), num_frames=6, size=16, num_readers=4, filters=["key > 1"]), Autoencoder(), out))
    with pytest.raises(ValueError, match="short was skip and is loop"):
        list(encode_shards(webvid(str(videos), num_frames=6, size=16, num_readers=4, short="loop"), Autoencoder(), out))
    with pytest.raises(ValueError, match="max_frames was 300 and is 24"):
        list(encode_shards(stream(videos), Autoencoder(), out, max_frames=24))
    with pytest.raises(ValueError, match=r"no encode.json, which says what they were made of: choose another output="):
        list(encode_shards(stream(videos), Autoencoder(), other.parent))
    assert [path.name for path in other.parent.iterdir()] == ["00002.tar"]


def test_all_captions_of_one_file_are_encoded(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/b.mp4", "a_b.mp4"):
        (tmp_path / name).write_bytes(video_bytes())
    rows = ["a/b.mp4", "a/b.mp4", "a_b.mp4", "a/b.mp4"]
    (tmp_path / "captions.csv").write_text("file,caption\n" + "".join(f"{name},video {k}\n" for k, name in enumerate(rows)))
    (shard,) = encode_shards(stream(tmp_path / "captions.csv"), Autoencoder(), tmp_path / "out")
    tar = LocalTar(str(shard.shard))
    found = [(tar.read(k).key, tar.read(k).members["txt"].decode(), tar.read(k).fields["key"]) for k in range(len(tar))]
    assert found == [("a_b", "video 0", "a/b"), ("a_b_2", "video 1", "a/b"), ("a_b_3", "video 2", "a_b"), ("a_b_4", "video 3", "a/b")]


def test_readers_find_the_files_of_a_table_that_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "a.mp4").write_bytes(video_bytes())
    (tmp_path / "tables/captions.csv").write_text("file,caption\n../a.mp4,video 1\n")
    (shard,) = encode_shards(stream(tmp_path / "tables/captions.csv"), Autoencoder(), tmp_path / "out")
    assert (shard.clips, keys(tmp_path / "out")) == (1, ["_a"])


def test_a_table_that_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video_bytes())
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\na.mp4,video 1\n")
    (shard,) = encode_shards(stream(table), Autoencoder(), tmp_path / "out")
    assert shard.clips == 1
    assert keys(tmp_path / "out") == ["a"]
    read_table.cache_clear()
    table.write_text("file,caption\na.mp4,video 1\na.mp4,video 2\n")  # its rows are divided in another way now
    with pytest.raises(ValueError, match=rf"{table} was 27 bytes .* and is 41 bytes"):
        list(encode_shards(stream(table), Autoencoder(), tmp_path / "out"))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_whose_connection_broke_is_encoded_again(
    videos: Path, tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store is a folder, so that workers see it, too."""
    whole = (videos / "00002.tar").read_bytes()
    (videos / "00002.tar").write_bytes(whole[: len(whole) // 2])
    overrides = ["data=webvid", f"paths.webvid=file://{videos}", "data.video.size=16", "autoencoder=shapes", "max_frames=1"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("encode", overrides=[*overrides, f"output={tmp_path}/out", f"num_workers={workers}"])
    with pytest.raises(OSError, match=r"1 of 3 shards could not be read to their end.*00002.tar: unexpected end of data.*tries them again"):
        encode(cfg)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert not list((tmp_path / "out").glob(".*"))
    assert "00002.tar is not written" in capsys.readouterr().out
    (videos / "00002.tar").write_bytes(whole)
    encode(cfg)
    assert "4 clips, 4 frames in 1 new shards" in capsys.readouterr().out
    assert len(keys(tmp_path / "out")) == 11


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_shard_does_not_end_the_encoding(videos: Path, tmp_path: Path, workers: int) -> None:
    (videos / "00001.tar").write_bytes(b"")
    shards = list(encode_shards(stream(videos), Autoencoder(), tmp_path / "out", num_workers=workers))
    assert [(shard.clips, dict(shard.skipped), "00001.tar" in shard.lost) for shard in shards] == [
        (4, {}, False),
        (0, {"shard_error": 1}, True),
        (4, {}, False),
    ]
    write_tar(videos / "00001.tar", [video_sample(4)])
    assert [shard.clips for shard in encode_shards(stream(videos), Autoencoder(), tmp_path / "out")] == [0, 1, 0]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_lies_before_the_damage_of_a_shard_is_encoded(videos: Path, tmp_path: Path, workers: int) -> None:
    whole = (videos / "00002.tar").read_bytes()
    (videos / "00002.tar").write_bytes(whole[: len(whole) * 3 // 4])
    *_, shard = encode_shards(stream(videos), Autoencoder(), tmp_path / "out", num_workers=workers)
    assert (shard.clips, dict(shard.skipped), shard.lost) == (2, {"shard_error": 1}, "")
    assert keys(tmp_path / "out")[-2:] == ["00000008", "00000009"]


@pytest.mark.parametrize(("bad", "stops"), [(2, False), (3, True)])
def test_too_many_bad_samples_end_the_encoding(tmp_path: Path, bad: int, stops: bool) -> None:
    samples = [video_sample(k) for k in range(10)] + [(f"bad{k}", {"mp4": b"<html>" * 50, "txt": b"?"}) for k in range(bad)]
    write_tar(tmp_path / "videos/0.tar", samples)
    videos = webvid(str(tmp_path / "videos"), num_frames=6, size=16, num_readers=1, limits={"min_samples": 2})
    shards = encode_shards(videos, Autoencoder(), tmp_path / "out")
    if stops:
        with pytest.raises(DataQualityError, match=r"3 of the last 13 samples are bad \(limit max_bad_fraction=0.2\)"):
            list(shards)
    else:
        assert [shard.clips for shard in shards] == [10]


def test_clips_and_captions_are_chosen_as_training_on_the_videos_would(tmp_path: Path) -> None:
    members = {"mp4": video_bytes(), "json": b'{"caption_1": "one", "caption_2": "two"}'}
    write_tar(tmp_path / "videos/0.tar", [(str(k), members) for k in range(9)])
    options = {"num_frames": 6, "size": 16, "num_readers": 1, "caption": "json:caption_*"}
    (shard,) = encode_shards(webvid(str(tmp_path / "videos"), **options), Autoencoder(), tmp_path / "out")
    tar = LocalTar(str(shard.shard))
    assert {tar.read(k).members["txt"] for k in range(9)} == {b"one", b"two"}
    for limit in ({"min_distinct": 1.1}, {"max_pixels": 99}):
        (shard,) = encode_shards(webvid(str(tmp_path / "videos"), **options, **limit), Autoencoder(), tmp_path / next(iter(limit)))
        assert shard.skipped.total() == 9


def test_too_many_unreadable_shards_end_the_encoding(tmp_path: Path) -> None:
    for number in range(30):
        path = write_tar(tmp_path / f"videos/{number:05d}.tar", [])
        if number in (21, 23):
            path.write_bytes(b"")
    with pytest.raises(DataQualityError, match=r"2 of 24 shards are unreadable \(limit max_unreadable_shards=0.05\)"):
        list(encode_shards(stream(tmp_path / "videos"), Autoencoder(), tmp_path / "out"))


def test_an_error_leaves_no_half_shard(videos: Path, tmp_path: Path) -> None:
    class Breaks(Autoencoder):
        def moments(self, frames: torch.Tensor) -> torch.Tensor:
            if self.calls == 2:
                raise RuntimeError("out of memory")
            return super().moments(frames)

    with pytest.raises(RuntimeError, match="memory"):
        list(encode_shards(stream(videos), Breaks(), tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dataset.json", "encode.json"}


def test_what_does_not_fit_is_refused(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(encode_shards(stream(videos), Autoencoder(), out))
    latents = webvid_latents(str(out), num_frames=6, size=16)
    with pytest.raises(ValueError, match="another autoencoder"):
        latents.check(Autoencoder(gain=0.5), TextEncoder())
    with pytest.raises(ValueError, match=r"other latents: autoencoder_sha256 was 0+1.000 and is 0+0.500. Choose another output="):
        list(encode_shards(stream(videos), Autoencoder(gain=0.5), out))
    with pytest.raises(ValueError, match="16 pixels at 3 fps, not of 32 at 3"):
        webvid_latents(str(out), size=32)
    with pytest.raises(ValueError, match=r"dataset.json is missing.*t2v.encode"):
        webvid_latents(str(videos))
    from t2v.data.laion import laion

    with pytest.raises(ValueError, match="only streams of videos"):
        list(encode_shards(laion(str(write_images(tmp_path / "images", 1, 1)), size=16), Autoencoder(), tmp_path / "o"))
    (out / "dataset.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="does not describe latents"):
        LatentCard.read(str(out))


def test_short_clips_and_damaged_latents_are_bad_samples(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(encode_shards(stream(videos), Autoencoder(), out))
    batch = next(iter(ClipLoader(webvid_latents(str(out), num_frames=16, size=16, num_readers=2), global_batch=30)))
    assert batch.bad == {("webvid_latents", "video_too_short"): batch.bad.total()}
    assert set(batch.keys) == {f"{k:08d}" for k in range(12) if k not in (6, 7)}
    for data in (b"", b"nothing", pack_moments(torch.zeros(2, 2, 2, 6))[:-40]):
        with pytest.raises(BadSample, match="latent_open"):
            read_moments(data)
    with pytest.raises(ValueError, match="not finite"):
        pack_moments(torch.full((1, 1, 1, 2), 1e6))
    frames = LatentFrames(LatentCard("", 8, 3, 16, 3.0), num_frames=6)
    windows = [frames(pack_moments(torch.zeros(8, 2, 2, 6)), {}, random.Random(seed)) for seed in range(30)]
    assert {round(3 * start) for _, start in windows} == {0, 1, 2}  # all that fit
    assert read_moments(pack_moments(torch.full((1, 1, 1, 2), 90.0))).tolist() == [[[[90.0, 20.0]]]]
    assert np.float16 == read_moments(pack_moments(torch.zeros(1, 1, 1, 2))).dtype


@pytest.mark.parametrize("workers", [0, 2])
def test_text_embeddings_travel_with_their_clips(videos: Path, tmp_path: Path, workers: int) -> None:
    out = tmp_path / "out"
    list(encode_shards(stream(videos), Autoencoder(), out, text_encoder=TextEncoder()))
    latents = webvid_latents(str(out), num_frames=6, size=16, num_readers=4, buffer=3)
    latents.check(Autoencoder(), TextEncoder())
    batch = next(iter(ClipLoader(latents, global_batch=40, num_workers=workers, timeout=60 * (workers > 0))))
    assert batch.text is not None
    assert batch.empty_text is not None
    assert (batch.text.shape, batch.text.dtype, batch.empty_text.shape) == ((40, 5, 4), torch.float16, (5, 4))
    assert batch.text[:, 0, 0].tolist() == [int(key) for key in batch.keys]
    assert batch.empty_text.unique().tolist() == [-1]
    assert batch.to("cpu", non_blocking=True).text is not None
    plain = webvid_latents(str(out), num_frames=6, size=16, num_readers=4, buffer=3, stored_text=False)
    plain.check(Autoencoder(), TextEncoder("another"))
    other = next(iter(ClipLoader(plain, global_batch=40)))
    assert (other.keys, other.text, other.empty_text) == (batch.keys, None, None)


def test_text_that_does_not_fit_is_refused(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    list(encode_shards(stream(videos), Autoencoder(), out, text_encoder=TextEncoder()))
    options = {"num_frames": 6, "size": 16, "num_readers": 4}
    with pytest.raises(ValueError, match=r"another text encoder: sha256 one.*two.*stored_text=false"):
        webvid_latents(str(out), **options).check(Autoencoder(), TextEncoder("two"))
    with pytest.raises(ValueError, match="other latents"):
        list(encode_shards(stream(videos), Autoencoder(), out))
    with pytest.raises(ValueError, match=r"of the txt members, not of caption=\['json:caption'\]"):
        webvid_latents(str(out), caption=["json:caption"], **options)
    samples = [(f"{k:08d}", {"moments.npy": pack_moments(torch.zeros(6, 2, 2, 6)), "txt": b"a", "text.npy": b"?"}) for k in range(2)]
    samples += [("3", {"moments.npy": pack_moments(torch.zeros(6, 2, 2, 6)), "txt": b"a"})]
    samples += [("4", samples[0][1] | {"text.npy": pack(torch.zeros(9, 4))}), ("5", samples[0][1] | {"text.npy": pack(torch.ones(5, 4))})]
    write_tar(out / "00000.tar", samples)
    batch = next(iter(ClipLoader(webvid_latents(str(out / "00000.tar"), **options), global_batch=4)))
    assert {reason for _, reason in batch.bad} == {"latent_open", "missing_member", "text_shape"}
    assert set(batch.keys) == {"5"}
    (out / "empty_text.npy").unlink()
    with pytest.raises(ValueError, match="empty prompt's embedding is missing"):
        webvid_latents(str(out), **options)
    list(encode_shards(stream(videos), Autoencoder(), out, text_encoder=TextEncoder()))  # as the message says
    webvid_latents(str(out), **options)


def test_a_hanging_worker_is_noticed_while_encoding(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "decode_clip", lambda *arguments, **options: time.sleep(30))
    with pytest.raises(TimeoutError, match="no sample came from 1 workers for 1 s"):
        list(encode_shards(stream(videos), Autoencoder(), tmp_path / "out", num_workers=1, timeout=1))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"dataset.json", "encode.json"}


@pytest.mark.parametrize("max_frames", [5, 24, 25])
def test_no_more_frames_are_decoded_than_are_kept(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_frames: int) -> None:
    decoded = []

    def watched(*arguments, **options):
        frames, start = decode_clip(*arguments, **options)
        decoded.append(len(frames))
        return frames, start

    monkeypatch.setattr(encoding, "decode_clip", watched)
    (shard,) = encode_shards(stream(videos / "00000.tar"), Autoencoder(), tmp_path / "out", max_frames=max_frames)
    assert decoded == [min(max_frames, 24)] * 4  # 8 s at 3 fps
    assert shard.frames == 4 * min(max_frames, 24)


STUCK = """
import signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_latents import Autoencoder, encode_shards, encoding, stream

def stuck(*arguments, **options):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as code that never comes back to Python
    time.sleep(60)

encoding.decode_clip = stuck
list(encode_shards(stream(Path(sys.argv[2])), Autoencoder(), Path(sys.argv[3]), num_workers=1, timeout=1))
"""


def test_encoding_ends_although_a_decoder_is_stuck(videos: Path, tmp_path: Path) -> None:
    arguments = [str(Path(__file__).parent), str(videos), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", STUCK, *arguments], capture_output=True, text=True, timeout=45)
    assert done.returncode == 1
    assert "TimeoutError: webvid: no sample came from 1 workers for 1 s" in done.stderr


@pytest.mark.parametrize(("short", "frames"), [("skip", 8), ("slow", 16), ("loop", 16)])
def test_short_clips_are_encoded_as_training_on_them_would_read_them(tmp_path: Path, short: str, frames: int) -> None:
    data = video_bytes(frames=30)  # 8 frames at 3 fps
    write_tar(tmp_path / "videos/00000.tar", [("1", {"mp4": data, "txt": b"video 1"})])
    videos = webvid(str(tmp_path / "videos"), num_frames=16, size=16, num_readers=1, short=short)
    (shard,) = encode_shards(videos, Autoencoder(), tmp_path / "out")
    assert shard.frames == frames
    (shard,) = encode_shards(videos, Autoencoder(), tmp_path / "fewer", max_frames=12)
    assert shard.frames == min(frames, 12)
    if short != "skip":
        batch = next(iter(ClipLoader(webvid_latents(str(tmp_path / "out"), num_frames=16, size=16, num_readers=1), global_batch=1)))
        raw, _ = decode_clip(data, num_frames=16, fps=3, size=16, short=short)
        assert torch.allclose(batch.frames[0].float(), Autoencoder().moments(raw[None])[0], atol=4e-3)

"""Files, zips and shards become shards that the readers read; damaged files are counted; an interrupted run continues."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_shards import image_bytes, running_in, video_bytes, video_sample, write_tar

from t2v.data.entries import Entry, find
from t2v.data.loader import ClipLoader
from t2v.data.raw import RawSample
from t2v.data.repacking import Recode, _segments, repack
from t2v.data.shard_writer import partial_of
from t2v.data.shards import LocalTar
from t2v.data.webvid import webvid
from t2v.video import decode_clip, probe


def samples(folder: Path) -> list[tuple[str, str, dict]]:
    """(suffixes, caption, json) of every sample."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        tar = LocalTar(str(path))
        for sample in map(tar.read, range(len(tar))):
            found.append((" ".join(sample.members), sample.members["txt"].decode(), sample.fields))
    return found


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "deep").mkdir(parents=True)
    for number in range(5):
        (folder / f"deep/{number}.mp4").write_bytes(video_bytes() if number != 3 else b"<html>" * 99)
    (folder / "captions.csv").write_text("video,caption,score\n" + "".join(f"{number}.mp4,video {number},0.5\n" for number in range(6)))
    return folder


def test_a_folder_with_a_table(clips: Path, tmp_path: Path) -> None:
    entries = find(clips, clips / "captions.csv")
    assert [entry.name for entry in entries] == [f"deep/{number}.mp4" for number in range(5)]
    shards = list(repack(entries, tmp_path / "out", per_shard=2))
    assert [(shard.samples, dict(shard.skipped)) for shard in shards] == [(2, {}), (1, {"video_open": 1}), (1, {})]
    assert "deep/3.mp4" in shards[1].examples[0]
    found = samples(tmp_path / "out")
    assert [caption for _, caption, _ in found] == [f"video {number}" for number in (0, 1, 2, 4)]
    assert all(suffixes == "mp4 txt json" for suffixes, _, _ in found)
    assert found[1][2] == found[1][2] | {"score": "0.5", "file": "deep/1.mp4", "status": "success", "duration": 7.917}
    assert json.loads((tmp_path / "out/00001_stats.json").read_text())["status_dict"] == {"success": 1, "video_open": 1}
    batch = next(iter(ClipLoader(webvid(str(tmp_path / "out"), size=16, num_readers=2), global_batch=8)))
    assert set(batch.captions) == {f"video {number}" for number in (0, 1, 2, 4)}


def test_zips_and_json_captions(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with zipfile.ZipFile(source / "part_1.zip", "w") as file:
        file.writestr("a/x_1.mp4", video_bytes())
        file.writestr("a/readme.md", "no")
    with zipfile.ZipFile(source / "part_2.zip", "w") as file:
        file.writestr("b/y.png", image_bytes(7))
    (tmp_path / "captions.json").write_text(json.dumps([{"vid": "x_1", "caption": "ein Zug"}, {"vid": "y", "caption": "sieben"}]))
    list(repack(find(source, tmp_path / "captions.json"), tmp_path / "out"))
    assert [(suffixes, caption) for suffixes, caption, _ in samples(tmp_path / "out")] == [
        ("mp4 txt json", "ein Zug"),
        ("png txt json", "sieben"),
    ]
    (source / "broken.zip").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"broken.zip: not a readable zip"):
        find(source, tmp_path / "captions.json")


def test_members_of_one_name_in_two_zips(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for part in (1, 2):
        with zipfile.ZipFile(source / f"part_{part}.zip", "w") as file:
            file.writestr("a/x.png", image_bytes(part))
    with pytest.raises(ValueError, match=r"'a/x.png' may be part_1/a/x.png or part_2/a/x.png: give paths relative to"):
        find(source, _table(source, "a/x.png"))
    (source / "both.csv").write_text("file,caption\npart_2/a/x.png,two\npart_1/a/x,one\n")
    read = [entry.read() for entry in find(source, source / "both.csv")]
    assert [(sample.members["png"], sample.members["txt"]) for sample in read] == [(image_bytes(2), b"two"), (image_bytes(1), b"one")]
    (source / "part_1/a").mkdir(parents=True)
    (source / "part_1/a/x.png").write_bytes(image_bytes(1))
    with pytest.raises(ValueError, match=r"holds part_1/a/x.png twice, in .*part_1.zip and beside it: move one of them away"):
        find(source, source / "both.csv")


def test_damaged_tars_are_counted(tmp_path: Path) -> None:
    for number in range(3):
        path = write_tar(tmp_path / f"in/{number:05d}.tar", [video_sample(number * 4 + k) for k in range(4)])
        if number == 1:
            data = path.read_bytes()
            path.write_bytes(data[: len(data) // 2])
    (shard,) = repack(find(tmp_path / "in"), tmp_path / "out")
    assert (shard.samples, dict(shard.skipped)) == (9, {"shard_error": 1})
    assert "00001.tar: unexpected end of data" in shard.examples[0]
    (tmp_path / "in/00003.tar").write_bytes(b"")
    (shard,) = repack(find(tmp_path / "in"), tmp_path / "again")
    assert (shard.samples, dict(shard.skipped)) == (9, {"shard_error": 2})
    assert "00003.tar: unexpected end of data at byte 0" in shard.examples[1]


def test_members_that_cannot_be_unpacked_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with zipfile.ZipFile(source / "all.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("damaged", "encrypted", "unknown", "good"):
            file.writestr(f"{name}.png", image_bytes(7))
        offsets = [info.header_offset for info in file.infolist()]
    data = bytearray((source / "all.zip").read_bytes())
    central = [match.start() for match in re.finditer(b"PK\x01\x02", data)]
    data[offsets[0] + 30 + len("damaged.png")] = 0xFF  # no type of a deflated block
    data[offsets[1] + 6] |= 1  # flags, method: in front of the member and in the list at the end
    data[central[1] + 8] |= 1
    data[offsets[2] + 8] = data[central[2] + 10] = 97
    (source / "all.zip").write_bytes(data)
    (source / "captions.csv").write_text(
        "file,caption\n" + "".join(f"{name}.png,c\n" for name in ("damaged", "encrypted", "unknown", "good"))
    )
    (shard,) = repack(find(source, source / "captions.csv"), tmp_path / "out")
    assert (shard.samples, dict(shard.skipped)) == (1, {"zip_damaged": 3})
    assert ["encrypted" in shard.examples[1], "not supported" in shard.examples[2]] == [True, True]


def test_several_workers_read_one_zip(tmp_path: Path) -> None:
    source, count = tmp_path / "source", 300
    source.mkdir()
    with zipfile.ZipFile(source / "all.zip", "w") as file:
        for number in range(count):
            file.writestr(f"{number}.png", image_bytes(number))
    (tmp_path / "captions.json").write_text(json.dumps({f"{number}.png": f"picture {number}" for number in range(count)}))
    (shard,) = repack(find(source, tmp_path / "captions.json"), tmp_path / "out", workers=4)
    assert (shard.samples, dict(shard.skipped)) == (count, {})


def test_captions_beside_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.webm").write_bytes(b"x")
    (source / "0.txt").write_text("zero")
    (source / "1.json").write_text('{"caption": "one", "n": 1}')
    assert [(entry.name, entry.fields["caption"]) for entry in find(source)] == [("0.webm", "zero"), ("1.webm", "one")]
    assert "1 of the 3 files in" in caplog.text
    assert "such as 2.webm" in caplog.text
    write_tar(source / "00000.tar", [video_sample(1)])
    assert [entry.name for entry in find(source)] == ["00000.tar#0"]
    assert "other files, such as 0.webm, which are not" in caplog.text


def test_files_of_a_table_that_are_not_there_are_counted(clips: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = clips / "table.csv"
    path.write_text("file,caption\nnope.mp4,no\n" + f"{next(iter(sorted(clips.rglob('*.mp4')))).relative_to(clips)},yes\n")
    assert len(find(clips, path)) == 1
    assert "1 of the 2 files that" in caplog.text
    assert "such as nope.mp4" in caplog.text


def test_what_cannot_be_found_is_said(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        find(tmp_path / "none")
    with pytest.raises(ValueError, match="5 media files, but no captions"):
        find(clips)
    (clips / "1.mp4").write_bytes(video_bytes())
    with pytest.raises(ValueError, match=r"'1' may be 1.mp4 or deep/1.mp4"):
        find(clips, _table(clips, "1"))
    for absent in ("other.mp4", "x/1.mp4", "deep/x/1.mp4", "eep/2.mp4"):
        with pytest.raises(ValueError, match=r"none of the 1 files .*: give paths relative to it"):
            find(clips, _table(clips, absent))
    with pytest.raises(ValueError, match="recode=true"):
        list(repack([], tmp_path / "out", segment=3))


def test_a_table_may_name_fewer_folders_or_more_than_those_of_the_source(clips: Path) -> None:
    (clips / "1.mp4").write_bytes(video_bytes())
    for name in ("deep/1.mp4", "deep/1", "./deep/1.mp4", "clips/deep/1.mp4", str(clips / "deep/1.mp4")):
        assert [entry.name for entry in find(clips, _table(clips, name))] == ["deep/1.mp4"], name
    assert [entry.name for entry in find(clips, _table(clips, "1.mp4"))] == ["1.mp4"]
    assert [entry.name for entry in find(clips, _table(clips, "2"))] == ["deep/2.mp4"]


def _table(folder: Path, name: str) -> Path:
    path = folder / f"{name.replace('/', '_')}.csv"
    path.write_text(f"file,caption\n{name},c\n")
    return path


def test_recoding_keeps_the_moments_and_shortens_the_groups(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/00000.tar", [video_sample(number) for number in range(3)])
    list(repack(find(tmp_path / "in"), tmp_path / "out", recode=Recode(size=32, fps=6, gop=6, crf=10)))
    tar = LocalTar(str(tmp_path / "out/00000.tar"))
    assert len(tar) == 3
    data = tar.read(1).members["mp4"]
    info = probe(data)
    assert (info.width, info.height, info.frames) == (32, 32, 48)
    assert info.keyframes >= 8
    for start in (0.0, 0.5, 2 + 1 / 3):
        new, _ = decode_clip(data, size=16, num_frames=12, start=start)
        old, _ = decode_clip(video_bytes(), size=16, num_frames=12, start=start)
        assert (new.float() - old.float()).abs().mean() < 4
    assert samples(tmp_path / "out")[1][1] == "video 1"


def test_long_videos_are_cut(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/00000.tar", [video_sample(number) for number in range(2)])
    list(repack(find(tmp_path / "in"), tmp_path / "out", recode=Recode(size=32, fps=6), segment=3))
    found = samples(tmp_path / "out")
    assert [(fields["key"], fields["begin"]) for _, _, fields in found[:2]] == [("0000000000_00000", 0.0), ("0000000000_00001", 3.0)]
    assert [fields["begin"] for _, _, fields in found] == [0.0, 3.0, 6.0] * 2
    tar = LocalTar(str(tmp_path / "out/00000.tar"))
    second, _ = decode_clip(tar.read(1).members["mp4"], size=16, num_frames=6)
    assert torch.allclose(second.float(), decode_clip(video_bytes(), size=16, num_frames=6, start=3.0)[0].float(), atol=12)
    assert _segments(10, 4) == [(0, 4), (4, 4), (8, 2)]
    assert _segments(9, 4) == [(0, 4), (4, 4)]
    assert _segments(3, 4) == [(0.0, 3)]


def test_it_continues(clips: Path, tmp_path: Path) -> None:
    entries = find(clips, clips / "captions.csv")
    first = repack(entries, tmp_path / "out", per_shard=2)
    next(first)
    first.close()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.tar", "00000_stats.json", "repack.json"]
    assert [shard.was_there for shard in repack(entries, tmp_path / "out", per_shard=2, workers=2)] == [True, False, False]
    assert len(samples(tmp_path / "out")) == 4
    for options in ({"per_shard": 3}, {"per_shard": 2, "recode": Recode(size=32)}):
        with pytest.raises(ValueError, match=r"another repacking: .*another output="):
            next(repack(entries, tmp_path / "out", **options))
    with pytest.raises(ValueError, match="files was"):
        next(repack(entries[1:], tmp_path / "out", per_shard=2))
    with pytest.raises(ValueError, match="captions was"):
        next(repack([replace(entry, fields={"caption": "another"}) for entry in entries], tmp_path / "out", per_shard=2))


def test_shards_of_others_are_neither_taken_for_ours_nor_changed(clips: Path, tmp_path: Path) -> None:
    theirs = write_tar(tmp_path / "out/00000.tar", [video_sample(1)]).read_bytes()
    with pytest.raises(ValueError, match=r"out holds 00000.tar, but no repack.json: it is not of a repacking. Choose another output="):
        next(repack(find(clips, clips / "captions.csv"), tmp_path / "out"))
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [("00000.tar", theirs)]


TOO_LARGE = """
import resource, sys
from pathlib import Path
from t2v.data.shard_writer import ShardWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
with ShardWriter(Path(sys.argv[1])) as shard:
    for number in range(9):
        shard.add(str(number), {"txt": bytes(5000)})
"""


def test_nothing_stays_of_a_shard_that_cannot_be_written(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", TOO_LARGE, str(tmp_path / "0.tar")], capture_output=True, text=True)
    assert "File too large" in done.stderr
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from t2v.data.shard_writer import ShardWriter
with ShardWriter(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_processes_left_is_removed(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subprocess.run([sys.executable, "-c", KILLED, str(out / "00000.tar")], check=False)
    assert len(list(out.iterdir())) == 1
    ours = partial_of(out / "00001.tar")  # of a process that lives
    others = out / ".00002.tar.another-machine.1.partial"
    for path in (ours, others):
        path.write_bytes(b"")
    (shard,) = repack(find(clips, clips / "captions.csv"), out)
    assert {path.name for path in out.iterdir()} == {"00000.tar", "00000_stats.json", "repack.json", ours.name, others.name}
    assert shard.samples == 4


class Deadly(Entry):
    def read(self) -> RawSample:
        os._exit(9)


def test_a_worker_that_crashes_ends_it_in_one_line(clips: Path, tmp_path: Path) -> None:
    entries = find(clips, clips / "captions.csv")
    entries[2:2] = [Deadly("bad.mp4", tmp_path, {})]
    with pytest.raises(ChildProcessError, match=r"a worker was killed, or crashed, over .*bad.mp4.*lower workers=3"):
        list(repack(entries, tmp_path / "out", workers=3))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["repack.json"]


WORKERS = """
import sys
from pathlib import Path
from t2v.data.entries import find
from t2v.data.repacking import Recode, repack
list(repack(find(Path(sys.argv[1])), Path(sys.argv[2]), recode=Recode(size=32), workers=2))
"""


def test_killed_outright_it_leaves_no_processes(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/00000.tar", [video_sample(number) for number in range(300)])
    arguments = [str(tmp_path / "in"), str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-c", WORKERS, *arguments], start_new_session=True)
    deadline = time.monotonic() + 60
    while len(running_in(process.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(running_in(process.pid)) == 3
    process.kill()
    process.wait()
    while running_in(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running_in(process.pid)

from __future__ import annotations

from pathlib import Path

from made_shards import tiny, video_bytes, video_sample, write_images, write_tar

from t2v.data.inspection import inspect_stream, pictures
from t2v.data.webvid import webvid
from t2v.video import contact_sheet


def test_counts_sizes_and_reasons(tmp_path: Path) -> None:
    samples = [video_sample(number) for number in range(10)]
    samples[2][1]["mp4"] = b"<html>" * 20
    del samples[3][1]["mp4"]
    write_tar(tmp_path / "00000.tar", samples)
    (tmp_path / "00001.tar").write_bytes(b"nothing")
    found = inspect_stream(webvid(str(tmp_path), size=16, num_frames=8), 100)
    assert (found.samples, found.usable) == (10, 8)
    assert found.members == {"json mp4 txt": 9, "json txt": 1}
    assert found.bad == {"webvid/video_open": 1, "webvid/missing_member": 1, "webvid/shard_error": 1}
    assert found.pictures == {"48x32 h264": 8}
    assert found.seconds == [95 / 12] * 8
    report = found.report(rate=20)
    per_clip = sum(found.sizes) / 8 / 1e6  # MB read for each usable clip: what is bad is read, too
    assert f"at 20 clips/s: {20 * per_clip:.1f} MB/s" in report
    assert f"{8 / found.decoding:.1f} clips/s on one core" in report
    for part in ("2 shards", "8 usable (80.0%)", "video_open: 1, e.g. 00000002", "json: ", "video 0", "MB/s"):
        assert part in report
    assert contact_sheet(pictures(found.clips), [clip.caption for clip in found.clips]).shape[0] == 8
    assert len(video_bytes()) < found.sizes[0]


def test_the_samples_are_spread_over_the_shards(tmp_path: Path) -> None:
    found = inspect_stream(tiny(write_images(tmp_path, 20, 5)), 16)
    assert found.samples == 16
    assert len({int(clip.key) // 5 for clip in found.clips}) == 8

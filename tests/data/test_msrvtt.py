"""MSR-VTT: its JSON, its clips from a folder and from shards, the middle frames at any frame rate, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from t2v.data.msrvtt import ClipError, MsrVtt, middle_clip
from t2v.video import BadSample, write_mp4


def annotation_file(folder: Path, split: str = "test", videos: int = 3) -> Path:
    ids = [f"video{7010 + k}" for k in range(videos)]
    content = {
        "info": {},
        "videos": [{"video_id": v, "split": split, "start time": 0.0, "end time": 10.0, "id": k} for k, v in enumerate(ids)],
        "sentences": [{"caption": f" caption {c} ", "video_id": v, "sen_id": 20 * k + c} for k, v in enumerate(ids) for c in range(2)],
    }
    path = folder / "test_videodatainfo.json"
    path.write_text(json.dumps(content))
    return path


BITS, STRIPE = 10, 4  # pixels


def counting(frames: int, size: int = BITS * STRIPE) -> Tensor:
    """Frame k wears k in upright stripes, black for 0 and white for 1, so that a decoded frame says its number, whatever the codec lost."""
    bits = torch.arange(frames)[:, None] >> torch.arange(BITS) & 1  # (f bits)
    stripes = F.pad((255 * bits).to(torch.uint8).repeat_interleave(STRIPE, 1), (0, size - BITS * STRIPE))
    return stripes[:, None, :, None].expand(-1, size, -1, 3).contiguous()


def numbers(frames: Tensor) -> list[int]:
    levels = frames[:, :, : BITS * STRIPE].float().unflatten(2, (BITS, STRIPE)).mean((1, 3, 4))  # (f bits)
    assert ((levels - 127.5).abs() > 60).all(), "unreadable"
    return [int(number) for number in ((levels > 127.5) << torch.arange(BITS)).sum(1)]


def mp4(frames: Tensor, fps: float) -> bytes:
    buffer = io.BytesIO()
    write_mp4(buffer, frames, fps, crf=1, preset="ultrafast")
    return buffer.getvalue()


def variable_rate(times: list[int], size: int = BITS * STRIPE) -> bytes:
    """Frame k shown from times[k] milliseconds on."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1", "preset": "ultrafast", "bf": "0"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, picture in zip(times, counting(len(times), size)):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


class TestMiddleFrames:
    def test_of_ten_seconds(self) -> None:
        """The video lasts for k / 3 s with k = 0..29: the middle 16 are k = 7..22."""
        assert numbers(middle_clip(mp4(counting(250), 25), num_frames=16, fps=3, size=40)) == [k * 25 // 3 for k in range(7, 23)]

    @pytest.mark.parametrize("fps", [29.97, Fraction(30000, 1001), 12.5])
    def test_at_other_rates(self, fps: float | Fraction) -> None:
        """To the frame: 30 s of 29.97 frames a second, read as 30, would give others."""
        frames = int(30 * fps)
        got = numbers(middle_clip(mp4(counting(frames), float(fps)), num_frames=16, fps=3, size=40))
        first = (int((frames - 1) / fps * 3) + 1 - 16) // 2
        assert got == [int(k * fps / 3 + 1e-9) for k in range(first, first + 16)]
        assert got != [int(k * round(fps) / 3 + 1e-9) for k in range(first, first + 16)]

    def test_of_a_variable_rate(self) -> None:
        """Slow at first, fast later: what is on screen at a time, not every tenth frame."""
        times = [k * 200 for k in range(30)] + [6000 + k * 40 for k in range(60)]  # 8.36 s
        got = numbers(middle_clip(variable_rate(times), num_frames=16, fps=3, size=40))
        first = (int(8.36 * 3) + 1 - 16) // 2
        want = [max(i for i, time in enumerate(times) if time <= 1000 * k / 3) for k in range(first, first + 16)]
        assert got == want
        assert want != [k * 90 // 26 for k in range(first, first + 16)]  # at the mean rate

    def test_native_thirty_fps(self) -> None:
        assert numbers(middle_clip(mp4(counting(100), 30), num_frames=16, fps=30, size=40)) == list(range(42, 58))

    def test_a_slide_show_is_measured_as_it_is(self) -> None:
        """A picture each second: training leaves such videos out, the protocol counts every clip."""
        got = numbers(middle_clip(mp4(counting(12), 1), num_frames=16, fps=3, size=40))
        assert got == [k // 3 for k in range(9, 25)]

    def test_short_clips_are_refused(self) -> None:
        with pytest.raises(BadSample, match="too_short"):
            middle_clip(mp4(counting(40), 10), num_frames=16, fps=3, size=32)


class TestFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        annotation_file(tmp_path)
        (tmp_path / "videos").mkdir()
        for k in range(3):
            write_mp4(tmp_path / "videos" / f"video{7010 + k}.mp4", counting(60 + k, 48), 10, preset="ultrafast")
        return tmp_path

    def shards(self, folder: Path) -> list[Path]:
        for number, names in enumerate((["video7010", "video7012"], ["video7011"])):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for name in names:
                    tar.add(folder / "videos" / f"{name}.mp4", f"{name}.mp4")
                    info = tarfile.TarInfo(f"{name}.txt")
                    info.size = 2
                    tar.addfile(info, io.BytesIO(b"hi"))
        return sorted(folder.glob("*.tar"))

    def test_folder_and_shards_give_the_same(self, folder: Path) -> None:
        one = MsrVtt(folder / "test_videodatainfo.json", videos=folder / "videos")
        two = MsrVtt(folder / "test_videodatainfo.json", shards=self.shards(folder))
        ids = ["video7010", "video7011", "video7012"]
        assert [s.caption for s in one.sentences] == ["caption 0", "caption 1"] * 3
        assert one.sentences == two.sentences
        assert one.signature(ids) == two.signature(ids)
        for video_id in ids:
            clip = one.clip(video_id, num_frames=16, fps=3, size=32)
            assert clip.shape == (16, 32, 32, 3)
            assert torch.equal(clip, two.clip(video_id, num_frames=16, fps=3, size=32))
        assert one.missing(["video7010", "video9999"]) == ["video9999"]

    def test_another_encoding_is_another_reference(self, folder: Path) -> None:
        before = MsrVtt(folder / "test_videodatainfo.json", videos=folder / "videos").signature(["video7010"])
        clip = folder / "videos" / "video7010.mp4"
        data = bytearray(clip.read_bytes())
        data[len(data) // 2] ^= 1  # of the same length
        clip.write_bytes(data)
        flipped = MsrVtt(folder / "test_videodatainfo.json", videos=folder / "videos").signature(["video7010"])
        write_mp4(clip, counting(80, 48), 10)
        encoded = MsrVtt(folder / "test_videodatainfo.json", videos=folder / "videos").signature(["video7010"])
        assert len({before, flipped, encoded}) == 3

    def test_broken_and_missing_clips_raise(self, folder: Path) -> None:
        (folder / "videos" / "video7011.mp4").write_bytes(b"1" * 1000)
        data = MsrVtt(folder / "test_videodatainfo.json", videos=folder / "videos")
        with pytest.raises(ClipError, match=r"video7011 in .*video_open.*leaves no clip out"):
            data.clip("video7011", num_frames=16, fps=3, size=32)
        with pytest.raises(ClipError, match="video8000 is not in"):
            data.clip("video8000", num_frames=16, fps=3, size=32)
        with pytest.raises(ClipError, match="too_short"):
            data.clip("video7010", num_frames=25, fps=3, size=32)

    def test_a_truncated_shard_raises(self, folder: Path) -> None:
        shard = self.shards(folder)[0]
        shard.write_bytes(shard.read_bytes()[:3000])
        with pytest.raises(ClipError, match="replace the shard"):
            MsrVtt(folder / "test_videodatainfo.json", shards=[shard])


class TestAnnotations:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("not json", "is not JSON"),
            ('[{"caption": "x"}]', "lists 'videos' and 'sentences', it holds list"),
            ('{"annotations": []}', r"it holds \['annotations'\]"),
            ('{"videos": [{"id": 1}], "sentences": [{"caption": "x"}]}', "an entry has no 'split'"),
        ],
    )
    def test_a_wrong_file_is_named(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "wrong.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            MsrVtt(path, videos=tmp_path)

    def test_the_training_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"no 'test' videos, only \{'train': 3\}"):
            MsrVtt(annotation_file(tmp_path, split="train"), videos=tmp_path)

    def test_places_must_exist_and_be_one(self, tmp_path: Path) -> None:
        path = annotation_file(tmp_path)
        with pytest.raises(FileNotFoundError, match=r"annotation file .*nothing\.json"):
            MsrVtt(tmp_path / "nothing.json", videos=tmp_path)
        with pytest.raises(FileNotFoundError, match="video folder"):
            MsrVtt(path, videos=tmp_path / "nowhere")
        with pytest.raises(ValueError, match="exactly one"):
            MsrVtt(path)
        with pytest.raises(ValueError, match="exactly one"):
            MsrVtt(path, videos=tmp_path, shards=[])

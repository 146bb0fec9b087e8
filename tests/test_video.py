"""Clips are exact: every frame of a test video carries its number as a pattern of black and white blocks in the middle square."""

from __future__ import annotations

import io
import random
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from t2v.video import BadSample, contact_sheet, decode_clip, film_strips, gif_bytes, probe, write_animation, write_mp4

HEIGHT, WIDTH = 64, 112  # the middle square is 64 x 64: 4 x 4 blocks of 16


def numbered(count: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Frames (f h w 3) whose middle square shows the frame's number in binary, over a moving gradient."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    for k in range(count):
        frames[k] = (np.arange(width)[None, :, None] * 2 + k * 3) % 255
        bits = np.array([255 if k >> b & 1 else 0 for b in range(16)], np.uint8).reshape(4, 4)
        blocks = np.kron(bits, np.ones((side // 4, side // 4), np.uint8))
        frames[k, top : top + blocks.shape[0], left : left + blocks.shape[1]] = blocks[..., None]
    return frames


def numbers(clip: torch.Tensor) -> list[int]:
    side = clip.shape[1]
    centres = [side // 8 + side // 4 * k for k in range(4)]
    return [
        sum(int(frame[y, x].float().mean() > 127) << b for b, (y, x) in enumerate((y, x) for y in centres for x in centres))
        for frame in clip
    ]


def mp4(frames: np.ndarray, fps: float = 30, **options: object) -> bytes:
    buffer = io.BytesIO()
    write_mp4(buffer, frames, fps, preset="veryfast", **options)
    return buffer.getvalue()


def encode(
    frames: np.ndarray, codec: str, pts: list[int], form: str = "mp4", time_base: Fraction = Fraction(1, 1000), **options: str
) -> bytes:
    """A video with the given presentation times (milliseconds), in any codec and container."""
    options = dict(options)
    muxer = options.pop("muxer", "")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options=dict([muxer.split("=")]) if muxer else {}) as container:
        stream = container.add_stream(codec, rate=30, options={name: value for name, value in options.items() if name != "pix_fmt"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = options.pop("pix_fmt", "yuv420p")
        stream.codec_context.time_base = time_base
        for picture, time in zip(frames, pts):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def long_video() -> bytes:
    return mp4(numbered(300), 30, gop=100)


def test_takes_the_frames_on_screen_at_the_wanted_times(long_video: bytes) -> None:
    clip, start = decode_clip(long_video, num_frames=16, fps=3, size=64, start=1.25)
    assert clip.shape == (16, 64, 64, 3)
    assert clip.dtype == torch.uint8
    assert start == 1.25
    assert numbers(clip) == [int(37.5 + 10 * k) for k in range(16)]


@pytest.mark.parametrize("gop", [1, 12, 250])
def test_random_starts_are_bit_equal_to_a_full_decode(gop: int) -> None:
    data = mp4(numbered(240), 30, gop=gop)
    whole, _ = decode_clip(data, num_frames=None, fps=None, size=64)
    assert numbers(whole) == list(range(240))
    rng = random.Random(0)
    for _ in range(8):
        clip, start = decode_clip(data, num_frames=16, fps=3, size=64, start=lambda slack: rng.random() * slack)
        expected = [int(Fraction(start).limit_denominator(10**6) * 30 + 10 * k) for k in range(16)]
        assert numbers(clip) == expected
        assert torch.equal(clip, whole[expected])


def test_the_start_is_given_the_slack_and_stays_inside(long_video: bytes) -> None:
    seen = []
    clip, _ = decode_clip(long_video, size=64, start=lambda slack: seen.append(slack) or slack)
    assert seen == [pytest.approx(299 / 30 - 5)]
    assert numbers(clip)[-1] == 299
    with pytest.raises(BadSample, match="video_too_short"):
        decode_clip(long_video, size=64, start=6.0)


def test_variable_frame_rate_follows_the_clock_not_the_count() -> None:
    pts = [40 * k for k in range(100)] + [4000 + 100 * k for k in range(30)]  # 25 fps, then 10 fps
    data = encode(numbered(130), "libx264", pts)
    clip, _ = decode_clip(data, num_frames=16, fps=3, size=64, start=1.0)
    wanted = [1000 + 1000 * k / 3 for k in range(16)]
    assert numbers(clip) == [max(n for n, time in enumerate(pts) if time <= t) for t in wanted]


@pytest.mark.parametrize(
    ("codec", "form", "options"),
    [
        ("libx264", "mp4", {"muxer": "use_editlist=0"}),
        ("libx264", "mp4", {"profile": "baseline", "g": "60"}),
        ("libx264", "matroska", {"x264-params": "bframes=4:b-pyramid=normal:open-gop=1", "g": "40"}),
        ("libx265", "mp4", {"g": "40", "preset": "ultrafast", "x265-params": "log-level=none"}),
        ("libvpx-vp9", "webm", {"g": "40", "deadline": "realtime", "cpu-used": "8"}),
        ("libsvtav1", "mp4", {"g": "40", "preset": "8", "crf": "10"}),
        ("mpeg4", "avi", {"g": "40"}),
        ("libx264", "mp4", {"pix_fmt": "yuv444p10le", "g": "40"}),
        ("libx264", "flv", {"x264-params": "bframes=3:b-pyramid=normal:keyint=2:min-keyint=1"}),  # seeks land on the keyframe after
    ],
)
def test_codecs_and_containers_give_the_right_frames(codec: str, form: str, options: dict[str, str]) -> None:
    base = Fraction(1, 30) if form == "avi" else Fraction(1, 1000)
    pts = list(range(210)) if form == "avi" else [round(1000 * k / 30) for k in range(210)]
    data = encode(numbered(210), codec, pts, form, base, **options)
    whole, _ = decode_clip(data, num_frames=None, fps=None, size=64)
    assert numbers(whole) == list(range(210))
    for start in (0.0, 0.7, 1.93):
        clip, _ = decode_clip(data, num_frames=16, fps=3, size=64, start=start)
        assert torch.equal(clip, whole[numbers(clip)])
        assert numbers(clip) == pytest.approx([30 * start + 10 * k for k in range(16)], abs=1)


def cut(data: bytes, begin: float, seconds: float) -> bytes:
    """Cut without encoding again, as `ffmpeg -ss BEGIN -i ... -c copy` does: packets from the keyframe before, and an edit list."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        offset = round(begin / stream.time_base)
        source.seek(offset, stream=stream)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copy
                target.mux(packet)
    edited = bytearray(buffer.getvalue())
    place = edited.index(b"elst") + 12  # after its name, version and count: the length in milliseconds
    edited[place : place + 4] = round(1000 * seconds).to_bytes(4, "big")
    return bytes(edited)


@pytest.mark.parametrize("gop", [7, 100])
def test_what_an_edit_list_cuts_off_is_not_shown(gop: int) -> None:
    data = cut(mp4(numbered(300), 30, gop=gop), 4.5, 4.0)
    with av.open(io.BytesIO(data)) as container:
        assert [frame.pts for frame in container.decode(video=0)] == [512 * k for k in range(120)]  # FFmpeg's own view
    whole, _ = decode_clip(data, num_frames=None, fps=None, size=64)
    assert numbers(whole) == list(range(135, 255))
    assert (probe(data).frames, probe(data).seconds) == (120, pytest.approx(119 / 30))
    for start in (0.0, 0.3):
        clip, _ = decode_clip(data, num_frames=12, fps=3, size=64, start=start)
        assert numbers(clip) == [135 + int(30 * start) + 10 * k for k in range(12)]


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rotation_tags_are_applied(rotation: int) -> None:
    frames = np.zeros((4, 64, 96, 3), np.uint8)
    frames[:, :32, 16:48] = (255, 0, 0)  # red in the top left of the middle square
    clip, _ = decode_clip(mp4(frames, 3, rotation=rotation), num_frames=4, size=64, min_distinct=0)
    corners = {(0, 0): clip[0, 8, 8], (0, 1): clip[0, 8, -8], (1, 0): clip[0, -8, 8], (1, 1): clip[0, -8, -8]}
    red = [corner for corner, colour in corners.items() if colour[0] > 150]
    assert red == [{0: (0, 0), 90: (1, 0), 180: (1, 1), 270: (0, 1)}[rotation]]  # av counts rotations against the clock


def test_middle_square_and_odd_sizes() -> None:
    frames = numbered(20, 63, 113)
    data = mp4(frames, 3)
    assert (probe(data).width, probe(data).height) == (114, 64)
    clip, _ = decode_clip(data, num_frames=20, fps=3, size=None, min_distinct=0)
    assert clip.shape == (20, 64, 114, 3)
    square, _ = decode_clip(data, num_frames=16, fps=3, size=32)
    assert square.shape == (16, 32, 32, 3)
    assert numbers(square) == list(range(16))


def test_short_videos_are_refused_looped_or_slowed() -> None:
    data = mp4(numbered(31), 10)  # 3 s
    with pytest.raises(BadSample, match="video_too_short"):
        decode_clip(data, size=64)
    looped, _ = decode_clip(data, size=64, short="loop")
    assert numbers(looped) == [int(10 * k / 3) for k in range(10)] + [int(10 * k / 3) for k in range(6)]
    slowed, _ = decode_clip(data, size=64, short="slow")
    assert numbers(slowed) == [2 * k for k in range(16)]


def test_bad_videos_raise_one_exception_with_a_reason(long_video: bytes) -> None:
    def reason(data: bytes, **options: object) -> str:
        with pytest.raises(BadSample) as caught:
            decode_clip(data, size=64, **options)
        return caught.value.reason

    assert reason(b"") == "video_empty"
    assert reason(b"<html><body>403 Forbidden</body></html>" * 9) == "video_open"
    assert reason(random.Random(0).randbytes(5000)) == "video_open"
    assert reason(long_video[: long_video.rindex(b"moov") - 4]) == "video_open"  # the index was at the end of the file
    assert reason(long_video, max_pixels=1000) == "video_too_large"
    slides = encode(numbered(12), "libx264", [1000 * k for k in range(12)])
    assert reason(slides) == "video_too_few_frames"
    assert reason(song(cover=False)) == "video_no_stream"
    assert reason(song(cover=True)) == "video_no_stream"


def song(cover: bool) -> bytes:
    """Sound only, or with a picture of its cover."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*sound.encode(frame), *sound.encode(None)])
        if cover:
            container.mux(picture.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")))
            container.mux(picture.encode(None))
    return buffer.getvalue()


def test_gifs_are_videos_too() -> None:
    clip, _ = decode_clip(gif_bytes(numbered(80), 10), size=64, start=1.0)
    assert numbers(clip) == [10 + int(10 * k / 3 + 1e-6) for k in range(16)]


def test_flipped_bits_are_noticed() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (180, 64, 64, 3), np.uint8)
    data = bytearray(mp4(noise, 30))
    rng = random.Random(1)
    begin = data.index(b"mdat") + 1000
    for _ in range(400):
        data[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
    with pytest.raises(BadSample, match=r"video_corrupt_frame|video_decode|video_missing_frames"):
        decode_clip(bytes(data), size=64)


def test_a_truncated_faststart_file_gives_the_part_that_is_there(tmp_path) -> None:
    write_mp4(tmp_path / "a.mp4", numbered(300), 30, preset="veryfast")
    long_video = (tmp_path / "a.mp4").read_bytes()
    assert long_video.index(b"moov") < long_video.index(b"mdat")
    clip, _ = decode_clip(long_video[: int(len(long_video) * 0.8)], size=64, start=0.5)
    assert numbers(clip) == [15 + 10 * k for k in range(16)]


def test_a_file_appears_whole_or_not_at_all(tmp_path) -> None:
    write_mp4(tmp_path / "a.mp4", numbered(4), 8)
    clip, _ = decode_clip((tmp_path / "a.mp4").read_bytes(), num_frames=4, fps=8, size=None)
    assert np.abs(clip.numpy().astype(int) - numbered(4)).mean() < 6
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "b.mp4", np.zeros((2, 8, 8, 3), np.float32), 8)
    with pytest.raises(ValueError, match="gif"):
        write_animation(tmp_path / "b.avi", numbered(2), 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_animations_move_and_keep_time(tmp_path) -> None:
    frames = numbered(12)
    for suffix in (".gif", ".webp"):
        write_animation(tmp_path / f"a{suffix}", torch.from_numpy(frames), 3)
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.n_frames == 12
            milliseconds = 0
            for k in range(12):
                image.seek(k)
                image.load()
                milliseconds += image.info["duration"]
                assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[k]).mean() < 12
            assert milliseconds == pytest.approx(4000, abs=10)
    assert gif_bytes(frames, 3).startswith(b"GIF89a")


def test_contact_sheet_places_videos_over_captions() -> None:
    videos = [np.full((k + 1, 32, 32, 3), 60 * k + 10, np.uint8) for k in range(3)]
    sheet = contact_sheet(videos, ["a red circle", "a very long caption " * 9, ""], columns=2)
    assert sheet.shape[0] == 3
    assert sheet[2, 20, 20].tolist() == [10] * 3  # the shortest video holds its last frame
    assert sheet[2, 130, 130].tolist() == [10] * 3  # enlarged from 32 to 128 pixels
    assert (sheet[0, 134:160, :130] < 128).any()  # letters under the first
    assert contact_sheet(videos, ["a", "b", "c"], columns=3, least_width=32).shape[2] == 3 * 36 + 4
    with pytest.raises(ValueError, match="caption"):
        contact_sheet(videos, ["one"])


def test_torchcodec_gives_the_same_frames_or_says_what_is_missing(long_video: bytes) -> None:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        with pytest.raises(ValueError, match=r"t2v\[torchcodec\].*backend=pyav"):
            decode_clip(long_video, size=64, backend="torchcodec")
        return
    clip, start = decode_clip(long_video, size=64, start=1.25, backend="torchcodec")
    assert start == 1.25
    assert numbers(clip) == [int(37.5 + 10 * k) for k in range(16)]
    variable = encode(numbered(130), "libx264", [40 * k for k in range(100)] + [4000 + 100 * k for k in range(30)])
    clips = [decode_clip(variable, size=64, start=1.0, backend=backend)[0] for backend in ("pyav", "torchcodec")]
    assert numbers(clips[0]) == numbers(clips[1])
    with pytest.raises(BadSample, match="video_open"):
        decode_clip(b"<html>" * 99, backend="torchcodec")


def test_film_strips_show_first_to_last_frame_in_a_row() -> None:
    videos = [torch.arange(16, dtype=torch.uint8).mul(value)[:, None, None, None].expand(16, 32, 32, 3) for value in (5, 10)]
    sheet = film_strips(videos, ["one", "two"])
    assert sheet.dtype == torch.uint8
    assert sheet.shape[1] == 8 * 32 + 2 * 4  # margins
    row = sheet[4 + 16, 4 + 16 : 4 + 256 : 32, 0]
    assert row.tolist() == [5 * k for k in (0, 2, 4, 6, 9, 11, 13, 15)]

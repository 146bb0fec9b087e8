"""Images of every mode become upright RGB squares; damaged ones are refused with a reason."""

from __future__ import annotations

import io
import json
import random
import zlib

import numpy as np
import pytest
import torch
from made_shards import video_bytes
from PIL import Image

from t2v.data.errors import BadSample
from t2v.data.frames import TURNS, ImageFrames, VideoFrames, decode_image

RED, BLUE, WHITE = (250, 10, 10), (10, 10, 250), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def marked(size: tuple[int, int] = (32, 32)) -> Image.Image:
    """Blue, with a red top left quarter."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1] // 2))
    return image


def corner(frames: torch.Tensor) -> str:
    """Where the red quarter is."""
    side = frames.shape[1]
    at = {"tl": (2, 2), "tr": (2, side - 3), "bl": (side - 3, 2), "br": (side - 3, side - 3)}
    (where,) = (name for name, (y, x) in at.items() if frames[0, y, x, 0] > 128)
    return where


def test_the_middle_square_scaled() -> None:
    wide = Image.new("RGB", (96, 32), BLUE)
    wide.paste(RED, (32, 0, 64, 32))
    for image in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        frames = decode_image(encoded(image), size=16)
        assert frames.shape == (1, 16, 16, 3)
        assert frames.dtype == torch.uint8
        assert (frames.float().mean((0, 1, 2)) - torch.tensor(RED)).abs().max() < 12


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_modes(mode: str) -> None:
    kind = {"P": "GIF", "CMYK": "JPEG", "YCbCr": "JPEG", "LAB": "TIFF"}.get(mode, "PNG")
    image = Image.new("RGB", (16, 16), WHITE)
    image.paste((0, 0, 0), (0, 0, 8, 16))
    try:
        data = encoded(image.convert(mode) if mode != "LAB" else Image.new("LAB", (16, 16), (255, 128, 128)), kind)
    except (OSError, ValueError):
        pytest.skip(f"Pillow does not write {mode}")
    frames = decode_image(data, size=16)
    assert frames.shape == (1, 16, 16, 3)
    assert frames[0, 8, 13].min() > 240
    assert mode == "LAB" or frames[0, 8, 2].max() < 15


def test_sixteen_bits_keep_their_tones() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(64, 0)
    frames = decode_image(encoded(Image.fromarray(ramp)), size=64)
    assert frames[0, 0, :, 0].tolist() == pytest.approx((ramp[0] / 257).tolist(), abs=1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_on_white(kind: str) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 8, 16))
    frames = decode_image(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})), size=16)
    assert frames[0, 8, 13].tolist() == list(WHITE)
    assert frames[0, 8, 2].tolist() == list(RED)


def test_transparent_palettes_are_on_white() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 0, 0])
    assert decode_image(encoded(image, "PNG", transparency=1), size=16).min() == 255


UPRIGHT = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}
NAMES = dict(zip(range(2, 9), TURNS))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_from_the_file_and_from_the_json(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = encoded(marked(), "JPEG", exif=exif, quality=95)
    assert corner(decode_image(tagged, size=32)) == UPRIGHT[orientation]
    fields = {"exif": json.dumps({"Image Orientation": NAMES.get(orientation, "Horizontal (normal)")})}
    if orientation > 1:
        assert corner(ImageFrames(32)(tagged, fields, random.Random(0))[0]) == UPRIGHT[orientation]  # not turned twice
    stripped, _ = ImageFrames(32)(encoded(marked(), "JPEG", quality=95), fields, random.Random(0))
    assert corner(stripped) == UPRIGHT[orientation]


@pytest.mark.parametrize("exif", [None, "", "{", "[]", 3, '{"a": 1}'])
def test_other_exif_is_ignored(exif: object) -> None:
    assert corner(ImageFrames(32)(encoded(marked()), {"exif": exif}, random.Random(0))[0]) == "tl"


def test_animations_give_their_first_frame() -> None:
    data = encoded(marked(), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), WHITE)])
    assert corner(decode_image(data, size=32)) == "tl"


def test_large_jpegs_are_reduced_while_decoding() -> None:
    big = marked((640, 640)).resize((640, 640))
    small = decode_image(encoded(big, "JPEG", quality=95), size=32)
    assert corner(small) == "tl"
    exact = np.asarray(big.resize((32, 32), Image.Resampling.BICUBIC), np.int16)
    assert np.abs(small[0].numpy() - exact).mean() < 2


def reason(data: bytes, **options) -> str:
    with pytest.raises(BadSample) as caught:
        decode_image(data, **{"size": 16} | options)
    return caught.value.reason


def bomb(side: int) -> bytes:
    """A tiny PNG that claims to be huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_bad_images() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    jpeg = encoded(noise, "JPEG")
    assert reason(b"") == "image_empty"
    assert reason(b"<html>404</html>") == "image_open"
    assert reason(random.Random(0).randbytes(3000)) == "image_open"
    assert reason(jpeg[: len(jpeg) // 2]) == "image_truncated"
    png = bytearray(encoded(noise))
    png[len(png) // 2] ^= 0xFF
    assert reason(bytes(png)) == "image_truncated"
    assert reason(bomb(8_000)) == "image_too_large"
    assert reason(bomb(10_000)) == "image_too_large"
    assert reason(bomb(20_000)) == "image_too_large"
    assert reason(jpeg, min_size=65) == "image_too_small"


def test_video_recipe_starts_at_random_and_repeats_with_its_rng() -> None:
    recipe = VideoFrames(num_frames=4, fps=3, size=16)
    clips = [recipe(video_bytes(), {}, random.Random(seed)) for seed in (0, 0, 1)]
    assert clips[0][0].shape == recipe.shape == (4, 16, 16, 3)
    assert torch.equal(clips[0][0], clips[1][0])
    assert clips[0][1] == clips[1][1] != clips[2][1]
    assert 0 <= clips[2][1] <= 95 / 12 - 1


def test_video_recipe_asks_for_what_it_is_told() -> None:
    short = video_bytes(frames=30)  # 2.4 s

    def frames(**options) -> int:
        try:
            return len(VideoFrames(**{"num_frames": 12, "fps": 3, "size": 16} | options)(short, {}, random.Random(0))[0])
        except BadSample as error:
            return error.reason

    assert frames() == "video_too_short"
    assert (frames(short="loop"), frames(short="slow")) == (12, 12)
    assert (frames(fps=30), frames(fps=30, min_distinct=0.2)) == ("video_too_few_frames", 12)
    assert (frames(num_frames=4), frames(num_frames=4, max_pixels=99)) == (4, "video_too_large")


def test_starts_of_the_grid_are_all_that_fit() -> None:
    recipe = VideoFrames(fps=3, starts="grid")
    for slack, last in ((0.0, 0), (0.5, 1), (2 / 3 - 1e-9, 2), (1.0, 3)):
        assert {recipe._start(slack, random.Random(seed)) for seed in range(99)} == {k / 3 for k in range(last + 1)}

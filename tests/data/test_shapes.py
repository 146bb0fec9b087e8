from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from made_shards import running_in

from t2v.data import shapes
from t2v.data.checker import check
from t2v.data.laion import laion
from t2v.data.loader import ClipLoader
from t2v.data.shape_world import (
    COLOURS,
    HELD_OUT_PAIRS,
    IMAGE_COLOURS,
    IMAGE_SHAPES,
    SECONDS,
    SHAPES,
    Spec,
    draw,
)
from t2v.data.shapes import COMPLETE, Settings, held_out_images, held_out_specs, prepare, render, shards
from t2v.data.webvid import webvid
from t2v.video import probe


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture(scope="module")
def video_shards(root: Path) -> list[str]:
    return shards(root, "video", 10, samples_per_shard=5, processes=1)


@pytest.fixture(scope="module")
def image_shards(root: Path) -> list[str]:
    return shards(root, "image", 24, samples_per_shard=12, processes=1)


def test_the_sentence_of_the_readme_is_in_the_grammar() -> None:
    spec = Spec("red", "circle", "black", "left", "slowly", radius=0.15, x=0.5, y=0.5)
    assert spec.caption == "a red circle moving left slowly on a black background"
    assert replace(spec, colour="orange").caption == "an orange circle moving left slowly on a black background"
    assert not spec.unseen_pair
    assert not spec.image_only


def test_video_shards_are_laid_out_as_video2dataset_does(video_shards: list[str]) -> None:
    assert [Path(path).name for path in video_shards] == ["00000.tar", "00001.tar"]
    with tarfile.open(video_shards[1]) as tar:
        names = tar.getnames()
        assert names[:3] == ["000010.mp4", "000010.txt", "000010.json"]
        info = probe(tar.extractfile(names[0]).read())
        facts = json.loads(tar.extractfile(names[2]).read())
        caption = tar.extractfile(names[1]).read().decode()
    assert info.codec == "h264"
    assert info.seconds > 5  # 16 frames at 3 fps
    assert info.width / info.height == pytest.approx(16 / 9, rel=0.02)
    assert facts["caption"] == caption
    assert facts["key"] == "000010"
    assert facts["status"] == "success"
    assert facts["duration"] == "PT00H00M06S"
    stats = json.loads(Path(video_shards[1]).with_name("00001_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (5, 5)


def test_image_shards_are_laid_out_as_img2dataset_does(image_shards: list[str]) -> None:
    with tarfile.open(image_shards[0]) as tar:
        names = tar.getnames()
        assert names[3:6] == ["0000001.jpg", "0000001.txt", "0000001.json"]
        data = tar.extractfile("0000001.jpg").read()
        facts = json.loads(tar.extractfile("0000001.json").read())
    assert data[:2] == b"\xff\xd8"
    assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    assert {"url", "key", "status", "width", "height", "original_width", "original_height", "exif"} <= set(facts)


def test_the_bytes_do_not_depend_on_the_number_of_processes(video_shards: list[str], tmp_path: Path) -> None:
    again = shards(tmp_path, "video", 10, samples_per_shard=5, processes=2)
    assert contents(Path(again[0]).parent) == contents(Path(video_shards[0]).parent)


def test_made_once_and_reused(video_shards: list[str], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v.data.shapes.write_folder", lambda *_: pytest.fail("written again"))
    assert shards(root, "video", 10, samples_per_shard=5) == video_shards


def test_other_settings_live_in_another_folder(root: Path, image_shards: list[str]) -> None:
    other = shards(root, "image", 24, samples_per_shard=12, seed=1, processes=1)
    assert Path(other[0]).parent != Path(image_shards[0]).parent
    assert contents(Path(other[0]).parent)["00000.tar"] != contents(Path(image_shards[0]).parent)["00000.tar"]


def test_left_overs_of_a_killed_process_are_not_taken_for_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, write = Settings("image", 4, samples_per_shard=2), shapes.write_shard

    def killed_in_the_second_shard(folder: Path, settings: Settings, shard: int) -> None:
        write(folder, settings, shard)
        if shard == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "write_shard", killed_in_the_second_shard)
        patch.setattr(shapes.shutil, "rmtree", lambda *_, **__: None)  # a killed process tidies nothing up
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path, settings, processes=1)
    left_over = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left_over) == 1
    assert left_over[0].name != settings.folder
    folder = prepare(tmp_path, settings, processes=1)
    assert sorted(contents(folder)) == ["00000.tar", "00000_stats.json", "00001.tar", "00001_stats.json", COMPLETE]
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [folder]


def test_killed_outright_it_leaves_neither_processes_nor_half_a_folder(tmp_path: Path) -> None:
    settings = Settings("video", 4000, samples_per_shard=40)
    code = f"from t2v.data.shapes import Settings, prepare\nif __name__ == '__main__': prepare({str(tmp_path)!r}, {settings!r})"
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".video-*/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(".video-*/*.tar")), "it had begun to write"
    while running_in(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running_in(process.pid)
    assert not (tmp_path / settings.folder).exists()


def test_of_two_that_start_at_once_one_writes_and_both_read_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, write = [], shapes.write_folder
    monkeypatch.setattr(shapes, "write_folder", lambda folder, *rest: (written.append(folder), write(folder, *rest)))
    found: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: found.append(shards(tmp_path, "image", 64, samples_per_shard=16, processes=1))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert [len(paths) for paths in found] == [4, 4, 4]


def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"paths\.data=FOLDER"):
        shards(tmp_path / "file" / "shapes", "image", 4)


@pytest.mark.parametrize("wrong", [{"media": "audio"}, {"count": 0}, {"height": 95}, {"fps": 0}])
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Settings(**({"media": "video", "count": 8} | wrong))


def test_the_webvid_reader_reads_what_the_caption_says(video_shards: list[str]) -> None:
    batch = next(iter(ClipLoader(webvid(video_shards, size=64, num_readers=2), global_batch=8)))
    assert batch.frames.shape == (8, 16, 64, 64, 3)
    for frames, caption in zip(batch.frames, batch.captions):
        seen = check(frames)
        for word in (seen.colour, seen.shape, seen.background, seen.direction, seen.speed):
            assert word in caption.replace(",", "").split()


def test_the_laion_reader_reads_what_the_caption_says(image_shards: list[str]) -> None:
    batch = next(iter(ClipLoader(laion(image_shards, size=64, num_readers=2), global_batch=20)))
    assert batch.frames.shape == (20, 1, 64, 64, 3)
    for frames, caption in zip(batch.frames, batch.captions):
        seen = check(frames)
        for word in (seen.colour, seen.shape, seen.background):
            assert word in caption.replace(",", "").split()


def test_images_know_more_than_videos_and_neither_knows_the_held_out_pairs() -> None:
    videos = [Settings("video", 1).spec(index) for index in range(1000)]
    images = [Settings("image", 1).spec(index) for index in range(2000)]
    assert {spec.colour for spec in videos} == set(COLOURS)
    assert {spec.shape for spec in videos} == set(SHAPES)
    assert {spec.colour for spec in images} == set(COLOURS) | set(IMAGE_COLOURS)
    assert {spec.shape for spec in images} == set(SHAPES) | set(IMAGE_SHAPES)
    assert not any(spec.unseen_pair for spec in videos + images)
    assert {colour for colour, _ in HELD_OUT_PAIRS} < {spec.colour for spec in videos}  # each half is known


def test_moving_shapes_stay_inside_the_middle_square() -> None:
    for index in range(300):
        spec = Settings("video", 1).spec(index)
        for seconds in (0.0, SECONDS):
            assert all(spec.radius < place < 1 - spec.radius for place in spec.centre(seconds))


def test_held_out_specs_are_even_flagged_and_new() -> None:
    specs = held_out_specs(48)
    assert Counter(spec.unseen_pair for spec in specs) == {True: 8, False: 40}
    assert set(Counter(spec.direction for spec in specs).values()) == {12}
    assert set(Counter(spec.speed for spec in specs).values()) == {24}
    assert specs == held_out_specs(48)
    assert specs != held_out_specs(48, seed=1)
    assert all(spec.unseen_pair for spec in held_out_specs(10, kind="unseen"))
    assert not any(spec.unseen_pair or spec.image_only for spec in held_out_specs(50, kind="seen"))
    assert all(spec.image_only and spec.is_video for spec in held_out_specs(10, kind="image_only"))
    assert not set(specs) & {Settings("video", 1).spec(index) for index in range(2000)}
    assert not any(spec.is_video for spec in held_out_images(5))
    with pytest.raises(ValueError, match="mixed"):
        held_out_specs(1, kind="other")  # type: ignore[arg-type]


def test_render_is_what_the_readers_show() -> None:
    spec = held_out_specs(1)[0]
    frames = render(spec, num_frames=8, size=64, start=0.5)
    assert frames.shape == (8, 64, 64, 3)
    plain = draw(spec, 0.5, 64, 64)
    assert abs(frames[0].numpy().astype(int) - plain).mean() < 3  # codec and scaling only
    assert render(held_out_images(1)[0], size=64).shape == (1, 64, 64, 3)


@pytest.mark.parametrize(("size", "height"), [(64, 96), (128, 160)])
def test_the_truth_comes_from_files_as_high_as_the_readers(size: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heights: list[int] = []
    draw = shapes.image_bytes
    monkeypatch.setattr(shapes, "image_bytes", lambda spec, height: (heights.append(height), draw(spec, height))[1])
    assert render(held_out_images(1)[0], size=size).shape == (1, size, size, 3)
    assert heights == [height]


def test_the_world_of_motion_differs_in_motion_alone() -> None:
    clips, images = (Settings(media, 64, world="motion") for media in ("video", "image"))  # type: ignore[arg-type]
    specs = [clips.spec(k) for k in range(64)] + held_out_specs(16, kind="motion")
    assert {(spec.colour, spec.shape, spec.background) for spec in specs} == {("white", "circle", "black")}
    assert len({(spec.direction, spec.speed) for spec in specs}) == 8
    assert all(not images.spec(k).is_video and images.spec(k).colour == "white" for k in range(8))
    assert clips.folder != Settings("video", 64).folder
    with pytest.raises(ValueError, match="world is 'flat'"):
        Settings("video", 64, world="flat")  # type: ignore[arg-type]

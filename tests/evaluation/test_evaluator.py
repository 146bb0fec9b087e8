"""An evaluation from captions to results: resumed, of foreign videos, compared; and what must not become a number."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_evaluation import VIDEOS, FrameGrid, Grid, Painter, moving, protocol
from torch import Tensor

from t2v.data.msrvtt import MsrVtt
from t2v.evaluation import Evaluator, Manifest, NotComparable, Protocol, QuickEvaluation, Results, VideoFolder, compare
from t2v.evaluation.features import FeatureStore, extract, identity
from t2v.evaluation.videos import read_strip, uniform, write_strip
from t2v.metrics.features import MotionFeatures
from t2v.metrics.frechet import frechet_distance_of_few
from t2v.video import write_mp4


def evaluator(msrvtt: MsrVtt, output: Path, cache: Path | None = None, p: Protocol | None = None, **changes: object) -> Evaluator:
    networks = {"i3d": Grid(), "clip_vit_b32": FrameGrid(), "motion": MotionFeatures()}
    return Evaluator(p or protocol(), msrvtt, networks, output, cache or output / "cache", **changes)  # type: ignore[arg-type]


def test_from_captions_to_results(msrvtt: MsrVtt, tmp_path: Path) -> None:
    run = evaluator(msrvtt, tmp_path)
    painter = Painter()
    results = run.of_model(painter, "painter", {"checkpoint": "none"})
    assert results is not None
    scores = {score.name: score for score in results.scores}
    assert f"fvd_n{VIDEOS}" in scores
    assert {"kvd_n13", "fvd_extrapolated_n13", "clipsim_n13", "dynamics_n13", "still_videos_n13", "dynamics_of_real_n13"} <= set(scores)
    assert painter.seeds == [row.noise_seed for row in run.manifest.rows]
    real = torch.cat([Grid()(msrvtt.clip(row.video_id, num_frames=16, fps=3, size=32)[None]) for row in run.manifest.rows])
    fake = torch.cat([Grid()(moving(row.noise_seed % 1000, 16, 32, 32)[None]) for row in run.manifest.rows])
    assert scores["fvd_n13"].value == pytest.approx(frechet_distance_of_few(real, fake), rel=1e-5)
    assert scores["fvd_n13"].error is not None
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure>") == VIDEOS
    assert page.count("<img") == 2 * VIDEOS
    assert run.manifest.rows[0].caption in page
    table = (tmp_path / "results.md").read_text()
    assert "| fvd_n13 |" in table
    assert "11.09" in table
    assert "683" in table
    assert Results.read(tmp_path / "results.json") == results
    assert json.loads((tmp_path / "results.json").read_text())["scores"][0]["interval"]


def test_a_killed_run_continues_and_ends_alike(msrvtt: MsrVtt, tmp_path: Path) -> None:
    straight = evaluator(msrvtt, tmp_path / "straight").of_model(Painter(), "painter", {})
    killed = evaluator(msrvtt, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.of_model(Painter(dies_at=2), "painter", {})
    (tmp_path / "killed" / "features" / "i3d" / "00001.safetensors").write_bytes(b"cut off")
    (tmp_path / "killed" / "videos" / "000005.png").write_bytes(b"\x89PNG cut off")
    again = Painter()
    resumed = evaluator(msrvtt, tmp_path / "killed").of_model(again, "painter", {})
    assert resumed == straight
    assert again.calls == 1 + 2  # the chunk that was damaged and the two that were missing; the first was kept
    finished = Painter()
    assert evaluator(msrvtt, tmp_path / "killed").of_model(finished, "painter", {}) == straight
    assert finished.calls == 0


def test_reference_features_are_cached_by_videos_weights_and_recipe(msrvtt: MsrVtt, tmp_path: Path) -> None:
    first = evaluator(msrvtt, tmp_path / "a", tmp_path / "cache")
    first.of_model(Painter(), "a", {})
    second = evaluator(msrvtt, tmp_path / "b", tmp_path / "cache")
    second.of_model(Painter(), "b", {})
    assert second.extractors["i3d"].calls == 4  # type: ignore[attr-defined]  (13 videos in chunks of 4, generated only)
    third = evaluator(msrvtt, tmp_path / "c", tmp_path / "cache")
    third.extractors["i3d"].weights = "2" * 64  # type: ignore[index]
    third.of_model(Painter(), "c", {})
    assert third.extractors["i3d"].calls == 8  # type: ignore[attr-defined]


def test_another_model_may_not_continue_a_folder(msrvtt: MsrVtt, tmp_path: Path) -> None:
    evaluator(msrvtt, tmp_path).of_model(Painter(), "one", {"checkpoint": "one"})
    with pytest.raises(ValueError, match=r"holds features of something else \(differs in \['subject'\]"):
        evaluator(msrvtt, tmp_path).of_model(Painter(), "two", {"checkpoint": "two"})
    with pytest.raises(ValueError, match="other videos or captions"):
        evaluator(msrvtt, tmp_path, p=protocol(seed=1)).of_model(Painter(), "one", {"checkpoint": "one"})


def test_ranks_share_the_work_and_the_result(msrvtt: MsrVtt, tmp_path: Path) -> None:
    alone = evaluator(msrvtt, tmp_path / "alone").of_model(Painter(), "painter", {})
    painters = [Painter() for _ in range(3)]
    for rank in (2, 1, 0):  # rank 0 last: it collects (with processes, the barrier sees to that)
        together = evaluator(msrvtt, tmp_path / "three", rank=rank, world=3).of_model(painters[rank], "painter", {})
        assert (together is None) == (rank > 0)
    assert together == alone
    assert sorted(painter.calls for painter in painters) == [1, 1, 2]


class TestForeignVideos:
    def folder(self, run: Evaluator, path: Path, suffix: str = ".png", frames: int = 16, size: int = 32) -> Path:
        path.mkdir()
        for row in run.manifest.rows:
            video = moving(row.noise_seed % 1000, frames, size, size)
            if suffix == ".png":
                write_strip(path / f"{row.index:06d}.png", video)
            else:
                write_mp4(path / f"{row.video_id}{suffix}", video, 8, preset="ultrafast")
        return path

    def test_lossless_ones_measure_as_if_generated(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        want = run.of_model(Painter(), "painter", {})
        other = evaluator(msrvtt, tmp_path / "b")
        videos = VideoFolder(self.folder(run, tmp_path / "peer"), run.manifest, run.protocol)
        got = other.of_folder(videos, "peer", {})
        assert want is not None
        assert got is not None
        assert got.scores == want.scores
        assert got.details["lossless"]

    def test_mp4_by_video_id(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        videos = VideoFolder(self.folder(run, tmp_path / "peer", ".mp4"), run.manifest, run.protocol)
        got = run.of_folder(videos, "peer", {})
        assert got is not None
        assert not got.details["lossless"]

    def test_other_names_are_listed(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        folder = self.folder(run, tmp_path / "peer", ".mp4")
        (folder / f"{run.manifest.rows[2].video_id}.mp4").rename(folder / "sample_2.mp4")
        with pytest.raises(ValueError, match=rf"1 of 13 videos are missing.*{run.manifest.rows[2].video_id}"):
            VideoFolder(folder, run.manifest, run.protocol)
        for path in folder.iterdir():
            path.rename(folder / f"clip of {path.name}")
        with pytest.raises(ValueError, match=r"13 of 13 videos are missing .*has 13 videos \(clip of .*manifest.jsonl"):
            VideoFolder(folder, run.manifest, run.protocol)
        with pytest.raises(ValueError, match="is not a folder"):
            VideoFolder(tmp_path / "nowhere", run.manifest, run.protocol)

    def test_sizes_and_lengths_must_fit_or_be_chosen(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        large = self.folder(run, tmp_path / "large", ".mp4", frames=20, size=48)
        with pytest.raises(ValueError, match=r"20 frames, protocol tiny measures 16.*take="):
            VideoFolder(large, run.manifest, run.protocol).load(0)
        with pytest.raises(ValueError, match=r"48 x 48 pixels, protocol tiny measures 32 x 32.*fit=crop"):
            VideoFolder(large, run.manifest, run.protocol, take="middle").load(0)
        assert VideoFolder(large, run.manifest, run.protocol, take="uniform", fit="crop").load(0).shape == (16, 32, 32, 3)
        with pytest.raises(ValueError, match="generate longer videos"):
            VideoFolder(self.folder(run, tmp_path / "short", frames=9), run.manifest, run.protocol, take="first").load(0)
        with pytest.raises(ValueError, match="take='last'"):
            VideoFolder(large, run.manifest, run.protocol, take="last")

    @pytest.mark.parametrize(("take", "frames"), [("first", range(16)), ("middle", range(2, 18)), ("uniform", uniform(20, 16))])
    def test_frames_of_longer_videos_are_those_that_were_chosen(self, msrvtt: MsrVtt, tmp_path: Path, take: str, frames: list[int]) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        videos = VideoFolder(self.folder(run, tmp_path / "peer", frames=20), run.manifest, run.protocol, take=take)
        whole = read_strip(tmp_path / "peer/000003.png", 32)
        assert whole is not None
        assert torch.equal(videos.load(3), whole[list(frames)])

    def test_other_videos_in_the_same_folder_are_not_measured_as_the_earlier_ones(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        folder = VideoFolder(self.folder(run, tmp_path / "peer", ".mp4"), run.manifest, run.protocol)
        before = folder.sha256()
        first, second = folder.paths[:2]
        first.write_bytes(second.read_bytes())
        assert VideoFolder(tmp_path / "peer", run.manifest, run.protocol).sha256() != before

    @pytest.mark.parametrize("fit", ["error", "crop"])
    @pytest.mark.parametrize(("height", "width"), [(32, 64), (24, 32), (64, 64)])
    def test_strips_of_other_frames_are_refused(self, msrvtt: MsrVtt, tmp_path: Path, height: int, width: int, fit: str) -> None:
        """Cut into squares they would be measured as videos that nobody made."""
        run = evaluator(msrvtt, tmp_path / "a")
        folder = self.folder(run, tmp_path / "peer")
        write_strip(folder / "000003.png", moving(1, 17, width, height))
        with pytest.raises(ValueError, match=rf"{width} x {17 * height} pixels.*frames of 32 x 32.*video file .*fit=crop"):
            run.of_folder(VideoFolder(folder, run.manifest, run.protocol, "first", fit), "peer", {})
        assert not (tmp_path / "a" / "results.json").exists()

    def test_mixed_resolutions_are_an_error(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        folder = self.folder(run, tmp_path / "peer", ".mp4")
        odd = folder / f"{run.manifest.rows[6].video_id}.mp4"
        write_mp4(odd, moving(1, 16, 64, 48), 8, preset="ultrafast")
        with pytest.raises(ValueError, match=rf"{odd.name} has 64 x 48 pixels, protocol tiny measures 32 x 32: fit=crop"):
            run.of_folder(VideoFolder(folder, run.manifest, run.protocol), "peer", {})
        assert not (tmp_path / "a" / "results.json").exists()
        assert VideoFolder(folder, run.manifest, run.protocol, fit="crop").videos()(range(4, 8)).shape == (4, 16, 32, 32, 3)

    def test_a_broken_file_is_an_error(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        run = evaluator(msrvtt, tmp_path / "a")
        folder = self.folder(run, tmp_path / "peer", ".mp4")
        (folder / f"{run.manifest.rows[5].video_id}.mp4").write_bytes(b"0" * 5000)
        with pytest.raises(ValueError, match=f"{run.manifest.rows[5].video_id}.mp4 cannot be measured"):
            run.of_folder(VideoFolder(folder, run.manifest, run.protocol), "peer", {})


class TestRefuses:
    def test_videos_of_another_size(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        def wrong(captions: list[str], seeds: list[int]) -> Tensor:
            return torch.zeros(len(seeds), 16, 64, 64, 3, dtype=torch.uint8)

        with pytest.raises(ValueError, match=r"\(4, 16, 64, 64, 3\).*\(4, 16, 32, 32, 3\)"):
            evaluator(msrvtt, tmp_path).of_model(wrong, "wrong", {})

    def test_real_clips_that_are_missing_or_named_otherwise(self, msrvtt_folder: Path, tmp_path: Path) -> None:
        """Listed before a network is asked for anything; none is left out."""
        for path in (msrvtt_folder / "videos").iterdir():
            shutil.copy(path, tmp_path)
        for name in ("video7012", "video7019"):
            (tmp_path / f"{name}.mp4").unlink()
        captions = msrvtt_folder / "test_videodatainfo.json"
        with pytest.raises(
            ValueError, match=r"2 of 13 videos that tiny needs are missing in msrvtt: (video7012, video7019|video7019, video7012)"
        ):
            evaluator(MsrVtt(captions, tmp_path), tmp_path / "out")
        for path in tmp_path.glob("*.mp4"):
            path.rename(tmp_path / f"MSRVTT_{path.name}")
        with pytest.raises(ValueError, match=r"13 of 13 videos that tiny needs are missing.*\.\.\. Evaluation leaves no clip out"):
            evaluator(MsrVtt(captions, tmp_path), tmp_path / "out")
        with pytest.raises(ValueError, match="needs are missing"):
            QuickEvaluation(
                protocol(), MsrVtt(captions, tmp_path), evaluator(MsrVtt(captions, msrvtt_folder / "videos"), tmp_path).used, tmp_path
            )

    def test_real_clips_of_mixed_resolutions_become_one(self, msrvtt_folder: Path, tmp_path: Path) -> None:
        """MSR-VTT's clips differ in size: the middle square of each is scaled."""
        for path in (msrvtt_folder / "videos").iterdir():
            shutil.copy(path, tmp_path)
        write_mp4(tmp_path / "video7011.mp4", moving(1, 60, 40, 96), 10, preset="ultrafast")
        results = evaluator(MsrVtt(msrvtt_folder / "test_videodatainfo.json", tmp_path), tmp_path / "out").of_model(
            Painter(), "painter", {}
        )
        assert results is not None
        assert results.value("fvd_n13") > 0

    def test_nan_features(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        class Broken(Grid):
            def __call__(self, videos: Tensor) -> Tensor:
                features = super().__call__(videos)
                features[1:2] = float("nan")
                return features

        run = evaluator(msrvtt, tmp_path)
        run.used["i3d"] = Broken()
        with pytest.raises(ValueError, match=r"i3d gives NaN or infinity for rows \[1\]"):
            run.of_model(Painter(), "painter", {})
        assert not (tmp_path / "results.json").exists()
        quick = QuickEvaluation(run.protocol, msrvtt, {**run.used, "i3d": Broken()}, tmp_path / "cache")
        with pytest.raises(ValueError, match="NaN or infinity"):
            quick(Painter())

    def test_missing_networks_before_anything_is_made(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"needs the networks \['i3d'\]"):
            Evaluator(protocol(metrics=("fvd",)), msrvtt, {}, tmp_path, tmp_path)

    def test_a_table_of_what_is_not_comparable(self, msrvtt: MsrVtt, tmp_path: Path) -> None:
        one = evaluator(msrvtt, tmp_path / "1").of_model(Painter(), "one", {})
        two = evaluator(msrvtt, tmp_path / "2").of_model(Painter(), "two", {})
        fewer = evaluator(msrvtt, tmp_path / "3", p=protocol(num_videos=9)).of_model(Painter(), "three", {})
        other = evaluator(msrvtt, tmp_path / "4")
        other.used["i3d"].weights = "2" * 64
        weights = other.of_model(Painter(), "four", {})
        assert one is not None
        assert two is not None
        assert fewer is not None
        assert weights is not None
        assert compare([one, two]).count("\n") == 3
        doubtful = replace(two, unverified=("i3d",), details={"lossless": False, "take": "uniform", "fit": "error"})
        assert "| two (unverified i3d, lossy, take=uniform) |" in compare([one, doubtful])
        for stranger in (fewer, weights):
            with pytest.raises(NotComparable, match="fvd was measured on different videos"):
                compare([one, stranger])


def test_a_clip_of_many_captions_is_read_once(msrvtt: MsrVtt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    clip = MsrVtt.clip
    monkeypatch.setattr(MsrVtt, "clip", lambda self, video_id, **options: read.append(video_id) or clip(self, video_id, **options))
    everything = protocol(metrics=("clipsim", "dynamics"), captions="all")
    one = replace(everything, captions="one")
    run = evaluator(msrvtt, tmp_path / "all", tmp_path / "cache", everything)
    results = run.of_model(Painter(), "painter", {})
    assert results is not None
    page = {row.video_id for row in Manifest.read(tmp_path / "all" / "manifest.jsonl").rows[:16]}
    assert sorted(read) == sorted([*{s.video_id for s in msrvtt.sentences}, *page])
    scores = {score.metric: score for score in results.scores}
    assert scores["clipsim"].n == scores["dynamics"].n == 3 * VIDEOS  # generated
    assert scores["dynamics_of_real"].n == VIDEOS
    alone = evaluator(msrvtt, tmp_path / "one", tmp_path / "cache", one).of_model(Painter(), "painter", {})
    assert alone is not None
    assert len(list((tmp_path / "cache").iterdir())) == 1  # protocols share a clip's features, however many captions they take
    assert scores["dynamics_of_real"].value == {score.metric: score for score in alone.scores}["dynamics_of_real"].value
    read.clear()
    quick = QuickEvaluation(everything, msrvtt, run.used, tmp_path / "quick")
    values = quick(Painter())
    assert sorted(read) == sorted({s.video_id for s in msrvtt.sentences})
    assert {f"val/{score.name}": score.value for score in results.scores} == values


def test_one_batch_of_frames_is_held_at_a_time(msrvtt: MsrVtt, tmp_path: Path) -> None:
    earlier: list[weakref.ref[Tensor]] = []

    def make(rows: int) -> Tensor:
        assert all(batch() is None for batch in earlier)
        videos = torch.randint(0, 256, (rows, 16, 32, 32, 3), dtype=torch.uint8)
        earlier.append(weakref.ref(videos))
        return videos

    grid = Grid()
    store = FeatureStore(tmp_path / "features", {"extractor": identity(grid)})
    extract(lambda rows: make(len(rows)), [grid], [store], total=13, chunk=4, device="cpu")
    assert len(earlier) == 4
    quick = QuickEvaluation(protocol(companions=False), msrvtt, evaluator(msrvtt, tmp_path / "out").used, tmp_path / "cache")
    quick(lambda captions, seeds: make(len(seeds)))
    assert len(earlier) == 8


def test_strips_keep_every_bit(tmp_path: Path) -> None:
    video = torch.randint(0, 256, (5, 24, 24, 3), dtype=torch.uint8)
    write_strip(tmp_path / "1.png", video)
    got = read_strip(tmp_path / "1.png", 24)
    assert got is not None
    assert torch.equal(got, video)
    with pytest.raises(ValueError, match="not a strip"):
        read_strip(tmp_path / "1.png", 24, 4)
    assert uniform(16, 6) == [0, 3, 6, 9, 12, 15]

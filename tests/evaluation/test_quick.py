"""Evaluation during training: names, caching, equal work, and three ranks equal to one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_evaluation import VIDEOS, FrameGrid, Grid, Painter, protocol
from torch import Tensor

from t2v.data.msrvtt import MsrVtt
from t2v.evaluation import Evaluator, QuickEvaluation
from t2v.evaluation.quick import equal_chunks
from t2v.evaluation.videos import Generate
from t2v.metrics.features import MotionFeatures


def quick(folder: Path, cache: Path, **changes: object) -> QuickEvaluation:
    data = MsrVtt(folder / "test_videodatainfo.json", folder / "videos")
    networks = {"i3d": Grid(), "clip_vit_b32": FrameGrid(), "motion": MotionFeatures()}
    return QuickEvaluation(protocol(companions=False, **changes), data, networks, cache)


class FailsOnce(Grid):
    """Raises at its second video chunk."""

    def __call__(self, videos: Tensor) -> Tensor:
        if self.calls == 1:
            raise RuntimeError("out of memory")  # nothing that a user can mend
        return super().__call__(videos)


def failure_of(evaluate: QuickEvaluation, generate: Generate, rank: int, world: int) -> str:
    try:
        evaluate(generate, rank, world)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def on_rank(rank: int, world: int, folder: str, cache: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{cache}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=20))
    evaluate = quick(Path(folder), Path(cache) / "three")
    painter = Painter()
    scores = evaluate(painter, rank, world)

    def fails(captions: list[str], seeds: list[int]) -> Tensor:
        if rank == 1:
            raise ValueError("no memory")
        return painter(captions, seeds)

    failures = [failure_of(evaluate, fails, rank, world)]
    again = Painter()
    if rank == 1:
        evaluate.extractors["i3d"] = FailsOnce()
    failures.append(failure_of(evaluate, again, rank, world))
    cached = quick(Path(folder), Path(cache) / "real clips that one rank cannot read")
    if rank == 2:
        cached.dataset.places = {}  # type: ignore[attr-defined]
    failures.append(failure_of(cached, painter, rank, world))
    torch.save({"scores": scores, "calls": painter.calls, "again": again.calls, "failures": failures}, f"{cache}/{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_equal_one_with_equal_work_and_fail_together(msrvtt_folder: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = quick(msrvtt_folder, tmp_path / "one")(Painter())
    torch.set_num_threads(threads)
    mp.start_processes(on_rank, (3, str(msrvtt_folder), str(tmp_path)), nprocs=3, start_method="fork")  # no second start of Python
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [rank["scores"] for rank in ranks] == [alone] * 3  # bit by bit
    # 4 chunks of 13 videos are two rounds for each of three ranks; a round where one failed is the last; then two rounds again
    assert [rank["calls"] for rank in ranks] == [2 + 1 + 2, 2 + 0 + 2, 2 + 1 + 2]
    assert [rank["again"] for rank in ranks] == [2, 2, 2]
    unreadable = [rank["failures"].pop() for rank in ranks]
    assert unreadable[2].startswith("ClipError: ")
    assert set(unreadable[:2]) == {f"ValueError: the evaluation failed on rank 2: {unreadable[2]}"}
    for one in (0, 2):
        failed = "the evaluation failed on rank 1"
        assert ranks[one]["failures"] == [
            f"ValueError: {failed}: ValueError: no memory",
            f"RuntimeError: {failed}: RuntimeError: out of memory",
        ]
    assert ranks[1]["failures"] == ["ValueError: no memory", "RuntimeError: out of memory"]


def test_names_carry_the_count_and_numbers_are_the_evaluators(msrvtt_folder: Path, msrvtt: MsrVtt, tmp_path: Path) -> None:
    scores = quick(msrvtt_folder, tmp_path / "cache")(Painter())
    assert {"val/fvd_n13", "val/kvd_n13", "val/clipsim_n13", "val/dynamics_n13", "val/still_videos_n13"} <= set(scores)
    networks: dict[str, Any] = {"i3d": Grid(), "clip_vit_b32": FrameGrid(), "motion": MotionFeatures()}
    whole = Evaluator(protocol(companions=False), msrvtt, networks, tmp_path / "out", tmp_path / "cache").of_model(Painter(), "painter", {})
    assert whole is not None
    assert {f"val/{score.name}": score.value for score in whole.scores} == scores
    assert networks["i3d"].calls == 4  # of what is generated, 13 videos in chunks of 4: the real clips' features are those of the training


def test_real_clips_are_read_once(msrvtt_folder: Path, tmp_path: Path) -> None:
    first = quick(msrvtt_folder, tmp_path)
    first(Painter())
    calls = first.extractors["i3d"].calls  # type: ignore[attr-defined]
    first(Painter())
    assert first.extractors["i3d"].calls == calls + 4  # type: ignore[attr-defined]
    second = quick(msrvtt_folder, tmp_path)
    second(Painter())
    assert second.extractors["i3d"].calls == 4  # type: ignore[attr-defined]


def test_the_reference_is_fitted_once(msrvtt_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = []

    def eigh(matrix: Tensor) -> Any:
        solved.append(len(matrix))
        return solver(matrix)

    solver = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    evaluate = quick(msrvtt_folder, tmp_path)
    scores = evaluate(Painter())
    assert solved == [24]  # the root of the reference covariance, of Grid's 24 numbers
    assert evaluate(Painter()) == scores
    assert quick(msrvtt_folder, tmp_path)(Painter()) == scores  # another run reads it
    assert solved == [24]


@pytest.mark.parametrize(("total", "size", "world"), [(13, 4, 3), (16, 4, 4), (3, 4, 5), (100, 8, 7)])
def test_work_is_equal_and_whole(total: int, size: int, world: int) -> None:
    spread = [equal_chunks(total, size, rank, world) for rank in range(world)]
    assert len({len(chunks) for chunks in spread}) == 1
    assert {index for chunks in spread for rows in chunks for index in rows} == set(range(total))


def test_asks_for_its_networks_at_once(msrvtt: MsrVtt, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs the networks \['motion'\]"):
        QuickEvaluation(protocol(metrics=("dynamics",)), msrvtt, {}, tmp_path)


def test_a_smaller_protocol_is_another_name(msrvtt_folder: Path, tmp_path: Path) -> None:
    assert VIDEOS == 13
    assert "val/fvd_n9" in quick(msrvtt_folder, tmp_path, num_videos=9)(Painter())

"""Evaluation during training: names, caching, equal work, and three ranks equal to one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_evaluation import VIDEOS, FrameGrid, Grid, Painter, protocol
from torch import Tensor

from t2v.data.msrvtt import MsrVtt
from t2v.evaluation import Evaluator, QuickEvaluation
from t2v.evaluation.quick import equal_chunks
from t2v.metrics.features import MotionFeatures


def quick(folder: Path, cache: Path, **changes: object) -> QuickEvaluation:
    data = MsrVtt(folder / "test_videodatainfo.json", folder / "videos")
    networks = {"i3d": Grid(), "clip_vit_b32": FrameGrid(), "motion": MotionFeatures()}
    return QuickEvaluation(protocol(companions=False, **changes), data, networks, cache)


def on_rank(rank: int, world: int, folder: str, cache: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{cache}/meeting", rank=rank, world_size=world)
    evaluate = quick(Path(folder), Path(cache) / "three")
    painter = Painter()
    scores = evaluate(painter, rank, world)

    def fails(captions: list[str], seeds: list[int]) -> Tensor:
        if rank == 1:
            raise ValueError("no memory")
        return painter(captions, seeds)

    try:
        evaluate(fails, rank, world)
        failure = "none"
    except (ValueError, RuntimeError) as error:
        failure = str(error)
    torch.save({"scores": scores, "calls": painter.calls, "failure": failure}, f"{cache}/{rank}.pt")
    dist.destroy_process_group()


def test_three_ranks_equal_one_with_equal_work_and_fail_together(msrvtt_folder: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = quick(msrvtt_folder, tmp_path / "one")(Painter())
    torch.set_num_threads(threads)
    mp.spawn(on_rank, (3, str(msrvtt_folder), str(tmp_path)), nprocs=3)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [rank["scores"] for rank in ranks] == [alone] * 3  # bit by bit
    assert [rank["calls"] for rank in ranks] == [4, 2, 4]  # 4 chunks: two rounds each, then two more where nothing failed
    assert ranks[1]["failure"] == "no memory"
    assert "another rank" in ranks[0]["failure"]


def test_names_carry_the_count_and_numbers_are_the_evaluators(msrvtt_folder: Path, msrvtt: MsrVtt, tmp_path: Path) -> None:
    scores = quick(msrvtt_folder, tmp_path / "cache")(Painter())
    assert {"val/fvd_n13", "val/kvd_n13", "val/clipsim_n13", "val/dynamics_n13", "val/still_videos_n13"} <= set(scores)
    networks = {"i3d": Grid(), "clip_vit_b32": FrameGrid(), "motion": MotionFeatures()}
    whole = Evaluator(protocol(companions=False), msrvtt, networks, tmp_path / "out", tmp_path / "cache").of_model(Painter(), "painter", {})
    assert whole is not None
    assert {f"val/{score.name}": score.value for score in whole.scores} == scores


def test_real_clips_are_read_once(msrvtt_folder: Path, tmp_path: Path) -> None:
    first = quick(msrvtt_folder, tmp_path)
    first(Painter())
    calls = first.extractors["i3d"].calls  # type: ignore[attr-defined]
    first(Painter())
    assert first.extractors["i3d"].calls == calls + 4  # type: ignore[attr-defined]
    second = quick(msrvtt_folder, tmp_path)
    second(Painter())
    assert second.extractors["i3d"].calls == 4  # type: ignore[attr-defined]


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

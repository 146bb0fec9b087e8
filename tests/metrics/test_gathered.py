"""The wrappers: duplicates, gaps, and one rank equal to three bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from t2v.metrics.frechet import FeatureError, frechet_distance, moments
from t2v.metrics.gathered import ClipSimMetric, FrechetMetric, chunks, deduplicated

TOTAL, SIZE, WIDTH = 23, 4, 12  # 6 chunks, the last of 3 rows; 3 ranks do not divide 23


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv3d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten(), torch.nn.Linear(8, WIDTH)
    )


def videos(rows: range) -> Tensor:
    return torch.stack([torch.randn(3, 6, 12, 12, generator=torch.Generator().manual_seed(row)) for row in rows])


def filled(rank: int, world: int, pad: bool, **options: Any) -> tuple[FrechetMetric, ClipSimMetric]:
    """Metrics with the features of this rank's chunks; `pad` repeats the first chunk, as a padded sampler would."""
    reference = moments(torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(7)))
    frechet = FrechetMetric(reference, expected=range(TOTAL), **options)
    similarity = ClipSimMetric(frames=2, width=4, expected=range(TOTAL), **options)
    features = network()
    with torch.no_grad():
        for rows in [*chunks(TOTAL, SIZE, rank, world), *([range(SIZE)] if pad else [])]:
            x = features(videos(rows))
            frechet.update(x, list(rows))
            similarity.update(x.view(-1, 3, 4), list(rows))
    return frechet, similarity


@pytest.mark.parametrize("world", [3, 7])
def test_one_rank_equals_several_bit_by_bit(world: int) -> None:
    """torchmetrics' own synchronisation, its gathering played by this process (a real one: test_quick.py). Of 7 ranks one has nothing."""
    ranks = [filled(rank, world, pad=rank == 1) for rank in range(world)]
    for which, alone in enumerate(filled(0, 1, pad=False)):

        def gather(tensor: Tensor, group: Any = None, which: int = which) -> list[Tensor]:
            name = "index" if tensor.dtype == torch.long else "features"
            return [torch.cat(metrics[which]._with_nothing()[name]) for metrics in ranks]

        metric = filled(0, world, pad=False, dist_sync_fn=gather, distributed_available_fn=lambda: True)[which]
        assert torch.equal(metric.compute(), alone.compute())


def test_chunks_are_the_same_rows_on_any_number_of_ranks() -> None:
    alone = list(chunks(TOTAL, SIZE))
    assert [len(rows) for rows in alone] == [4, 4, 4, 4, 4, 3]
    for world in (2, 3, 5, 9):
        spread = [rows for rank in range(world) for rows in chunks(TOTAL, SIZE, rank, world)]
        assert sorted(spread, key=lambda rows: rows.start) == alone


def test_order_and_duplicates_do_not_matter() -> None:
    index, features = torch.tensor([2, 0, 1, 0]), torch.tensor([[2.0], [0.0], [1.0], [9.0]])
    names, rows = deduplicated(index, features, range(3))
    assert names.tolist() == [0, 1, 2]
    assert rows.flatten().tolist() == [0.0, 1.0, 2.0]  # of a duplicate the first stays


def test_gaps_and_foreign_rows_are_errors() -> None:
    with pytest.raises(FeatureError, match=r"2 missing \[1, 3\], 1 not in the manifest \[8\]"):
        deduplicated(torch.tensor([0, 2, 8]), torch.zeros(3, 1), range(4))
    metric = FrechetMetric(moments(torch.randn(9, 3)), expected=range(5))
    metric.update(torch.randn(4, 3), range(4))
    with pytest.raises(FeatureError, match=r"1 missing \[4\]"):
        metric.compute()
    with pytest.raises(FeatureError, match=r"\(3,\)"):
        metric.update(torch.randn(4, 2), range(4))


def test_frames_count_as_rows_of_their_video() -> None:
    frames = torch.randn(6, 4, 3)
    reference = moments(torch.randn(50, 3))
    metric = FrechetMetric(reference, frames=4)
    metric.update(frames[3:], range(3, 6))
    metric.update(frames[:3], range(3))
    assert float(metric.compute()) == pytest.approx(frechet_distance(reference, moments(frames.flatten(0, 1))), rel=1e-9)

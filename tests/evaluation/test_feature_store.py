"""Features on disk, where several ranks use the same folder."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from t2v.evaluation import features
from t2v.evaluation.features import FeatureStore


def fitted(folder: Path, barrier: Any, answers: Any, patch: pytest.MonkeyPatch) -> None:
    """The Gaussian's mean, or what went wrong; nobody drops the damaged file before both have seen the damage."""
    torch.set_num_threads(1)

    def seen_by_both(path: Path, framework: str) -> Any:
        try:
            return safe_open(path, framework)
        except SafetensorError:
            barrier.wait(30)
            raise

    patch.setattr(features, "safe_open", seen_by_both)
    try:
        answers.put(FeatureStore(folder, {}).moments(8).mean.tolist())
    except Exception as error:  # for the test to see
        answers.put(repr(error))


def test_two_ranks_may_drop_a_damaged_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FeatureStore(tmp_path, {})
    store.write(range(8), 8, torch.arange(24.0).reshape(8, 3).sin())
    expected = store.moments(8).mean.tolist()
    kept = tmp_path / "moments.safetensors"
    whole = kept.read_bytes()
    kept.write_bytes(whole[:50])
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.SimpleQueue()
    ranks = [context.Process(target=fitted, args=(tmp_path, barrier, answers, monkeypatch), daemon=True) for _ in range(2)]
    for rank in ranks:
        rank.start()
    assert [answers.get() for _ in ranks] == [expected] * 2
    for rank in ranks:
        rank.join(30)
    assert kept.read_bytes() == whole
    assert not list(tmp_path.glob(".*"))


def test_features_of_other_rows_are_not_there(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path, {})
    store.write(range(4, 8), 4, torch.zeros(4, 3))
    assert store.has(range(4, 8), 4)
    assert not store.has(range(8, 16), 8)  # of the same file name

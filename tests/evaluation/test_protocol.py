"""Selection: golden, nested, independent of order; what does not fit is refused."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_evaluation import protocol
from torch import Tensor

from t2v.data.msrvtt import Sentence
from t2v.evaluation import Manifest, select
from t2v.evaluation.scores import check_protocol


@dataclass
class Paper:
    """A data set of captions alone."""

    sentences: list[Sentence]
    name: str = "msrvtt"
    recipe: str = "none"
    fingerprint: str = "0" * 64

    def missing(self, video_ids: list[str]) -> list[str]:
        return []

    def signature(self, video_ids: list[str]) -> str:
        return "files"

    def clip(self, video_id: str, *, num_frames: int, fps: float, size: int) -> Tensor:
        return torch.zeros(num_frames, size, size, 3, dtype=torch.uint8)


def sentences(videos: int = 40, captions: int = 5) -> list[Sentence]:
    return [Sentence(f"video{v}", 10 * v + c, f"caption {c} of {v}") for v in range(videos) for c in range(captions)]


GOLDEN = [
    ("video26", 262),
    ("video18", 183),
    ("video36", 360),
    ("video11", 110),
    ("video23", 233),
    ("video5", 52),
    ("video13", 134),
    ("video35", 353),
]
GOLDEN_SEED = 4431954584727193545
GOLDEN_MANIFEST = "c2ef4bed0ae4f59e1a65a99cb2249c0cb428bc8e52a047bc0b46ab9f577cc1d4"


def test_golden() -> None:
    """Written down once: another machine, Python or library must choose the same."""
    rows = select(Paper(sentences()), protocol(num_videos=8, metrics=("fvd",))).rows
    assert [(row.video_id, row.sen_id) for row in rows] == GOLDEN
    assert rows[0].noise_seed == GOLDEN_SEED
    assert select(Paper(sentences()), protocol(num_videos=8, metrics=("fvd",))).sha256 == GOLDEN_MANIFEST


def test_smaller_is_a_part_of_larger_and_order_does_not_matter() -> None:
    shuffled = sentences()
    random.Random(1).shuffle(shuffled)
    large = select(Paper(sentences()), protocol(num_videos=32, metrics=("fvd",)))
    small = select(Paper(shuffled), protocol(num_videos=8, metrics=("fvd",)))
    assert small.rows == large.rows[:8]
    other = select(Paper(sentences()), protocol(num_videos=8, metrics=("fvd",), seed=1))
    assert {row.video_id for row in other.rows} != {row.video_id for row in small.rows}
    assert len({row.noise_seed for row in large.rows}) == 32


def test_all_captions_of_a_video_stay_together_and_have_their_own_noise() -> None:
    rows = select(Paper(sentences()), protocol(captions="all", metrics=("clipsim",))).rows
    assert len(rows) == 200
    assert len({row.noise_seed for row in rows}) == 200
    assert len({row.video_id for row in rows[:5]}) == 1
    assert [row.index for row in rows] == list(range(200))


def test_manifest_survives_a_file(tmp_path: Path) -> None:
    manifest = select(Paper([Sentence(f"v{k}", k, 'ünïcode | "quoted"') for k in range(9)]), protocol(metrics=("fvd",)))
    manifest.write(tmp_path / "manifest.jsonl")
    again = Manifest.read(tmp_path / "manifest.jsonl")
    assert again == manifest
    assert again.sha256 == manifest.sha256
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["index"] == 0
    (tmp_path / "manifest.jsonl").write_text("not json")
    with pytest.raises(ValueError, match="is not a manifest"):
        Manifest.read(tmp_path / "manifest.jsonl")


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\r\n"])
def test_ends_of_lines_inside_captions_are_read_back(tmp_path: Path, end: str) -> None:
    manifest = select(Paper([Sentence(f"v{k}", k, f"a dog{end}runs") for k in range(9)]), protocol(metrics=("fvd",)))
    manifest.write(tmp_path / "manifest.jsonl")
    assert Manifest.read(tmp_path / "manifest.jsonl") == manifest


def test_fewer_videos_than_the_preset_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts 2048 videos, msrvtt has 40.*num_videos=40"):
        select(Paper(sentences()), protocol(num_videos=2048))
    with pytest.raises(ValueError, match="is on shapes, it was given msrvtt"):
        select(Paper(sentences()), protocol(dataset="shapes"))
    with pytest.raises(ValueError, match="fewer than 8"):
        protocol(num_videos=4)


def test_protocols_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown metrics \['fid_vid'\]"):
        check_protocol(protocol(metrics=("fid_vid",)))
    with pytest.raises(ValueError, match="count each real video once"):
        check_protocol(protocol(captions="all"))
    with pytest.raises(ValueError, match="at least 9 frames"):
        check_protocol(protocol(num_frames=8))
    with pytest.raises(ValueError, match="captions='some'"):
        protocol(captions="some")

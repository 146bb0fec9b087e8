"""1:7 is a weight of losses and a share of ranks; uneven shares weigh by count."""

from __future__ import annotations

import pytest
import torch

from t2v.training.mixture import JointMixture, RankMixture, Role, StepPlan


def shares(total: int, world: int) -> list[int]:
    return [len(range(rank, total, world)) for rank in range(world)]


@pytest.mark.parametrize(("world", "images", "videos", "micro"), [(1, 7, 5, 3), (3, 7, 5, 2), (8, 1400, 3200, 64)])
def test_joint_loss_is_the_weighted_mean_over_the_global_batch(world: int, images: int, videos: int, micro: int) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = {"image": torch.rand(images, generator=generator), "video": torch.rand(videos, generator=generator)}
    plan = StepPlan.of(JointMixture(), {"image": images, "video": videos}, {"image": micro, "video": micro}, world)
    ranks = [sum(plan.scale(s) * values[rank::world].sum() for s, values in losses.items()) / plan.accumulate for rank in range(world)]
    expected = losses["image"].mean() / 8 + losses["video"].mean() * 7 / 8
    assert torch.isclose(torch.stack(ranks).mean(), expected)  # data-parallel training averages the ranks
    assert not torch.isclose(torch.cat(list(losses.values())).mean(), expected)


def test_rank_mixture_gives_the_same_gradient_as_joint() -> None:
    generator = torch.Generator().manual_seed(1)
    losses = {"image": torch.rand(10, generator=generator), "video": torch.rand(11, generator=generator)}
    mixture = RankMixture()
    plan = StepPlan.of(mixture, {"image": 10, "video": 11}, {"image": 4, "video": 4}, world=3)
    total = torch.zeros(())
    for rank in range(3):
        for stream, role in mixture.roles(rank, 3).items():
            total += plan.scale(stream) * losses[stream][role.rank :: role.world].sum() / plan.accumulate / 3
    assert torch.isclose(total, losses["image"].mean() / 8 + losses["video"].mean() * 7 / 8)


def test_rank_mixture_takes_every_eighth_rank_for_images() -> None:
    roles = [RankMixture().roles(rank, 16) for rank in range(16)]
    assert [rank for rank in range(16) if "image" in roles[rank]] == [0, 8]
    assert [role["image"].rank for role in roles if "image" in role] == [0, 1]
    assert [role["video"].rank for role in roles if "video" in role] == list(range(14))
    assert {role["video"].world for role in roles if "video" in role} == {14}
    uneven = [RankMixture().roles(rank, 11) for rank in range(11)]
    assert [role["image"] for role in uneven if "image" in role] == [Role(0, 2), Role(1, 2)]
    assert [role["video"] for role in uneven if "video" in role] == [Role(rank, 9) for rank in range(9)]


def test_accumulation_follows_from_micro_batches() -> None:
    plan = StepPlan.of(JointMixture(), {"image": 1400, "video": 3200}, {"image": 175, "video": 8}, world=80)
    assert plan.accumulate == 5  # 40 videos on each rank in fives of 8; 17 or 18 images
    assert StepPlan.of(JointMixture(), {"video": 7}, {"video": 2}, world=3).accumulate == 2


def test_impossible_mixtures_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"at least 2 ranks.*mixture=joint"):
        RankMixture().roles(0, 1)
    with pytest.raises(ValueError, match="4 image samples cannot be divided between 8 ranks"):
        StepPlan.of(JointMixture(), {"image": 4, "video": 64}, {"image": 4, "video": 8}, world=8)
    with pytest.raises(ValueError, match="between 0"):
        JointMixture(1.5)
    with pytest.raises(ValueError, match="micro_batch"):
        StepPlan.of(JointMixture(), {"video": 4}, {"video": 0}, world=1)

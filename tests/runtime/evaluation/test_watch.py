import pytest
import torch

from rewards.mixture import RewardError
from runtime.evaluation.evaluated import Evaluated
from runtime.evaluation.statistics import heldout_metrics
from runtime.evaluation.watch import suspicions, watch_metrics
from runtime.experiment.config import WatchSection

ONE = torch.ones(1)
NO_IMAGES = torch.zeros(0, 1, 1, 3, dtype=torch.uint8)
SPREAD = torch.tensor([1.0, 3.0]).repeat(8)  # 8 prompts, standard deviation 1.033


def evaluated(total, other, diversity):
    return Evaluated({"total": SPREAD + total, "other": SPREAD + other}, diversity * ONE, NO_IMAGES, 0)


def watched(total=0.0, other=0.0, diversity=1.0, **limits):
    teacher, result = evaluated(0.0, 0.0, 1.0), evaluated(total, other, diversity)
    line = heldout_metrics(result, teacher) | watch_metrics(result, teacher, {"total"})
    return line, suspicions(line, result, teacher, WatchSection(**limits))


def test_falls_by_hand():
    line, _ = watched(total=1.0, other=-0.5, diversity=0.75)
    assert line["watch/other"] == pytest.approx(0.5 / SPREAD.std().item())
    assert line["watch/diversity"] == pytest.approx(0.25)
    assert "watch/total" not in line


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"total": 1.0, "other": -0.5}, "other fell by 0.5, 0.48 of its standard deviation"),
        ({"total": 1.0, "diversity": 0.5}, "diversity fell by 50 %"),
        ({"total": 1.0, "diversity": 0.75, "diversity_drop": 0.2}, "diversity fell by 25 %"),
        ({"total": 1.0, "other": -0.1, "reward_drop": 0.05}, "other fell by 0.1"),
    ],
)
def test_suspected_hacking(change, words):
    (sentence,) = watched(**change)[1]
    assert words in sentence


@pytest.mark.parametrize(
    "change",
    [
        {"total": 1.0, "other": 0.5, "diversity": 1.5},
        {"total": 1.0, "other": -0.1},
        {"total": 1.0, "diversity": 0.75},
        {"total": 0.0, "other": -0.5, "diversity": 0.1},  # the trained reward has not risen
    ],
)
def test_no_suspicion(change):
    assert watched(**change)[1] == []


def test_an_insignificant_fall_is_ignored():
    teacher, result = evaluated(0.0, 0.0, 1.0), evaluated(1.0, 0.0, 1.0)
    result.scores["other"][0] -= 16.0  # one image of sixteen: a mean fall of 1, and a standard error of 1
    line = heldout_metrics(result, teacher) | watch_metrics(result, teacher, {"total"})
    assert line["watch/other"] > 0.9
    assert suspicions(line, result, teacher, WatchSection()) == []


def test_constant_scores_are_not_watched():
    teacher = Evaluated({"total": SPREAD, "same": torch.ones(16)}, 0 * ONE, NO_IMAGES, 0)
    assert watch_metrics(teacher, teacher, {"total"}) == {}


def test_an_image_without_a_score_on_one_side_is_excluded_from_both():
    nan = torch.nan
    teacher = Evaluated({"total": torch.tensor([1.0, 2.0, 3.0, nan, 5.0, 6.0]), "other": SPREAD[:6]}, ONE, NO_IMAGES, 0)
    result = Evaluated({"total": torch.tensor([2.0, 3.0, nan, 9.0, 5.0, 6.0]), "other": SPREAD[:6] * nan}, ONE, NO_IMAGES, 0)
    line = heldout_metrics(result, teacher)
    assert line["heldout/total"] == 4.0
    assert line["heldout/base/total"] == 3.5
    assert line["heldout/win_rate"] == 0.75
    assert line["heldout/total_se"] == pytest.approx(0.5), "of 1 and 0; one prompt has no pair"
    assert "heldout/other" not in line
    assert watch_metrics(result, teacher, {"total"}) == {"watch/diversity": 0.0}
    one = Evaluated({"total": torch.tensor([2.0, 3.0, nan, nan])}, ONE, NO_IMAGES, 0)
    assert "heldout/total_se" not in heldout_metrics(one, one)
    with pytest.raises(RewardError, match="no held-out image has a score"):
        heldout_metrics(result, Evaluated({**teacher.scores, "total": torch.full((6,), nan)}, ONE, NO_IMAGES, 0))


def test_a_saturated_discriminator_and_lost_diversity_without_a_rising_reward():
    teacher, result = evaluated(0.0, 0.0, 1.0), evaluated(-1.0, -2.0, 0.6)
    line = heldout_metrics(result, teacher) | watch_metrics(result, teacher, {"total"})
    assert suspicions(line, result, teacher, WatchSection()) == []
    assert suspicions(line, result, teacher, WatchSection(), 0.5) == ["diversity fell by 40 %"]
    lost, certain = suspicions(line, result, teacher, WatchSection(), 0.95)
    assert lost == "diversity fell by 40 %"
    assert certain.startswith("the discriminator is certain of 95 % of the image pairs")
    assert suspicions(line, result, teacher, WatchSection(discriminator_saturated=1.0, diversity_drop=0.5), 0.95) == []

"""Rewards that fail sometimes, in whole runs: the effect of `on_error`, and their values beside the score."""

import pytest
import torch

from diffusion import Scores
from rewards.mixture import RewardError
from runtime.evaluation.statistics import reward_metrics
from runtime.executors.inline import InlineExecutor
from runtime.executors.messages import Batch, joined
from runtime.experiment.yaml import read_experiment
from tests.runtime.run.test_run import QUICKSTART, SMALL, go

REWARD = """
def mean(prompts, completions, log_metric, **columns):
    if "SUCH" in prompts[0]:
        raise OSError("gone")
    log_metric("length", len(prompts[0]))
    return [sum(image.convert("L").tobytes()) / 261120 for image in completions]
"""


@pytest.fixture
def failing(tmp_path):
    """An experiment whose reward fails on every prompt with a word in it, and which groups those are, in the first step."""

    def experiment(word, on_error):
        (tmp_path / "reward.py").write_text(REWARD.replace("SUCH", word))
        entry = f"{{name: 'python:{tmp_path}/reward.py:mean', trl: true, on_error: {on_error}}}"
        changes = [f"rewards={{train: [{entry}]}}", "run.steps=1", "run.evaluate_every=1", "rollouts.groups_per_step=6"]
        return read_experiment(QUICKSTART, [*SMALL, *changes], allow_code=True)

    return experiment


def test_a_failing_reward_ends_the_run(failing, tmp_path):
    with pytest.raises(RewardError, match="mean raised OSError: gone"):
        go(failing("a ", "fail"), tmp_path / "run")


def test_groups_without_scores_are_excluded(failing, tmp_path):
    experiment = failing("left", "drop_group")
    updates = []

    class Watched(InlineExecutor):
        def update(self, step, batch, credit):
            updates.append(batch.scores.total)
            return super().update(step, batch, credit)

    folder, _ = go(experiment, tmp_path / "run", Watched(experiment))
    (line,) = folder.metrics()
    missing = updates[0].isnan().view(6, 4)
    assert missing.any(), "the prompts of the step must have the word, or this proves nothing"
    assert not missing.all(), "and some must not"
    assert (missing == missing[:, :1]).all(), "whole groups"
    assert line["extra/dropped/mean"] == pytest.approx(missing.float().mean().item())
    assert line["reward/total"] == pytest.approx(updates[0].nanmean().item())
    assert line["grad_norm"] > 0
    assert line["extra/length"] > 0
    assert line["nfe/train"] == 4 * (~missing[:, 0]).sum().item(), "anchors times trained steps, of the other groups only"


def test_a_step_without_any_score_ends_the_run(failing, tmp_path):
    with pytest.raises(RewardError, match=r"no held-out image has a score|no group of this step has all its scores"):
        go(failing("a ", "drop_group"), tmp_path / "run")


def scores(total, extra):
    return Scores(torch.tensor(total), {}, {name: torch.tensor(values) for name, values in extra.items()})


def test_means_are_over_the_known_values():
    nan = torch.nan
    line = reward_metrics(scores([1.0, 3.0, nan, 5.0, 2.0, 2.0], {"length": [4.0, nan], "nothing": [nan]}), group_size=2)
    assert line == {"reward/total": pytest.approx(13 / 5), "reward/std": pytest.approx(2**0.5 / 2), "extra/length": 4.0}
    with pytest.raises(RewardError, match="no group of this step"):
        reward_metrics(scores([1.0, nan, nan, 5.0], {}), group_size=2)


def test_batches_of_several_workers_join():
    def part(total, extra):
        return Batch(scores(total, extra), 4, 10, {"rollout": total[0], "reward": 1.0}, None)

    both = joined([part([1.0], {"a": [1.0]}), part([2.0], {"b": [2.0], "a": [3.0]})], "payload")
    assert {name: values.tolist() for name, values in both.scores.extra.items()} == {"a": [1.0, 3.0], "b": [2.0]}
    assert both.scores.total.tolist() == [1, 2]
    assert (both.nfe, both.version, both.seconds["rollout"], both.payload) == (20, 4, 2.0, "payload")

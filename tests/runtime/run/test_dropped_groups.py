"""Rewards that fail now and then, in whole runs: what `on_error` makes of them, and what they say beside their scores."""

import pytest
import torch

from rewards.mixture import RewardError
from runtime.executors.inline import Batch, InlineExecutor
from runtime.executors.ray.executor import joined_batch
from runtime.experiment.config import read_experiment
from runtime.run.loop import reward_metrics
from tests.runtime.run.test_run import QUICKSTART, SMALL, go

REWARD = """
def mean(prompts, completions, log_metric, **columns):
    if "SUCH" in prompts[0]:
        raise OSError("gone")
    log_metric("length", len(prompts[0]))
    return [sum(picture.convert("L").tobytes()) / 261120 for picture in completions]
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


def test_groups_without_scores_are_left_out(failing, tmp_path):
    experiment = failing("left", "drop_group")
    updates = []

    class Watched(InlineExecutor):
        def update(self, step, batch):
            updates.append(batch.payload[0].scores.total)
            return super().update(step, batch)

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
    with pytest.raises(RewardError, match=r"no held-out picture has a score|no group of this step has all its scores"):
        go(failing("a ", "drop_group"), tmp_path / "run")


def batch(total, extra):
    return Batch({"total": torch.tensor(total)}, {k: torch.tensor(v) for k, v in extra.items()}, 0, {"rollout": 0.0}, None)


def test_means_are_of_what_is_known():
    nan = torch.nan
    line = reward_metrics(batch([1.0, 3.0, nan, 5.0, 2.0, 2.0], {"length": [4.0, nan], "nothing": [nan]}), group_size=2)
    assert line == {"reward/total": pytest.approx(13 / 5), "reward/std": pytest.approx(2**0.5 / 2), "extra/length": 4.0}
    with pytest.raises(RewardError, match="no group of this step"):
        reward_metrics(batch([1.0, nan, nan, 5.0], {}), group_size=2)


def test_extra_figures_are_joined_whoever_has_them():
    joined = joined_batch([batch([1.0], {"a": [1.0]}), batch([2.0], {"b": [2.0], "a": [3.0]})], [None, None])
    assert {name: values.tolist() for name, values in joined.extra.items()} == {"a": [1.0, 3.0], "b": [2.0]}

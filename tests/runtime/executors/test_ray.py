"""The Ray executor where it does not matter what runs: splitting, shares of GPUs, what travels."""

import pytest
import torch

from rollouts.prompts import read_prompts
from runtime.executors.ray.store import bytes_of, from_store, to_store
from runtime.experiment.config import new_objective
from runtime.roles.sampler import Sampler
from runtime.run.loop import work_of_step
from tests.runtime.run.test_run import small


def test_groups_are_split_where_micro_batches_end():
    from runtime.executors.ray.executor import split

    assert split(range(16), 2, 5) == [range(10), range(10, 16)]
    assert split(range(16), 1, 5) == [range(16)]
    assert split(range(4), 3, 5) == [range(4)]
    assert [len(part) for part in split(range(12), 3, 1)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("gpus", "processes", "share"), [(0, 2, 0), (1, 1, 1), (3, 3, 1), (8, 2, 1), (2, 3, 0.5), (8, 9, 0.5), (1, 6, 0.1666)]
)
def test_a_processs_share_fits_on_one_gpu(monkeypatch, gpus, processes, share):
    from runtime.executors.ray import cluster

    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"GPU": gpus} if gpus else {})
    assert cluster.gpus_of_a_process("auto", processes) == share
    assert cluster.gpus_of_a_process("cpu", processes) == 0


def test_what_travels_to_the_learner_is_states_and_one_condition_for_each_group(restore_threads):
    experiment = small("rollouts.groups_per_step=3", "rollouts.steps=4")
    sampler = Sampler(experiment)
    train = read_prompts(experiment.prompts.train)
    work = work_of_step(experiment, new_objective(experiment), train, step=1)
    rollout = sampler.sample(work.groups, work.plan, version=0).rollout
    samples, states, latent = 3 * 4, 4 + 1, 8 * 8 * 8
    condition = sum(tensor[:1].nbytes for tensor in rollout.condition.tensors.values())
    indices = 2 * 8 * samples + 8 * states  # group and seeds, times
    payload = to_store(rollout)
    assert bytes_of(payload) == bytes_of(rollout) == 4 * samples * states * latent + 3 * condition + indices
    back = from_store(payload)
    assert torch.equal(back.trajectory.x, rollout.trajectory.x)
    assert [prompt.text for prompt in back.prompts] == [prompt.text for prompt in rollout.prompts]

import pytest
import torch

from diffusion.protocols import Codec, Predict, RewardModel
from diffusion.types import About, Condition, Plan, Prompt, Rollout, Scores, Trajectory


@pytest.fixture
def condition():
    return Condition({"tokens": torch.arange(6.0).reshape(3, 2), "pooled": torch.tensor([10.0, 20.0, 30.0])})


def test_condition_counts_its_rows(condition):
    assert len(condition) == 3


def test_condition_refuses_different_batch_sizes():
    with pytest.raises(ValueError, match=r"\{'a': 2, 'b': 3\}"):
        Condition({"a": torch.zeros(2, 4), "b": torch.zeros(3)})


@pytest.mark.parametrize(
    ("index", "pooled"),
    [
        (slice(1, None), [20.0, 30.0]),
        ([2, 0], [30.0, 10.0]),
        ((1,), [20.0]),
        (torch.tensor([1, 1]), [20.0, 20.0]),
        (torch.tensor([True, False, True]), [10.0, 30.0]),
    ],
)
def test_condition_indexes_every_tensor_alike(condition, index, pooled):
    part = condition[index]
    assert part.tensors["pooled"].tolist() == pooled
    assert part.tensors["tokens"][:, 0].tolist() == [(p - 10) / 5 for p in pooled]


@pytest.mark.parametrize("index", [0, torch.tensor(0)])
def test_condition_refuses_a_single_index(condition, index):
    with pytest.raises(TypeError, match="drop the batch axis"):
        condition[index]


def test_condition_repeats_row_by_row(condition):
    assert condition.repeat(2).tensors["pooled"].tolist() == [10.0, 10.0, 20.0, 20.0, 30.0, 30.0]


def test_condition_joins_in_order(condition):
    joined = Condition.cat([condition[[2]], condition[[0]]])
    assert joined.tensors["tokens"].tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_condition_moves_every_tensor(condition):
    assert {t.dtype for t in condition.to(torch.float64).tensors.values()} == {torch.float64}


def test_trajectory_refuses_states_without_times():
    with pytest.raises(ValueError, match="3 states but 2 times"):
        Trajectory(torch.zeros(1, 3, 4), torch.tensor([1.0, 0.0]))


def test_data_types_are_frozen():
    with pytest.raises(AttributeError):
        Prompt("a", "a red circle").text = "a blue circle"  # type: ignore[misc]


def test_protocols_distinguish_a_reward_from_a_network():
    class Brightness:
        about = About("brightness", differentiable=True)

        def __call__(self, images, prompts):
            mean = images.mean(dim=(1, 2, 3))
            return Scores(mean, {self.about.label: mean})

    assert isinstance(Brightness(), RewardModel)
    assert not isinstance(Brightness(), Codec)
    assert isinstance(lambda x, t, condition, adapter: x, Predict)
    assert not isinstance(lambda x, t, condition, adapter: x, RewardModel)


def rollout(texts, group_size=2, version=3, predictions=True):
    number = len(texts) * group_size
    x = torch.arange(number * 3.0).reshape(number, 3, 1)
    return Rollout(
        prompts=[Prompt(text, text) for text in texts],
        condition=Condition({"length": torch.tensor([float(len(text)) for text in texts])}),
        group=torch.arange(len(texts)).repeat_interleave(group_size),
        seeds=torch.arange(number) + 10 * len(texts[0]),
        trajectory=Trajectory(x, torch.tensor([1.0, 0.5, 0.0]), -x[:, :2] if predictions else None),
        version=version,
    )


def test_a_rollout_has_one_condition_per_group():
    one = rollout(["a", "bcd"])
    assert len(one) == 4
    assert one.condition[one.group].tensors["length"].tolist() == [1, 1, 3, 3]
    assert [prompt.id for prompt in one.sample_prompts] == ["a", "a", "bcd", "bcd"]


def test_joined_rollouts_renumber_their_groups():
    joined = Rollout.cat([rollout(["a", "bcd"]), rollout(["ef"])])
    assert joined.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert joined.condition.tensors["length"].tolist() == [1, 3, 2]
    assert joined.seeds.tolist() == [10, 11, 12, 13, 20, 21]
    assert [prompt.id for prompt in joined.sample_prompts] == ["a", "a", "bcd", "bcd", "ef", "ef"]
    assert joined.trajectory.x.shape == (6, 3, 1)
    assert joined.trajectory.prediction.shape == (6, 2, 1)
    assert joined.version == 3
    assert Rollout.cat([rollout(["a"], predictions=False), rollout(["b"], predictions=False)]).trajectory.prediction is None


def test_rollouts_of_two_versions_do_not_join():
    with pytest.raises(AssertionError, match="one version"):
        Rollout.cat([rollout(["a"]), rollout(["b"], version=4)])


def test_scores_join_and_a_batch_may_lack_an_extra_value():
    a = Scores(torch.tensor([1.0]), {"r": torch.tensor([1.0])}, {"x": torch.tensor([5.0])})
    b = Scores(torch.tensor([2.0]), {"r": torch.tensor([3.0])})
    joined = Scores.cat([b, a, a])
    assert joined.total.tolist() == [2, 1, 1]
    assert joined.parts["r"].tolist() == [3, 1, 1]
    assert joined.extra["x"].tolist() == [5, 5]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(record=[5]), r"record has \[5\], allowed are 0 to 4"),
        (Plan(noisy=[4]), r"noisy has \[4\], allowed are 0 to 3"),
        (Plan(adapter="old"), "adapter is 'old', allowed are policy"),
        (Plan(group_size=0), "group_size is 0"),
        (Plan(source="noise"), "scored is True"),
    ],
)
def test_a_plan_that_does_not_fit_the_solve_is_refused(plan, words):
    with pytest.raises(ValueError, match=words):
        plan.check(4, ["policy"])


def test_the_drawing_adapter_follows_from_the_plan():
    Plan(record=range(5), noisy=[0, 3]).check(4, ["policy"])
    assert Plan(adapter="old").drawing_adapter == "old"
    assert Plan(source="teacher").drawing_adapter is None

import pytest
import torch

from diffusion.types import About, Codec, Condition, Predict, Prompt, RewardModel, Scores, Trajectory


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


def test_nouns_are_frozen():
    with pytest.raises(AttributeError):
        Prompt("a", "a red circle").text = "a blue circle"  # type: ignore[misc]


def test_protocols_tell_a_reward_from_a_network():
    class Brightness:
        about = About("brightness", differentiable=True)

        def __call__(self, images, prompts):
            mean = images.mean(dim=(1, 2, 3))
            return Scores(mean, {self.about.label: mean})

    assert isinstance(Brightness(), RewardModel)
    assert not isinstance(Brightness(), Codec)
    assert isinstance(lambda x, t, condition, adapter: x, Predict)
    assert not isinstance(lambda x, t, condition, adapter: x, RewardModel)

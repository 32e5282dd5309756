import pickle

import pytest
import torch

from diffusion import Prompt, RewardModel, Scores
from diffusion.types import About
from rewards.mixture import Mixture, RewardError, normalized_then_summed, score
from rewards.scorers.brightness import Brightness
from rewards.scorers.symmetry import Symmetry
from rewards.wrappers import Clipped

PROMPTS = [Prompt("1", "a red circle"), Prompt("2", "a blue seven")]


class Says:
    """A scorer with constant scores."""

    def __init__(self, answer, label="says"):
        self.about = About(label, differentiable=False)
        self.answer = answer

    def __call__(self, images, prompts):
        return Scores(self.answer, {self.about.label: self.answer})


class Best:
    """1 - mean pixel: differentiable or not, as constructed, in both cases with a gradient."""

    def __init__(self, differentiable, label):
        self.about = About(label, differentiable)

    def __call__(self, images, prompts):
        total = 1 - images.mean((1, 2, 3))
        return Scores(total, {self.about.label: total})


@pytest.fixture
def images():
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_the_total_is_the_weighted_mean_and_the_parts_are_raw(images):
    first, second = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])
    mixture = Mixture([(Says(first, "first"), 1.0), (Says(second, "second"), 3.0)])
    scores = mixture(images, PROMPTS)
    assert scores.total.tolist() == [0.75, 0.625]
    assert scores.total.dtype == torch.float32
    assert {label: part.tolist() for label, part in scores.parts.items()} == {"first": [0, 1], "second": [1, 0.5]}


def test_a_mixture_of_one_is_that_one(images):
    mixture = Mixture([(Brightness(), 0.3)])
    assert torch.equal(mixture(images, PROMPTS).total, Brightness()(images, PROMPTS).total)


def test_it_is_a_reward_model_and_can_be_mixed_again(images):
    inner = Mixture([(Brightness(), 1), (Symmetry(), 1)], label="look")
    outer = Mixture([(inner, 1), (Says(torch.zeros(2)), 1)])
    assert isinstance(outer, RewardModel)
    scores = score(outer, images, PROMPTS)
    assert list(scores.parts) == ["look", "says"]
    assert torch.equal(scores.total, inner(images, PROMPTS).total / 2)


def test_weight_zero_is_logged_only(images):
    mixture = Mixture([(Brightness(), 1.0), (Best(True, "watched"), 0.0)])
    scores = mixture(images.requires_grad_(), PROMPTS)
    assert torch.equal(scores.total, Brightness()(images, PROMPTS).total)
    assert not scores.parts["watched"].requires_grad
    assert mixture.about.differentiable


def test_differentiable_if_all_of_positive_weight_are():
    yes, no = Best(True, "yes"), Best(False, "no")
    assert Mixture([(yes, 1.0)]).about.differentiable
    assert Mixture([(yes, 1.0), (no, 0.0)]).about.differentiable
    assert not Mixture([(yes, 1.0), (no, 1.0)]).about.differentiable


def test_the_gradient_comes_from_the_differentiable_parts_alone(images):
    images.requires_grad_()
    mixture = Mixture([(Brightness(), 1.0), (Best(False, "no"), 3.0)])
    (gradient,) = torch.autograd.grad(mixture(images, PROMPTS).total.sum(), images)
    (alone,) = torch.autograd.grad(Brightness()(images, PROMPTS).total.sum(), images)
    assert torch.allclose(gradient, alone / 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_score_that_is_not_finite_stops_the_run(images, value):
    answer = torch.tensor([0.5, value])
    with pytest.raises(RewardError, match=f"^reward says gave the score {value} for the prompt 'a blue seven'$"):
        Mixture([(Brightness(), 1.0), (Says(answer), 1.0)])(images, PROMPTS)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (torch.zeros(2, 1), r"float32 \[2, 1\]"),
        (torch.zeros(3), r"float32 \[3\]"),
        (torch.tensor(0.0), r"float32 \[\]"),
        (torch.zeros(2, dtype=torch.float64), r"float64 \[2\]"),
        (torch.zeros(2, dtype=torch.int64), r"int64 \[2\]"),
    ],
)
def test_scores_of_another_shape_or_dtype_stop_the_run(images, answer, kind):
    said = f"^reward says gave scores {kind} for 2 prompts \\(the first is 'a red circle'\\); they must be float32 \\[2\\]$"
    with pytest.raises(RewardError, match=said):
        score(Says(answer), images, PROMPTS)


def test_invalid_images_stop_the_run(images):
    reward = Brightness()
    for wrong, kind in [
        (images[:1], r"float32 \[1, 3, 4, 4\] for 2 prompts \(the first is 'a red circle'\)"),
        (images[:, :1], r"float32 \[2, 1, 4, 4\]"),
        (images[0], r"float32 \[3, 4, 4\]"),
        (images.double(), r"float64 \[2, 3, 4, 4\]"),
        ((images * 255).to(torch.uint8), r"uint8 \[2, 3, 4, 4\]"),
    ]:
        with pytest.raises(RewardError, match=f"^reward brightness got images {kind}.*; it takes float32"):
            score(reward, wrong, PROMPTS)
    images[1, 0] = -0.5
    with pytest.raises(RewardError, match=r"values from -0.5 to 0.\d+ for the prompt 'a blue seven'; it takes \[0, 1\]$"):
        score(reward, images, PROMPTS)


def test_the_error_travels_between_processes():
    error = pickle.loads(pickle.dumps(RewardError("reward x gave the score nan")))
    assert (type(error), str(error)) == (RewardError, "reward x gave the score nan")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([], "no reward; at least one"),
        ([(Brightness(), 1), (Brightness(), 1)], "2 rewards have the label 'brightness'; give each a `label` of its own"),
        ([(Brightness("total"), 1)], "label 'total': not allowed; allowed are letters"),
        ([(Brightness("a/b"), 1)], "label 'a/b': not allowed"),
        ([(Brightness(), 0)], "at least one must be positive"),
        ([(Brightness(), 2), (Symmetry(), -1)], "none may be negative"),
        ([(Brightness(), float("nan"))], "none may be negative"),
    ],
)
def test_invalid_members(members, said):
    with pytest.raises(ValueError, match=said):
        Mixture(members)


def test_clipped_scores_are_set_to_the_nearer_end():
    says = Says(torch.tensor([-2.0, 0.25]))
    assert Clipped(says, 0.0, 1.0)(torch.rand(2, 3, 4, 4), PROMPTS[:2]).total.tolist() == [0.0, 0.25]
    images = torch.full((1, 3, 4, 4), 0.5, requires_grad=True)
    Clipped(Brightness(), 0.6, 1.0)(images, PROMPTS[:1]).total.sum().backward()
    assert not images.grad.any()


def test_a_clipped_reward_that_is_broken_still_stops_the_run():
    with pytest.raises(RewardError, match="gave the score nan"):
        Clipped(Says(torch.tensor([float("nan")])), 0.0, 1.0)(torch.rand(1, 3, 4, 4), PROMPTS[:1])


def test_normalized_then_summed_by_hand():
    parts = {"a": torch.tensor([0.0, 1.0, 5.0, 5.0]), "b": torch.tensor([300.0, 100.0, 2.0, 6.0]), "watched": torch.ones(4)}
    half = 0.5**0.5  # of two scores, each is this many standard deviations from their mean
    expected = torch.tensor([-half / 4 + 3 * half / 4, half / 4 - 3 * half / 4, -3 * half / 4, 3 * half / 4])
    torch.testing.assert_close(normalized_then_summed(parts, {"a": 1.0, "b": 3.0, "watched": 0.0}, 2), expected)
    scaled = parts | {"b": 0.001 * parts["b"] - 7}
    torch.testing.assert_close(normalized_then_summed(scaled, {"a": 1.0, "b": 3.0}, 2), expected, atol=1e-4, rtol=0)

import pytest
import torch

import rewards
from diffusion.types import About, Prompt, Scores
from rewards.mixture import Mixture, RewardError, normalized_then_summed, score
from rewards.scorers.brightness import Brightness
from rewards.wrappers import ATTEMPTS, Cached, Clipped, Dropping, Retried, image_features

PROMPTS = [Prompt("1", "a red circle"), Prompt("1", "a red circle"), Prompt("2", "a blue seven"), Prompt("3", "a cross")]


class Picky:
    """The mean pixel. Fails on the prompts with these ids, `times` times; records how many images each call had."""

    about = About("picky", differentiable=True)

    def __init__(self, fails_on=(), times=1000, error=RewardError):
        self.fails_on, self.times, self.error = fails_on, times, error
        self.calls = []

    def __call__(self, images, prompts):
        self.calls.append(len(images))
        if self.times and any(prompt.id in self.fails_on for prompt in prompts):
            self.times -= 1
            raise self.error("the judge is out")
        total = images.mean((1, 2, 3))
        return Scores(total, {"picky": total}, {"seen": torch.ones(len(images))})


class Says:
    def __init__(self, label, answer, may_abstain=False):
        self.about = About(label, differentiable=False, may_abstain=may_abstain)
        self.answer = torch.tensor(answer)

    def __call__(self, images, prompts):
        return Scores(self.answer, {self.about.label: self.answer})


@pytest.fixture
def images():
    return torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_retry_calls_again_with_doubled_pauses(images, capsys):
    waits, picky = [], Picky("2", times=2)
    scores = Retried(picky, waits.append)(images, PROMPTS)
    assert torch.equal(scores.total, images.mean((1, 2, 3)))
    assert waits == [1.0, 2.0]
    assert capsys.readouterr().err.count("the judge is out; trying again") == 2


def test_retry_gives_up_with_the_error(images):
    waits, picky = [], Picky("2", error=ConnectionError)
    with pytest.raises(ConnectionError, match="the judge is out"):
        Retried(picky, waits.append)(images, PROMPTS)
    assert len(picky.calls) == ATTEMPTS
    assert waits == [1.0, 2.0, 4.0]


def test_a_mistake_in_code_is_neither_retried_nor_dropped(images):
    for wrapper in (Retried, Dropping):
        picky = Picky("2", error=TypeError)
        with pytest.raises(TypeError):
            wrapper(picky)(images, PROMPTS)
        assert picky.calls == [4]


def test_only_the_prompt_that_fails_is_dropped(images, capsys):
    picky = Picky("2")
    scores = score(Dropping(picky), images, PROMPTS)
    assert picky.calls == [4, 2, 1, 1]
    assert scores.total.isnan().tolist() == [False, False, True, False]
    assert torch.allclose(scores.total[[0, 1, 3]], images[[0, 1, 3]].mean((1, 2, 3)))
    assert scores.extra["dropped/picky"].tolist() == [0, 0, 1, 0]
    assert "'a blue seven' is excluded" in capsys.readouterr().err


def test_nothing_dropped_is_counted_as_zero_and_keeps_the_rest(images):
    scores = Dropping(Picky())(images, PROMPTS)
    assert scores.extra["dropped/picky"].tolist() == [0, 0, 0, 0]
    assert scores.extra["seen"].tolist() == [1, 1, 1, 1]


def test_a_dropped_image_has_no_total_even_if_others_score_it(images):
    mixture = Mixture([(Brightness(), 1.0), (Dropping(Picky("2")), 3.0)])
    scores = mixture(images.requires_grad_(), PROMPTS)
    assert scores.total.isnan().tolist() == [False, False, True, False]
    assert not scores.parts["brightness"].isnan().any()
    expected = (Brightness()(images, PROMPTS).total + 3 * images.mean((1, 2, 3))) / 4
    assert torch.allclose(scores.total[[0, 1, 3]], expected[[0, 1, 3]])
    (gradient,) = torch.autograd.grad(scores.total[[0, 1, 3]].sum(), images)
    assert gradient.isfinite().all()
    assert (gradient[[0, 1, 3]] != 0).all()


def test_a_watched_reward_that_fails_costs_nothing(images):
    scores = Mixture([(Brightness(), 1.0), (Dropping(Picky("2")), 0.0)])(images, PROMPTS)
    assert torch.equal(scores.total, Brightness()(images, PROMPTS).total)


def test_who_abstains_is_left_out_of_the_mean(images):
    nan = torch.nan
    sometimes = Says("sometimes", [nan, 1.0, nan, 0.5], may_abstain=True)
    always = Says("always", [0.0, 0.0, 1.0, 1.0])
    mixture = Mixture([(sometimes, 1.0), (always, 3.0)])
    assert mixture(images, PROMPTS).total.tolist() == [0.0, 0.25, 1.0, 0.875]
    alone = Mixture([(sometimes, 1.0)])
    assert alone.about.may_abstain
    assert alone(images, PROMPTS).total.isnan().tolist() == [True, False, True, False]
    assert not Mixture([(always, 1.0), (sometimes, 0.0)]).about.may_abstain


def test_others_may_not_abstain(images):
    with pytest.raises(RewardError, match="gave the score nan"):
        score(Says("x", [torch.nan, 0.0, 0.0, 0.0]), images, PROMPTS)


def test_who_abstains_adds_nothing_to_normalized_rewards():
    half = 0.5**0.5
    parts = {"a": torch.tensor([1.0, 3.0, torch.nan]), "b": torch.tensor([1.0, 2.0, 3.0])}
    got = normalized_then_summed(parts, {"a": 1.0, "b": 1.0}, 3)
    torch.testing.assert_close(got, torch.tensor([(-half - 1) / 2, half / 2, 0.5]))


def test_the_cache_scores_new_images_only(images):
    picky = Picky()
    cached = Cached(picky, size=10)
    first = cached(images, PROMPTS).total
    assert torch.equal(cached(images[[3, 1]], [PROMPTS[3], PROMPTS[1]]).total, first[[3, 1]])
    assert picky.calls == [4]
    assert torch.allclose(cached(images, [*PROMPTS[:3], Prompt("4", "another")]).total, first)
    assert picky.calls == [4, 1], "the cache is keyed by prompt too"
    changed = images.clone()
    changed[0, 0, 0, 0] = 0
    cached(changed, PROMPTS)
    assert picky.calls == [4, 1, 1]


def test_the_cache_evicts_the_least_recently_used(images):
    picky = Picky()
    cached = Cached(picky, size=2)
    for row in (0, 2, 0, 3, 0, 2):
        cached(images[row : row + 1], PROMPTS[row : row + 1])
    assert len(picky.calls) == 4, "0, 2 and 3 are scored, and 2 again"


def test_the_same_image_twice_in_a_batch_is_scored_once(images):
    picky = Picky()
    total = Cached(picky, size=10)(images[[0, 0, 2]], [PROMPTS[0], PROMPTS[0], PROMPTS[2]]).total
    assert picky.calls == [2]
    assert torch.allclose(total, images[[0, 0, 2]].mean((1, 2, 3)))


def test_a_cached_reward_keeps_its_gradient(images):
    cached = Cached(Picky(), size=10)
    cached(images, PROMPTS)
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(cached(images, PROMPTS).total.sum(), images)
    assert torch.allclose(gradient, torch.full_like(images, 1 / 48))


def test_a_wrapper_is_about_its_scorer():
    class Featured(Picky):
        about = About("picky", True, (-1.0, 1.0), may_abstain=True)

        def image_features(self, images):
            return images

    for wrapped in (Cached(Featured(), 1), Retried(Featured()), Dropping(Featured())):
        assert wrapped.about == Featured.about
        assert image_features(Retried(wrapped))(3) == 3
    assert Clipped(Featured(), 0.0, 0.5).about == About("picky", True, (0.0, 0.5), may_abstain=True)
    assert Dropping(Picky()).about.may_abstain
    assert image_features(Retried(Brightness())) is None


def test_an_entry_defines_its_wrappers(images):
    entries = [{"name": "brightness", "cache": 5, "clip": [0.0, 0.1], "on_error": "drop_group"}]
    ((reward, _),) = rewards.build(rewards.resolve(entries)).members
    assert isinstance(reward, Dropping)
    assert isinstance(reward.reward, Clipped)
    assert isinstance(reward.reward.reward, Cached)
    assert reward(images, PROMPTS).total.max() == pytest.approx(0.1)
    ((reward, _),) = rewards.build(rewards.resolve([{"name": "brightness", "on_error": "retry"}])).members
    assert isinstance(reward, Retried)
    with pytest.raises(ValueError, match=r"^rewards\.0\.on_error = 'ignore': Input should be 'fail', 'retry' or 'drop_group'$"):
        rewards.resolve([{"name": "brightness", "on_error": "ignore"}])

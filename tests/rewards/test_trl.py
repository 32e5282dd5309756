"""TRL's reward functions as RewardModels, and the reverse."""

import asyncio
import math

import pytest
import torch
from PIL import Image

from diffusion import Prompt, RewardModel, Scores
from diffusion.types import About
from rewards import build, check, resolve
from rewards.mixture import Mixture, RewardError
from rewards.trl import as_trl_reward, from_trl_reward, text_of

PROMPTS = [Prompt("1", "a", {"wish": 0.5}), Prompt("2", "bb", {}), Prompt("3", "ccc", {"wish": 2.0, "prompts": "no"})]
IMAGES = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4).contiguous()


class Brightness:
    """The mean of an image; records the prompts."""

    about = About("bright", differentiable=True)

    def __call__(self, images, prompts):
        self.asked = list(prompts)
        total = images.mean((1, 2, 3))
        return Scores(total, {self.about.label: total}, {"width": torch.full_like(total, images.shape[3])})


class Lengths:
    """How long the captions are."""

    about = About("lengths", differentiable=False)

    def __call__(self, images, prompts):
        total = torch.tensor([float(len(prompt.text)) for prompt in prompts])
        return Scores(total, {self.about.label: total})


class Abstains(Brightness):
    """No score of black images."""

    about = About("bright", differentiable=True, may_abstain=True)

    def __call__(self, images, prompts):
        total = images.mean((1, 2, 3))
        total = torch.where(total == 0, math.nan, total)
        return Scores(total, {self.about.label: total})


def drawn(texts):
    """As bright as the text is long, in tenths."""
    return torch.tensor([len(text) / 10 for text in texts]).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()


# Ours for TRL


def test_completions_are_drawn_and_scored_against_the_prompts():
    reward = Brightness()
    f = as_trl_reward(reward, drawn)
    assert f.__name__ == "bright"
    given = f(prompts=["one", "two"], completions=["", "12345"], completion_ids=[[], [1]], trainer_state=object())
    assert given == [0.0, 0.5]
    assert [prompt.text for prompt in reward.asked] == ["one", "two"]
    assert all(type(value) is float for value in given)


def test_a_column_holds_the_captions_and_the_others_are_meta():
    reward, logged = Brightness(), {}
    f = as_trl_reward(reward, drawn, caption="original")
    columns = {"original": ["red", "blue"], "id": [7, 8], "wish": [0.5, None]}
    assert f(["rewrite: red", "rewrite: blue"], ["1", "12"], log_extra=logged.__setitem__, **columns) == pytest.approx(
        [0.1, 0.2]
    )
    assert reward.asked == [Prompt("7", "red", {"wish": 0.5}), Prompt("8", "blue", {"wish": None})]
    assert logged == {"original": ["red", "blue"]}


def test_chats_are_read():
    reward = Brightness()
    prompts = [[{"role": "system", "content": "rewrite"}, {"role": "user", "content": "red"}]]
    completions = [[{"role": "assistant", "content": [{"type": "text", "text": "12"}, {"type": "text", "text": "345"}]}]]
    assert as_trl_reward(reward, drawn)(prompts, completions) == [0.5]
    assert reward.asked[0].text == "red"
    assert text_of("plain") == "plain"


def test_a_mixture_logs_its_parts_and_a_reward_its_extra_figures():
    logged = {}
    mixture = Mixture([(Brightness(), 1), (Lengths(), 3)])
    assert as_trl_reward(mixture, drawn)(["ab", "abcd"], ["", "1234567890"], log_metric=logged.__setitem__) == [1.5, 3.25]
    assert {name: logged[name] for name in ("reward/bright", "reward/lengths")} == {"reward/bright": 0.5, "reward/lengths": 3.0}
    logged.clear()
    as_trl_reward(Brightness(), drawn)(["a"], ["1"], log_metric=logged.__setitem__)
    assert logged == {"extra/width": 4.0}


def test_no_score_is_none():
    assert as_trl_reward(Abstains(), drawn)(["a", "b"], ["", "12345"]) == [None, 0.5]


def test_images_that_cannot_be_scored_stop_the_run():
    with pytest.raises(RewardError, match=r"reward bright got an image with values from 2 to 2 for the prompt 'a'"):
        as_trl_reward(Brightness(), drawn)(["a"], ["1" * 20])


# TRL's for us


def test_a_function_gets_texts_images_and_columns_as_keywords():
    got = {}

    def f(prompts, completions, **keywords):
        got.update(keywords, prompts=prompts, completions=completions)
        return [0.25, None, float("nan")]

    reward = from_trl_reward(f)
    assert isinstance(reward, RewardModel)
    assert reward.about == About("f", differentiable=False, bounds=(-math.inf, math.inf), may_abstain=True)
    scores = reward(IMAGES, PROMPTS)
    assert scores.total[0] == 0.25
    assert scores.total.isnan().tolist() == [False, True, True]
    assert scores.parts["f"] is scores.total
    assert scores.total.dtype == torch.float32
    assert scores.extra == {}
    assert got["prompts"] == ["a", "bb", "ccc"]
    assert got["wish"] == [0.5, None, 2.0]
    assert set(got) == {"prompts", "completions", "wish", "trainer_state", "log_extra", "log_metric"}
    assert got["trainer_state"] is None
    assert all(isinstance(image, Image.Image) for image in got["completions"])
    assert [image.getpixel((0, 0)) for image in got["completions"]] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_what_a_function_logs_is_extra():
    def f(completions, log_extra, log_metric, **keywords):
        log_metric("twice", 1)
        log_metric("twice", 2)
        log_extra("numbers", [1, 2.5, True])
        log_extra("words", ["a", "b", "c"])
        return [1.0] * len(completions)

    extra = from_trl_reward(f)(IMAGES, PROMPTS).extra
    assert {name: values.tolist() for name, values in extra.items()} == {"twice": [1.5] * 3, "numbers": [1.0, 2.5, 1.0]}
    assert all(values.dtype == torch.float32 for values in extra.values())


def test_a_coroutine_function_is_waited_for():
    async def slow(prompts, completions, **keywords):
        await asyncio.sleep(0)
        return [float(len(text)) for text in prompts]

    reward = from_trl_reward(slow, label="mine")
    assert reward(IMAGES, PROMPTS).parts["mine"].tolist() == [1.0, 2.0, 3.0]


async def fails_late(prompts, completions, **keywords):
    raise KeyError("gone")


def test_what_is_raised_names_reward_and_function():
    with pytest.raises(RewardError, match=r"^reward late: fails_late raised KeyError: 'gone'$") as caught:
        from_trl_reward(fails_late, "late")(IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="reward f: f did not return a list of numbers"):
        from_trl_reward(lambda **_: ["a", "b", "c"], "f", "f")(IMAGES, PROMPTS)
    with pytest.raises(RewardError, match="reward f: f logged 1 few for 3 prompts"):
        from_trl_reward(lambda log_extra, **_: log_extra("few", [1]) or [1.0] * 3, "f", "f")(IMAGES, PROMPTS)


def test_a_round_trip_keeps_scores_columns_and_logs():
    def f(prompts, completions, wish, log_metric, **keywords):
        log_metric("calls", 1)
        brightness = [image.getpixel((0, 0))[0] / 255 for image in completions]
        return [None if text == "none" else b + w for text, b, w in zip(prompts, brightness, wish, strict=True)]

    logged = {}
    back = as_trl_reward(from_trl_reward(f), drawn)
    given = back(["red", "none", "blue"], ["", "1", "1234567890"], wish=[0.5, 0.0, 2.0], log_metric=logged.__setitem__)
    assert back.__name__ == "f"
    assert given == [0.5, None, 3.0]
    assert logged == {"extra/calls": 1.0}


def test_in_a_mixture_it_is_excluded_where_it_abstains():
    mixture = Mixture([(Brightness(), 1), (from_trl_reward(lambda **_: [1.0, None, 0.0], "some"), 3)])
    scores = mixture(IMAGES, PROMPTS)
    assert scores.total.tolist() == [0.75, 0.5, 0.25]
    assert scores.parts["some"].isnan().tolist() == [False, True, False]


# In an experiment


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def longer(prompts, completions, log_metric, **columns):\n"
        "    assert columns['wish'] == [0.5, None, 2.0]\n"
        "    log_metric('images', len(completions))\n"
        "    return [len(p) if len(p) < 3 else None for p in prompts]\n"
        "def broken(images, prompts, **meta):\n    return images.no_such_thing\n"
        "def words(images, prompts, **meta):\n    return prompts\n"
    )
    return path


def test_a_users_function_may_be_one_of_trls(file):
    entries = resolve([{"name": f"python:{file}:longer", "trl": True}])
    check(entries)
    ((reward, _),) = build(entries).members
    scores = reward(IMAGES, PROMPTS)
    assert scores.total[:2].tolist() == [1.0, 2.0]
    assert scores.total[2].isnan()
    assert scores.extra["images"].tolist() == [3.0] * 3
    assert reward.about.may_abstain
    assert not reward.about.differentiable


def test_it_has_no_gradient(file):
    entry = {"name": f"python:{file}:longer", "trl": True, "differentiable": True}
    with pytest.raises(ValueError, match=r"^rewards\.0\.trl = True: .*8-bit.*; allowed with differentiable: False$"):
        resolve([entry])


@pytest.mark.parametrize(("name", "trl"), [("broken", False), ("longer", True)])
def test_what_a_users_function_raises_is_a_reward_error(file, name, trl):
    mixture = build(resolve([{"name": f"python:{file}:{name}", "label": "mine", "trl": trl}]))
    prompts = [Prompt("1", "a", {"wish": 1}), Prompt("2", "b"), Prompt("3", "c")]
    kind = "AssertionError" if trl else "AttributeError"
    with pytest.raises(RewardError, match=f"^reward mine: python:{file}:{name} raised {kind}: "):
        mixture(IMAGES, prompts)


def test_scores_that_are_not_numbers_are_a_reward_error(file):
    with pytest.raises(RewardError, match=f"^reward words: python:{file}:words did not return a list of numbers: "):
        build(resolve([{"name": f"python:{file}:words"}]))(IMAGES, PROMPTS)

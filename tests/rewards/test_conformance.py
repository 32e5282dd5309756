"""The interface that every scorer keeps, independent of what it measures."""

import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import rewards
from diffusion import Prompt, RewardModel
from rewards.mixture import RewardError, score
from rewards.parts.compat import missing
from worlds.glyphs import parse, read_prompts, render

TEXTS = read_prompts("evaluation")[:6]
SHOWN = ("65", "00", "2", "circle", "6", "36")
"""The text requested of `ocr`: the captions' digits, if they have any."""
PROMPTS = [Prompt(str(i), text, {"ocr_text": SHOWN[i]}) for i, text in enumerate(TEXTS)]
ROUNDING = 1e-6
"""How far a score may move with its neighbours in the batch."""


@pytest.fixture(scope="module")
def build(clip_folder, hps_folder, image_reward_folder, head_file, chat_server):
    knobs = {
        "aesthetic": {"head": str(head_file), "weights": str(clip_folder)},
        "clip_score": {"weights": str(clip_folder)},
        "hpsv2": {"weights": str(hps_folder), "tokenizer": str(clip_folder)},
        "image_reward": {"weights": str(image_reward_folder), "tokenizer": str(image_reward_folder)},
        "ocr": {"shortest_side": 256},
        "pickscore": {"weights": str(clip_folder)},
        "vlm_judge": {"url": chat_server.url, "model": "brightness", "max_requests": 1_000_000},
    }

    def build(name, **label):
        if absent := missing(rewards.scorer(name).facts.packages):
            pytest.skip(f"{', '.join(absent)} not installed; make rewards")
        return rewards.scorer(name)(**knobs.get(name, {}), **label)

    return build


@pytest.fixture(scope="module", params=rewards.REWARDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def reward(build, name):
    return build(name)


@pytest.fixture(scope="module", params=[name for name in rewards.REWARDS if rewards.scorer(name).facts.differentiable])
def with_gradient(build, request):
    return build(request.param)


@pytest.fixture
def images():
    """Half ground truth, half something else, and no pixel at the ends of the range."""
    images = render([parse(text) for text in TEXTS], seed=0)
    images[3:] = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return images * 0.9 + 0.05


def test_every_scorer_has_a_name():
    files = {path.stem for path in (Path(rewards.__file__).parent / "scorers").glob("*.py")}
    assert files == {*rewards.REWARDS, "__init__", "user_function"}


def test_it_keeps_to_the_interface(reward, name, images):
    assert isinstance(reward, RewardModel)
    assert reward.about.label == name
    scores = score(reward, images, PROMPTS)
    assert scores.total.shape == (6,)
    assert scores.total.dtype == torch.float32
    assert list(scores.parts) == [name]
    assert torch.equal(scores.parts[name], scores.total)
    assert scores.total.unique().numel() > 1, "it must distinguish images"


def test_it_takes_a_label(build, name, images):
    reward = build(name, label="mine")
    assert reward.about.label == "mine"
    assert list(reward(images, PROMPTS).parts) == ["mine"]


def test_the_constructor_takes_the_knobs_and_a_label(name):
    knobs = rewards.knobs(name)
    assert knobs.model_config["frozen"]
    assert knobs.model_config["extra"] == "forbid"
    assert not set(knobs.model_fields) & set(rewards.Entry.model_fields)
    assert all(field.description for field in knobs.model_fields.values())
    taken = dict(inspect.signature(rewards.scorer(name)).parameters)
    assert taken.pop("label").default == name
    defaults = {field: value.default for field, value in knobs.model_fields.items() if not value.is_required()}
    assert set(taken) == set(knobs.model_fields)
    assert {key: value.default for key, value in taken.items() if value.default is not value.empty} == defaults


def test_scores_stay_within_its_bounds(reward, images):
    low, high = reward.about.bounds
    extremes = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32), *images[:4].round()])
    for batch in (images, extremes):
        total = reward(batch, PROMPTS).total
        assert (total >= low).all()
        assert (total <= high).all()


def test_it_repeats_itself(reward, images):
    assert torch.equal(reward(images, PROMPTS).total, reward(images, PROMPTS).total)


def test_images_are_not_changed(reward, images):
    before = images.clone()
    reward(images, PROMPTS)
    assert torch.equal(images, before)


def test_a_score_does_not_depend_on_the_batch(reward, images):
    together = reward(images, PROMPTS).total
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]).total for i in range(6)])
    assert (together - alone).abs().max() <= ROUNDING


def test_a_score_does_not_depend_on_its_row(reward, images):
    order = [4, 0, 5, 1, 3, 2]
    moved = reward(images[order], [PROMPTS[i] for i in order]).total
    assert (moved - reward(images, PROMPTS).total[order]).abs().max() <= ROUNDING


def test_its_networks_are_frozen_and_in_evaluation_mode(reward):
    for value in vars(reward).values():
        if isinstance(value, torch.nn.Module):
            assert not value.training
            assert not any(module.training for module in value.modules())
            assert not any(parameter.requires_grad for parameter in value.parameters())


def test_images_with_nan_are_refused(reward, images):
    images[2, 1, 3, 3] = torch.nan
    with pytest.raises(RewardError, match=f"^reward {reward.about.label} .* nan .* {TEXTS[2]!r}"):
        score(reward, images, PROMPTS)


def test_no_gradient_leaks(reward, images):
    if not reward.about.differentiable:
        assert not reward(images.requires_grad_(), PROMPTS).total.requires_grad
    with torch.no_grad():
        assert not reward(images.requires_grad_(), PROMPTS).total.requires_grad


@pytest.fixture
def noise():
    """Images without two equal pixels, away from the kinks of absolute values."""
    return (torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05).requires_grad_()


def test_the_gradient_reaches_every_pixel(with_gradient, noise):
    (gradient,) = torch.autograd.grad(with_gradient(noise, PROMPTS).total.sum(), noise)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


def test_an_image_s_gradient_is_its_own(with_gradient, noise):
    (gradient,) = torch.autograd.grad(with_gradient(noise, PROMPTS).total[1], noise)
    assert gradient[1].abs().max() > 0
    assert gradient[[0, 2, 3, 4, 5]].abs().max() == 0


def test_the_gradient_is_the_slope(with_gradient, noise):
    """Central differences along the gradient, within 1 %: float32 leaves no more to steps that stay clear of kinks."""
    (gradient,) = torch.autograd.grad(with_gradient(noise, PROMPTS).total.sum(), noise)
    step = 1e-4 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    with torch.no_grad():
        measured = (with_gradient(noise + step, PROMPTS).total - with_gradient(noise - step, PROMPTS).total) / 2
    assert measured == pytest.approx((gradient * step).sum((1, 2, 3)), rel=0.01)


@pytest.fixture(scope="module", params=[name for name in rewards.REWARDS if "dtype" in rewards.knobs(name).model_fields])
def in_both_dtypes(build, request):
    return build(request.param), build(request.param, dtype="bfloat16")


def test_bfloat16_agrees_with_float32(in_both_dtypes, images):
    """It has 8 significant bits, so a rounding moves a number by up to 0.4 %, and the few dozen in a small network add up, like
    noise, to about 1 % of the features. Scores may move by a tenth of their spread over these images (0.02 to 0.05 were
    measured), and the gradient keeps its direction up to a cosine of 0.999 (0.9998)."""
    exact, coarse = ((reward(images, PROMPTS).total, *_gradient(reward, images)) for reward in in_both_dtypes)
    assert {tensor.dtype for tensor in coarse} == {torch.float32}
    assert 0 < (coarse[0] - exact[0]).abs().max() < 0.1 * exact[0].std()
    assert F.cosine_similarity(coarse[1].flatten(1), exact[1].flatten(1)).min() > 0.999


def test_bfloat16_does_not_make_scores_coarse(in_both_dtypes):
    """The network's output is normalised and scored in float32: similar images have different scores."""
    _, coarse = in_both_dtypes
    grey = torch.linspace(0.45, 0.55, 6)[:, None, None, None].expand(6, 3, 32, 32)
    total = coarse(grey + 0.2 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)), [PROMPTS[0]] * 6).total
    assert not torch.equal(total, total.bfloat16().float())


def _gradient(reward, images):
    images = images.clone().requires_grad_()
    return torch.autograd.grad(reward(images, PROMPTS).total.sum(), images)

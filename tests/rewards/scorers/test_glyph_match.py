import numpy as np
import pytest
import torch

from diffusion.protocols import RewardModel
from diffusion.types import Prompt
from rewards.scorers.glyph_match import Found, GlyphMatch, color_credit, find_things, glyph_credit, grade, place_credit
from worlds.glyphs import COLORS, GLYPHS, caption, change_one, parse, random_scene, render


def prompts(scenes):
    return [Prompt(str(i), caption(scene)) for i, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def truth():
    """500 scenes, half of them held-out ones, and a ground-truth render of each."""
    rng = np.random.default_rng(11)
    scenes = [random_scene(rng, heldout=i % 2 == 1) for i in range(500)]
    return scenes, render(scenes, seed=12)


@pytest.fixture(scope="module")
def truth_scores(truth):
    scenes, images = truth
    return GlyphMatch()(images, prompts(scenes)).total


def test_right_on_98_percent_of_ground_truth(truth_scores):
    assert (truth_scores == 1).float().mean() >= 0.98
    assert truth_scores.mean() >= 0.98


def test_one_changed_attribute_scores_lower_98_percent_of_the_time(truth, truth_scores):
    scenes, _ = truth
    rng = np.random.default_rng(13)
    others = render([change_one(scene, rng) for scene in scenes], seed=14)
    scores = GlyphMatch()(others, prompts(scenes)).total
    assert (scores < truth_scores).float().mean() >= 0.98


def test_it_is_a_reward_model_with_one_part():
    reward = GlyphMatch("match")
    assert isinstance(reward, RewardModel)
    assert reward.about.differentiable is False
    scores = reward(render([parse("a red circle")], seed=0), [Prompt("0", "a red circle")])
    assert scores.total.dtype == torch.float32
    assert list(scores.parts) == ["match"]
    assert torch.equal(scores.parts["match"], scores.total)


@pytest.mark.parametrize(
    ("shown", "low", "high"),
    [
        ("a red circle left of a blue square", 1.0, 1.0),
        ("a blue square right of a red circle", 1.0, 1.0),
        ("a red circle right of a blue square", 0.5, 0.5),  # all but the place
        ("a green circle left of a blue square", 0.5, 0.52),  # one of two things
        ("a green circle right of a blue square", 0.25, 0.26),  # one of two things, at the wrong place
        ("a green seven left of a yellow cross", 0.0, 0.02),  # the place alone
        ("a red square left of a blue square", 0.5, 0.9),  # the other thing's glyph is like the right one
    ],
)
def test_partial_credit(shown, low, high):
    asked = "a red circle left of a blue square"
    score = GlyphMatch()(render([parse(shown)], seed=1), [Prompt("0", asked)]).total.item()
    assert low <= score <= high


def test_nothing_or_too_much_is_punished():
    reward, prompt = GlyphMatch(), [Prompt("0", "a red circle")]
    assert reward(torch.full((1, 3, 32, 32), 0.2), prompt).total.item() == 0
    two = render([parse("a red circle left of a red square")], seed=0)
    assert reward(two, prompt).total.item() == pytest.approx(0.5)
    half = reward(render([parse("a red circle")], seed=0), [Prompt("0", "a red circle left of a blue seven")]).total.item()
    assert half == pytest.approx(0.25)  # one of two things, so no place


@pytest.mark.parametrize("background", [COLORS["green"], COLORS["white"], (0.5, 0.5, 0.5)])
def test_any_background_will_do(background):
    image = torch.tensor(background)[:, None, None].expand(3, 32, 32).clone()
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing="ij")
    image[:, (x - 16) ** 2 + (y - 16) ** 2 < 49] = torch.tensor(COLORS["red"])[:, None]
    assert GlyphMatch()(image[None], [Prompt("0", "a red circle")]).total.item() == pytest.approx(1.0)


def test_noise_scores_low():
    noise = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert GlyphMatch()(noise, [Prompt("0", "a red circle")] * 64).total.mean() < 0.2


def test_scores_do_not_depend_on_the_batch(truth, truth_scores):
    scenes, images = truth
    assert torch.equal(GlyphMatch()(images[40:50], prompts(scenes[40:50])).total, truth_scores[40:50])


def test_what_is_found_does_not_depend_on_the_batch(truth):
    """To the last bit: a matrix product of a few rows may add up in another order than one of dozens."""
    images = truth[1][:40]
    for image, together in zip(images, find_things(images), strict=True):
        (alone,) = find_things(image[None])
        assert len(alone) == len(together)
        for one, other in zip(alone, together, strict=True):
            assert (one.x, one.y) == (other.x, other.y)
            assert np.array_equal(one.color, other.color)
            assert np.array_equal(one.glyphs, other.glyphs)


def test_a_batch_with_nothing_in_it():
    assert find_things(torch.zeros(0, 3, 32, 32)) == []
    assert find_things(torch.zeros(2, 3, 32, 32)) == [[], []]


def test_no_gradient_leaks(truth):
    scenes, images = truth
    assert not GlyphMatch()(images[:2].clone().requires_grad_(), prompts(scenes[:2])).total.requires_grad


def test_color_credit():
    red = np.array(COLORS["red"])
    assert color_credit(red, "red") == 1.0
    assert color_credit(red + np.array([0, 0.15, 0]), "red") == pytest.approx(1.0)
    assert color_credit(red + np.array([0, 0.35, 0]), "red") == pytest.approx(np.exp(-1))
    assert color_credit(red, "white") < 0.02


def test_no_two_colours_can_both_be_right():
    table = np.array(list(COLORS.values()))
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert distances[~np.eye(len(table), dtype=bool)].min() > 2 * 0.15


def test_glyph_credit():
    glyphs = np.full(len(GLYPHS), 0.4)
    glyphs[[GLYPHS.index(name) for name in ("seven", "one")]] = 0.90, 0.68
    assert glyph_credit(glyphs, "seven") == 1.0
    assert glyph_credit(glyphs, "one") == pytest.approx(np.exp(-0.22 / 0.03) * 0.5)  # half way from vague to clear
    assert glyph_credit(glyphs, "circle") == 0.0
    glyphs[GLYPHS.index("seven")] = 0.77
    assert glyph_credit(glyphs, "seven") == pytest.approx(0.75)


def at(x, y):
    return Found(color=np.zeros(3), x=x, y=y, glyphs=np.zeros(len(GLYPHS)))


@pytest.mark.parametrize(
    ("centres", "place", "credit"),
    [
        ([(9, 16)], "on the left", 1),
        ([(12.5, 16)], "on the left", 1),
        ([(16, 16)], "on the left", 0.5),
        ([(19.5, 16)], "on the left", 0),
        ([(25, 16)], "on the left", 0),
        ([(25, 16)], "on the right", 1),
        ([(16, 16)], "at the top", 0.5),
        ([(16, 9)], "at the top", 1),
        ([(16, 23)], "at the bottom", 1),
        ([(10, 16), (18, 16)], "left of", 1),
        ([(10, 16), (12, 16)], "left of", 0.5),
        ([(10, 16), (6, 16)], "left of", 0),
        ([(24, 16), (8, 20)], "right of", 1),
        ([(16, 8), (16, 24)], "above", 1),
        ([(16, 8), (16, 24)], "below", 0),
    ],
)
def test_place_credit(centres, place, credit):
    assert place_credit([at(*centre) for centre in centres], place) == pytest.approx(credit)


def test_grade_finds_out_which_thing_is_which():
    scene = parse("a white circle above a white square")
    (found,) = find_things(render([scene], seed=2))
    assert len(found) == 2
    assert grade(found, scene) == grade(found[::-1], scene) == 1.0


def test_a_thing_is_found_with_its_colour_place_and_glyph():
    (things,) = find_things(render([parse("a purple square on the right")], seed=3))
    (thing,) = things
    assert np.linalg.norm(thing.color - COLORS["purple"]) < 0.08
    assert 20 < thing.x < 25
    assert GLYPHS[thing.glyphs.argmax()] == "square"


def test_wrong_size_and_foreign_prompts_are_refused():
    with pytest.raises(ValueError, match=r"\[1, 3, 64, 64\]"):
        GlyphMatch()(torch.zeros(1, 3, 64, 64), [Prompt("0", "a red circle")])
    with pytest.raises(ValueError, match="'mountain'"):
        GlyphMatch()(torch.zeros(1, 3, 32, 32), [Prompt("0", "a red mountain")])

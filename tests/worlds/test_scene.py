import numpy as np
import pytest

from worlds.glyphs import COLORS, GLYPHS, HELDOUT_THINGS, Scene, Thing, caption, change_one, parse, random_scene

RED_CIRCLE, BLUE_SEVEN = Thing("red", "circle"), Thing("blue", "seven")


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (Scene((RED_CIRCLE,)), "a red circle"),
        (Scene((RED_CIRCLE,), "at the top"), "a red circle at the top"),
        (Scene((RED_CIRCLE, BLUE_SEVEN), "left of"), "a red circle left of a blue seven"),
    ],
)
def test_caption_and_parse_are_inverse(scene, text):
    assert caption(scene) == text
    assert parse(text) == scene


def test_every_random_scene_survives_the_round_trip():
    rng = np.random.default_rng(0)
    for i in range(500):
        scene = random_scene(rng, heldout=i % 2 == 1)
        assert parse(caption(scene)) == scene


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a rad circle", "'red'"),
        ("a red circel", "'circle'"),
        ("a red circle on the lift", "'on the left'"),
        ("red circle", "'a COLOUR GLYPH'"),
        ("a red circle left of a blue", "'a COLOUR GLYPH'"),
        ("a red circle left of", "'a COLOUR GLYPH'"),
        ("a red circle left of a blue seven today", "'today'"),
        ("", "'a COLOUR GLYPH'"),
    ],
)
def test_text_outside_the_grammar_is_named(text, word):
    with pytest.raises(ValueError, match=rf"^caption {text!r}: .*{word}"):
        parse(text)


def test_change_one_changes_one_attribute_of_every_kind():
    rng, kinds = np.random.default_rng(2), set()
    for _ in range(300):
        scene = random_scene(rng)
        other = change_one(scene, rng)
        pairs = list(zip(scene.things, other.things, strict=True))
        differences = [
            *["color" for a, b in pairs if a.color != b.color],
            *["glyph" for a, b in pairs if a.glyph != b.glyph],
            *(["place"] if scene.place != other.place else []),
        ]
        assert len(differences) == 1
        kinds |= set(differences)
    assert kinds == {"color", "glyph", "place"}


@pytest.mark.parametrize(
    ("things", "place"),
    [((), None), ((RED_CIRCLE, RED_CIRCLE), "above"), ((RED_CIRCLE, BLUE_SEVEN), None), ((RED_CIRCLE,), "above")],
)
def test_impossible_scenes_are_refused(things, place):
    with pytest.raises(ValueError, match="thing"):
        Scene(things, place)


def test_heldout_things_are_two_of_every_colour_and_never_in_a_training_scene():
    assert sorted(thing.color for thing in HELDOUT_THINGS) == sorted([*COLORS, *COLORS])
    assert {thing.glyph for thing in HELDOUT_THINGS} <= set(GLYPHS)
    rng = np.random.default_rng(1)
    assert not any(HELDOUT_THINGS.intersection(random_scene(rng).things) for _ in range(2000))
    assert all(HELDOUT_THINGS.intersection(random_scene(rng, heldout=True).things) for _ in range(200))

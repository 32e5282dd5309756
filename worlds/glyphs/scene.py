"""Scenes of the glyph world and their captions: one thing, optionally at a place, or two things in a relation.

    a red circle
    a red circle on the left
    a red circle left of a blue seven

Some (colour, glyph) pairs are held out: no training scene has them, so a prompt with one requires the generator to compose a
colour and a glyph that it has only seen in other pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inputs import nearest

COLORS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.72, 0.25),
    "blue": (0.20, 0.40, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.70, 0.25, 0.85),
    "white": (0.96, 0.96, 0.96),
}
"""RGB in [0, 1]; the renderer jitters each channel slightly."""

SHAPES = ("circle", "square", "triangle", "cross")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GLYPHS = SHAPES + DIGITS
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Thing:
    color: str
    glyph: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    """One thing, or two different ones."""
    place: str | None = None
    """For one thing, one of PLACES, or None for anywhere; for two, one of RELATIONS, of the first to the second."""

    def __post_init__(self) -> None:
        allowed: tuple[str | None, ...] = (None, *PLACES) if len(self.things) == 1 else RELATIONS
        if len(self.things) not in (1, 2) or len(set(self.things)) != len(self.things):
            raise ValueError(f"things {self.things}: a scene has one thing or two different things")
        if self.place not in allowed:
            raise ValueError(
                f"place {self.place!r}: not for {len(self.things)} thing(s) (allowed: {', '.join(map(str, allowed))})"
            )


HELDOUT_THINGS = frozenset(
    Thing(color, glyph)
    for color, glyphs in {
        "red": ("triangle", "four"),
        "green": ("cross", "seven"),
        "blue": ("circle", "two"),
        "yellow": ("square", "nine"),
        "purple": ("triangle", "five"),
        "white": ("circle", "three"),
    }.items()
    for glyph in glyphs
)


def caption(scene: Scene) -> str:
    first, *rest = (f"a {thing.color} {thing.glyph}" for thing in scene.things)
    return " ".join(part for part in (first, scene.place, *rest) if part)


def parse(text: str) -> Scene:
    """The scene that a caption describes. Raises ValueError for text outside the grammar, with the nearest allowed word."""
    words = text.lower().strip().rstrip(".").split()
    first, words = _parse_thing(words, text)
    rest = " ".join(words)
    if not rest or rest in PLACES:
        return Scene((first,), rest or None)
    for relation in RELATIONS:
        if rest == relation or rest.startswith(relation + " "):
            second, words = _parse_thing(words[len(relation.split()) :], text)
            if words:
                raise ValueError(f"caption {text!r}: {' '.join(words)!r} after the second thing")
            return Scene((first, second), relation)
    raise ValueError(f"caption {text!r}: unknown place {rest!r}{nearest(rest, PLACES + RELATIONS)}")


def _parse_thing(words: list[str], text: str) -> tuple[Thing, list[str]]:
    if len(words) < 3 or words[0] not in ("a", "an"):
        raise ValueError(f"caption {text!r}: {' '.join(words)!r} in place of 'a COLOUR GLYPH'")
    for word, allowed in ((words[1], tuple(COLORS)), (words[2], GLYPHS)):
        if word not in allowed:
            raise ValueError(f"caption {text!r}: unknown word {word!r}{nearest(word, allowed)}")
    return Thing(words[1], words[2]), words[3:]


def random_scene(rng: np.random.Generator, heldout: bool = False) -> Scene:
    """A scene without held-out things, or (heldout=True) with at least one.

    Half of the scenes have two things, half of the others a place; half of the glyphs are shapes, half are digits. Scenes
    that do not fit `heldout` are redrawn, which changes these proportions slightly.
    """
    while True:
        things = tuple(_random_thing(rng) for _ in range(int(rng.integers(1, 3))))
        if len(set(things)) == len(things) and any(t in HELDOUT_THINGS for t in things) == heldout:
            break
    places: tuple[str | None, ...] = RELATIONS if len(things) == 2 else (*PLACES, None, None, None, None)
    return Scene(things, places[int(rng.integers(len(places)))])


def change_one(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed: a colour, a glyph, or the place if it has one."""
    while True:
        which = int(rng.integers(len(scene.things) * 2 + (scene.place is not None)))
        place, things = scene.place, list(scene.things)
        if which == len(things) * 2:
            names = RELATIONS if len(things) == 2 else PLACES
            place = str(rng.choice([name for name in names if name != place]))
        else:
            thing = things[which // 2]
            color = str(rng.choice(list(COLORS))) if which % 2 else thing.color
            glyph = thing.glyph if which % 2 else str(rng.choice(GLYPHS))
            things[which // 2] = Thing(color, glyph)
        if (tuple(things), place) != (scene.things, scene.place) and len(set(things)) == len(things):
            return Scene(tuple(things), place)


def _random_thing(rng: np.random.Generator) -> Thing:
    glyphs = SHAPES if rng.random() < 0.5 else DIGITS
    return Thing(tuple(COLORS)[int(rng.integers(len(COLORS)))], glyphs[int(rng.integers(len(glyphs)))])

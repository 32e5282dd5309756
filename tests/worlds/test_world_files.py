"""The files in the package are those that their recipe writes."""

import numpy as np
import pytest
from PIL import Image

from worlds.glyphs import HELDOUT_THINGS, PROMPT_SETS, parse, read_prompts
from worlds.glyphs.digits import SHEET
from worlds.glyphs.make import make_prompts, make_sheet


def test_the_digit_sheet_is_scikit_learns_data():
    with Image.open(SHEET) as sheet:
        assert np.array_equal(np.array(sheet), np.array(make_sheet()))


def test_the_prompt_files_are_what_the_recipe_draws():
    assert {name: read_prompts(name) for name in PROMPT_SETS} == make_prompts()


def test_sizes_and_disjointness():
    sets = {name: read_prompts(name) for name in PROMPT_SETS}
    assert {name: len(lines) for name, lines in sets.items()} == {
        "train": 2000,
        "heldout": 200,
        "evaluation": 100,
        "tuning": 150,
    }
    assert len(set().union(*sets.values())) == 2450


def test_heldout_combinations_are_held_out():
    def heldout(name):
        return [bool(HELDOUT_THINGS.intersection(parse(line).things)) for line in read_prompts(name)]

    assert not any(heldout("train") + heldout("tuning"))
    assert all(heldout("heldout"))
    assert sum(heldout("evaluation")) == 50


def test_an_unknown_prompt_set_is_named():
    with pytest.raises(ValueError, match=r"prompt set 'test': not known \(allowed: train, heldout, evaluation, tuning\)"):
        read_prompts("test")

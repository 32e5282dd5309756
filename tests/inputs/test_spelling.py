import pytest

from inputs import nearest, one_of


def test_the_nearest_word_and_all_allowed_ones():
    assert nearest("eular", ["heun", "euler"]) == "; did you mean 'euler'? (allowed: euler, heun)"
    assert nearest("x", ["heun", "euler"]) == " (allowed: euler, heun)"
    assert nearest("x", []) == " (allowed: none)"


def test_one_of_returns_the_value_or_names_the_nearest():
    assert one_of("heun", {"heun": 1, "euler": 2}) == "heun"
    with pytest.raises(ValueError, match=r"is not known; did you mean 'heun'\? \(allowed: euler, heun\)"):
        one_of("hen", ("heun", "euler"))

import pytest
from PIL import Image

from align import ALGORITHMS
from diffusion import SOLVERS
from rewards import REWARDS
from runtime.catalogue import description, named_rewards, reward_table, score_files
from runtime.config import InputError


@pytest.fixture
def grey(tmp_path):
    Image.new("L", (5, 7), 51).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def test_pictures_of_any_size_are_scored(grey, tmp_path):
    Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(tmp_path / "white.png")
    rows = score_files("brightness, {name: symmetry, label: mirror}", [grey, tmp_path / "white.png"], "a red circle", False)
    assert rows == [
        {"picture": str(grey), "brightness": "0.2000", "mirror": "1.0000"},
        {"picture": str(tmp_path / "white.png"), "brightness": "1.0000", "mirror": "1.0000"},
    ]


def test_the_picture_is_read_channels_first(tmp_path):
    (tmp_path / "mine.py").write_text("def corner(images, prompts, **meta):\n    return images[:, 2, 0, 1]\n")
    Image.new("RGB", (2, 1)).save(tmp_path / "two.png")
    picture = Image.open(tmp_path / "two.png")
    picture.putpixel((1, 0), (0, 0, 255))
    picture.save(tmp_path / "two.png")
    rows = score_files(f"python:{tmp_path}/mine.py:corner", [tmp_path / "two.png"], "x", True)
    assert rows[0]["corner"] == "1.0000"


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("brightnes", "did you mean 'brightness'"),
        ("{name", "is neither names nor"),
        ("glyph_match", "glyph_match reads images"),
        ("python:os.system", "runs only with --allow-code"),
        ("{name: clip_score, weights: no/such}", "no/such"),
        ("brightness, brightness", "2 rewards are called 'brightness'"),
    ],
)
def test_a_reward_that_cannot_score_is_one_line(grey, reward, words):
    with pytest.raises(InputError) as caught:
        score_files(reward, [grey], "a red circle", False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "words.png").write_text("words")
    for name in ("words.png", "missing.png"):
        with pytest.raises(InputError, match=f"{name}: no picture that can be read"):
            score_files("brightness", [tmp_path / name], "x", False)


def test_named_rewards():
    assert named_rewards("a, {name: b, weight: 2}") == [{"name": "a"}, {"name": "b", "weight": 2}]


def test_the_table_has_every_reward():
    table = {row["reward"]: row for row in reward_table()}
    assert list(table) == list(REWARDS)
    assert table["clip_score"]["needs"] == "weights"
    assert table["glyph_match"]["differentiable"] == "no"


@pytest.mark.parametrize("name", [*ALGORITHMS, *REWARDS, *SOLVERS, "sd3"])
def test_every_name_is_described(name):
    text = description(name)
    assert len(text) > 50
    assert "PydanticUndefined" not in text


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="did you mean 'neighbor_grpo'"):
        description("neighbour_grpo")

import socket
import sys
from importlib.machinery import ModuleSpec

import pytest
from huggingface_hub import constants
from PIL import Image

from align import ALGORITHMS
from diffusion import SOLVERS
from rewards import REWARDS
from rewards.parts import compat
from runtime.cli import app
from runtime.experiment.config import InputError
from runtime.finished.catalogue import description, named_rewards, reward_table, score_files


@pytest.fixture
def grey(tmp_path):
    Image.new("L", (5, 7), 51).save(tmp_path / "grey.png")
    return tmp_path / "grey.png"


def test_images_of_any_size_are_scored(grey, tmp_path):
    Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(tmp_path / "white.png")
    rows = score_files("brightness, {name: symmetry, label: mirror}", [grey, tmp_path / "white.png"], "a red circle", False)
    assert rows == [
        {"image": str(grey), "brightness": "0.2000", "mirror": "1.0000"},
        {"image": str(tmp_path / "white.png"), "brightness": "1.0000", "mirror": "1.0000"},
    ]


def test_the_image_is_read_channels_first(tmp_path):
    (tmp_path / "mine.py").write_text("def corner(images, prompts, **meta):\n    return images[:, 2, 0, 1]\n")
    Image.new("RGB", (2, 1)).save(tmp_path / "two.png")
    image = Image.open(tmp_path / "two.png")
    image.putpixel((1, 0), (0, 0, 255))
    image.save(tmp_path / "two.png")
    rows = score_files(f"python:{tmp_path}/mine.py:corner", [tmp_path / "two.png"], "x", True)
    assert rows[0]["corner"] == "1.0000"


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("brightnes", "did you mean 'brightness'"),
        ("{name", "allowed: names or"),
        ("glyph_match", "glyph_match needs images"),
        ("python:os.system", "runs only with --allow-code"),
        ("{name: clip_score, weights: no/such}", "no/such"),
        ("brightness, brightness", "2 rewards have the label 'brightness'"),
    ],
)
def test_a_reward_that_cannot_score_is_one_line(grey, reward, words):
    with pytest.raises(InputError) as caught:
        score_files(reward, [grey], "a red circle", False)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_an_image(tmp_path):
    (tmp_path / "words.png").write_text("words")
    for name in ("words.png", "missing.png"):
        with pytest.raises(InputError, match=f"{name}: not a readable image"):
            score_files("brightness", [tmp_path / name], "x", False)


def test_named_rewards():
    assert named_rewards("a, {name: b, weight: 2}") == [{"name": "a"}, {"name": "b", "weight": 2}]


def table():
    return {row["reward"]: row for row in reward_table()}


def test_the_table_has_every_reward():
    rows = table()
    assert list(rows) == list(REWARDS)
    assert rows["colorfulness"] == {
        "reward": "colorfulness",
        "gradient": "yes",
        "range": "[0, 1.1673]",
        "weights": "none needed",
        "licence": "Odeon's",
        "environment": "core",
    }
    assert rows["glyph_match"]["gradient"] == "no"
    assert rows["image_reward"]["range"] == "[-inf, inf]"
    assert rows["clip_score"]["licence"] == "the model's"
    assert rows["pickscore"]["licence"] == "MIT (code), none stated (weights)"


def test_the_table_shows_required_knobs_and_downloads(monkeypatch, tmp_path):
    def no_network(*_, **__):
        raise AssertionError("the table asks the network")

    def cache(hub_id, file):
        folder = tmp_path / f"models--{hub_id.replace('/', '--')}"
        for path, text in ((folder / "refs/main", "0" * 40), (folder / "snapshots" / ("0" * 40) / file, "")):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    weights = {name: row["weights"] for name, row in table().items()}
    assert weights["clip_score"] == "give weights"
    assert weights["vlm_judge"] == "give url, model, max_requests"
    assert weights["ocr"] == "in its package"
    assert weights["image_reward"] == "first use downloads THUDM/ImageReward, google-bert/bert-base-uncased"
    assert weights["aesthetic"] == "give head; first use downloads openai/clip-vit-large-patch14"
    cache("xswu/HPSv2", "HPS_v2_compressed.pt")  # of the other version
    assert table()["hpsv2"]["weights"] == "first use downloads xswu/HPSv2, openai/clip-vit-large-patch14"
    cache("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    assert table()["hpsv2"]["weights"] == "in the cache: xswu/HPSv2; first use downloads openai/clip-vit-large-patch14"
    cache("openai/clip-vit-large-patch14", "vocab.json")
    assert table()["hpsv2"]["weights"] == "in the cache: xswu/HPSv2, openai/clip-vit-large-patch14"
    assert table()["aesthetic"]["weights"] == "give head; first use downloads openai/clip-vit-large-patch14"
    cache("openai/clip-vit-large-patch14", "model.safetensors")
    assert table()["aesthetic"]["weights"] == "give head; in the cache: openai/clip-vit-large-patch14"


def test_the_table_shows_which_rewards_need_more_than_the_core(monkeypatch):
    looked_up, absent = list[str](), "ImageReward"

    def find_spec(name):
        looked_up.append(name)
        return None if name == absent else ModuleSpec(name, None)

    packages = {"rapidocr", "onnxruntime", "ImageReward", "torchvision", "timm"}
    for name in packages:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(compat, "find_spec", find_spec)
    environments = {name: row["environment"] for name, row in table().items()}
    assert set(looked_up) == packages
    assert {name for name, environment in environments.items() if environment != "core"} == {"image_reward", "ocr"}
    assert (environments["image_reward"], environments["ocr"]) == ("make rewards", "ready")
    absent = "onnxruntime"
    assert (table()["image_reward"]["environment"], table()["ocr"]["environment"]) == ("ready", "make rewards")
    assert not packages & set(sys.modules), "asking must not import them"


def test_the_table_is_not_truncated(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        app(["rewards"])
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in REWARDS)
    assert "…" not in printed
    assert max(len(line) for line in printed.splitlines()) <= 80


@pytest.mark.parametrize("name", [*ALGORITHMS, *REWARDS, *SOLVERS, "sd3"])
def test_every_name_is_described(name):
    text = description(name)
    assert len(text) > 50
    assert "PydanticUndefined" not in text


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="did you mean 'neighbor_grpo'"):
        description("neighbour_grpo")

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rewards
from diffusion.types import Prompt
from runtime.experiment.config import InputError
from runtime.experiment.yaml import read_experiment
from worlds.glyphs import parse, render


def refused(*entries) -> str:
    with pytest.raises(ValueError, match=r"^rewards\.train") as error:
        rewards.resolve(entries, "rewards.train")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_entries_are_completed():
    resolved = rewards.resolve([{"name": "glyph_match"}, {"name": "clip_score", "weights": "w", "label": "clip", "weight": 2}])
    rest = {"clip": None, "on_error": "fail", "cache": 0, "env": None, "server": None}
    assert resolved == [
        {"name": "glyph_match", "label": "glyph_match", "weight": 1.0, **rest},
        {"name": "clip_score", "label": "clip", "weight": 2.0, **rest, "weights": "w", "micro_batch": 8, "dtype": "float32"},
    ]
    assert rewards.resolve(resolved) == resolved


def test_from_entries_to_scores(clip_folder):
    mixture = rewards.build([{"name": "glyph_match"}, {"name": "clip_score", "weights": str(clip_folder), "weight": 3}])
    text = "a red circle"
    scores = mixture(render([parse(text)], seed=0), [Prompt("1", text)])
    assert list(scores.parts) == ["glyph_match", "clip_score"]
    assert torch.allclose(scores.total, (scores.parts["glyph_match"] + 3 * scores.parts["clip_score"]) / 4)
    assert not mixture.about.differentiable


def test_unknown_names():
    assert refused({"name": "brightness"}, {"name": "clipscore"}) == (
        "rewards.train.1.name = 'clipscore': is not known; did you mean 'clip_score'? "
        f"(allowed: {', '.join(sorted(rewards.REWARDS))})"
    )
    with pytest.raises(ValueError, match=r"^reward 'brightnes': is not known; did you mean 'brightness'\? \(allowed: "):
        rewards.scorer("brightnes")
    assert refused({"name": ["x"]}).startswith("rewards.train.0.name = ['x']: is not known")


def test_entries_without_a_name():
    assert refused("brightness") == "rewards.train.0 = 'brightness': has no name; write for example {name: brightness}"
    assert "rewards.train.0 = {'label': 'x'}: has no name" in refused({"label": "x"})


def test_wrong_knobs():
    """In the form of an experiment's other errors: key = value: message."""
    common = ["cache", "clip", "env", "label", "name", "on_error", "server", "weight"]
    assert refused({"name": "clip_score", "weigths": "x"}) == "rewards.train.0.weights: missing"
    assert refused({"name": "clip_score", "weights": "x", "microbatch": 3}) == (
        "rewards.train.0.microbatch: unknown key; did you mean 'micro_batch'? "
        f"(allowed: {', '.join(sorted([*common, 'weights', 'micro_batch', 'dtype']))})"
    )
    assert refused({"name": "brightness", "weights": "x"}) == (
        f"rewards.train.0.weights: unknown key; did you mean 'weight'? (allowed: {', '.join(common)})"
    )
    assert refused({"name": "clip_score", "weights": "x", "micro_batch": 0}) == (
        "rewards.train.0.micro_batch = 0: Input should be greater than or equal to 1"
    )
    assert refused({"name": "brightness", "weight": -1}) == (
        "rewards.train.0.weight = -1: Input should be greater than or equal to 0"
    )
    assert refused({"name": "brightness", "clip": [0, "x"]}).startswith("rewards.train.0.clip.1 = 'x': Input should be a valid")


def test_a_validator_s_message_is_kept_as_it_is():
    assert refused({"name": "python:a.py:F", "trl": True, "differentiable": True}) == (
        "rewards.train.0.trl = True: the function gets 8-bit images, which have no gradient; allowed with differentiable: False"
    )
    assert refused({"name": "brightness", "env": "E", "server": "http://S:1"}) == (
        "rewards.train.0: env 'E' and server 'http://S:1': at most one of the two is allowed"
    )


def test_an_experiment_shows_the_error_unchanged():
    """Once, with the key once and without pydantic's own prefix."""
    quickstart = Path(__file__).parents[2] / "experiments/quickstart.yaml"
    function = "{name: 'python:a.py:f', trl: true, differentiable: true}"
    for override, line in (
        ("rewards.heldout.0.weight=-1", "rewards.heldout.0.weight = -1: Input should be greater than or equal to 0"),
        (
            f"rewards.train=[{function}]",
            "rewards.train.0.trl = True: the function gets 8-bit images, which have no gradient; "
            "allowed with differentiable: False",
        ),
        ("rewards.train=[]", "rewards.train: no reward; at least one is needed"),
    ):
        with pytest.raises(InputError) as error:
            read_experiment(quickstart, [override], allow_code=True)
        assert str(error.value) == line


def test_two_rewards_of_one_name_need_labels():
    assert refused({"name": "brightness"}, {"name": "brightness"}) == (
        "rewards.train: 2 rewards have the label 'brightness'; give each a `label` of its own"
    )
    rewards.resolve([{"name": "brightness"}, {"name": "brightness", "label": "again"}])


def test_no_rewards():
    assert refused() == "rewards.train: no reward; at least one is needed"


def test_importing_the_package_and_the_scorers_is_light():
    def imported(code: str) -> str:
        watched = {"torch", "transformers", "huggingface_hub"}
        code = f"import sys, rewards; {code}; print(sorted({watched} & set(sys.modules)))"
        root = Path(__file__).parents[2]
        return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout

    assert imported("rewards.scorer") == "[]\n"
    assert imported("[rewards.knobs(name) for name in rewards.REWARDS]") == "['torch']\n"


def test_a_clip_wraps_the_scorer_and_must_be_a_range():
    mixture = rewards.build(rewards.resolve([{"name": "brightness", "clip": [0.2, 0.5]}]))
    assert mixture(torch.ones(1, 3, 4, 4), [Prompt("1", "x")]).total.item() == 0.5
    assert (
        refused({"name": "brightness", "clip": [0.5, 0.2]})
        == "rewards.train.0.clip: [0.5, 0.2] is not a range; allowed: [low, high] with low < high"
    )


def test_prompts_are_checked_by_the_scorers_that_would_read_them():
    prompts = [Prompt("1", "a red circle"), Prompt("2", "a portrait of a cat")]
    rewards.check_prompts(rewards.resolve([{"name": "symmetry"}]), prompts)
    rewards.check_prompts(rewards.resolve([{"name": "glyph_match"}]), prompts[:1])
    rewards.check_prompts(rewards.resolve([{"name": "glyph_match", "on_error": "drop_group"}]), prompts)
    with pytest.raises(ValueError, match="reward wish, prompt 'a portrait of a cat': "):
        rewards.check_prompts(rewards.resolve([{"name": "symmetry"}, {"name": "glyph_match", "label": "wish"}]), prompts)
    with pytest.raises(ValueError, match="reward ocr, prompt 'a red circle': requests no text"):
        rewards.check_prompts(rewards.resolve([{"name": "ocr"}]), prompts)

import pytest
import torch

from diffusion import Prompt
from rewards import build, check, resolve
from rewards.mixture import RewardError, score

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("1", "a", {"wish": 0.5}), Prompt("2", "bb", {}), Prompt("3", "ccc", {"wish": 2.0, "other": "x"})]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def lengths(images, prompts, **meta):\n"
        "    assert list(images.shape) == [3, 3, 8, 8]\n"
        "    assert meta == {'wish': [0.5, None, 2.0], 'other': [None, None, 'x']}\n"
        "    return [len(p) for p in prompts]\n"
        "def bright(images, prompts, **meta):\n    return images.mean((1, 2, 3))\n"
        "def short(images, prompts, **meta):\n    return [1.0]\n"
        "constant = 3\n"
    )
    return path


def test_a_function_gets_images_captions_and_columns(file):
    entries = resolve([{"name": f"python:{file}:lengths"}, {"name": f"python:{file}:bright", "label": "light", "weight": 3}])
    assert [entry["label"] for entry in entries] == ["lengths", "light"]
    check(entries)
    mixture = build(entries)
    scores = mixture(IMAGES, PROMPTS)
    assert scores.parts["lengths"].tolist() == [1.0, 2.0, 3.0]
    torch.testing.assert_close(scores.total, (torch.tensor([1.0, 2, 3]) + 3 * IMAGES.mean((1, 2, 3))) / 4)


@pytest.mark.parametrize("differentiable", [False, True])
def test_gradients_flow_only_if_declared(file, differentiable):
    entry = {"name": f"python:{file}:bright", "differentiable": differentiable}
    mixture = build(resolve([entry]))
    assert mixture.about.differentiable is differentiable
    images = IMAGES.clone().requires_grad_()
    total = mixture(images, PROMPTS).total
    assert total.requires_grad is differentiable
    if differentiable:
        total.sum().backward()
        torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 192))


def test_a_file_with_dataclasses(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Knob:\n    value: float = 2.0\n"
        "def f(images, prompts, **meta):\n    return [Knob().value] * len(prompts)\n"
    )
    assert build(resolve([{"name": f"python:{tmp_path}/mine.py:f"}]))(IMAGES, PROMPTS).total.tolist() == [2.0, 2.0, 2.0]


def test_a_function_of_a_module():
    (entry,) = resolve([{"name": "python:math.fsum"}])
    check([entry])
    assert entry["label"] == "fsum"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("python:nothing.py:f", "no such file: nothing.py"),
        ("python:no_such_module.f", "No module named 'no_such_module'"),
        ("python:math.no_such_function", "math has no function no_such_function"),
        ("python:FILE:constant", "has no function constant"),
        ("python:f", "allowed are python:FILE.py:FUNCTION and python:MODULE.FUNCTION"),
    ],
)
def test_missing_functions_are_reported_before_anything_runs(file, name, message):
    with pytest.raises(ValueError, match=message):
        check(resolve([{"name": name.replace("FILE", str(file))}]))


def test_a_wrong_number_of_scores_stops_the_run(file):
    mixture = build(resolve([{"name": f"python:{file}:short"}]))
    with pytest.raises(RewardError, match="reward short gave scores float32 \\[1\\] for 3 prompts"):
        score(mixture.members[0][0], IMAGES, PROMPTS)

"""The rules that keep the rooms apart, read off the syntax trees (docs/architecture.md)."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MIDDLE = {"align", "distill", "rollouts", "rewards", "generators"}
LEAVES = {"diffusion", "inputs", "worlds"}
MAY_IMPORT = {
    **{room: set() for room in LEAVES},
    **dict.fromkeys(MIDDLE, LEAVES),
    "runtime": LEAVES | MIDDLE,
}
HOMES = {
    "ray": "runtime/executors/ray/",
    "diffusers": "generators/",
    "peft": "generators/",
    "hpsv2": "rewards/scorers/hpsv2.py",
    "ImageReward": "rewards/scorers/image_reward.py",
    "trl": "runtime/prompt_policy/",
    "rapidocr": "rewards/scorers/ocr.py",
    "onnxruntime": "rewards/scorers/ocr.py",
    "cv2": "rewards/scorers/ocr.py",
    "tensorboard": "runtime/run/tracking.py",
    "accelerate": "runtime/run/tracking.py",
    "wandb": "runtime/run/tracking.py",
    "mlflow": "runtime/run/tracking.py",
    "trackio": "runtime/run/tracking.py",
}
"""A third-party library and the only file or room that may import it."""
LIBRARIES = {"diffusion": {"torch"}, "inputs": {"huggingface_hub"}, "worlds": {"torch", "numpy", "PIL", "sklearn"}}
"""The rooms that keep to a few libraries, and which."""

FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imported(source: str) -> set[str]:
    """The dotted names a module imports, wherever in it the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test can read them"
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return names


def wrong_rooms(path: Path, source: str) -> set[str]:
    room = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(source)}
    return (tops & set(MAY_IMPORT)) - MAY_IMPORT[room] - {room}


def strangers(path: Path, source: str) -> set[str]:
    tops = {name.split(".")[0] for name in imported(source)} & set(HOMES)
    return {name for name in tops if not path.relative_to(ROOT).as_posix().startswith(HOMES[name])}


def luxuries(path: Path, source: str) -> set[str]:
    """Libraries that a room which keeps to a few imports beyond them."""
    room = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(source)} - set(sys.stdlib_module_names) - set(MAY_IMPORT)
    return tops - LIBRARIES[room] if room in LIBRARIES else set()


def test_every_room_is_there():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way_and_libraries_stay_home(path):
    assert wrong_rooms(path, path.read_text()) == set()
    assert strangers(path, path.read_text()) == set()
    assert luxuries(path, path.read_text()) == set()


def test_the_rules_catch_a_breach():
    def late(name):
        return f"def f():\n    import {name}"

    assert wrong_rooms(ROOT / "diffusion/x.py", late("generators.families.sd3")) == {"generators"}
    assert wrong_rooms(ROOT / "rewards/x.py", "from generators import load") == {"generators"}
    assert wrong_rooms(ROOT / "runtime/x.py", "from generators import load") == set()
    assert strangers(ROOT / "align/x.py", late("diffusers.utils")) == {"diffusers"}
    assert strangers(ROOT / "runtime/run/loop.py", "import ray") == {"ray"}
    assert strangers(ROOT / "runtime/executors/ray/executor.py", "import ray") == set()
    assert strangers(ROOT / "runtime/run/loop.py", "from importlib import import_module\nimport_module('ray.util')") == {"ray"}
    assert luxuries(ROOT / "diffusion/x.py", "import json\nimport numpy as np") == {"numpy"}
    assert luxuries(ROOT / "worlds/glyphs/x.py", "from transformers import CLIPModel") == {"transformers"}

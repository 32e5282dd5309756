"""The rules of rooms, files and imports, checked on the syntax trees (docs/architecture.md)."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MIDDLE = {"align", "distill", "rollouts", "rewards", "generators"}
LEAVES = {"diffusion", "inputs", "worlds"}
MAY_IMPORT = {
    "inputs": set(),
    "diffusion": set(),
    "worlds": {"inputs"},
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
"""{third-party library: the only file or room that may import it}"""
LIBRARIES = {
    "diffusion": {"torch"},
    "inputs": {"huggingface_hub", "numpy", "PIL"},
    "worlds": {"torch", "numpy", "PIL", "sklearn"},
}
"""{room: the only third-party libraries it may import}"""

FILES = sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def imported(source: str) -> set[str]:
    """The dotted names that a module imports, also inside functions."""
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


def misplaced_libraries(path: Path, source: str) -> set[str]:
    tops = {name.split(".")[0] for name in imported(source)} & set(HOMES)
    return {name for name in tops if not path.relative_to(ROOT).as_posix().startswith(HOMES[name])}


def forbidden_libraries(path: Path, source: str) -> set[str]:
    """Libraries that a room imports beyond those LIBRARIES allows."""
    room = path.relative_to(ROOT).parts[0]
    tops = {name.split(".")[0] for name in imported(source)} - set(sys.stdlib_module_names) - set(MAY_IMPORT)
    return tops - LIBRARIES[room] if room in LIBRARIES else set()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(files: dict[str, str]) -> dict[str, set[str]]:
    """{module: modules it imports, also inside functions and for types}. files: {module: source}.

    A string that begins with a package's name and a dot, as for `import_module`, counts as all modules of the package.
    """
    edges = {}
    for module, source in files.items():
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in files else str(node.module) for name in names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value[-1:] == ".":
                found |= {name for name in files if name.startswith(node.value) and node.value[:-1] in files}
        edges[module] = (found & files.keys()) - {module}
    return edges


def test_every_room_exists():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way_and_libraries_stay_in_their_rooms(path):
    assert wrong_rooms(path, path.read_text()) == set()
    assert misplaced_libraries(path, path.read_text()) == set()
    assert forbidden_libraries(path, path.read_text()) == set()


def test_the_rules_find_a_violation():
    def late(name):
        return f"def f():\n    import {name}"

    assert wrong_rooms(ROOT / "diffusion/x.py", late("generators.families.sd3")) == {"generators"}
    assert wrong_rooms(ROOT / "rewards/x.py", "from generators import load") == {"generators"}
    assert wrong_rooms(ROOT / "runtime/x.py", "from generators import load") == set()
    assert misplaced_libraries(ROOT / "align/x.py", late("diffusers.utils")) == {"diffusers"}
    assert misplaced_libraries(ROOT / "runtime/run/loop.py", "import ray") == {"ray"}
    assert misplaced_libraries(ROOT / "runtime/executors/ray/executor.py", "import ray") == set()
    assert misplaced_libraries(
        ROOT / "runtime/run/loop.py", "from importlib import import_module\nimport_module('ray.util')"
    ) == {"ray"}
    assert forbidden_libraries(ROOT / "diffusion/x.py", "import json\nimport numpy as np") == {"numpy"}
    assert forbidden_libraries(ROOT / "worlds/glyphs/x.py", "from transformers import CLIPModel") == {"transformers"}


def test_no_import_cycle():
    modules = graph({module_of(path): path.read_text() for path in FILES})
    assert "rewards.scorers.hpsv2" in modules["rewards.names"], "imported by name"
    try:
        TopologicalSorter(modules).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' <- '.join(error.args[1])}")


def test_a_cycle_through_a_function_or_a_type_import_is_found():
    late = "def f():\n    from rewards import build"
    typed = "if TYPE_CHECKING:\n    from rewards.names import Entry"
    with pytest.raises(CycleError):
        TopologicalSorter(graph({"rewards.names": late, "rewards.build": typed})).prepare()


MOST_LINES = 350
MOST_FILES = 12
ONE_FILE_EACH = {"rewards/scorers": "one file for each reward"}
"""Folders that may hold more files than others, and why."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_folders_hold_few_files_and_have_a_docstring(folder):
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert docstring, f"{folder.relative_to(ROOT)}/__init__.py must describe the folder"
    if folder.relative_to(ROOT).as_posix() not in ONE_FILE_EACH:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_FILES

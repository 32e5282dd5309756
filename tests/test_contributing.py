"""CONTRIBUTING.md, followed literally: its blocks are applied to a copy of the repository, which then runs what they add."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from generators.families import FAMILIES
from generators.families.family import Family, Geometry, check_shift
from generators.load import load, outline
from generators.targets import match
from tests.test_house_rules import MAY_IMPORT

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BLOCK = re.compile(r"^```(\w+) (\S+)\n(.*?)^```$", re.M | re.S)
FOLDERS = (*MAY_IMPORT, "experiments", "tests")
FILES = ("README.md", "docs/rewards.md", "pyproject.toml")
LARGE = 100_000
"""Bytes; larger files, which are weights, are linked instead of copied."""
SMALL = [
    "run.steps=2",
    "run.evaluate_every=2",
    "run.checkpoint_every=2",
    "run.micro_batch=8",
    "run.threads=1",
    "run.trackers=[]",
    "rollouts.steps=3",
    "rollouts.groups_per_step=2",
    "prompts.heldout_number=3",
]
FOLLOW = """
import json, sys
import pytest
from runtime.cli import app

tests, *launches = json.loads(sys.argv[1])
code = pytest.main(["-q", "-p", "no:cacheprovider", *tests])
assert code == 0, code
for arguments in launches:
    app(arguments, standalone_mode=False)
"""


def blocks(title: str) -> list[tuple[str, str, str]]:
    """(language, file, content) of the fenced blocks with a file, below this heading."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return BLOCK.findall(section)


def changed(text: str, diff: str) -> str:
    """The text with all hunks applied. The context of a hunk has to occur exactly once."""
    for hunk in re.split(r"^@@\n", diff, flags=re.M):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-")
        before = "".join(line[1:] for line in lines if line[0] != "+")
        assert ("\n" + text).count("\n" + before) == 1, f"does not occur exactly once:\n{before}"
        text = text.replace(before, "".join(line[1:] for line in lines if line[0] != "-"))
    return text


def copy_or_link(source: str, target: str) -> None:
    if Path(source).stat().st_size > LARGE:
        Path(target).symlink_to(source)
    else:
        shutil.copy2(source, target)


def files_of(root: Path) -> dict[str, bytes | None]:
    """{file: its content, or None where it is large}"""
    paths = [
        path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.stat().st_size <= LARGE else None
        for path in [*paths, *(root / name for name in FILES)]
    }


def follow(title: str, root: Path) -> set[str]:
    """Copy the repository to root, and apply the section's blocks. Returns the files that differ afterwards."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, copy_function=copy_or_link, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    before = files_of(root)
    for language, name, content in blocks(title):
        path = root / name
        assert path.exists() == (language == "diff"), f"{name}: a diff changes a file, other blocks are new files"
        path.write_text(changed(path.read_text(), content) if language == "diff" else content)
    return {name for name, content in files_of(root).items() if name not in before or before[name] != content}


def run(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return result.stdout


def is_tidy(root: Path, files: set[str]) -> None:
    python = [name for name in sorted(files) if name.endswith(".py")]
    run(root, "-m", "ruff", "check", "--no-cache", *python)
    run(root, "-m", "ruff", "format", "--check", "--no-cache", *python)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_method_is_added_in_five_places(tmp_path):
    touched = follow("A training method", tmp_path)
    assert touched == {
        "align/awm.py",
        "align/__init__.py",
        "tests/align/test_awm.py",
        "experiments/awm_glyphs.yaml",
        "README.md",
    }
    is_tidy(tmp_path, touched)
    tests = [
        "tests/align/test_awm.py",
        "tests/runtime/experiment/test_experiments.py",
        "tests/runtime/finished/test_catalogue.py",
    ]
    launch = ["launch", "experiments/awm_glyphs.yaml", "--executor", "inline"]
    small = [*launch, "--run-dir", "run", "objective.group_size=4", *SMALL]
    resumed = [*small, "run.steps=3"]
    work = [["-k", "awm", *tests, "tests/test_house_rules.py"], [*launch, "--dry-run"], small, resumed]
    printed = run(tmp_path, "-c", FOLLOW, json.dumps(work))
    # 16 groups of 8: solves of 4 evaluations each, and the frozen network's; then one with gradient for each sample
    assert "# a step: 128 images, at most 640 network evaluations without gradient and\n#   128 with gradient" in printed
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["grad_norm"] > 0
        assert line["awm/max_error"] >= line["awm/error"] > 0
    assert lines[0]["awm/drift"] == 0 < lines[1]["awm/drift"]
    assert "heldout/total" in lines[1]


def test_a_reward_is_added_in_five_places(tmp_path):
    touched = follow("A reward", tmp_path)
    assert touched == {
        "rewards/scorers/smoothness.py",
        "rewards/names.py",
        "tests/rewards/scorers/test_smoothness.py",
        "README.md",
        "docs/rewards.md",
    }
    is_tidy(tmp_path, touched)
    tests = ["tests/rewards/scorers/test_smoothness.py", "tests/rewards/test_conformance.py", "tests/test_house_rules.py"]
    chosen = "smoothness or test_every_scorer_has_a_name"
    launch = ["launch", "experiments/drtune_symmetry_glyphs.yaml", "--executor", "inline", "--run-dir", "run"]
    reward = "rewards={train: [{name: smoothness}], heldout: [{name: symmetry}]}"
    run(tmp_path, "-c", FOLLOW, json.dumps([["-k", chosen, *tests], [*launch, reward, *SMALL]]))
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(0 < line["reward/smoothness"] < 1 and line["grad_norm"] > 0 for line in lines)
    assert 0 < lines[1]["heldout/smoothness"] < 1


def test_the_page_shows_the_record_of_sd3():
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    shown: dict = {"Family": Family, "Geometry": Geometry, "check_shift": check_shift}
    exec("from __future__ import annotations\n" + block, shown)
    real, page = FAMILIES["sd3"], shown["SD3"]
    plain = {field.name for field in fields(Family)} - {"geometry", "load"}
    assert {name: getattr(page, name) for name in plain} == {name: getattr(real, name) for name in plain}
    network = {"patch_size": 2, "pos_embed_max_size": 192, "sample_size": 128, "in_channels": 16}
    configs = {"transformer": network, "vae": {"block_out_channels": [128, 256, 512, 512]}}
    assert page.geometry(configs) == real.geometry(configs)
    for field in fields(Family):
        assert f"\n| `{field.name}` | " in PAGE
    ((_, registry, diff),) = blocks("A model family")
    assert "SD3, NAME" in changed((ROOT / registry).read_text(), diff)


def test_a_family_is_its_record(tmp_path, monkeypatch):
    """Checks before the weights are read, from the record alone; then the loader with its options."""
    loaded = []

    def new(folder, **options):
        loaded.append((folder, options))
        return "a generator"

    tiny = Family(
        name="tiny",
        pipeline="TinyPipeline",
        network="transformer",
        short_names={"attn": "to_[qk]"},
        keys={"transformer": ("channels",)},
        geometry=lambda configs: Geometry(configs["transformer"]["channels"], factor=8, patch=2, default=64, limit=128),
        check_grid=check_shift,
        load=new,
        optional={"captioner": ("text_encoder_2",)},
    )
    monkeypatch.setitem(FAMILIES, tiny.name, tiny)
    configs = {
        "model_index.json": {"_class_name": "TinyPipeline"},
        "transformer/config.json": {"channels": 3},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    }
    for name, config in configs.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config))
    save_file({"0.to_q.weight": torch.zeros(4, 6)}, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    shape = outline(str(tmp_path), "tiny")
    assert shape.latent_shape(128, 64) == (3, 16, 8)
    assert match("attn", shape.linear, tiny.short_names) == ("0.to_q",)
    with pytest.raises(ValueError, match="shift"):
        shape.check_grid(3.0, even=False)
    with pytest.raises(ValueError, match="a TinyPipeline, but family sd3 is a StableDiffusion3Pipeline"):
        outline(str(tmp_path), "sd3")
    assert load(str(tmp_path), family="tiny", captioner=False) == "a generator"
    options = {"dtype": torch.float32, "device": "cpu", "gradient_checkpointing": False, "captioner": False}
    assert loaded == [(tmp_path, options)]

"""The command line: exit codes, one line for an error, no folder left after one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def odeon(*arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "runtime.cli", *map(str, arguments)], cwd=cwd, capture_output=True, text=True)


def test_help_is_light():
    code = "import sys, runtime.cli; print([name for name in ('torch', 'ray', 'diffusers', 'pydantic') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_a_dry_run_prints_the_whole_experiment_and_leaves_nothing(tmp_path):
    result = odeon("launch", "experiments/quickstart.yaml", "--dry-run", "--run-dir", tmp_path / "run")
    assert result.returncode == 0
    assert "perturbation:" in result.stdout
    assert "network evaluations" in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["launch", "nothing.yaml"], "nothing.yaml"),
        (["launch", "experiments/quickstart.yaml", "generator.weights=no/such/folder"], "no/such/folder"),
        (["launch", "experiments/quickstart.yaml", "prompts.train=no/such.txt"], "no/such.txt"),
        (["launch", "experiments/quickstart.yaml", "--executor", "rai"], "'ray'"),
        (["launch", "experiments/quickstart.yaml", "--ray", "ray://head:1"], "ray://head:1"),
        (["compare", "docs"], "docs"),
        (["export", "docs"], "docs"),
        (["sample", "docs", "--prompt", "a red circle"], "docs"),
        (["describe", "neighbor_grop"], "neighbor_grpo"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(tmp_path, arguments, word):
    run_dir = ["--run-dir", tmp_path / "run"] if arguments[0] == "launch" else []
    result = odeon(*arguments, *run_dir)
    assert result.returncode == 2
    assert result.stderr.startswith("odeon: ")
    assert result.stderr.count("\n") == 1
    assert word in result.stderr
    assert not (tmp_path / "run").exists()

"""The command line: exit codes, one line for an error, no folder left after one."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.cli import main

ROOT = Path(__file__).parents[2]


def test_help_is_light():
    code = "import sys, runtime.cli; print([name for name in ('torch', 'ray', 'diffusers', 'pydantic') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_a_dry_run_prints_the_whole_experiment_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-m", "runtime.cli", "launch", "experiments/quickstart.yaml", "--dry-run"]
    result = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
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
def test_an_error_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capfd, arguments, word):
    """In this process: a new one would spend three seconds on imports."""
    run_dir = ["--run-dir", str(tmp_path / "run")] if arguments[0] == "launch" else []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["odeon", *arguments, *run_dir])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    errors = capfd.readouterr().err
    assert errors.startswith("odeon: ")
    assert errors.count("\n") == 1
    assert word in errors
    assert not (tmp_path / "run").exists()

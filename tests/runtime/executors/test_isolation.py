"""Scorers with another interpreter. The environment of these tests has our own packages, through a .pth file: it is another
interpreter, and is made in a second."""

import json
import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import torch

import rewards
from diffusion.types import Prompt
from runtime.executors import isolation
from runtime.executors.isolation import Child, build_environment, check_rewards, packages_hash, problem_with, python_of
from runtime.experiment.config import InputError
from runtime.run.folder import RunFolder
from runtime.run.launch import launch_experiment

PROMPTS = [Prompt("1", "a red circle"), Prompt("2", "a blue seven")]


@pytest.fixture(scope="session")
def twin(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("envs") / "twin"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "ours.pth").write_text(str(Path(torch.__file__).parents[1]))
    return str(folder)


def entry(**given):
    return rewards.resolve([given])[0]


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_it_is_another_interpreter(twin):
    printed = subprocess.run(
        [python_of(twin), "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == twin != sys.prefix
    assert problem_with(twin) is None


def test_a_child_scores_as_this_process_does(twin, images):
    here = rewards.build([{"name": "symmetry"}])
    entries = [entry(name="symmetry", env=twin)]
    check_rewards(entries)
    there = rewards.build(entries, isolated=lambda one: Child(one, "cpu", 1))
    gradients = []
    for mixture in (here, there):
        leaf = images.clone().requires_grad_()
        total = mixture(leaf, PROMPTS).total
        gradients.append(torch.autograd.grad(total.sum(), leaf)[0])
    assert (there(images, PROMPTS).total - here(images, PROMPTS).total).abs().max() <= 1e-6
    assert (gradients[1] - gradients[0]).abs().max() <= 1e-5 * gradients[0].abs().max()


def test_a_child_ends_with_its_parent(twin):
    program = (
        "import rewards, sys; from runtime.executors.isolation import Child;"
        f"child = Child(rewards.resolve([{{'name': 'brightness', 'env': {twin!r}}}])[0], 'cpu', 1);"
        "print(child._process.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    os.kill(child, 0)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child outlives its parent")


def fake_interpreter(folder: Path, says: str) -> str:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f"#!/bin/sh\n{says}\n")
    (folder / "bin" / "python").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ("echo '[[3, 7], \"2.60.0\"]'", r"has Python 3\.7, but this is 3\.\d+; both must be the same"),
        (
            f"echo '[[{sys.version_info[0]}, {sys.version_info[1]}], \"1.0\"]'",
            r"has Ray 1\.0, but this is .*; both must be the same",
        ),
        ("echo 'PackageNotFoundError: ray' >&2; exit 1", r"python has no Ray: PackageNotFoundError: ray"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(tmp_path, says, words):
    env = fake_interpreter(tmp_path / "odd", says)
    with pytest.raises(ValueError, match=f"^env '{env}': .*{words}$"):
        check_rewards([entry(name="brightness", env=env)])


def test_a_missing_environment():
    with pytest.raises(
        ValueError, match=r"^env 'envs/none': no such file: .*/envs/none/bin/python; make it with `odeon env build none`$"
    ):
        check_rewards([entry(name="brightness", env="envs/none")])


def test_missing_files_are_found_in_the_environment(twin, tmp_path):
    with pytest.raises(ValueError, match=rf"^env '{twin}': weights '{tmp_path}/no': no such file or folder"):
        check_rewards([entry(name="clip_score", weights=f"{tmp_path}/no", env=twin)])


def test_an_environment_is_built_with_this_ray_and_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    def run(*command):
        commands.append([str(word) for word in command])
        Path("envs/mine").mkdir(exist_ok=True)

    monkeypatch.setattr(isolation, "_run", run)
    Path("envs").mkdir()
    Path("envs/mine.txt").write_text("transformers==4.45.2\n")
    assert build_environment("mine", None) == Path("envs/mine")
    assert commands[0] == [sys.executable, "-m", "venv", "envs/mine"]
    assert commands[1][-1] == f"torch=={torch.__version__.split('+')[0]}"
    assert commands[2][5:] == [commands[1][-1], "-r", "envs/mine.txt", f"ray=={isolation.version('ray')}", *isolation.NEEDED]
    with pytest.raises(InputError, match=r"^envs/mine: already exists; remove it to build it again$"):
        build_environment("mine", None)
    with pytest.raises(InputError, match=r"^envs/other.txt: no such file"):
        build_environment("other", None)
    Path("old.txt").write_text("torch>=2.11  # its own\n")
    commands.clear()
    build_environment("own", Path("old.txt"))
    assert not any("torch" in word for command in commands for word in command)


def test_an_environment_that_failed_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("none.txt").write_text("x\n")
    monkeypatch.setattr(sys, "executable", fake_interpreter(tmp_path / "python", 'mkdir -p "$3/bin"; exit 3') + "/bin/python")
    with pytest.raises(RuntimeError, match=r"-m venv envs/mine failed with code 3"):
        build_environment("mine", Path("none.txt"))
    assert not Path("envs/mine").exists()


def test_the_packages_hash_follows_the_packages(tmp_path):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    (site / "a-1.0.dist-info").mkdir(parents=True)
    before = packages_hash(str(tmp_path))
    assert re.fullmatch(r"[0-9a-f]{64}", before)
    (site / "a-1.0.dist-info").rename(site / "a-1.1.dist-info")
    assert packages_hash(str(tmp_path)) != before


def test_odeon_rewards_serve(twin):
    command = [sys.executable, "-m", "runtime.cli", "rewards", "serve", f"{{name: symmetry, env: {twin}}}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        assert re.fullmatch(r"symmetry \(with gradient\) at http://127.0.0.1:\d+; Ctrl-C stops it\n", line)
        url = line.split()[-4].rstrip(";")
        rewards.check(rewards.resolve([{"name": "symmetry", "server": url}]))
        process.terminate()


def test_a_run_with_an_isolated_reward_is_the_same_as_without(twin, tmp_path, cluster, restore_threads):
    """Without, with a child process, and with a Ray actor."""
    text = """
name: x
generator: {weights: embedded:glyphs}
prompts: {train: embedded:glyphs/train, heldout: embedded:glyphs/heldout, heldout_number: 2}
rollouts: {steps: 2, groups_per_step: 2}
objective: {algorithm: neighbor_grpo, group_size: 2, anchors: 1, train_steps: 1}
run: {steps: 1, evaluate_every: 1, checkpoint_every: 1, trackers: [], threads: 1}
"""
    lines = []
    for env, executor in ((None, "inline"), (twin, "inline"), (twin, "ray")):
        file = tmp_path / "x.yaml"
        reward = {"name": "symmetry"} | ({"env": env} if env else {})
        file.write_text(f"{text}rewards: {{train: [{json.dumps(reward)}]}}\n")
        folder = tmp_path / f"run_{len(lines)}"
        assert launch_experiment(file, [], folder, executor, cluster, dry_run=False) == 0
        (line,) = RunFolder(folder).metrics()
        lines.append({key: value for key, value in line.items() if not key.startswith(("time/", "seconds", "memory/"))})
    assert lines[0] == lines[1] == lines[2]
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["weights"][twin] == f"packages {packages_hash(twin)}"

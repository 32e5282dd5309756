"""Whole runs of the methods that back-propagate through the sampler, as small as they get."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion import SOLVERS, Prompt, Rollout, Trajectory, integrate
from generators import load
from rewards.mixture import RewardError
from runtime.experiment.checks import check_inputs
from runtime.experiment.config import InputError
from runtime.experiment.yaml import read_experiment
from runtime.finished.compare import summary
from runtime.roles.trainer import Trainer
from runtime.run.plan import plan_text
from runtime.run.progress import reporter
from tests.runtime.run.test_run import QUICKSTART, SMALL, adapter, go

COMMON = [
    *SMALL,
    "rewards={train: [{name: symmetry}], heldout: [{name: contrast}]}",
    "rollouts.groups_per_step=5",
    "run.steps=2",
]
METHODS = {
    "drtune": "{algorithm: drtune, train_steps: 2, draw: prefix, reference_weight: 0.1}",
    "refl": "{algorithm: refl, window: [0.3, 1.0]}",
    "draft": "{algorithm: draft, low_variance: 2}",
    "draft_k": "{algorithm: draft, train_steps: 2}",
    "alignprop": "{algorithm: alignprop}",
}
DIFFER = ("time/", "seconds", "memory/")


def direct(method, *overrides):
    return read_experiment(QUICKSTART, [*COMMON, f"objective={METHODS[method]}", *overrides])


def lines(folder):
    return [{key: value for key, value in line.items() if not key.startswith(DIFFER)} for line in folder.metrics()]


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    return request.param, go(direct(request.param), tmp_path_factory.mktemp("runs") / "whole")[0]


def test_it_learns_and_logs_what_it_did(run):
    name, folder = run
    first, second = folder.metrics()
    for line in (first, second):
        assert line["loss"] == pytest.approx(-line["reward/symmetry"], abs=0.2)
        assert line["reward/total"] == line["reward/symmetry"]
        assert line["grad_norm"] > 0
        assert {"memory/forward", "memory/reward", "memory/backward"} <= line.keys()
        assert "reward/std" not in line, "a group of one has no spread"
    assert second["adapter_norm"] != first["adapter_norm"]
    trained = {"drtune": 2, "refl": 1, "draft": 3, "draft_k": 4}  # recomputed evaluations count, and those after noising again
    if name in trained:
        assert first["nfe/train"] == 5 * trained[name]
    assert "heldout/contrast" in second


class Cut(Exception):
    pass


def cut_at(step):
    def show(line):
        if line["step"] == step:
            raise Cut

    return show


def test_an_interrupted_run_continues_bit_for_bit(run, tmp_path):
    name, whole = run
    with pytest.raises(Cut):
        go(direct(name), tmp_path / "cut", show=cut_at(1))
    folder, _ = go(direct(name), tmp_path / "cut")
    assert lines(folder) == lines(whole)
    assert adapter(folder, 2) == adapter(whole, 2)


def test_with_guidance_an_ema_and_accumulated_gradients_it_continues_bit_for_bit_too(tmp_path):
    def experiment():
        knobs = ["generator.guidance=2", "optimizer.ema=0.9", "optimizer.accumulation=2", "run.steps=3"]
        return read_experiment(QUICKSTART, [*COMMON, "objective={algorithm: refl, detach_negative: true}", *knobs])

    whole, _ = go(experiment(), tmp_path / "whole")
    with pytest.raises(Cut):
        go(experiment(), tmp_path / "cut", show=cut_at(1))
    folder, _ = go(experiment(), tmp_path / "cut")
    assert lines(folder) == lines(whole)
    assert adapter(folder, 3) == adapter(whole, 3)
    first, second, third = whole.metrics()
    assert first["adapter_norm"] != second["adapter_norm"] == third["adapter_norm"], "the optimiser moves at step 2 alone"
    assert first["nfe/train"] == 5, "the negative branch has no gradient"


def test_a_step_that_trains_nothing_is_a_step_and_continues_bit_for_bit(tmp_path, capsys):
    """K = 1 drawn over the full range: where the one step comes after the stop it is not executed."""
    experiment = direct("drtune", "objective={algorithm: drtune, train_steps: 1, early_stop: 1.0}", "run.steps=5", "seed=2")
    with reporter(5) as show:
        whole, _ = go(experiment, tmp_path / "whole", show=show)
    trained = [line.get("drtune/trained") for line in whole.metrics()]
    assert set(trained) == {None, 1.0}
    for line in whole.metrics():
        assert ("reward/total" in line) == ("drtune/trained" in line) == (line["loss"] != 0)
        assert (line["grad_norm"] > 0) == ("drtune/trained" in line)
    assert "reward -" in capsys.readouterr().out
    with pytest.raises(Cut):
        go(experiment, tmp_path / "cut", show=cut_at(1 + trained.index(None)))
    folder, _ = go(experiment, tmp_path / "cut")
    assert lines(folder) == lines(whole)
    rewards = [line["reward/total"] for line in whole.metrics() if "reward/total" in line]
    assert summary("one", whole.metrics())["reward"] == f"{rewards[0]:.3f} -> {rewards[-1]:.3f}"


def test_a_gradient_that_is_not_finite_is_one_line_on_the_command_line(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(images, prompts, **meta):\n    return (0 * images).sqrt().mean((1, 2, 3))\n")
    overrides = [*COMMON, f"objective={METHODS['draft']}", "run.trackers=[]"]
    overrides.append(f"rewards.train=[{{name: 'python:{tmp_path}/mine.py:mine', differentiable: true}}]")
    command = [
        sys.executable,
        "-m",
        "runtime.cli",
        "launch",
        str(QUICKSTART),
        *overrides,
        "--allow-code",
        "--executor",
        "inline",
    ]
    root = Path(__file__).parents[3]
    ran = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(
        "odeon: step 1, policy: loss 0.0, gradient norm nan; the adapters were not changed."
    )
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_reward_error_while_learning_ends_the_run_in_one_line(executor, tmp_path, cluster):
    file = tmp_path / "mine.py"
    file.write_text("def mine(images, prompts, **meta):\n    return [0.0] * len(prompts)\n")
    reward = f"rewards.train=[{{name: 'python:{file}:mine', differentiable: true}}]"
    experiment = read_experiment(QUICKSTART, [*COMMON, f"objective={METHODS['draft']}", reward], allow_code=True)
    roles = None
    if executor == "ray":
        from runtime.executors.ray.executor import RayExecutor

        roles = RayExecutor(experiment, cluster)
    with pytest.raises(RewardError) as caught:
        go(experiment, tmp_path / "run", roles)
    expected = f"reward mine: python:{file}:mine is declared differentiable, but its scores have no gradient"
    assert str(caught.value) == expected


def test_ray_changes_nothing(tmp_path, cluster):
    from runtime.executors.ray.executor import RayExecutor

    experiment = direct("drtune", "rollouts.workers=2", "run.micro_batch=4")
    inline, _ = go(experiment, tmp_path / "inline")
    ray, _ = go(experiment, tmp_path / "ray", RayExecutor(experiment, cluster))
    assert lines(inline) == lines(ray)
    assert adapter(inline, 2) == adapter(ray, 2)


def test_micro_batches_change_rounding_alone(tmp_path):
    whole, _ = go(direct("drtune", "run.micro_batch=5", "run.steps=1"), tmp_path / "whole")
    parts, _ = go(direct("drtune", "run.micro_batch=2", "run.steps=1"), tmp_path / "parts")
    (a,), (b,) = lines(whole), lines(parts)
    for key in ("loss", "reward/total", "grad_norm"):
        assert b[key] == pytest.approx(a[key], rel=1e-4)
    assert a["nfe/train"] == b["nfe/train"] == 10


@pytest.mark.parametrize("name", ["draft_k", "alignprop"])
def test_the_scored_image_is_the_sampler_s_own(name):
    """Without early stop the judged image is the one that a plain solve of the trained policy draws."""
    trainer, generator = Trainer(direct(name)), load("embedded:glyphs")
    with torch.no_grad():
        for parameter in trainer.generator.adapters.parameters("policy"):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    texts = ["a red circle", "a blue seven"]
    noise = torch.randn(2, *generator.latent_shape(), generator=torch.Generator().manual_seed(0))
    condition, grid = generator.encode(texts), generator.time_grid(3)
    solve = integrate(
        lambda x, t: trainer.generator(x, t, condition, "policy"), noise, grid, generator.path, SOLVERS["dpmpp_2m"]
    )
    images = generator.decode(solve.x[:, -1]).detach()
    start = Rollout(
        prompts=[Prompt("1", texts[0]), Prompt("2", texts[1])],
        condition=condition,
        group=torch.arange(2),
        seeds=torch.arange(2),
        trajectory=Trajectory(noise.unsqueeze(1), grid[:1]),
    )
    tools = trainer.tools(step=1)
    items = trainer.objective.items(start, None, tools)
    loss = trainer.objective.loss("policy", items, tools)
    symmetric = (1 - (images - images.flip(3)).abs().mean()).item()
    assert loss.metrics["reward/total"].item() == pytest.approx(symmetric, abs=1e-5)
    assert loss.value.item() == pytest.approx(-symmetric, abs=1e-5)
    drawn = generator.decode(
        integrate(lambda x, t: generator(x, t, condition, None), noise, grid, generator.path, SOLVERS["dpmpp_2m"]).x[:, -1]
    )
    assert (drawn - images).abs().mean() > 0.01, "the adapter matters"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rewards.train=[{name: glyph_match}]"], "rewards.train: glyph_match has no gradient, which drtune needs; "),
        (["rewards.multi_objective_aggregation=normalize_then_sum"], "needs groups of several images"),
    ],
)
def test_a_reward_without_gradient_is_refused(overrides, words):
    with pytest.raises(InputError) as caught:
        check_inputs(direct("drtune", *overrides), "inline")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    if "with one" in words:
        named = str(caught.value).split("rewards with one: ")[1]
        assert "symmetry" in named
        assert "clip_score" in named
        assert "jpeg_size" not in named


def test_a_held_out_reward_needs_no_gradient():
    check_inputs(direct("drtune", "rewards.train=[{name: symmetry}, {name: jpeg_size, weight: 0}]"), "inline")


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ("{algorithm: drtune, train_steps: 9}", "train_steps is 9, allowed are 1 to 3 with 3 solver steps"),
        ("{algorithm: draft, low_variance: 1, train_steps: 2}", "DRaFT-LV repeats a single step"),
        ("{algorithm: drtune, draw: some}", "objective.draw = 'some'"),
        ("{algorithm: drtune, anchors: 2}", "objective.anchors: unknown key (allowed: algorithm, detach_negative, draw,"),
        (
            "{algorithm: drtune, train_steps: 3, draw: prefix, early_stop: 0.7}",
            "allowed are 1 to 2 with 3 solver steps, since early_stop 0.7 may leave no more",
        ),
        ("{algorithm: dr_tune}", "did you mean 'drtune'"),
    ],
)
def test_wrong_knobs(objective, words):
    with pytest.raises(InputError) as caught:
        read_experiment(QUICKSTART, [*COMMON, f"objective={objective}"])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_plan_counts_evaluations_with_gradient():
    experiment = direct("drtune")
    _, _, generator = check_inputs(experiment, "inline")

    def plan(*overrides):
        return plan_text(direct("drtune", *overrides), "inline", generator)

    assert "at most 30 network evaluations without gradient and\n#   10 with gradient" in plan()
    assert "at most 50 network evaluations without gradient and\n#   20 with gradient" in plan("rollouts.solver=heun")
    assert "at most 60 network evaluations without gradient and\n#   20 with gradient" in plan("generator.guidance=2")
    assert "at most 15 network evaluations without gradient" in plan("objective.reference_weight=0")


def test_the_peak_is_that_of_the_phase():
    """In a new process: in one with much freed memory a new block may not increase the resident memory."""
    program = (
        "import json, torch; from runtime.roles.memory import PeakMemory; memory = PeakMemory(torch.device('cpu'));"
        "memory.enter('small'); memory.enter('large'); block = torch.ones(100 * 2**20 // 4); del block; memory.enter('small');"
        "print(json.dumps([memory.peaks(), memory.peaks()]))"
    )
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    peaks, again = json.loads(ran.stdout)
    assert peaks["memory/large"] > peaks["memory/small"] + 50
    assert again == {}

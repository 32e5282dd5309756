"""Small whole runs on the glyph world: what they write, that they resume, and that Ray gives the same results."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from generators import outline
from rollouts.prompts import read_prompts
from runtime.executors.inline import InlineExecutor
from runtime.experiment.config import InputError
from runtime.experiment.yaml import read_experiment
from runtime.finished.verbs import evaluate_run, sample_one
from runtime.run.folder import RunFolder
from runtime.run.loop import run
from runtime.run.plan import plan_text

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.yaml"
SMALL = [
    "run.steps=4",
    "run.evaluate_every=2",
    "run.checkpoint_every=1",
    "run.micro_batch=8",
    "run.threads=1",
    "rollouts.steps=3",
    "rollouts.groups_per_step=2",
    "prompts.heldout_number=3",
    "objective={algorithm: neighbor_grpo, group_size: 4, anchors: 2, train_steps: 2}",
    "optimizer.lr=0.01",
]
BIT_EQUAL = ("loss", "reward/total", "reward/std", "ratio/max_log", "grad_norm", "adapter_norm", "nfe/rollout", "nfe/train")


@pytest.fixture(autouse=True, scope="module")
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small(*overrides):
    return read_experiment(QUICKSTART, [*SMALL, *overrides])


def go(experiment, path, executor=None, show=lambda line: None):
    folder = RunFolder(path)
    train, heldout = read_prompts(experiment.prompts.train), read_prompts(experiment.prompts.heldout)
    with folder.locked():
        folder.claim(experiment)
        roles = executor or InlineExecutor(experiment)
        try:
            stopped = run(experiment, folder, roles, train, heldout, show)
        finally:
            roles.close()
    return folder, stopped


def adapter(folder, step):
    return (folder.checkpoints()[step] / "policy.safetensors").read_bytes()


def same(a, b):
    return [[line[key] for key in BIT_EQUAL] for line in a.metrics()] == [
        [line[key] for key in BIT_EQUAL] for line in b.metrics()
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    folder, stopped = go(small(), tmp_path_factory.mktemp("runs") / "whole")
    assert stopped is None
    return folder


def test_every_step_has_its_line_and_every_evaluation_its_metrics(whole):
    lines = whole.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["ratio/max_log"] == line["ratio/clip_fraction"] == 0  # one update: the old policy is the new one
        assert abs(line["loss"]) < 1e-6
        assert line["grad_norm"] > 0
        assert line["reward/total"] == line["reward/glyph_match"]
        assert 0 <= line["reward/total"] <= 1
    evaluated = [line for line in lines if "heldout/total" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    for line in evaluated:
        assert {
            "heldout/clip_score",
            "heldout/base/clip_score",
            "heldout/total_se",
            "heldout/win_rate",
            "diversity",
        } <= line.keys()
    assert len({line["heldout/base/total"] for line in evaluated}) == 1
    assert lines[-1]["adapter_norm"] > lines[0]["adapter_norm"]


def test_network_evaluations_are_counted_per_image(whole):
    lines = whole.metrics()
    # 2 groups of 4, 3 solver steps; 2 anchors and 2 trained steps of each group with signal; 6 held-out images per evaluation
    assert [line["nfe/rollout"] for line in lines] == [24, 48, 72, 96]
    assert all(line["nfe/train"] % 4 == 0 for line in lines)
    assert [line["nfe/teacher"] for line in lines] == [18, 36, 36, 54]


def test_the_dry_run_counts_what_a_step_does(tmp_path):
    """Old-policy and reference passes included; every group has a signal, so the upper bounds are reached."""
    knobs = "group_size: 4, anchors: 2, train_steps: 2, inner_updates: 3, reference_weight: 0.1"
    objective = f"objective={{algorithm: neighbor_grpo, {knobs}}}"
    experiment = small(
        objective, "rewards.train=[{name: brightness}]", "run.steps=1", "generator.guidance=2", "rollouts.solver=heun"
    )
    folder, _ = go(experiment, tmp_path / "run")
    (line,) = folder.metrics()
    text = plan_text(experiment, "inline", outline(experiment.generator.weights))
    without, with_gradient = re.search(
        r"at most ([\d,]+) network evaluations without gradient and\n#   ([\d,]+) with gradient", text
    ).groups()
    assert (line["nfe/rollout"], line["nfe/train"]) == (int(without.replace(",", "")), int(with_gradient))
    # 2 groups of 4, 5 evaluations of Heun; 2 anchors, 2 steps, 3 updates; guidance twice
    assert line["nfe/rollout"] == 2 * (2 * 4 * 5 + 2 * (2 * 2 + 2 * 2 * 3))
    assert line["nfe/train"] == 2 * 2 * 2 * 2 * 3


def test_the_run_folder_is_complete(whole):
    names = {path.name for path in whole.path.iterdir()}
    assert {"experiment.yaml", "metrics.jsonl", "events", "samples", "checkpoints", "report.html"} <= names
    assert list(whole.checkpoints())[-3:] == [2, 3, 4]
    assert (whole.path / "samples" / "step_000004" / "grid.png").stat().st_size > 500
    assert not list(whole.path.rglob("partial_*"))


class Killed(Exception):
    pass


@pytest.mark.parametrize("moment", ["request", "save", "update"])
def test_a_run_interrupted_anywhere_continues_bit_for_bit(whole, tmp_path, moment, monkeypatch):
    calls = []

    def dies(original):
        def method(self, *args, **kwargs):
            calls.append(moment)
            if len(calls) == 3:
                raise Killed
            return original(self, *args, **kwargs)

        return method

    with monkeypatch.context() as patch:
        patch.setattr(InlineExecutor, moment, dies(getattr(InlineExecutor, moment)))
        with pytest.raises(Killed):
            go(small(), tmp_path / "cut")
    folder, _ = go(small(), tmp_path / "cut")
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3, 4]
    assert same(folder, whole)
    assert adapter(folder, 4) == adapter(whole, 4)


def test_a_finished_run_is_not_changed(whole):
    before = whole.metrics_file.read_bytes(), adapter(whole, 4)
    go(small(), whole.path)
    assert (whole.metrics_file.read_bytes(), adapter(whole, 4)) == before


def test_a_signal_ends_the_step_and_leaves_a_checkpoint(whole, tmp_path):
    def interrupt(line):
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    folder, stopped = go(small("run.checkpoint_every=100"), tmp_path / "stopped", show=interrupt)
    assert stopped == signal.SIGTERM
    assert list(folder.checkpoints()) == [2]
    assert adapter(folder, 2) == adapter(whole, 2)
    assert json.loads((folder.checkpoints()[2] / "state.json").read_text())["step"] == 2


def test_guidance_and_an_ema_run_and_resume(tmp_path):
    experiment = small("generator.guidance=2.0", "optimizer.ema=0.9", "run.steps=2")
    folder, _ = go(experiment, tmp_path / "run")
    assert [line["nfe/rollout"] for line in folder.metrics()] == [48, 96]
    assert {path.name for path in folder.checkpoints()[2].iterdir()} >= {"policy.safetensors", "ema.safetensors"}
    longer = small("generator.guidance=2.0", "optimizer.ema=0.9", "run.steps=3")
    folder, _ = go(longer, tmp_path / "run")
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]


def test_ray_gives_the_same_bits_with_two_workers_of_which_one_is_killed(whole, tmp_path, cluster):
    import ray

    from runtime.executors.ray.executor import RayExecutor

    experiment = small("rollouts.workers=2")
    executor = RayExecutor(experiment, cluster)

    def kill(line):
        # Publishing has returned, so the weights are in the store; on-policy, one version is kept.
        ((version, weights),) = executor._weights.items()
        assert (version, ray.wait([weights], timeout=0)[0]) == (line["step"], [weights])
        if line["step"] == 2:
            os.kill(executor.processes()[0], signal.SIGKILL)

    folder, _ = go(experiment, tmp_path / "ray", executor, show=kill)
    assert same(folder, whole)
    assert adapter(folder, 4) == adapter(whole, 4)
    assert [line["heldout/total"] for line in folder.metrics() if "heldout/total" in line] == [
        line["heldout/total"] for line in whole.metrics() if "heldout/total" in line
    ]


def test_a_worker_that_hangs_is_replaced_at_the_deadline(whole, tmp_path, cluster):
    from runtime.executors.ray.executor import RayExecutor

    experiment = small("rollouts.deadline=8")
    executor = RayExecutor(experiment, cluster)
    first = executor.processes()

    def hang(line):
        if line["step"] == 2:
            os.kill(first[0], signal.SIGSTOP)

    folder, _ = go(experiment, tmp_path / "ray", executor, show=hang)
    assert same(folder, whole)


def test_the_teacher_is_evaluated_once_per_run(tmp_path, monkeypatch):
    evaluated = []
    original = InlineExecutor.evaluate

    def evaluate(self, groups, adapter):
        evaluated.append(adapter)
        return original(self, groups, adapter)

    monkeypatch.setattr(InlineExecutor, "evaluate", evaluate)
    go(small("run.steps=2"), tmp_path / "run")
    folder, _ = go(small("run.steps=4"), tmp_path / "run")
    assert evaluated == [None, "ema", "ema"]
    lines = [line for line in folder.metrics() if "heldout/total" in line]
    assert [line["nfe/teacher"] for line in lines] == [36, 54]  # 3 prompts, 2 images, 3 steps
    assert lines[0]["heldout/base/glyph_match"] == lines[1]["heldout/base/glyph_match"]


def test_tensorboard_has_a_rewound_step_once(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        patch.setattr("runtime.run.loop.checkpoint", lambda *_: None)
        go(small("run.steps=3", "run.evaluate_every=3"), tmp_path / "run")
    folder, _ = go(small("run.steps=3", "run.evaluate_every=3"), tmp_path / "run")
    events = EventAccumulator(str(folder.path / "events")).Reload().Scalars("grad_norm")
    assert [event.step for event in events] == [1, 2, 3]


def test_a_run_is_sampled_and_evaluated_with_fewer_solver_steps(whole, tmp_path):
    sample_one(whole.path, "a red circle", 3, 1, False, tmp_path / "new" / "one.png")
    assert Image.open(tmp_path / "new" / "one.png").size == (32, 32)
    rewards = ["glyph_match, brightness", "{name: clip_score, label: again, weights: embedded:glyphs-clip}"]
    rows = evaluate_run(whole.path, None, rewards, [1], "euler")
    labels = ["total", "glyph_match", "clip_score", "brightness", "again"]
    assert [row["reward"] for row in rows] == [*labels, "win rate of total", "standard error of the gain", "diversity"]
    assert rows[2] == rows[4] | {"reward": "clip_score"}
    whole_rows = evaluate_run(whole.path, None, [], [], None)
    last = whole.metrics()[-1]
    assert whole_rows[0] == {
        "reward": "total",
        "teacher": f"{last['heldout/base/total']:.4f}",
        "trained": f"{last['heldout/total']:.4f}",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": [0]}, "steps = 0"),
        ({"solver": "eular"}, "'euler'"),
        ({"rewards": ["brightnes"]}, "brightnes"),
        ({"rewards": ["{name"]}, "{name"),
        ({"prompts": "no/such.txt"}, "no/such.txt"),
    ],
)
def test_an_error_of_evaluate_is_one_line(whole, change, words):
    with pytest.raises(InputError) as caught:
        evaluate_run(whole.path, **{"prompts": None, "rewards": [], "steps": [], "solver": None} | change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_python_functions_run_only_when_allowed(whole, tmp_path):
    (tmp_path / "mine.py").write_text("def bright(images, prompts, **meta):\n    return images.mean((1, 2, 3))\n")
    rewards = [f"{{name: 'python:{tmp_path}/mine.py:bright'}}"]
    with pytest.raises(InputError, match="runs only with --allow-code"):
        evaluate_run(whole.path, None, rewards, [], None)
    rows = evaluate_run(whole.path, None, rewards, [], None, allow_code=True)
    assert [row["reward"] for row in rows][:4] == ["total", "glyph_match", "clip_score", "bright"]
    override = f"rewards.heldout=[{{name: 'python:{tmp_path}/mine.py:bright'}}]"
    with pytest.raises(InputError, match="runs only with --allow-code"):
        read_experiment(QUICKSTART, [override])
    assert read_experiment(QUICKSTART, [override], allow_code=True).rewards.heldout[0]["label"] == "bright"


def test_a_run_stops_at_the_last_evaluation_without_suspicion(tmp_path, monkeypatch):
    evaluations = []
    monkeypatch.setattr("runtime.evaluation.heldout.suspicions", lambda *_: ["it cheats"] if evaluations else [])

    def show(line):
        evaluations.extend([line["step"]] * ("heldout/total" in line))

    experiment = small("run.evaluate_every=2", "run.steps=6", "watch.stop_on_hacking=true")
    folder, stopped = go(experiment, tmp_path / "run", show=show)
    assert stopped is None
    assert evaluations == [2, 4]
    assert list(folder.checkpoints()) == [2]
    assert folder.metrics()[-1]["hacking"] == ["it cheats"]
    assert "quickstart: suspected reward hacking: it cheats" in (folder.path / "report.html").read_text()


def test_rewards_may_be_standardised_before_they_are_summed(tmp_path):
    rewards = "rewards.train=[{name: glyph_match}, {name: brightness, weight: 100, clip: [0, 0.9]}]"
    lines = {}
    for how in ("sum_then_normalize", "normalize_then_sum"):
        for scale in (1, 100):
            changed = rewards.replace("100", str(scale))
            experiment = small(changed, f"rewards.multi_objective_aggregation={how}", "run.steps=1")
            folder, _ = go(experiment, tmp_path / f"{how}{scale}")
            lines[how, scale] = folder.metrics()[0]
    assert len({line["reward/brightness"] for line in lines.values()}) == 1
    assert len({line["grad_norm"] for line in lines.values()}) == 4

"""Small distillation runs: the same bits inline and under Ray, resumed or not; the store; the export in stock diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchLCMScheduler, StableDiffusion3Pipeline

from diffusion import Group, Plan, Prompt, sample_noise, sample_seed
from rollouts.records import RecordStore
from runtime.cli import _numbers
from runtime.executors.inline import InlineExecutor
from runtime.experiment.checks import check_inputs
from runtime.experiment.config import InputError, new_objective
from runtime.experiment.yaml import read_experiment
from runtime.finished.store import generate, show_trajectory, store_table
from runtime.finished.verbs import evaluate_run, export_run, sample_one, trained_generator
from runtime.roles.build import new_worker
from runtime.run.loop import work_of_step
from tests.runtime.run.test_direct_runs import Cut, cut_at
from tests.runtime.run.test_run import go

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
GLYPHS = EXPERIMENTS / "ccm_glyphs.yaml"
SMALL = [
    "run.steps=4",
    "run.evaluate_every=4",
    "run.checkpoint_every=1",
    "run.micro_batch=4",
    "run.threads=1",
    "run.trackers=[]",
    "teacher.steps=5",
    "teacher.noises=1",
    "lora.rank=4",
    "rollouts.groups_per_step=8",
    "prompts.heldout_number=3",
    "optimizer.lr=0.01",
]
LEFT_OUT = ("time/", "seconds", "memory/", "nfe/rollout", "nfe/saved")
METHODS = ["ccm", "consistency", "reflow", "pcm", "dmd2"]
pytestmark = pytest.mark.usefixtures("restore_threads")


def small(*overrides, store):
    return read_experiment(GLYPHS, [*SMALL, f"teacher.store={store}", *overrides])


def lines(folder):
    return [{key: value for key, value in line.items() if not key.startswith(LEFT_OUT)} for line in folder.metrics()]


def tensors(folder, step=4):
    return {path.name: path.read_bytes() for path in folder.checkpoints()[step].glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("distillation")
    return go(small(store=path / "store"), path / "whole")[0]


def test_a_run_reports_its_curriculum_and_what_the_store_saved(whole):
    first, *_, last = whole.metrics()
    assert first["ccm/threshold"] == last["ccm/threshold"], "measured once"
    assert "nfe/saved" not in first, "8 groups are drawn"
    assert first["nfe/rollout"] >= 8 * 5 * 2
    assert last["heldout/base/total"] != last["heldout/total"]
    assert sum(key.startswith("curriculum/u/") for key in last) >= 2
    assert "Over the time t" in (whole.path / "report.html").read_text()
    assert set(tensors(whole)) == {"policy.safetensors", "target.safetensors", "ema.safetensors", "objective.safetensors"}


def test_it_resumes_with_the_same_bits(whole, tmp_path):
    """The store holds what the interrupted run drew, so the second half reads other trajectories from it than it drew."""
    experiment = small(store=tmp_path / "store")
    with pytest.raises(Cut):
        go(experiment, tmp_path / "run", show=cut_at(3))
    resumed = go(experiment, tmp_path / "run")[0]
    assert lines(resumed) == lines(whole)
    assert tensors(resumed) == tensors(whole)


def test_it_runs_under_ray_with_the_same_bits(whole, tmp_path, cluster):
    from runtime.executors.ray.executor import RayExecutor

    experiment = small("rollouts.workers=2", store=tmp_path / "store")
    ray = go(experiment, tmp_path / "run", RayExecutor(experiment, cluster))[0]
    assert lines(ray) == lines(whole)
    assert tensors(ray) == tensors(whole)


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_method_learns_and_resumes(method, tmp_path):
    solver = "rollouts.solver=euler" if method in ("reflow", "pcm") else "rollouts.solver=consistency"
    changes = [f"objective={{algorithm: {method}}}", solver, "run.steps=2", "run.evaluate_every=2"]
    experiment = small(*changes, store=tmp_path / "store")
    whole = go(experiment, tmp_path / "whole")[0]
    assert all(line["grad_norm"] > 0 for line in whole.metrics())
    with pytest.raises(Cut):
        go(experiment, tmp_path / "run", show=cut_at(2))
    resumed = go(experiment, tmp_path / "run")[0]
    assert lines(resumed) == lines(whole)
    assert tensors(resumed, 2) == tensors(whole, 2)


def test_reward_adversarial_and_features_in_one_run(tmp_path):
    knobs = "algorithm: ccm, reward_weight: 0.1, distance: features, features: embedded:glyphs-clip, adversarial_weight: 1.0"
    rewards = "rewards={train: [{name: brightness}], heldout: [{name: glyph_match}]}"
    changes = [f"objective={{{knobs}}}", rewards, "run.steps=2", "run.evaluate_every=2"]
    folder = go(small(*changes, store=tmp_path / "store"), tmp_path / "run")[0]
    line = folder.metrics()[-1]
    assert {"reward/total", "reward/brightness", "discriminator/loss", "ccm/adversarial", "heldout/glyph_match"} <= line.keys()
    assert "discriminator.safetensors" in tensors(folder, 2)


# --- the store


def updates(experiment, steps):
    """(network evaluations of the frozen network in each update, batches)"""
    executor, objective = InlineExecutor(experiment), new_objective(experiment)
    prompts = check_inputs(experiment, "inline")[0]
    found = []
    for step in range(1, steps + 1):
        executor.request(work_of_step(experiment, objective, prompts, step))
        batch = executor.take(step)
        found.append((executor.update(step, batch, None).frozen, batch))
    return found


def test_with_a_warm_store_a_step_calls_the_teacher_for_nothing(tmp_path):
    known = "objective={algorithm: ccm, threshold: 70, data_range: 4}"
    experiment = small(known, store=tmp_path / "store")
    cold = updates(experiment, 2)
    assert [batch.nfe for _, batch in cold] == [8 * 5 * 2] * 2
    assert [frozen for frozen, _ in cold] == [0, 0]
    warm = updates(experiment, 2)
    assert [(frozen, batch.nfe, batch.saved) for frozen, batch in warm] == [(0, 0, 80)] * 2
    line = small(known.replace("data_range: 4", "data_range: 4, points: line"), store=tmp_path / "store")
    assert all(frozen > 0 for frozen, _ in updates(line, 2)), "on the line the teacher runs in the learner"


def test_generate_fills_the_store_and_a_launch_then_draws_nothing(tmp_path):
    prompts = tmp_path / "few.txt"
    prompts.write_text("a red circle\na blue seven\na green cross\n")
    few = [
        *SMALL,
        f"teacher.store={tmp_path / 'store'}",
        "teacher.noises=2",
        f"prompts.train={prompts}",
        "rollouts.groups_per_step=2",
    ]
    shown = []
    summary = generate(GLYPHS, few, "inline", "local", lambda *numbers: shown.append(numbers))
    assert summary == "6 trajectories: 60 network evaluations, 0 saved by the store"
    assert [done for done, _, _ in shown] == [2, 4, 6]
    assert generate(GLYPHS, few, "inline", "local", lambda *_: None).startswith(
        "6 trajectories: 0 network evaluations, 60 saved"
    )
    folder = go(read_experiment(GLYPHS, few), tmp_path / "run")[0]
    assert folder.metrics()[-1]["nfe/saved"] == 4 * 2 * 5 * 2, "passes 0, 1, 2 read noises 0, 1, 0"
    rows = store_table(tmp_path / "store")
    assert [row["trajectories"] for row in rows] == ["6", "6"]
    assert rows[0]["prompts"] == "3"
    said = show_trajectory(tmp_path / "store", "embedded:glyphs", "sd3", "a blue seven", 1, tmp_path / "strip.png")
    assert "euler, 5 steps, guidance 2.5" in said
    with pytest.raises(InputError, match="the most similar is 'a blue seven'"):
        show_trajectory(tmp_path / "store", "embedded:glyphs", "sd3", "a blue sevn", 0, tmp_path / "strip.png")
    with pytest.raises(InputError, match="numbers 0 to 1"):
        show_trajectory(tmp_path / "store", "embedded:glyphs", "sd3", "a blue seven", 2, tmp_path / "strip.png")
    with pytest.raises(InputError, match="there is no such folder"):
        store_table(tmp_path / "nowhere")
    with pytest.raises(InputError, match="reads no stored trajectories"):
        generate(GLYPHS, [*few, "objective={algorithm: dmd2}"], "inline", "local", lambda *_: None)


def test_a_worker_that_is_killed_while_it_draws(tmp_path, cluster):
    """Ray restarts it, the step is drawn again, and the run's result is that of an undisturbed one."""
    import os
    import signal

    from runtime.executors.ray.executor import RayExecutor

    calm = small("run.steps=2", "run.evaluate_every=2", store=tmp_path / "calm")
    expected = go(calm, tmp_path / "calm_run")[0]
    experiment = small("run.steps=2", "run.evaluate_every=2", "rollouts.workers=2", store=tmp_path / "store")
    executor = RayExecutor(experiment, cluster)

    def kill(line):
        if line["step"] == 1:
            os.kill(executor.processes()[0], signal.SIGKILL)

    disturbed = go(experiment, tmp_path / "run", executor, show=kill)[0]
    assert tensors(disturbed, 2) == tensors(expected, 2)
    store = RecordStore(tmp_path / "store")
    keys = [entry.key for entry in store.entries()]
    assert len(store.read(keys)) == len(keys), "all that is in the store is intact"


# --- sampling with few steps


def test_evaluate_at_several_numbers_of_steps(whole):
    rows = evaluate_run(whole.path, None, [], [1, 2, 4], None)
    assert list(rows[0]) == ["reward", "teacher", "trained, 1 step", "trained, 2 steps", "trained, 4 steps"]
    assert rows[0]["trained, 2 steps"] == f"{whole.metrics()[-1]['heldout/total']:.4f}"
    assert rows[0]["teacher"] == f"{whole.metrics()[-1]['heldout/base/total']:.4f}", "the teacher's own steps and guidance"
    assert _numbers("--steps", "1,2, 4") == [1, 2, 4]
    for bad in ("0", "1,x", "1,,2", "-1"):
        with pytest.raises(InputError, match="allowed: positive integers, separated by commas"):
            _numbers("--steps", bad)


def test_sample_with_few_steps(whole, tmp_path):
    for steps in (1, 2, 4):
        sample_one(whole.path, "a red circle", 3, steps, False, tmp_path / f"{steps}.png")
    images = [(tmp_path / f"{steps}.png").read_bytes() for steps in (1, 2, 4)]
    assert len(set(images)) == 3


def test_the_exported_lora_samples_in_stock_diffusers_with_the_lcm_scheduler(whole, tmp_path):
    """The pipeline, the scheduler and the settings are those of the file's metadata."""
    from safetensors import safe_open

    file = export_run(whole.path, "diffusers", None, tmp_path / "export")
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["scheduler"] == "FlowMatchLCMScheduler"
    assert (metadata["num_inference_steps"], metadata["sigmas"], metadata["guidance_scale"]) == ("2", "1, 0.5", "1")
    experiment = small(store=None)
    generator, _ = trained_generator(experiment, whole)
    folder = Path("generators/glyphs/pipeline")
    stock = StableDiffusion3Pipeline.from_pretrained(EXPERIMENTS.parent / folder, text_encoder_3=None, tokenizer_3=None)
    stock.scheduler = FlowMatchLCMScheduler.from_config(stock.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    group = Group(Prompt("p", "a red circle"), 1, [7])
    worker = new_worker(experiment, generator, experiment.rollouts)
    ours = worker.take([group], Plan(adapter="ema", record=[2], scored=False)).rollout.trajectory.x[:, -1]

    def draw():
        torch.manual_seed(sample_seed(7, 1, "p", 0))  # the pipeline does not hand its generator to the scheduler
        return stock(
            "a red circle",
            latents=sample_noise([7], generator.latent_shape()),
            sigmas=[float(sigma) for sigma in metadata["sigmas"].split(",")],
            guidance_scale=float(metadata["guidance_scale"]),
            max_sequence_length=0,
            output_type="latent",
        ).images

    without = draw()
    stock.load_lora_weights(file.parent)
    torch.testing.assert_close(draw(), ours, rtol=1e-4, atol=1e-4)
    assert (without - ours).abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["teacher=null"], "needs a section `teacher`"),
        (["teacher.guidance=[3, 2]"], "two that do not decrease"),
        (["objective={algorithm: ccm, features: embedded:glyph-clip, adversarial_weight: 1}"], "glyphs-clip"),
        (["objective={algorithm: ccm, reward_weight: 0.1}"], "glyph_match has no gradient"),
        (["objective={algorithm: consistency, gap: 6}"], "gap is 6, allowed are 1 to 5"),
        (["teacher.solver=eular"], "'euler'"),
    ],
)
def test_errors_are_one_line(changes, words, tmp_path):
    with pytest.raises(InputError) as caught:
        check_inputs(small(*changes, store=tmp_path / "store") if "teacher=null" not in changes else no_teacher(), "inline")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def no_teacher():
    return read_experiment(GLYPHS, [change for change in SMALL if not change.startswith("teacher.")] + ["teacher=null"])

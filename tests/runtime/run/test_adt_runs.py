"""Small ADT runs: two players, real images and teacher samples; the same bits inline and under Ray, resumed or not."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from inputs.images import ImageError
from runtime.experiment.checks import check_inputs
from runtime.experiment.config import InputError
from runtime.experiment.yaml import read_experiment
from runtime.finished.store import generate, store_table
from runtime.finished.verbs import evaluate_run
from tests.runtime.run.test_direct_runs import Cut, cut_at
from tests.runtime.run.test_distillation_runs import LEFT_OUT, SMALL, tensors
from tests.runtime.run.test_run import go

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
KNOBS = "algorithm: adt, features: embedded:glyphs-clip, adversarial_start: 2, adaptive_every: 2, discriminator_ema: 0.5"
COMMON = [
    *(change for change in SMALL if not change.startswith("teacher.")),
    f"objective={{{KNOBS}}}",
    "rollouts.steps=3",
    "run.evaluate_every=2",
]
pytestmark = pytest.mark.usefixtures("restore_threads")


def small(*overrides, store, file="adt_glyphs.yaml"):
    return read_experiment(EXPERIMENTS / file, [*COMMON, f"prompts.image_store={store}", *overrides])


def lines(folder):
    return [{key: value for key, value in line.items() if not key.startswith(LEFT_OUT)} for line in folder.metrics()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("adt")
    return go(small(store=path / "store"), path / "whole")[0]


def test_a_run_reports_both_players(whole):
    first, second, *_, last = whole.metrics()
    assert "adt/adversarial" not in first
    assert {"adt/adversarial", "adt/weight", "adt/diffusion", "loss", "discriminator/loss"} <= second.keys()
    assert {"discriminator/accuracy", "discriminator/saturated", "discriminator/grad_norm"} <= last.keys()
    assert any(key.startswith("start/accuracy/") for key in last)
    assert all(line["discriminator/grad_norm"] > 0 and line["grad_norm"] > 0 for line in whole.metrics())
    assert {"policy", "ema", "discriminator", "discriminator_ema", "objective"} == {Path(name).stem for name in tensors(whole)}
    assert first["nfe/teacher"] > 0
    rows = 8 * 4
    assert last["nfe/train"] <= rows * 3, "K = 2 solver steps and the diffusion loss"
    assert "Over the time t" in (whole.path / "report.html").read_text()


@pytest.mark.parametrize("cut", [2, 4])
def test_it_resumes_with_the_same_bits(cut, whole, tmp_path):
    """In step 2 the adaptive weight is measured; in step 3 it is what the checkpoint says."""
    experiment = small(store=tmp_path / "store")
    with pytest.raises(Cut):
        go(experiment, tmp_path / "run", show=cut_at(cut))
    resumed = go(experiment, tmp_path / "run")[0]
    assert lines(resumed) == lines(whole)
    assert tensors(resumed) == tensors(whole)


def test_it_runs_under_ray_with_the_same_bits(whole, tmp_path, cluster):
    from runtime.executors.ray.executor import RayExecutor

    experiment = small("rollouts.workers=2", store=tmp_path / "store")
    ray = go(experiment, tmp_path / "run", RayExecutor(experiment, cluster))[0]
    assert lines(ray) == lines(whole)
    assert tensors(ray) == tensors(whole)


@pytest.mark.parametrize("loss", ["siamese", "relativistic"])
def test_teacher_samples_as_the_target_and_a_reward(loss, tmp_path):
    knobs = (
        f"algorithm: adt, features: embedded:glyphs-clip, target: teacher, loss: {loss}, adversarial_start: 1, reward_weight: 1"
    )
    changes = [f"objective={{{knobs}}}", "rewards={train: [{name: brightness}], heldout: [{name: glyph_match}]}"]
    teacher = [f"teacher.store={tmp_path / 'store'}", "teacher.steps=4", "run.steps=2"]
    folder = go(small(*changes, *teacher, store=tmp_path / "store", file="adt_distill_glyphs.yaml"), tmp_path / "run")[0]
    line = folder.metrics()[-1]
    assert {"reward/total", "reward/brightness", "discriminator/loss", "adt/adversarial", "heldout/glyph_match"} <= line.keys()


def pictures(path, number=8):
    path.mkdir()
    for i in range(number):
        Image.new("RGB", (50, 40), (30 * i, 0, 0)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text("a red circle")
    return path


def test_images_of_a_folder_and_their_store(tmp_path, capsys):
    source, store = pictures(tmp_path / "photos"), tmp_path / "store"
    changes = [f"prompts.train={source}", f"prompts.image_store={store}", "rollouts.groups_per_step=4"]
    shown = []
    text = generate(EXPERIMENTS / "adt_glyphs.yaml", [*COMMON, *changes], "inline", "local", lambda *given: shown.append(given))
    assert text == f"8 images: all latents are in {store}"
    assert shown == [(4, 8, 0), (8, 8, 0)]
    assert store_table(store)[-1]["images"] == "8"
    experiment = small(*changes, "run.steps=1", store=store)
    assert len(check_inputs(experiment, "inline")[0]) == 8
    assert go(experiment, tmp_path / "run")[0].metrics()[-1]["adt/diffusion"] > 0


def test_a_wrong_feature_network_is_the_objectives_error(tmp_path):
    with pytest.raises(InputError, match=r"^objective: weights 'nonsense': no such folder"):
        check_inputs(small("objective.features=nonsense", store=tmp_path / "store"), "inline")


def test_missing_and_broken_images_are_one_line(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n")
    with pytest.raises(InputError, match=r"^prompts .*p.txt: has no images, only texts \(allowed: "):
        check_inputs(small(f"prompts.train={tmp_path / 'p.txt'}", store=tmp_path / "store"), "inline")
    source = pictures(tmp_path / "photos")
    (source / "0.png").write_bytes(b"no")
    experiment = small(f"prompts.train={source}", "run.steps=1", store=tmp_path / "store")
    with pytest.raises(InputError, match=r"^prompts: image .*photos/0.png: cannot be read as an image \(2 bytes\)"):
        check_inputs(experiment, "inline")
    with pytest.raises(ImageError, match=r"^image .*photos/0.png"):
        go(experiment, tmp_path / "run")


def test_evaluation_against_real_images(whole, tmp_path):
    source = str(pictures(tmp_path / "photos"))
    rows = {row["reward"]: row for row in evaluate_run(whole.path, None, [], [2, 3], None, reference=source)}
    for name in ("Frechet distance", "CMMD", "precision", "recall"):
        values = {column: float(value) for column, value in rows[name].items() if column != "reward"}
        assert values.keys() == {"teacher", "trained, 2 steps", "trained, 3 steps"}
        assert all(torch.isfinite(torch.tensor(list(values.values()))))
    assert float(rows["Frechet distance"]["trained, 3 steps"]) > 0
    with pytest.raises(InputError, match="has no images"):
        evaluate_run(whole.path, None, [], [], None, reference=str(EXPERIMENTS.parent / "worlds/glyphs/prompts/tuning.txt"))
    with pytest.raises(InputError, match=r"its captions are the prompts; leave out --prompts x\.txt"):
        evaluate_run(whole.path, "x.txt", [], [], None, reference=source)

from pathlib import Path

import pytest
import yaml

from runtime.experiment.config import Experiment, InputError
from runtime.experiment.yaml import read_experiment, validated, write_experiment

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.yaml"


def changed(tmp_path, body):
    path = tmp_path / "e.yaml"
    path.write_text(f"extends: {QUICKSTART}\n{body}\n")
    return path


def test_the_quickstart_is_an_experiment():
    experiment = read_experiment(QUICKSTART)
    assert experiment.objective.algorithm == "neighbor_grpo"
    assert experiment.objective.group_size == 12
    assert [entry["label"] for entry in experiment.rewards.heldout] == ["glyph_match", "clip_score"]


def test_a_written_experiment_reads_back_equal(tmp_path):
    experiment = read_experiment(QUICKSTART, ["rewards.train.0.weight=2"])
    write_experiment(experiment, tmp_path / "experiment.yaml")
    assert read_experiment(tmp_path / "experiment.yaml") == experiment
    assert experiment.rewards.train[0]["weight"] == 2


def test_overrides_are_yaml_and_reach_into_mappings_and_lists():
    overrides = ["run.steps=6", "optimizer.betas=[0.8, 0.9]", "rewards.train.0.label=match", "generator.height=null"]
    experiment = read_experiment(QUICKSTART, overrides)
    assert experiment.run.steps == 6
    assert experiment.optimizer.betas == (0.8, 0.9)
    assert experiment.rewards.train[0]["label"] == "match"
    assert experiment.generator.height is None


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    experiment = read_experiment(changed(tmp_path, "run: {steps: 7}\nrewards: {train: [{name: brightness}]}"))
    original = read_experiment(QUICKSTART)
    assert experiment.run.steps == 7
    assert experiment.run.evaluate_every == original.run.evaluate_every
    assert [entry["name"] for entry in experiment.rewards.train] == ["brightness"]
    assert experiment.rewards.heldout == original.rewards.heldout


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("objektive: {}", ["objektive: unknown key", "'objective'"]),
        ("objective: {algorithm: neighbor_grpo, group_sise: 4}", ["objective.group_sise: unknown key", "'group_size'"]),
        ("objective: {algorithm: neighbour_grpo}", ["objective.algorithm = 'neighbour_grpo'", "'neighbor_grpo'"]),
        ("run: {steps: many}", ["run.steps = 'many'", "integer"]),
        ("run: {stepz: 3}", ["run.stepz: unknown key", "'steps'"]),
        ("objective: {group_size: -1}", ["objective.group_size = -1", "greater than or equal to 2"]),
        ("objective: {group_size: 1}", ["objective.group_size = 1", "greater than or equal to 2"]),
        ("objective: {group_size: 4, anchors: 5}", ["objective.anchors = 5", "1 to group_size, which is 4"]),
        ("objective: {perturbation: 1.5}", ["objective.perturbation = 1.5", "less than or equal to 1"]),
        ("objective: {train_steps: 99}", ["train_steps is 99"]),
        ("rewards: {train: [{name: glyph_mach}]}", ["rewards.train.0.name = 'glyph_mach'", "'glyph_match'"]),
        ("rewards: {train: [{name: clip_score}]}", ["rewards.train.0.weights: missing"]),
        ("rewards: {train: [{name: symmetry}, {name: symmetry}]}", ["rewards.train", "'symmetry'", "label"]),
        ("rewards: {train: []}", ["rewards.train", "at least one"]),
        ("rewards: {train: [{name: 'python:os.system'}]}", ["python:os.system", "--allow-code"]),
        ("rollouts: {solver: dpmpp_3000}", ["rollouts.solver = 'dpmpp_3000'", "dpmpp_2m"]),
        ("generator: {family: sd4}", ["generator.family = 'sd4'", "sd3"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr", "finite"]),
        ("optimizer: {schedule: cosin}", ["optimizer.schedule = 'cosin'", "cosine"]),
        ("[1, 2, 3]", ["not YAML"]),
    ],
)
def test_an_error_is_one_line_with_the_key_the_value_and_what_is_allowed(tmp_path, body, words):
    with pytest.raises(InputError) as caught:
        read_experiment(changed(tmp_path, body))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_spread_weights_need_a_spread():
    with pytest.raises(InputError, match=r"objective\.spread_weights = True: normalize_then_sum leaves no spread"):
        read_experiment(QUICKSTART, ["rewards.multi_objective_aggregation=normalize_then_sum"])


def test_a_missing_key_is_named():
    raw = yaml.safe_load(QUICKSTART.read_text())
    del raw["prompts"]
    with pytest.raises(InputError, match="prompts: missing"):
        validated(raw, Experiment)


@pytest.mark.parametrize("override", ["run.steps", "rewards.train.9.weight=1", "name.x=1"])
def test_an_override_that_cannot_be_applied_is_named(override):
    with pytest.raises(InputError, match=override.split("=")[0]):
        read_experiment(QUICKSTART, [override])


def test_circular_extends_and_a_missing_file(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(InputError, match="circular"):
        read_experiment(tmp_path / "a.yaml")
    with pytest.raises(InputError, match=r"nothing\.yaml"):
        read_experiment(tmp_path / "nothing.yaml")


def test_the_schema_has_the_algorithms_knobs():
    text = str(Experiment.model_json_schema())
    assert "perturbation" in text
    assert "neighbor_grpo" in text


def test_a_heldout_reward_cannot_reuse_a_trained_label(tmp_path):
    body = "rewards: {train: [{name: brightness, label: q}], heldout: [{name: symmetry, label: q}]}"
    with pytest.raises(InputError, match=r"another reward under the trained label 'q'"):
        read_experiment(changed(tmp_path, body))
    same = "rewards: {train: [{name: brightness, weight: 2}], heldout: [{name: brightness}]}"
    assert read_experiment(changed(tmp_path, same)).rewards.heldout[0]["label"] == "brightness"


@pytest.mark.parametrize("override", ["run.device=cudaa", "optimizer.betas=[1.5, 2]", "name=.."])
def test_values_out_of_range_are_named(override):
    with pytest.raises(InputError, match=override.split("=")[0]):
        read_experiment(QUICKSTART, [override])

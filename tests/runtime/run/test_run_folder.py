import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runtime.experiment.config import InputError
from runtime.experiment.yaml import read_experiment
from runtime.run.folder import RunFolder

QUICKSTART = Path(__file__).parents[3] / "experiments" / "quickstart.yaml"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def test_a_folder_belongs_to_one_process_at_a_time(folder):
    code = (
        "import sys; from pathlib import Path; from runtime.run.folder import RunFolder\n"
        "try:\n    with RunFolder(Path(sys.argv[1])).locked(): print('got it')\n"
        "except ValueError as error: print(error)"
    )
    with folder.locked():
        inside = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True).stdout
    after = subprocess.run([sys.executable, "-c", code, str(folder.path)], capture_output=True, text=True).stdout
    assert "another process" in inside
    assert after == "got it\n"


def test_an_existing_folder_accepts_the_same_experiment_with_more_steps_and_other_trackers(folder):
    folder.claim(read_experiment(QUICKSTART, ["run.steps=5"]))
    folder.claim(read_experiment(QUICKSTART, ["run.steps=5"]))
    longer = read_experiment(QUICKSTART, ["run.steps=9", "run.trackers=[]"])
    folder.claim(longer)
    folder.claim(read_experiment(QUICKSTART, ["run.steps=5"]))  # the longer run was refused for another reason
    folder.keep(longer)
    with pytest.raises(InputError, match=r"run\.steps = 5.*grow"):
        folder.claim(read_experiment(QUICKSTART, ["run.steps=5"]))


def test_a_folder_older_than_a_key_continues_with_its_default_only(folder):
    folder.claim(read_experiment(QUICKSTART))
    file = folder.path / "experiment.yaml"
    raw = yaml.safe_load(file.read_text())
    del raw["rollouts"]["spacing"]
    file.write_text(yaml.safe_dump(raw))
    folder.claim(read_experiment(QUICKSTART))
    with pytest.raises(InputError, match=r"rollouts\.spacing \(was 'scheduler', is 'even'\)"):
        folder.claim(read_experiment(QUICKSTART, ["rollouts.spacing=even"]))
    file.write_text(yaml.safe_dump({**raw, "forgotten": 1}))
    with pytest.raises(InputError, match=r"forgotten \(was 1, is None\)"):
        folder.claim(read_experiment(QUICKSTART))


def test_another_experiment_is_refused_with_the_keys_that_differ(folder):
    folder.claim(read_experiment(QUICKSTART))
    before = (folder.path / "experiment.yaml").read_bytes()
    with pytest.raises(InputError, match=r"objective\.perturbation.*0\.77.*rewards\.train\.0\.weight"):
        folder.claim(read_experiment(QUICKSTART, ["objective.perturbation=0.77", "rewards.train.0.weight=3"]))
    assert (folder.path / "experiment.yaml").read_bytes() == before


def test_a_folder_with_foreign_metrics_is_not_changed(folder):
    folder.metrics_file.write_text("theirs")
    with pytest.raises(InputError, match=r"metrics\.jsonl but no experiment\.yaml"):
        folder.claim(read_experiment(QUICKSTART))
    assert folder.metrics_file.read_text() == "theirs"


def test_a_new_folder_without_a_run_is_removed_and_an_old_one_stays(tmp_path):
    new, old = RunFolder(tmp_path / "new"), RunFolder(tmp_path / "old")
    old.path.mkdir()

    def fail(folder):
        with folder.locked():
            folder.claim(read_experiment(QUICKSTART))
            raise InputError("wrong")

    for folder in (new, old):
        with pytest.raises(InputError, match="wrong"):
            fail(folder)
    assert not new.path.exists()
    assert old.path.exists()
    nested = RunFolder(tmp_path / "some" / "where" / "new")
    with pytest.raises(InputError, match="wrong"):
        fail(nested)
    assert not (tmp_path / "some").exists()

    def fail_beside_notes():
        with nested.locked():
            (nested.path / "notes.txt").write_text("mine")
            raise InputError("wrong")

    with pytest.raises(InputError, match="wrong"):
        fail_beside_notes()
    assert [path.name for path in nested.path.iterdir()] == ["notes.txt"]


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_text("theirs")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="cannot be used as a run's folder"), RunFolder(path).locked():
            pass


def test_incomplete_checkpoints_are_removed(folder):
    (folder.path / "checkpoints" / "partial_000001").mkdir(parents=True)
    for step in (2, 3, 4, 5):
        with folder.new_checkpoint(step) as path:
            (path / "file").write_text("x")
    folder.prune_checkpoints(keep=2, best=3)
    assert sorted(path.name for path in (folder.path / "checkpoints").iterdir()) == [
        "step_000003",
        "step_000004",
        "step_000005",
    ]


def test_metrics_are_complete_lines_and_can_be_rewound(folder):
    for step in (1, 2, 3):
        folder.append_metrics({"step": step, "loss": 0.5})
    with folder.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')  # interrupted in the middle of a line
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]
    folder.rewind_metrics(2)
    assert folder.metrics_file.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_never_reach_the_file(folder, value):
    with pytest.raises(ValueError, match="step 7: reward/total"):
        folder.append_metrics({"step": 7, "reward/total": value})
    assert folder.metrics() == []


def test_a_checkpoint_is_complete_or_absent(folder):
    def cut():
        with folder.new_checkpoint(10) as path:
            (path / "policy.safetensors").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        cut()
    assert folder.checkpoints() == {}
    with folder.new_checkpoint(10) as path:
        assert list(path.iterdir()) == []
        (path / "state.json").write_text(json.dumps({"step": 10}))
    assert [p.name for p in folder.checkpoints()[10].iterdir()] == ["state.json"]


def test_pruning_keeps_the_newest_and_the_best(folder):
    for step in (1, 2, 3, 4, 5):
        with folder.new_checkpoint(step) as path:
            (path / "state.json").write_text("{}")
    folder.prune_checkpoints(keep=2, best=2)
    assert list(folder.checkpoints()) == [2, 4, 5]

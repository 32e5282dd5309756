"""The interfaces that further methods need, each on a probe: it runs inline and under Ray with the same bits, and resumes."""

import inspect
from pathlib import Path

import pytest
import torch

from runtime.experiment.checks import check_inputs
from runtime.experiment.config import AdamWSection, InputError, OptimizerSection
from runtime.experiment.yaml import read_experiment
from tests.runtime.run.probes import PROBES, STEPS, ProbesConfig
from tests.runtime.run.test_run import QUICKSTART, SMALL, go

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of an objective outside the schema
LEFT_OUT = ("time/", "seconds", "memory/")


def experiment(**optimizer):
    """The quickstart with the probes for its objective, which are not in the schema."""
    last = STEPS * len(PROBES)
    steps = [f"run.steps={last}", f"run.evaluate_every={last}", "run.checkpoint_every=1", "run.keep=1", "run.trackers=[]"]
    sizes = ["rollouts.groups_per_step=4", "prompts.heldout_number=2", "rollouts.workers=2"]
    read = read_experiment(QUICKSTART, [*SMALL, *steps, *sizes])
    section = OptimizerSection(**{"lr": 0.01, "players": {"critic": AdamWSection(lr=0.05)}} | optimizer)
    return read.model_copy(update={"objective": ProbesConfig(), "optimizer": section})


def lines(folder):
    return [{key: value for key, value in line.items() if not key.startswith(LEFT_OUT)} for line in folder.metrics()]


def of_probe(name, folder):
    """The lines of its steps."""
    start = STEPS * list(PROBES).index(name)
    return lines(folder)[start : start + STEPS]


def files(folder):
    """{name: bytes} of the last checkpoint's adapters and networks."""
    checkpoint = list(folder.checkpoints().values())[-1]
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    return go(experiment(), tmp_path_factory.mktemp("probes") / "whole")[0]


class Cut(Exception):
    pass


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The same run, interrupted inside every probe before the step's checkpoint, and continued from the one before."""
    path = tmp_path_factory.mktemp("probes") / "cut"
    for number in range(len(PROBES)):

        def cut(line, step=STEPS * number + 2):
            if line["step"] == step:
                raise Cut

        with pytest.raises(Cut):
            go(experiment(), path, show=cut)
    return go(experiment(), path)[0]


@pytest.fixture(scope="module")
def ray(tmp_path_factory, cluster):
    from runtime.executors.ray.executor import RayExecutor

    probes = experiment()
    return go(probes, tmp_path_factory.mktemp("probes") / "ray", RayExecutor(probes, cluster))[0]


@pytest.mark.parametrize("name", PROBES)
def test_it_learns_resumes_and_runs_under_ray_with_the_same_bits(name, whole, resumed, ray):
    steps = of_probe(name, whole)
    assert [line["grad_norm"] > 0 for line in steps] == [True, name != "two_players", True], "the critic has step 2 alone"
    assert of_probe(name, resumed) == steps
    assert of_probe(name, ray) == steps


def test_adapters_and_networks_end_the_same(whole, resumed, ray):
    assert set(files(whole)) == {"policy.safetensors", "old.safetensors", "critic.safetensors"}
    assert files(whole)["policy.safetensors"] != files(whole)["old.safetensors"]
    assert files(resumed) == files(ray) == files(whole)


def test_a_second_player_has_metrics_of_its_own(whole):
    first, second, _ = of_probe("two_players", whole)
    assert {"critic/loss", "critic/grad_norm", "critic/margin"} <= first.keys()
    assert second["grad_norm"] == 0
    assert second["critic/grad_norm"] > 0
    assert not any("critic/loss" in line for line in of_probe("teacher", whole)), "unknown values are absent"


def test_network_evaluations_follow_the_plan(whole):
    teacher = of_probe("teacher", whole)
    # 4 groups of 1, 3 solver steps and the probe's own check; no image is scored
    assert teacher[1]["nfe/rollout"] - teacher[0]["nfe/rollout"] == 4 * 3 + 4
    assert "reward/total" not in teacher[0]
    changing = of_probe("changing_plan", whole)
    assert changing[1]["nfe/rollout"] == changing[0]["nfe/rollout"], "noise is drawn without the network"
    assert changing[2]["nfe/rollout"] - changing[1]["nfe/rollout"] == 4 * 3 * 3


def test_settings_of_a_player_that_does_not_exist_are_refused():
    with pytest.raises(InputError, match=r"^optimizer\.players\.critc: .*did you mean 'critic'"):
        check_inputs(experiment(players={"critc": AdamWSection()}), "inline")


def test_from_launch_to_the_loss_it_is_at_most_six_calls(tmp_path, monkeypatch):
    from runtime.cli import launch

    depths = []

    def loss(self, player, items, tools):
        root = str(Path(__file__).parents[3])
        rooms = tuple(f"{root}/{room}/" for room in ("align", "diffusion", "generators", "rollouts", "runtime"))
        ours = [frame.function for frame in inspect.stack()[1:] if frame.filename.startswith(rooms)]
        depths.append(ours[: ours.index("launch") + 1])
        return original(self, player, items, tools)

    from align.refl import ReFL

    original = ReFL.loss
    monkeypatch.setattr(ReFL, "loss", loss)
    changes = ["objective={algorithm: refl}", "rewards={train: [{name: symmetry}], heldout: [{name: contrast}]}", "run.steps=1"]
    launch(QUICKSTART, [*SMALL, *changes, "run.trackers=[]"], tmp_path / "run", executor="inline", ray="local")
    assert depths[0] == ["update", "update", "update", "run", "launch_experiment", "launch"]


def test_networks_start_equal_in_every_process():
    from runtime.experiment.config import new_objective

    torch.manual_seed(1)
    first = new_objective(experiment()).networks["critic"].state_dict()
    torch.manual_seed(2)
    second = new_objective(experiment()).networks["critic"].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)

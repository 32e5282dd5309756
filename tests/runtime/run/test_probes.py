"""The interfaces that further methods need, each on a probe: it runs inline and under Ray with the same bits, and resumes."""

import inspect
from pathlib import Path

import pytest
import torch

from runtime.experiment.checks import check_inputs
from runtime.experiment.config import AdamWSection, InputError, OptimizerSection
from runtime.experiment.yaml import read_experiment
from tests.runtime.run.probes import PROBES
from tests.runtime.run.test_run import QUICKSTART, SMALL, go

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of an objective outside the schema
LEFT_OUT = ("time/", "seconds", "memory/")


def experiment(name, **optimizer):
    """The quickstart with a probe for its objective: probes are not in the schema."""
    changes = [
        "run.steps=3",
        "run.evaluate_every=3",
        "rollouts.groups_per_step=4",
        "prompts.heldout_number=2",
        "rollouts.workers=2",
    ]
    read = read_experiment(QUICKSTART, [*SMALL, *changes])
    section = OptimizerSection(lr=0.01, players={"critic": AdamWSection(lr=0.05)} if "players" in name else {}, **optimizer)
    return read.model_copy(update={"objective": PROBES[name].Config(), "optimizer": section})


def lines(folder):
    return [{key: value for key, value in line.items() if not key.startswith(LEFT_OUT)} for line in folder.metrics()]


def files(folder):
    """{name: bytes} of the last checkpoint's adapters and networks."""
    checkpoint = list(folder.checkpoints().values())[-1]
    return {path.name: path.read_bytes() for path in checkpoint.glob("*.safetensors")}


@pytest.fixture(scope="module", params=PROBES)
def whole(request, tmp_path_factory):
    folder, _ = go(experiment(request.param), tmp_path_factory.mktemp(request.param) / "whole")
    return request.param, folder


class Cut(Exception):
    pass


def test_it_learns_and_resumes_bit_for_bit(whole, tmp_path):
    name, folder = whole
    assert all(line["grad_norm"] > 0 for line in folder.metrics() if not (name == "probe_two_players" and line["step"] == 2))
    assert folder.metrics()[-1]["adapter_norm"] > 0

    def cut(line):
        if line["step"] == 2:
            raise Cut

    with pytest.raises(Cut):
        go(experiment(name), tmp_path / "cut", show=cut)
    resumed, _ = go(experiment(name), tmp_path / "cut")
    assert lines(resumed) == lines(folder)
    assert files(resumed) == files(folder)


def test_ray_gives_the_same_bits(whole, tmp_path, cluster):
    from runtime.executors.ray.executor import RayExecutor

    name, folder = whole
    probe = experiment(name)
    ray, _ = go(probe, tmp_path / "ray", RayExecutor(probe, cluster))
    assert lines(ray) == lines(folder)
    assert files(ray) == files(folder)


def test_a_second_player_has_metrics_settings_and_a_file_of_its_own(whole):
    name, folder = whole
    if name != "probe_two_players":
        pytest.skip("another probe")
    first, second, _ = folder.metrics()
    assert {"critic/loss", "critic/grad_norm", "critic/margin"} <= first.keys()
    assert second["grad_norm"] == 0, "the policy had no turn"
    assert second["critic/grad_norm"] > 0
    assert set(files(folder)) == {"policy.safetensors", "critic.safetensors"}


def test_a_follower_is_published_and_checkpointed(whole):
    name, folder = whole
    if name != "probe_follower":
        pytest.skip("another probe")
    found = files(folder)
    assert set(found) == {"policy.safetensors", "old.safetensors"}
    assert found["policy.safetensors"] != found["old.safetensors"]


def test_settings_of_a_player_that_does_not_exist_are_refused():
    section = OptimizerSection(players={"critc": AdamWSection()})
    wrong = experiment("probe_two_players").model_copy(update={"optimizer": section})
    with pytest.raises(InputError, match=r"optimizer\.players\.critc: .*did you mean 'critic'"):
        check_inputs(wrong, "inline")


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


def test_networks_start_alike_in_every_process():
    from runtime.experiment.algorithms import new_objective

    torch.manual_seed(1)
    first = new_objective(experiment("probe_two_players")).networks["critic"].state_dict()
    torch.manual_seed(2)
    second = new_objective(experiment("probe_two_players")).networks["critic"].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)

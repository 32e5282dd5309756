"""Consistency, PCM, reflow and DMD2 on a small network; the distances and the reward term they share."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion import SOLVERS, Condition, Prompt, RectifiedFlow, Rollout, RunSettings, Scores, Trajectory, integrate
from diffusion.objective import by_time
from distill import ALGORITHMS
from distill.consistency import Consistency, ConsistencyConfig
from distill.distillation import DistanceConfig, draw_positions, feature_distance, pseudo_huber, row_distance
from distill.dmd2 import DMD2, DMD2Config, matching_gradient, sample_of
from distill.pcm import PCM, PCMConfig, phase_ends
from distill.reflow import Reflow, ReflowConfig
from tests.tools import tools

F64 = torch.float64
PATH = RectifiedFlow()
STEPS = 8
GRID = torch.linspace(1, 0, STEPS + 1, dtype=F64)


class Network(nn.Module):
    """Each adapter has its own two numbers; the teacher's velocity is constant along straight lines only if b = 0."""

    def __init__(self):
        super().__init__()
        values = {"policy": [0.3, -0.2], "target": [0.1, 0.4], "fake": [-0.1, 0.3]}
        self.adapters = nn.ParameterDict({name: nn.Parameter(torch.tensor(value, dtype=F64)) for name, value in values.items()})
        self.calls = []

    def forward(self, x, t, condition, adapter):
        self.calls.append((adapter, len(x), torch.is_grad_enabled()))
        a, b = torch.tensor([0.2, 0.2], dtype=F64) if adapter is None else self.adapters[adapter]
        return a * x + b * torch.tanh(x) + t.reshape(-1, *[1] * (x.ndim - 1)) / 2


def rollout(number=6, predict=None):
    x = torch.randn(number, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    network = Network()
    predict = predict or (lambda x, t: network(x, t, None, None))
    solve = integrate(predict, x, GRID, PATH, SOLVERS["euler"], record=range(STEPS + 1))
    condition = Condition({"c": torch.zeros(number, 1, dtype=F64)})
    prompts = [Prompt(str(i), str(i)) for i in range(number)]
    return Rollout(prompts, condition, torch.arange(number), torch.arange(number), Trajectory(solve.x.detach(), GRID))


def loss_of(method, given, network, player="policy", **knobs):
    with_network = tools(network, grid=GRID, **knobs)
    items = method.items(given, None, with_network)
    return method.loss(player, items, with_network), items


@pytest.mark.parametrize("gap", [1, 3, 8])
def test_consistency_is_the_distance_to_the_ema_a_gap_later(gap):
    given, network = rollout(), Network()
    loss, items = loss_of(Consistency(ConsistencyConfig(gap=gap)), given, network)
    x, t = given.trajectory.x, given.trajectory.t
    expected = []
    for row, start in enumerate(items.start.tolist()):
        later = min(start + gap, STEPS)
        own = x[row, start] - t[start] * network(x[row : row + 1, start], t[start : start + 1], None, "policy")[0]
        target = x[row, later]
        if later < STEPS:
            target = target - t[later] * network(target[None], t[later : later + 1], None, "target")[0]
        expected.append((own - target).square().mean())
    torch.testing.assert_close(loss.value, torch.stack(expected).mean().float(), rtol=1e-6, atol=0)
    loss.value.backward()
    assert network.adapters["target"].grad is None
    assert network.adapters["policy"].grad.abs().min() > 0


def test_phases_are_split_by_index():
    assert phase_ends(torch.arange(8), 8, 1).tolist() == [8] * 8
    assert phase_ends(torch.arange(8), 8, 2).tolist() == [4] * 4 + [8] * 4
    assert phase_ends(torch.arange(10), 10, 4).tolist() == [2, 2, 5, 5, 5, 7, 7, 10, 10, 10], "floor(10 m / 4)"
    edges = torch.tensor([100 * m // 4 for m in range(4)])
    shifted = 3 * (1 - edges / 100) / (1 + 2 * (1 - edges / 100))
    assert shifted.tolist() == pytest.approx([1, 0.9, 0.75, 0.5]), "the edges of the SD3 code, with shift 3"


def test_pcm_steps_to_the_end_of_the_phase():
    given, network = rollout(number=40), Network()
    loss, items = loss_of(PCM(PCMConfig(phases=2, gap=3)), given, network)
    x, t, expected = given.trajectory.x, given.trajectory.t, []
    for row, start in enumerate(items.start.tolist()):
        end = 4 if start < 4 else 8
        later = min(start + 3, end)

        def to_end(index, adapter="policy", row=row, end=end):
            prediction = network(x[row : row + 1, index], t[index : index + 1], None, adapter)[0]
            return x[row, index] + (t[end] - t[index]) * prediction

        target = x[row, end] if later == end else to_end(later)
        expected.append(pseudo_huber(to_end(start) - target, 0.001).mean())
    torch.testing.assert_close(loss.value, torch.stack(expected).mean().float(), rtol=1e-5, atol=0)
    assert {call for call in network.calls if call[0] == "policy" and not call[2]}, "the target has no gradient"


def test_pcm_of_the_teacher_itself_is_zero_where_its_phase_is_one_step():
    given, network = rollout(), Network()
    network.adapters["policy"].data = torch.tensor([0.2, 0.2], dtype=F64)
    loss, _ = loss_of(PCM(PCMConfig(phases=STEPS)), given, network)
    assert loss.value < 1e-6, "M = S: each step is the teacher's own"
    other, _ = loss_of(PCM(PCMConfig(phases=1)), given, network)
    assert other.value > 1e-3


def test_reflow_is_zero_on_straight_trajectories_of_the_policy_alone():
    """A velocity that is constant along each trajectory; straightness falls with reflow because this is what it learns."""
    number = 6
    x = torch.randn(number, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    constant = torch.full((number, 3), 0.7, dtype=F64)
    given = rollout(predict=lambda x, t: constant)
    method = Reflow(ReflowConfig())
    loss, items = loss_of(method, given, lambda x, t, condition, adapter: constant[: len(x)])
    assert loss.value < 1e-25
    torch.testing.assert_close(items.noise, x)
    torch.testing.assert_close(items.clean, x - 0.7)
    loss, _ = loss_of(method, given, lambda x, t, condition, adapter: constant[: len(x)] + 0.5)
    assert loss.value.item() == pytest.approx(0.25)


def test_reflow_straightens_trajectories():
    """Two means: the teacher's trajectories are curved; after reflow the student's velocity is closer to x_1 - x_0."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)).double()

        def forward(self, x, t, condition=None, adapter=None):
            return self.net(torch.cat([x, t.double().reshape(-1, 1).expand(len(x), 1)], dim=1))

    def teacher(x, t):
        """Data at -2 and 2 with equal weight: E[x_0 | x_t] = 2 tanh(2 alpha x / sigma^2), sigma limited below."""
        alpha, sigma = 1 - t, t.clamp(min=0.05)
        return (x - 2 * torch.tanh(2 * alpha * x / sigma**2)) / sigma

    def straightness(predict, x):
        solve = integrate(predict, x, torch.linspace(1, 0, 41, dtype=F64), PATH, SOLVERS["euler"], record=range(41))
        total = solve.x[:, 0] - solve.x[:, -1]
        velocities = torch.stack([predict(solve.x[:, i], solve.t[i]) for i in range(40)], dim=1)
        return (velocities - total[:, None]).square().mean().item()

    torch.manual_seed(0)
    x = torch.randn(512, 1, dtype=F64)
    solve = integrate(teacher, x, torch.linspace(1, 0, 41, dtype=F64), PATH, SOLVERS["euler"], record=range(41))
    prompts = [Prompt(str(i), "") for i in range(512)]
    given = Rollout(
        prompts, Condition({"c": torch.zeros(512, 1)}), torch.arange(512), torch.arange(512), Trajectory(solve.x, solve.t)
    )
    student = Net()
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    method = Reflow(ReflowConfig())
    for step in range(300):
        with_network = tools(student, grid=GRID, seed=step)
        loss = method.loss("policy", method.items(given, None, with_network), with_network)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    with torch.no_grad():
        before, after = straightness(teacher, x), straightness(lambda x, t: student(x, t), x)
    assert after < before / 3
    ends = integrate(lambda x, t: student(x, t), x, torch.tensor([1.0, 0.5, 0.0]), PATH, SOLVERS["euler"]).x[:, -1].detach()
    assert (ends.abs() - 2).abs().mean() < 0.35, "two steps end near the data"


def test_matching_gradient():
    sample = torch.tensor([[1.0, 3.0]])
    real, fake = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 2.0]])
    assert matching_gradient(sample, real, fake).tolist() == [[0.5, 0.0]]
    assert matching_gradient(sample, real, real).abs().max() == 0, "equal scores: nothing to learn"


def test_dmd2_takes_turns_and_trains_one_player_at_a_time():
    given, network = rollout(), Network()
    method = DMD2(DMD2Config(fake_updates=3))
    given = replace(given, trajectory=Trajectory(given.trajectory.x[:, :1], GRID[:1]))
    with_network = tools(network, grid=torch.linspace(1, 0, 5, dtype=F64), solver=SOLVERS["consistency"])
    items = method.items(given, None, with_network)
    assert (items.t.min() >= 0.02, items.t.max() <= 0.98) == (True, True)
    turns = list(method.turns(1, items))
    assert [player for player, _ in turns] == ["fake"] * 3 + ["policy"]
    assert [rows.draw for _, rows in turns] == [0, 1, 2, 3]
    method.loss("fake", turns[0][1], with_network).value.backward()
    assert network.adapters["policy"].grad is None
    assert network.adapters["fake"].grad is not None
    network.adapters["fake"].grad = None
    loss = method.loss("policy", turns[3][1], with_network)
    loss.value.backward()
    assert network.adapters["fake"].grad is None
    found = network.adapters["policy"].grad

    sample = sample_of(items, with_network, with_gradient=True)
    t, noise = items.t[:, 3], items.diffused[:, 3]
    x = PATH.mix(sample.detach(), noise, t)
    real = x - t[:, None] * network(x, t, None, None)
    fake = x - t[:, None] * network(x, t, None, "fake").detach()
    gradient = (fake - real) / (sample - real).abs().mean(dim=1, keepdim=True)
    expected = torch.autograd.grad(sample, network.adapters["policy"], gradient.detach() / sample.numel())[0]
    torch.testing.assert_close(found, expected)


def test_dmd2_evaluates_the_student_with_gradient_once():
    given, network = rollout(), Network()
    method = DMD2(DMD2Config())
    with_network = tools(network, grid=torch.linspace(1, 0, 5, dtype=F64))
    items = replace(method.items(given, None, with_network), stop=3)
    sample_of(items, with_network, with_gradient=True)
    assert [grad for _, _, grad in network.calls] == [False, False, False, True]


def test_dmd2_moves_a_shifted_gaussian_onto_the_teachers():
    """1-D: the student x = n + b starts at b = 0, the teacher's data are N(2, 1); exact scores of both."""
    shift = nn.Parameter(torch.zeros((), dtype=F64))

    def velocity(x, t, mean):
        """Of data N(mean, 1): E[x_0 | x] = mean + alpha (x - alpha mean) / (alpha^2 + sigma^2)."""
        t = t.reshape(-1, 1) if t.ndim else t
        alpha = 1 - t
        clean = mean + alpha * (x - alpha * mean) / (alpha**2 + t**2)
        return (x - clean) / t

    def network(x, t, condition, adapter):
        if adapter == "policy":
            return -shift.expand_as(x)  # one step from noise: x - (-b) = n + b
        return velocity(x, t, 2.0 if adapter is None else shift.detach())

    given = rollout(number=64)
    noise = torch.randn(64, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    given = replace(given, trajectory=Trajectory(noise, GRID[:1]))
    method = DMD2(DMD2Config(fake_updates=1))
    optimizer = torch.optim.Adam([shift], 0.05)
    for step in range(200):
        with_network = tools(network, grid=torch.tensor([1.0, 0.0], dtype=F64), seed=step)
        items = replace(method.items(given, None, with_network), draw=1)
        optimizer.zero_grad()
        method.loss("policy", items, with_network).value.backward()
        optimizer.step()
    assert shift.item() == pytest.approx(2, abs=0.1)


def test_distances():
    a, b = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    assert row_distance(a, b, DistanceConfig(), None, None).tolist() == [5.0, 0.0]
    huber = row_distance(a, b, DistanceConfig(distance="pseudo_huber", huber=1.0), None, None)
    assert huber.tolist() == pytest.approx([(10**0.5 - 1 + 2**0.5 - 1) / 2, 0])
    east, north = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 0.2]).view(1, 2, 1, 1)
    assert feature_distance([east], [north]).tolist() == pytest.approx([2.0]), "unit vectors at a right angle"
    assert feature_distance([east, east], [north, 5 * east]).tolist() == pytest.approx([1.0]), "lengths do not count"
    with pytest.raises(ValueError, match="`features` names no network"):
        DistanceConfig(distance="features")


def test_means_over_bins_of_time():
    values = {"v": torch.tensor([1.0, 3.0, float("-inf"), 7.0])}
    means, known = by_time(values, torch.tensor([1.0, 0.9, 0.85, 0.2], dtype=F64), "x")
    assert means["x/v/0.8-1"].item() == 2
    assert {key: int(rows) for key, rows in known.items() if rows} == {"x/v/0.8-1": 2, "x/v/0-0.2": 1}


def test_positions_favour_the_noise():
    positions = draw_positions(20000, 2.0, torch.Generator().manual_seed(0))
    assert (positions < 0.25).double().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_reward_term_adds_its_own_gradient(name):
    """With weight w the gradient is that without, plus w times that of the reward on the student's clean prediction."""
    cleans = []

    def judge(latents, prompts):
        cleans.append(latents)
        return Scores(latents.sum(dim=1), {"sum": latents.sum(dim=1)})

    found = {}
    for weight in (0.0, 0.5, 1.0):
        network, method = Network(), ALGORITHMS[name](ALGORITHMS[name].Config(reward_weight=weight))
        if name == "ccm":
            method.state["threshold_and_range"].copy_(torch.tensor([80.0, 2.0]))
        assert method.config.needs_reward_gradient == (weight > 0)
        loss, _items = loss_of(method, rollout(), network, judge=judge)
        found[weight] = torch.autograd.grad(loss.value, network.adapters["policy"])[0]
        assert ("reward/total" in loss.metrics) == (weight > 0)
    torch.testing.assert_close(found[1.0] - found[0.0], 2 * (found[0.5] - found[0.0]), rtol=1e-5, atol=1e-8)
    assert (found[1.0] - found[0.0]).abs().max() > 1e-3
    assert len(cleans) == 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_that_do_not_fit(name):
    config = ALGORITHMS[name].Config()
    config.check(RunSettings(steps=4, teacher_steps=20))
    with pytest.raises(ValueError, match="needs a section `teacher`"):
        config.check(RunSettings(steps=4))
    with pytest.raises(ValueError, match="sum_then_normalize"):
        config.check(RunSettings(steps=4, teacher_steps=20, standardized_rewards=True))


def test_steps_of_the_teacher_limit_gap_and_phases():
    with pytest.raises(ValueError, match="gap is 9, allowed are 1 to 8"):
        ConsistencyConfig(gap=9).check(RunSettings(steps=1, teacher_steps=8))
    with pytest.raises(ValueError, match="phases is 9, allowed are 1 to 8"):
        PCMConfig(phases=9).check(RunSettings(steps=1, teacher_steps=8))

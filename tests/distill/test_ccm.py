"""CCM: closed-form step counts, the curriculum's rule, calibration, and the gradient."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from diffusion import Condition, Prompt, RectifiedFlow, Rollout, Trajectory
from distill.ccm import CCM, CCMConfig, curriculum, kdc, one_step_kdc
from distill.consistency import Consistency, ConsistencyConfig
from distill.distillation import LinePoints, TrajectoryPoints, trajectory_points
from tests.tools import tools

F64 = torch.float64
PATH = RectifiedFlow()
Q = 0.5
"""Standard deviation of the Gaussian data of algorithms.md 4.5 item 4."""
R = 2.0
STEP = 0.03


def g(tau):
    """The clean prediction of the exact network along a trajectory is g(tau) z; tau = 1 - t is the paper's time."""
    return tau * Q**2 / (tau**2 * Q**2 + (1 - tau) ** 2) ** 0.5


def exact_network(x, t, condition=None, adapter=None):
    """The velocity n - x_0 of data N(0, q^2): (x - E[x_0 | x]) / t."""
    alpha, sigma = 1 - t, t
    clean = alpha * Q**2 / (alpha**2 * Q**2 + sigma**2)
    rows = (-1, *[1] * (x.ndim - 1))
    return (x - clean.reshape(rows) * x) / t.reshape(rows)


def exact_states(tau, z):
    """The exact flow: sqrt(tau^2 q^2 + (1 - tau)^2) z."""
    return (tau**2 * Q**2 + (1 - tau) ** 2) ** 0.5 * z


@dataclass
class ExactAhead:
    start: torch.Tensor
    z: torch.Tensor

    def states(self, rows, first, number):
        tau = (self.start[rows, None] + STEP * torch.arange(first, first + number)).clamp(max=1)
        return exact_states(tau[..., None], self.z[rows, None]), 1 - tau


def line_points(starts, z):
    tau = torch.tensor(starts, dtype=F64)
    x = exact_states(tau[:, None], z)
    rows = len(starts)
    return LinePoints(x, 1 - tau, Condition({"c": torch.zeros(rows, 1)}), [Prompt("", "")] * rows, torch.ones(rows), x)


STARTS = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95]
Z = torch.ones(len(STARTS), 1, dtype=F64)


def clean(x, t, rows=None):
    """The exact clean prediction; x itself at t = 0."""
    found = x.clone()
    inside = t > 0
    found[inside] = PATH.clean(x[inside], t[inside], exact_network(x[inside], t[inside]))
    return found


def run(ahead, starts=STARTS, z=Z, threshold=65.0):
    tau = torch.tensor(starts, dtype=F64)
    estimate = g(tau)[:, None] * z
    return curriculum(estimate, ahead, clean, threshold, R)


def test_step_counts_of_the_exact_teacher():
    found = run(ExactAhead(torch.tensor(STARTS, dtype=F64), Z))
    assert [round(v, 1) for v in found.first.tolist()] == [51.7, 55.4, 59.3, 61.6, 57.8, 50.0, 41.3]
    assert found.jump.tolist() == [5, 3, 2, 2, 3, 4, 2]
    assert [t == 0 for t in found.t.tolist()] == [False] * 5 + [True, True]


def test_step_counts_of_the_euler_teacher():
    """The released code's teacher; the numbers are those of the public code."""
    points = line_points(STARTS, Z)
    steps = tools(exact_network, teacher_grid=torch.linspace(1, 0, 101, dtype=F64))
    ahead = points.ahead(steps)
    ahead._step = STEP
    found = run(ahead)
    assert [round(v, 1) for v in found.first.tolist()] == [51.7, 55.4, 59.2, 61.4, 57.0, 48.2, 36.3]
    assert found.jump.tolist() == [5, 3, 2, 2, 4, 4, 2]


def test_kdc():
    a = torch.zeros(1, 4)
    b = torch.full((1, 4), 0.1)
    assert kdc(a, b, 1.0).item() == pytest.approx(80.0)
    assert kdc(a, b, 2.0).item() == pytest.approx(80 - 20 * math.log10(2)), "twice the range: 6.02 dB less"
    assert kdc(a, a, 2.0).item() == -math.inf
    threshold = 65.0
    error = R**2 / 10 ** ((100 - threshold) / 10)
    assert error == pytest.approx(1.265e-3, rel=1e-3)
    assert kdc(torch.zeros(1, 1, dtype=F64), torch.full((1, 1), error**0.5, dtype=F64), R).item() == pytest.approx(65, abs=1e-4)


class Table:
    """A teacher whose states are a table; the target network's prediction is the state itself."""

    def __init__(self, x, t, start):
        rows = len(start)
        condition = Condition({"c": torch.zeros(rows, 1)})
        self.points = TrajectoryPoints(x, t, condition, [Prompt("", "")] * rows, torch.arange(rows), start)


def sequential(estimate, points, threshold):
    """The rule, one row and one step at a time."""
    jumps, targets = [], []
    for row in range(len(estimate)):
        index = int(points.start[row])
        while True:
            index += 1
            x = points.x[row, index]
            if kdc(estimate[row : row + 1], x[None], R) >= threshold or index == len(points.t) - 1:
                break
        jumps.append(index - int(points.start[row]))
        targets.append(x)
    return jumps, torch.stack(targets)


@pytest.mark.parametrize("threshold", [-1000.0, 20.0, 80.0, 95.0, 100.0, 103.0, 1000.0])
def test_blocks_return_what_the_sequential_rule_returns(threshold):
    """Random tables, in which KDC is not monotone in u; each row as if it were alone."""
    rng = torch.Generator().manual_seed(0)
    rows, steps = 40, 13
    x = torch.randn(rows, steps + 1, 3, generator=rng, dtype=F64)
    start = torch.randint(steps, (rows,), generator=rng)
    points = Table(x, torch.linspace(1, 0, steps + 1, dtype=F64), start).points
    estimate = torch.randn(rows, 3, generator=rng, dtype=F64)
    found = curriculum(estimate, points, lambda x, t, rows: x, threshold, R)
    jumps, targets = sequential(estimate, points, threshold)
    assert found.jump.tolist() == jumps
    torch.testing.assert_close(found.target, targets, rtol=0, atol=0)
    torch.testing.assert_close(found.t, points.t[start + found.jump], rtol=0, atol=0)
    assert ((found.kdc >= threshold) | (found.t == 0)).all()
    torch.testing.assert_close(found.kdc, kdc(estimate, targets, R), rtol=0, atol=0)
    one = [
        curriculum(estimate[i : i + 1], points[i : i + 1], lambda x, t, rows: x, threshold, R).jump.item() for i in range(rows)
    ]
    assert one == jumps


def test_limits_of_the_threshold():
    ahead = ExactAhead(torch.tensor(STARTS, dtype=F64), Z)
    low = run(ahead, threshold=30.0)
    assert low.jump.tolist() == [1] * len(STARTS), "ordinary consistency distillation"
    high = run(ahead, threshold=1000.0)
    assert (high.t == 0).all(), "regression on the end of the trajectory"
    torch.testing.assert_close(high.target, Q * Z)
    jumps = torch.stack([run(ahead, threshold=value).jump for value in range(40, 75)])
    assert (jumps.diff(dim=0) >= 0).all(), "u does not decrease when the threshold increases"


def test_a_straight_trajectory_runs_to_its_end_with_loss_zero():
    x_0, n = torch.randn(2, 1, 4, dtype=F64), torch.randn(2, 1, 4, dtype=F64)
    t = torch.linspace(1, 0, 9, dtype=F64)
    x = (1 - t[None, :, None]) * x_0 + t[None, :, None] * n
    points = Table(x, t, torch.tensor([0, 3])).points
    estimate = x_0[:, 0]
    found = curriculum(estimate, points, lambda x, t, rows: estimate[rows], 65.0, R)
    assert (found.kdc == -math.inf).all()
    assert found.jump.tolist() == [8, 5]
    assert (found.target - estimate).abs().max() == 0


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy = nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))
        self.target = nn.Parameter(torch.tensor([0.1, 0.4], dtype=F64))
        self.calls = []

    def forward(self, x, t, condition, adapter):
        self.calls.append((adapter, len(x), torch.is_grad_enabled()))
        a, b = {"policy": self.policy, "target": self.target, None: torch.tensor([0.2, 0.2], dtype=F64)}[adapter]
        return a * x + b * torch.tanh(x) + t.reshape(-1, 1) / 2


def rollout(number=6, steps=8):
    rng = torch.Generator().manual_seed(1)
    network, grid = Network(), torch.linspace(1, 0, steps + 1, dtype=F64)
    x = [torch.randn(number, 3, generator=rng, dtype=F64)]
    for i in range(steps):
        x.append(PATH.step(x[-1], grid[i], grid[i + 1], network(x[-1], grid[i : i + 1], None, None)))
    condition = Condition({"c": torch.zeros(number, 1, dtype=F64)})
    prompts = [Prompt(str(i), str(i)) for i in range(number)]
    return Rollout(prompts, condition, torch.arange(number), torch.arange(number), Trajectory(torch.stack(x, 1).detach(), grid))


def test_the_gradient_is_that_of_consistency_distillation_when_every_jump_is_one_step():
    """And neither the target nor anything but the student's own evaluation gets a gradient."""
    given = rollout()
    gradients = []
    for method in (CCM(CCMConfig(threshold=-1000.0, data_range=R)), Consistency(ConsistencyConfig(gap=1))):
        network = Network()
        with_network = tools(network, grid=given.trajectory.t)
        items = method.items(given, None, with_network)
        loss = method.loss("policy", items, with_network)
        loss.value.backward()
        assert network.target.grad is None
        assert [adapter for adapter, _, grad in network.calls if grad] == ["policy"]
        gradients.append(network.policy.grad)
    torch.testing.assert_close(*gradients, rtol=1e-14, atol=0)
    assert gradients[0].abs().min() > 1e-3


def test_no_teacher_evaluation_on_stored_trajectories():
    given, network = rollout(), Network()
    method = CCM(CCMConfig(threshold=80.0, data_range=R))
    with_network = tools(network, grid=given.trajectory.t)
    method.loss("policy", method.items(given, None, with_network), with_network)
    assert {adapter for adapter, _, _ in network.calls} == {"policy", "target"}
    network.calls.clear()
    line = CCM(CCMConfig(threshold=80.0, data_range=R, points="line"))
    line.loss("policy", line.items(given, None, with_network), with_network)
    assert None in {adapter for adapter, _, _ in network.calls}


def test_calibration_measures_the_teacher_once_and_is_part_of_a_checkpoint():
    given, network = rollout(), Network()
    method = CCM(CCMConfig(margin=2.0))
    with_network = tools(network, grid=given.trajectory.t)
    method.items(given, None, with_network)
    threshold, data_range = method.state["threshold_and_range"].tolist()
    assert data_range == pytest.approx(4 * given.trajectory.x[:, -1].std().item())
    x, t = given.trajectory.x, given.trajectory.t
    cleans = [PATH.clean(x[:, i], t[i], network(x[:, i], t[i : i + 1], None, None)) for i in range(8)]
    expected = [kdc(a, b, data_range).mean().item() for a, b in itertools.pairwise(cleans)]
    assert threshold == pytest.approx(max(expected) + 2)
    torch.testing.assert_close(one_step_kdc(x, t, given.condition, with_network, data_range), torch.tensor(expected))
    calls = len(network.calls)
    method.items(rollout(number=3), None, with_network)
    assert len(network.calls) == calls
    again = CCM(CCMConfig(margin=2.0))
    again.state["threshold_and_range"].copy_(method.state["threshold_and_range"])
    again.items(given, None, with_network)
    assert len(network.calls) == calls, "a resumed run does not measure again"


def test_metrics_over_time():
    given, network = rollout(number=50), Network()
    method = CCM(CCMConfig(threshold=80.0, data_range=R, time_power=1.0))
    with_network = tools(network, grid=given.trajectory.t)
    items = method.items(given, None, with_network)
    loss = method.loss("policy", items, with_network)
    bins = [f"{i / 5:g}-{(i + 1) / 5:g}" for i in range(5)]
    assert sum(int(loss.known[f"curriculum/steps/{name}"]) for name in bins) == 50
    mean = sum(loss.known[f"curriculum/steps/{name}"] * loss.metrics[f"curriculum/steps/{name}"] for name in bins) / 50
    assert mean.item() == pytest.approx(loss.metrics["ccm/teacher_steps"].item(), rel=1e-6)


def test_points_on_the_line_and_their_teacher():
    given, network = rollout(number=200), Network()
    with_network = tools(network, grid=given.trajectory.t)
    method = CCM(CCMConfig(threshold=80.0, data_range=R, points="line"))
    items = method.items(given, None, with_network)
    assert isinstance(items, LinePoints)
    assert items.t.max() <= 1
    assert items.t.min() >= 1 / 8 - 1e-12, "the last teacher step is no starting point"
    noise = (items.x - (1 - items.t)[:, None] * given.trajectory.x[:, -1]) / items.t[:, None]
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    ahead = items.ahead(with_network)
    x, t = ahead.states(torch.arange(200), 1, 12)
    assert (t[:, -1] == 0).all()
    first = PATH.step(items.x, items.t, items.t - 1 / 8, network(items.x, items.t, None, None))
    torch.testing.assert_close(x[:, 0], first)
    short = items.t < 2 / 8
    torch.testing.assert_close(x[short, 1], x[short, -1], msg="after the end the last state is repeated")


def test_trajectory_points_repeat_the_end():
    points = trajectory_points(rollout(), torch.tensor([0, 1, 2, 5, 6, 7]))
    x, t = points.states(torch.tensor([5, 0]), 1, 3)
    assert t.tolist() == [[0, 0, 0], [0.875, 0.75, 0.625]]
    torch.testing.assert_close(x[0], points.x[5, [8, 8, 8]])
    torch.testing.assert_close(x[1], points.x[0, [1, 2, 3]])


class Codec:
    def decode(self, latents):
        return latents.sigmoid()


def adversarial(**knobs):
    method = CCM(CCMConfig(threshold=80.0, data_range=R, features="any", adversarial_weight=1.0, **knobs))
    torch.manual_seed(0)
    method.build_networks([3])
    return method


def with_features(network, given, step=1):
    return tools(network, grid=given.trajectory.t, codec=Codec(), features=lambda x: [x.float()[..., None, None]], step=step)


def test_the_discriminator_learns_before_the_student_and_without_it():
    given, network, method = rollout(), Network(), adversarial(adversarial_start=3)
    assert [player for player, _ in method.turns(2, None)] == ["policy"]
    assert [player for player, _ in method.turns(3, None)] == ["discriminator", "policy"]
    given_tools = with_features(network, given, step=3)
    items = method.items(given, None, given_tools)
    method.loss("discriminator", items, given_tools).value.backward()
    assert network.policy.grad is None
    assert all(parameter.grad is not None for parameter in method.networks["discriminator"].parameters())
    loss = method.loss("policy", items, given_tools)
    plain = CCM(CCMConfig(threshold=80.0, data_range=R)).loss("policy", items, given_tools)
    assert 0.01 <= loss.metrics["ccm/adversarial_weight"] <= 10
    expected = plain.value + loss.metrics["ccm/adversarial_weight"] * loss.metrics["ccm/adversarial"]
    torch.testing.assert_close(loss.value.float(), expected.float())
    early = method.loss("policy", items, with_features(network, given, step=2))
    torch.testing.assert_close(early.value, plain.value)


def test_a_discriminator_needs_features():
    with pytest.raises(ValueError, match="adversarial_weight needs a network"):
        CCMConfig(adversarial_weight=1.0)
    assert not CCM(CCMConfig()).networks

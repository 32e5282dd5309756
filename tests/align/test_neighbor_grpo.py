"""The properties that the algorithm states: noise, advantages, policy, ratio, gradient, rows, cost; and that it trains."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from align import ALGORITHMS, NeighborGRPO, neighbor_grpo
from align.neighbor_grpo import clipped_terms, group_advantages, log_policy, neighbor_noise, spread_weights
from diffusion import (
    SOLVERS,
    Condition,
    Group,
    Prompt,
    RectifiedFlow,
    Rollout,
    RunSettings,
    Scores,
    VariancePreserving,
    integrate,
)
from rollouts.worker import group_noise
from tests.tools import ODE_SOLVERS, tools

F64 = torch.float64
PROMPT = Prompt("1", "x")
PATHS = {
    "flow": RectifiedFlow(),
    "noise": VariancePreserving.from_alphas_cumprod(torch.cumprod(1 - torch.linspace(0.001, 0.02, 1000, dtype=F64), 0)),
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(**knobs):
    return NeighborGRPO(NeighborGRPO.Config(**knobs))


def gradient(value, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()))])


class Network(nn.Module):
    """The flow towards N(prompt, deviation^2 I) in closed form; adapter "policy" adds a small network, zero unless moved."""

    deviation = 0.5

    def __init__(self, elements=3, moved=0.0, dtype=F64):
        super().__init__()
        self.inner = nn.Linear(elements + 1, 16, dtype=dtype)
        self.outer = nn.Linear(16, elements, dtype=dtype)
        with torch.no_grad():
            for p in self.inner.parameters():
                p.copy_(torch.randn(p.shape, dtype=dtype, generator=rng(1)) / 2)
            for p in self.outer.parameters():
                p.copy_(torch.randn(p.shape, dtype=dtype, generator=rng(2)) * moved)
        self.calls = []

    def forward(self, x, t, condition, adapter):
        self.calls.append((adapter, torch.is_grad_enabled(), len(x)))
        row_t = t.expand(len(x)).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        mean = condition.tensors["mean"].reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        alone = x - (1 - row_t) * mean
        variance = (1 - row_t) ** 2 * self.deviation**2 + row_t**2
        velocity = (row_t - (1 - row_t) * self.deviation**2) / variance * alone - mean
        if adapter is None:
            return velocity
        assert adapter == "policy"
        features = torch.cat([x.flatten(1), row_t.flatten(1)], dim=1).to(self.inner.weight.dtype)
        return velocity + self.outer(torch.tanh(self.inner(features))).reshape(x.shape).to(x.dtype)


def draw(algorithm, network, *, groups=2, steps=5, shape=(3,), solver="dpmpp_2m", path="flow", dtype=F64, seed=0):
    """Rollouts of the policy, as a worker makes them."""
    size = algorithm.config.group_size
    seeds = torch.arange(groups * size) + 1000 * seed
    drawn = [Group(PROMPT, 77 + 1000 * seed + m, seeds[m * size : (m + 1) * size].tolist()) for m in range(groups)]
    noise = [group_noise(group, 0, shape, algorithm.noise) for group in drawn]
    means = Condition({"mean": torch.linspace(-0.5, 0.5, groups, dtype=F64)})
    group = torch.arange(groups).repeat_interleave(size)
    condition = means[group]
    grid = torch.linspace(1, 0, steps + 1, dtype=F64)
    with torch.no_grad():
        trajectory = integrate(
            lambda x, t: network(x, t, condition, "policy"),
            torch.cat(noise).to(dtype),
            grid,
            PATHS[path],
            SOLVERS[solver],
            record=algorithm.plan(1, steps).record,
        )
    return Rollout([PROMPT] * groups, means, group, seeds, trajectory, 0)


def scored(rollout, reward=lambda x: x.flatten(1)[:, 0]):
    """The last states take the place of the images."""
    total = reward(rollout.trajectory.x[:, -1]).float()
    return Scores(total, {"toy": total})


def items_of(algorithm, rollout, network, path="flow", seed=0, scores=None):
    credit = algorithm.credit(scored(rollout) if scores is None else scores)
    return algorithm.items(rollout, credit, tools(network, PATHS[path], seed=seed))


def loss_of(algorithm, rows, network, path="flow"):
    return algorithm.loss("policy", rows, tools(network, PATHS[path]))


def metrics_of(loss):
    return {name: value.item() for name, value in loss.metrics.items()}


def make(network, *, path="flow", seed=0, knobs=None, **rollout):
    """An algorithm and the items of one rollout of the network."""
    algorithm = objective(**{"group_size": 6, "anchors": 3, "train_steps": 2} | (knobs or {}))
    drawn = draw(algorithm, network, path=path, **rollout)
    return algorithm, items_of(algorithm, drawn, network, path, seed)


# --- noise, eq. 7


def test_neighbours_are_standard_normal_and_correlate_by_one_minus_s_squared():
    s, elements = 0.3, 200_000
    algorithm = objective(perturbation=s, group_size=3, anchors=1)
    noise = group_noise(Group(PROMPT, 5, [1, 2, 3]), 0, (2, elements // 2), algorithm.noise).flatten(1)
    assert noise.dtype == torch.float32
    covariance = noise @ noise.T / elements
    expected = torch.full((3, 3), 1 - s**2) + s**2 * torch.eye(3)
    torch.testing.assert_close(covariance, expected, atol=0.01, rtol=0)
    squares = torch.cdist(noise, noise)[0, 1:] ** 2 / elements
    torch.testing.assert_close(squares, torch.full((2,), 2 * s**2), atol=0.003, rtol=0)


def test_neighbours_at_the_ends_of_s_are_independent_and_identical():
    shared, own = torch.randn(2, 5, 4, dtype=F64, generator=rng())
    torch.testing.assert_close(neighbor_noise(shared[0], own, 1.0), own, rtol=0, atol=0)
    torch.testing.assert_close(neighbor_noise(shared[0], own, 0.0), shared[:1].expand(5, 4), rtol=0, atol=0)


def test_a_members_noise_depends_on_its_own_seed_and_the_groups_only():
    def noise(seed, seeds):
        return group_noise(Group(PROMPT, seed, seeds), 0, (3,), objective(group_size=2, anchors=1).noise)

    assert torch.equal(noise(9, [4, 5, 6])[1:], noise(9, [5, 6]))
    assert not torch.equal(noise(9, [4]), noise(8, [4]))


# --- advantages, eq. 11


def test_advantages_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 3.0], [1.0, 2.0, 3.0]])
    expected = torch.tensor([[-0.25, -0.25, 0.5], [-0.5, 0.0, 0.5]], dtype=F64)
    torch.testing.assert_close(group_advantages(rewards, 1.0), expected)
    half = 2**-1.25
    torch.testing.assert_close(group_advantages(torch.tensor([[5.0, 6.0]]), 0.8), torch.tensor([[-half, half]], dtype=F64))


@pytest.mark.parametrize("p", [0.5, 0.8, 1.0, 2.0])
def test_the_quasi_norm_is_one_and_the_norm_stays_in_its_range(p):
    a = group_advantages(torch.randn(50, 12, generator=rng()), p)
    torch.testing.assert_close((a.abs() ** p).sum(dim=1) ** (1 / p), torch.ones(50, dtype=F64))
    norm = a.norm(dim=1)
    assert (norm >= 12 ** (0.5 - 1 / p) - 1e-12).all()
    assert (norm <= 1 + 1e-12).all()


def test_the_quasi_norm_damps_groups_where_no_sample_stands_out():
    flat, peaked = [0.0] * 6 + [1.0] * 6, [0.0] * 11 + [1.0]
    norms = group_advantages(torch.tensor([flat, peaked]), 0.8).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([0.155, 0.314], dtype=F64), atol=5e-4, rtol=0)
    torch.testing.assert_close(group_advantages(torch.tensor([flat, peaked]), 2.0).norm(dim=1), torch.ones(2, dtype=F64))


def test_advantages_do_not_depend_on_the_rewards_scale_and_offset():
    rewards = torch.randn(4, 6, dtype=F64, generator=rng())
    for a, b in [(3.0, 7.0), (1e-6, 1.0), (1e30, 0.0)]:
        torch.testing.assert_close(group_advantages(a * rewards + b, 0.8), group_advantages(rewards, 0.8), atol=1e-9, rtol=0)


# --- policy and clipped objective, eq. 8 and 9


def test_spread_weights_by_hand():
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 5.5]])
    torch.testing.assert_close(spread_weights(rewards), torch.tensor([1.0, 3.0, 0.5], dtype=F64) / 1.5)
    torch.testing.assert_close(spread_weights(-3 * rewards + 7), spread_weights(rewards))


def test_spread_weights_reduce_groups_with_similar_rewards():
    scores = Scores(torch.tensor([0.0, 1.0, 0.0, 3.0, 5.0, 5.0]), {})  # the last group has no signal
    rows = []
    for weights in (False, True):
        algorithm = objective(group_size=2, anchors=1, train_steps=1, spread_weights=weights)
        rollout = draw(algorithm, Network(), groups=3)
        rows.append(items_of(algorithm, rollout, Network(), scores=scores))
    plain, weighted = rows
    assert weighted.group.tolist() == plain.group.tolist() == [0, 1]
    torch.testing.assert_close(weighted.advantages[:2], plain.advantages[:2] * torch.tensor([[0.5], [1.5]], dtype=F64))


def test_the_policy_by_hand():
    candidates = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]]])  # mean squared distances from 0: 0, 1, 2
    for tau in (1.0, 0.5):
        weights = torch.tensor([[1.0, math.exp(-1 / tau), math.exp(-2 / tau)]])
        torch.testing.assert_close(log_policy(candidates, torch.zeros(1, 2), tau).exp(), weights / weights.sum())


def test_the_summed_distance_of_a_large_state_stays_finite():
    elements = 100_000
    x = neighbor_noise(torch.randn(elements, generator=rng()), torch.randn(12, elements, generator=rng(1)), 0.3)
    for scale in (1, 100):  # |x_i - y|^2 is 18,000, then 180 million
        log_pi = log_policy(scale * x[None], scale * x[:1], 1 / elements)
        assert log_pi.isfinite().all()
        torch.testing.assert_close(log_pi.exp(), torch.eye(12)[:1])  # one-hot at the anchor
    mean = log_policy(x[None], x[:1], 1.0)
    torch.testing.assert_close(mean.exp().sum(), torch.tensor(1.0))
    assert -(mean.exp() * mean).sum() == pytest.approx(2.4835, abs=2e-4)  # almost uniform: ln 12 = 2.4849


def test_the_mean_distance_is_exact_enough_for_the_clip():
    x, y = torch.randn(1, 4, 100_000, generator=rng()), torch.randn(1, 100_000, generator=rng(1))
    exact = log_policy(x.double(), y.double(), 1.0)
    assert (log_policy(x, y, 1.0) - exact).abs().max() < 2e-6


@pytest.mark.parametrize(
    ("advantage", "ratio", "term", "slope"),
    [
        (1.0, 1.2, 1.1, 0.0),
        (1.0, 1.05, 1.05, 1.0),
        (1.0, 0.8, 0.8, 1.0),
        (-1.0, 0.8, -0.9, 0.0),
        (-1.0, 0.95, -0.95, -1.0),
        (-1.0, 1.2, -1.2, -1.0),
        (1.0, 1.0, 1.0, 1.0),
        (-1.0, 1.0, -1.0, -1.0),
        (0.0, 1.2, 0.0, 0.0),
    ],
)
def test_the_clip_stops_the_gradient_outside_its_range(advantage, ratio, term, slope):
    rho = torch.tensor([[ratio]], dtype=F64, requires_grad=True)
    value = clipped_terms(rho, torch.tensor([[advantage]], dtype=F64), 0.1)
    value.sum().backward()
    assert value.item() == pytest.approx(term)
    assert rho.grad.item() == slope


def stencil(function, y, h):
    """The gradient of a function of y [D], by a fourth-order stencil whose error is about h^4."""
    unit = torch.eye(len(y), dtype=F64) * h
    return torch.stack(
        [(8 * (function(y + u) - function(y - u)) - (function(y + 2 * u) - function(y - 2 * u))) / (12 * h) for u in unit]
    )


@pytest.mark.parametrize("tau", [1.0, 4.0, 0.25])
def test_at_the_old_policy_the_gradient_is_advantage_weighted_squared_error(tau):
    group, elements = 5, 4
    x = torch.randn(1, group, elements, dtype=F64, generator=rng())
    a = group_advantages(torch.randn(1, group, generator=rng(1)), 0.8)
    closed_form = 2 / (tau * group) * (a @ x[0])[0] / elements  # / D: the distance is a mean
    for seed in (2, 3):  # the same for every y
        y = 0.3 * torch.randn(elements, dtype=F64, generator=rng(seed))
        old = log_policy(x, y[None], tau)

        def value(y, old=old):
            return clipped_terms((log_policy(x, y[None], tau) - old).exp(), a, 0.9).mean()

        live = y.clone().requires_grad_()
        (autograd,) = torch.autograd.grad(value(live), live)
        torch.testing.assert_close(autograd, closed_form, atol=1e-14, rtol=1e-12)
        torch.testing.assert_close(stencil(value, y, h=1e-3 * tau**0.5), closed_form, atol=1e-10, rtol=0)


def test_identical_candidates_give_no_gradient():
    x = torch.randn(1, 1, 4, dtype=F64, generator=rng()).expand(1, 6, 4)
    y = torch.randn(1, 4, dtype=F64, generator=rng(1)).requires_grad_()
    a = group_advantages(torch.randn(1, 6, generator=rng(2)), 0.8)
    log_pi = log_policy(x, y, 1.0)
    (found,) = torch.autograd.grad(clipped_terms((log_pi - log_pi.detach()).exp(), a, 1e-4).mean(), y)
    assert found.abs().max() < 1e-15


def test_the_order_of_candidates_does_not_matter():
    shuffle = torch.randperm(6, generator=rng())
    x, y = torch.randn(2, 6, 4, dtype=F64, generator=rng()), torch.randn(2, 4, dtype=F64, generator=rng(1))
    rewards = torch.randn(2, 6, generator=rng(2))
    torch.testing.assert_close(log_policy(x[:, shuffle], y, 1.0), log_policy(x, y, 1.0)[:, shuffle])
    torch.testing.assert_close(group_advantages(rewards[:, shuffle], 0.8), group_advantages(rewards, 0.8)[:, shuffle])


# --- rows


def test_a_row_is_an_anchor_at_a_step_among_its_group():
    algorithm = objective(group_size=3, anchors=2, train_steps=2, temperature=0.1)
    rollout = draw(algorithm, Network(), groups=2, steps=4)
    rows = items_of(algorithm, rollout, Network(), seed=3)
    assert len(rows) == 2 * 2 * 2
    inputs = {}

    def predict(x, t, condition, adapter):
        inputs.update(x=x, t=t, mean=condition.tensors["mean"], adapter=adapter)
        return torch.full_like(x, 0.25)

    found = rows.log_policy(*rows.evaluate(predict, "policy"), PATHS["flow"], 0.1, False)
    states = rollout.trajectory.x
    for n, (m, k, j) in enumerate(zip(rows.group.tolist(), rows.anchor.tolist(), rows.step.tolist(), strict=True)):
        source, t, s = states[3 * m + k, j], rollout.trajectory.t[j], rollout.trajectory.t[j + 1]
        assert torch.equal(inputs["x"][n], source)
        assert inputs["t"][n] == t
        assert inputs["mean"][n] == rollout.condition.tensors["mean"][m]
        distance = ((states[3 * m : 3 * m + 3, j + 1] - (source + (s - t) * 0.25)) ** 2).mean(dim=1)
        torch.testing.assert_close(found[n], torch.log_softmax(-distance / 0.1, dim=0))
    assert inputs["adapter"] == "policy"


def test_anchors_and_steps_are_drawn_evenly_and_without_replacement():
    algorithm = objective(group_size=6, anchors=3, train_steps=2)
    rollout = draw(algorithm, Network(), groups=1000, steps=5)
    rows = items_of(algorithm, rollout, Network())
    grid = torch.zeros(1000, 6, 5)
    grid.index_put_((rows.group, rows.anchor, rows.step), torch.ones(len(rows)), accumulate=True)
    assert grid.max() == 1
    assert (grid.amax(dim=2).sum(dim=1) == 3).all()
    assert (grid.amax(dim=1).sum(dim=1) == 2).all()
    assert (grid.mean(dim=0) - 3 / 6 * 2 / 5).abs().max() < 0.05  # four standard deviations


@pytest.mark.parametrize(
    ("window", "steps", "trained"),
    [((0, 1), 5, {0, 1, 2, 3, 4}), ((0.5, 1), 8, {4, 5, 6, 7}), ((0, 0.5), 8, {0, 1, 2, 3}), ((0.25, 0.75), 8, {2, 3, 4, 5})],
)
def test_only_steps_inside_the_window_are_trained(window, steps, trained):
    algorithm = objective(group_size=2, anchors=1, train_steps=1, train_window=window)
    rollout = draw(algorithm, Network(), groups=80, steps=steps)
    rows = items_of(algorithm, rollout, Network())
    assert set(rows.step.tolist()) == trained


def test_all_choices_come_from_the_rng():
    def rows(seed, reward=lambda x: x[:, 0]):
        algorithm = objective(group_size=6, anchors=3, train_steps=2, inner_updates=2)
        rollout = draw(algorithm, Network(), groups=4)
        found = items_of(algorithm, rollout, Network(), seed=seed, scores=scored(rollout, reward))
        return torch.stack([found.group, found.anchor, found.step]), found.old

    index, old = rows(0)
    again, old_again = rows(0)
    assert torch.equal(index, again)
    assert torch.equal(old, old_again)
    assert not torch.equal(index, rows(1)[0])
    fewer, _ = rows(0, lambda x: x[:, 0] * (torch.arange(24) >= 6))
    assert torch.equal(fewer, index[:, index[0] > 0]), "a group without signal must not change the draws of the others"


@pytest.mark.parametrize(
    "dull", [torch.full((6,), 0.1), torch.tensor([1, 2, math.nan, 3, 4, 5]), torch.tensor([1, 2, math.inf, 3, 4, 5])]
)
def test_groups_without_signal_are_excluded(dull):
    algorithm = objective(group_size=6, anchors=3, train_steps=2, inner_updates=2)
    rollout = draw(algorithm, Network(), groups=2)
    total = torch.cat([dull, torch.arange(6.0)])
    rows = items_of(algorithm, rollout, Network(), scores=Scores(total, {}))
    assert rows.group.unique().tolist() == [1]
    assert loss_of(algorithm, rows, Network(moved=0.1)).value.isfinite()
    nothing = items_of(algorithm, rollout, Network(), scores=Scores(dull.repeat(2), {}))
    assert len(nothing) == 0
    assert len(nothing[:4]) == 0


def test_a_rollout_with_a_split_group_is_refused():
    algorithm = objective(group_size=2, anchors=1, train_steps=1)
    rollout = draw(algorithm, Network(), groups=2)
    torn = replace(rollout, group=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(AssertionError, match="whole groups"):
        items_of(algorithm, torn, Network())


# --- loss


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_the_ratio_starts_at_one_for_every_rollout_solver(solver, path):
    network = Network(moved=0.3)
    algorithm, rows = make(network, solver=solver, path=path)
    loss = loss_of(algorithm, rows, network, path)
    assert metrics_of(loss) == {"ratio/max_log": 0.0, "ratio/clip_fraction": 0.0}
    assert abs(loss.value) < 1e-15
    assert gradient(loss.value, network).abs().max() > 1e-4
    algorithm, rows = make(network, solver=solver, path=path, knobs={"inner_updates": 2, "clip": 1e-9})
    metrics = metrics_of(loss_of(algorithm, rows, network, path))
    assert metrics["ratio/max_log"] < 1e-12
    assert metrics["ratio/clip_fraction"] == 0


@pytest.mark.parametrize(("solver", "starts_at_one"), [("euler", True), ("dpmpp_2m", False), ("heun", False), ("unipc", False)])
def test_an_old_policy_at_the_stored_state_would_not_start_at_one(solver, starts_at_one):
    network = Network(moved=0.3)
    algorithm, rows = make(network, solver=solver)
    stored = log_policy(rows.x[rows.group, :, rows.step + 1], rows.x[rows.group, rows.anchor, rows.step + 1], 1.0)
    metrics = metrics_of(loss_of(algorithm, replace(rows, old=stored), network))
    assert (metrics["ratio/max_log"] < 1e-12) == starts_at_one
    assert (metrics["ratio/clip_fraction"] == 0) == starts_at_one


def test_the_gradient_reaches_the_parameters_through_one_step():
    """The whole loss by finite differences with a fixed old policy, against autograd with the old policy detached."""
    network = Network(moved=0.3)
    algorithm, rows = make(network, knobs={"inner_updates": 2, "clip": 0.5})
    found = gradient(loss_of(algorithm, replace(rows, old=None), network).value, network)
    start = nn.utils.parameters_to_vector(network.parameters()).detach()

    def value(parameters):
        nn.utils.vector_to_parameters(parameters, network.parameters())
        with torch.no_grad():
            return loss_of(algorithm, rows, network).value

    torch.testing.assert_close(stencil(value, start, h=1e-3), found, atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_a_small_step_moves_towards_the_better_neighbours(solver):
    network = Network(moved=0.3)
    algorithm, rows = make(network, solver=solver)

    def attraction():
        source, prediction = rows.evaluate(network, "policy")
        y = PATHS["flow"].step(source, rows.t[rows.step], rows.t[rows.step + 1], prediction)
        towards = (rows.advantages[rows.group][..., None] * rows.x[rows.group, :, rows.step + 1]).sum(dim=1)
        return (towards * y).sum().item()

    before = attraction()
    loss_of(algorithm, rows, network).value.backward()
    with torch.no_grad():
        for p in network.parameters():
            p -= 0.1 * p.grad
    assert attraction() > before


def test_anchors_are_symmetric():
    """Over all choices of B anchors the loss averages to that of all G; checked off the old policy, where it is not 0."""
    network, moved = Network(), Network(moved=0.3)
    knobs = {"group_size": 4, "anchors": 4, "train_steps": 5, "inner_updates": 2, "clip": 0.01}
    algorithm, rows = make(network, groups=1, knobs=knobs)
    everyone = loss_of(algorithm, rows, moved).value

    def chosen(anchors):
        keep = torch.isin(rows.anchor, torch.tensor(anchors))
        part = replace(rows, group=rows.group[keep], anchor=rows.anchor[keep], step=rows.step[keep], old=rows.old[keep])
        return loss_of(algorithm, part, moved).value

    values = torch.stack([chosen(pair) for pair in combinations(range(4), 2)])
    torch.testing.assert_close(values.mean(), everyone)
    assert values.std() > 1e-6


def test_micro_batches_weighted_by_their_length_add_up_to_the_whole():
    network, moved = Network(), Network(moved=0.3)
    algorithm, rows = make(network, knobs={"inner_updates": 2, "clip": 1e-3, "reference_weight": 0.5})
    whole = loss_of(algorithm, rows, moved)
    parts = [rows[i : i + 5] for i in range(0, len(rows), 5)]
    assert [len(part) for part in parts] == [5, 5, 2]
    losses = [loss_of(algorithm, part, moved) for part in parts]
    shares = [len(part) / len(rows) for part in parts]
    value = sum(w * loss.value for w, loss in zip(shares, losses, strict=True))
    torch.testing.assert_close(value, whole.value, atol=1e-14, rtol=0)
    torch.testing.assert_close(gradient(value, moved), gradient(whole.value, moved), atol=1e-14, rtol=0)
    for name in ("ratio/clip_fraction", "reference/distance"):
        mean = sum(w * loss.metrics[name].item() for w, loss in zip(shares, losses, strict=True))
        assert mean == pytest.approx(whole.metrics[name].item())
    assert max(loss.metrics["ratio/max_log"].item() for loss in losses) == pytest.approx(whole.metrics["ratio/max_log"].item())


def test_later_inner_updates_leave_ratio_one_until_the_clip_stops_them():
    network = Network(moved=0.3)
    algorithm, rows = make(network, knobs={"inner_updates": 2, "clip": 1e-3})
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    history = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(algorithm, rows, network)
        loss.value.backward()
        optimizer.step()
        history.append((loss.value.item(), *metrics_of(loss).values()))
    values, logs, fractions = zip(*history, strict=True)
    assert abs(values[0]) < 1e-12
    assert logs[0] < 1e-12
    assert values[1] < 0 < logs[1]
    assert fractions[0] == 0
    assert fractions[-1] > 0.5
    assert values[-1] > -1e-3  # a term gains at most A_i c


def test_the_reference_term_pulls_to_the_prediction_without_adapter():
    network = Network()
    algorithm, rows = make(network, knobs={"reference_weight": 2.0})
    with torch.no_grad():
        network.outer.bias += 0.3
    network.calls.clear()
    loss = loss_of(algorithm, rows, network)
    assert loss.metrics["reference/distance"].item() == pytest.approx(0.09)
    assert loss.value.item() == pytest.approx(2 * 0.09)
    assert network.calls == [(None, False, len(rows)), ("policy", True, len(rows))]
    plain = loss_of(objective(group_size=6, anchors=3, train_steps=2), rows, network)
    pull = gradient(loss.value, network) - gradient(plain.value, network)
    torch.testing.assert_close(pull[-3:], torch.full((3,), 2 * 2 * 0.3 / 3, dtype=F64))  # d/d bias of 2 mean |bias|^2


@pytest.mark.parametrize("updates", [1, 2])
def test_the_evaluations_of_an_iteration(updates):
    network = Network()
    algorithm = objective(group_size=6, anchors=3, train_steps=2, inner_updates=updates)
    rollout = draw(algorithm, network, groups=2, steps=5, solver="heun")
    assert sum(rows for _, _, rows in network.calls) == 2 * 6 * (2 * 4 + 1)  # G NFE_old
    network.calls.clear()
    items = items_of(algorithm, rollout, network)
    assert sum(rows for _, _, rows in network.calls) == (0 if updates == 1 else 2 * 3 * 2)
    assert all(rows <= 6 and not grad for _, grad, rows in network.calls)
    network.calls.clear()
    for player, rows in algorithm.turns(1, items):
        algorithm.loss(player, rows, tools(network))
    assert sum(rows for _, grad, rows in network.calls if grad) == 2 * 3 * 2 * updates  # B K U for each group
    cost = algorithm.config.cost(SOLVERS["heun"], torch.linspace(1, 0, 6))
    assert (cost.with_gradient, cost.without) == (3 * 2 * updates, 0 if updates == 1 else 3 * 2)
    assert len(network.calls) == updates


def test_sampling_is_deterministic_and_does_not_use_the_surrogate_policy(monkeypatch):
    def forbidden(*_):
        raise AssertionError("sampling used the surrogate policy")

    monkeypatch.setattr(neighbor_grpo, "log_policy", forbidden)
    network = Network(moved=0.3)
    first, second = (draw(objective(group_size=6), network) for _ in range(2))
    assert torch.equal(first.trajectory.x, second.trajectory.x)


# --- edges


def test_bfloat16_states_are_stepped_and_compared_in_float32():
    network = Network(shape_elements := 48, moved=0.1, dtype=torch.float32)
    algorithm, rows = make(network, shape=(3, 4, 4), dtype=torch.bfloat16, knobs={"inner_updates": 2})
    assert rows.x.dtype == torch.bfloat16
    assert math.prod(rows.x.shape[3:]) == shape_elements
    with torch.no_grad():
        network.outer.bias += 1e-4  # far below the resolution of y in bfloat16
    loss = loss_of(algorithm, rows, network)
    assert loss.value.dtype == torch.float32
    assert 1e-7 < loss.metrics["ratio/max_log"] < 1e-4
    assert gradient(loss.value, network).isfinite().all()


@pytest.mark.parametrize("updates", [1, 2])
def test_the_smallest_group_with_every_anchor_and_every_step(updates):
    network = Network(moved=0.1)
    knobs = {"group_size": 2, "anchors": 2, "train_steps": 5, "inner_updates": updates}
    algorithm, rows = make(network, groups=1, knobs=knobs)
    assert len(rows) == 2 * 5
    assert {(k, j) for k, j in zip(rows.anchor.tolist(), rows.step.tolist(), strict=True)} == {
        (k, j) for k in range(2) for j in range(5)
    }
    assert gradient(loss_of(algorithm, rows, network).value, network).abs().max() > 0


def test_a_large_state_and_the_papers_summed_distance():
    elements = 100_000
    network = Network(elements, moved=1e-3, dtype=torch.float32)
    knobs = {"temperature": 1 / elements, "inner_updates": 2, "train_steps": 1, "anchors": 2, "group_size": 4}
    algorithm, rows = make(network, groups=1, steps=2, shape=(elements,), dtype=torch.float32, knobs=knobs)
    loss = loss_of(algorithm, rows, Network(elements, moved=2e-3, dtype=torch.float32))
    assert loss.value.isfinite()


# --- knobs


@pytest.mark.parametrize(
    ("knobs", "key", "message"),
    [
        ({"anchors": 13}, "anchors", "is 13, allowed are 1 to group_size, which is 12"),
        ({"group_size": 3}, "anchors", "is 4, allowed are 1 to group_size, which is 3"),
        ({"group_size": 1}, "group_size", "greater than or equal to 2"),
        ({"anchors": 0}, "anchors", "greater than or equal to 1"),
        ({"perturbation": 0}, "perturbation", "greater than 0"),
        ({"perturbation": 1.1}, "perturbation", "less than or equal to 1"),
        ({"train_steps": 0}, "train_steps", "greater than or equal to 1"),
        ({"train_window": (0.5, 0.5)}, "train_window", "increasing fractions between 0 and 1"),
        ({"train_window": (0.0, 1.5)}, "train_window", "increasing fractions between 0 and 1"),
        ({"temperature": 0}, "temperature", "greater than 0"),
        ({"temperature": math.inf}, "temperature", "finite"),
        ({"clip": 0}, "clip", "greater than 0"),
        ({"quasi_norm": 2.1}, "quasi_norm", "less than or equal to 2"),
        ({"inner_updates": 0}, "inner_updates", "greater than or equal to 1"),
        ({"reference_weight": -1}, "reference_weight", "greater than or equal to 0"),
        ({"ancors": 4}, "ancors", "not permitted"),
    ],
)
def test_a_wrong_knob_is_named(knobs, key, message):
    with pytest.raises(ValidationError) as caught:
        NeighborGRPO.Config(**knobs)
    (error,) = caught.value.errors()
    assert error["loc"] == (key,)
    assert message in error["msg"]


def test_more_trained_steps_than_the_solve_has_are_refused():
    NeighborGRPO.Config().check(RunSettings(4))
    with pytest.raises(ValueError, match=r"train_steps is 4, allowed are 1 to 3: .* holds 3 of the solver's 3 steps"):
        NeighborGRPO.Config().check(RunSettings(3))
    with pytest.raises(ValueError, match=r"train_steps is 4, allowed are 1 to 3: train_window \[0\.5, 1\.0\] holds 3 of .* 6"):
        NeighborGRPO.Config(train_window=(0.5, 1.0)).check(RunSettings(6))
    assert list(objective().plan(1, 5).record) == [0, 1, 2, 3, 4, 5]


def test_every_knob_states_its_source():
    assert ALGORITHMS["neighbor_grpo"] is NeighborGRPO
    fields = NeighborGRPO.Config.model_fields
    assert all(any(source in field.description for source in ("paper", "AR-CoPO", "ours")) for field in fields.values())


# --- training


@pytest.mark.parametrize("updates", [1, 2])
def test_it_learns_from_a_reward_without_gradient(updates):
    """Eight coordinates; the reward counts those above 1, in whole numbers, of which the teacher has about 0.2."""

    def reward(x):
        return (x > 1).sum(dim=1)

    network = Network(8, dtype=torch.float32)
    algorithm = objective(inner_updates=updates)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    curve = []
    for iteration in range(60):
        rollout = draw(algorithm, network, groups=8, steps=8, shape=(8,), dtype=torch.float32, seed=iteration)
        scores = scored(rollout, reward)
        curve.append(scores.total.mean().item())
        items = items_of(algorithm, rollout, network, seed=iteration, scores=scores)
        for _ in range(updates):
            optimizer.zero_grad()
            loss_of(algorithm, items, network).value.backward()
            optimizer.step()
    assert sum(curve[:5]) / 5 < 0.5
    assert sum(curve[-5:]) / 5 > 3  # it is 4.5, and 5.3 with two updates


def test_with_a_solver_that_adds_noise_the_training_step_ends_at_the_anchors_next_state():
    """The ratios start at 1 and the gradient is that of the re-noised state with its own noise, by finite differences."""
    network = Network(moved=0.3)
    algorithm = objective(group_size=6, anchors=3, train_steps=2)
    grid, groups, size = torch.linspace(1, 0, 4, dtype=F64), 2, 6
    drawn = [Group(PROMPT, 5 + m, list(range(10 * m, 10 * m + size))) for m in range(groups)]

    def noise(step):
        return torch.cat([group_noise(group, step, (3,), algorithm.noise) for group in drawn]).double()

    fresh = {0: noise(1), 1: noise(2)}
    means = Condition({"mean": torch.linspace(-0.5, 0.5, groups, dtype=F64)})
    group = torch.arange(groups).repeat_interleave(size)
    solver = SOLVERS["consistency"]

    def predict(x, t):
        return network(x, t, means[group], "policy")

    with torch.no_grad():
        solve = integrate(predict, noise(0), grid, PATHS["flow"], solver, record=range(4), noise=fresh)
    rollout = Rollout([PROMPT] * groups, means, group, group, solve, 0)
    given = tools(network, PATHS["flow"], solver=solver, grid=grid)
    rows = algorithm.items(rollout, algorithm.credit(scored(rollout)), given)
    assert set(rows.step.tolist()) == {0, 1, 2}
    loss = algorithm.loss("policy", rows, given)
    assert metrics_of(loss)["ratio/max_log"] == 0
    found = gradient(loss.value, network)

    def value(parameters):
        """-J of each row with the noise written out; the old policy is the one that drew."""
        nn.utils.vector_to_parameters(parameters, network.parameters())
        source, prediction = rows.evaluate(network, "policy")
        t, s = rows.t[rows.step], rows.t[rows.step + 1]
        clean = source - t.reshape(-1, 1) * prediction
        own = [
            fresh[int(i)][int(g) * size + int(k)] if i < 2 else 0 * clean[0]
            for i, g, k in zip(rows.step, rows.group, rows.anchor, strict=True)
        ]
        y = (1 - s).reshape(-1, 1) * clean + s.reshape(-1, 1) * torch.stack(own)
        log_pi = log_policy(rows.x[rows.group, :, rows.step + 1], y, algorithm.config.temperature)
        return log_pi, rows.advantages[rows.group]

    start = nn.utils.parameters_to_vector(network.parameters()).detach()
    with torch.no_grad():
        old = value(start)[0]
        slopes = []
        for i in range(len(start)):
            step = torch.zeros_like(start)
            step[i] = 1e-6
            sides = []
            for sign in (1, -1):
                log_pi, advantages = value(start + sign * step)
                sides.append(-(advantages * (log_pi - old).exp()).mean())
            slopes.append((sides[0] - sides[1]) / 2e-6)
        value(start)
    torch.testing.assert_close(found, torch.stack(slopes), rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="a solver that adds noise after each step allows 1"):
        objective(inner_updates=2).config.check(RunSettings(steps=4, renoises=True))

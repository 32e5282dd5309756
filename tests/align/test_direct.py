"""DRTune, ReFL, DRaFT and AlignProp against closed forms and plain autograd, in float64 on small networks."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from align.alignprop import AlignProp, AlignPropConfig
from align.direct import DirectRows, rollout_with_gradient, rows_of
from align.draft import DRaFT, DRaFTConfig
from align.drtune import DRTune, DRTuneConfig, draw_steps, equally_spaced, starts
from align.refl import ReFL, ReFLConfig
from diffusion import (
    SOLVERS,
    Condition,
    Prompt,
    RectifiedFlow,
    Rollout,
    RunSettings,
    Scores,
    Trajectory,
    VariancePreserving,
    integrate,
    prediction_coefficients,
    stop_early,
)
from diffusion.objective import judged, reward_loss
from tests.tools import tools as tools_around

T = 10
GRID = torch.linspace(1, 0, T + 1, dtype=torch.float64) ** 1.3
PATHS = {
    "flow": RectifiedFlow(),
    "noise": VariancePreserving.from_alphas_cumprod(torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)),
}
SIZE = 6


class Network(nn.Module):
    """Two layers over the state and the time; counts its evaluations with and without gradient, one for each row."""

    def __init__(self, sees_input=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(SIZE + 1, 8, dtype=torch.float64)
        self.second = nn.Linear(8, SIZE, dtype=torch.float64)
        self.sees_input = sees_input
        self.calls = Counter()

    def forward(self, x, t, condition=None, adapter="policy"):
        self.calls[torch.is_grad_enabled()] += len(x)
        seen = x if self.sees_input else torch.zeros_like(x)
        time = t.to(x.dtype).expand(len(x), 1)
        out = self.second(torch.tanh(self.first(torch.cat([seen, time], dim=1))))
        return out if adapter == "policy" else 0.5 * out.detach()


def judge(latents, prompts):
    """A nonlinear reward, so that its gradient depends on the point where it is taken."""
    total = torch.sin(3 * latents).sum(1) + 0.1 * latents.square().sum(1)
    return Scores(total, {"wave": total})


def gradient(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


@pytest.fixture(params=["euler", "dpmpp_2m"])
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


def rows(trained, stop=T - 1, number=4):
    noise = torch.randn(number, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    prompts = [Prompt(str(i), "x") for i in range(number)]
    return DirectRows(noise, Condition({"x": torch.zeros(number, 1)}), prompts, tuple(trained), stop)


def tools(network=None, path=PATHS["flow"], solver=SOLVERS["euler"], seed=0, judge=judge):
    return tools_around(network, path, seed=seed, solver=solver, grid=GRID, judge=judge)


def drtuned(network, some, solver, path):
    return rollout_with_gradient(network, some, tools(network, path, solver), detach_input=True)


def explicit_sum(network, some, solver, path):
    """sum_{i in S} c_i (d v(sg x_i) / d theta)^T dL / d x_0, written out."""
    grid = stop_early(GRID, some.stop)
    seen = []

    def watched(x, t):
        seen.append((x.detach().clone(), t))
        return network(x, t)

    with torch.no_grad():
        clean = integrate(watched, some.noise, grid, path, solver).x[:, -1]
    clean.requires_grad_()
    (adjoint,) = torch.autograd.grad(-judge(clean, some.prompts).total.mean(), clean)
    coefficients = prediction_coefficients(path, solver, grid)
    total = 0.0
    for i in some.trained_steps:
        x, t = seen[i]
        total = total + coefficients[i] * gradient((network(x, t) * adjoint).sum(), network)
    return total


@pytest.mark.parametrize(("trained", "stop"), [((0, 3, 6), 9), ((1, 4, 7), 7), ((2, 5), 8), ((0,), 9), (range(10), 9)])
def test_the_gradient_is_the_explicit_sum(solver, path, trained, stop):
    network, some = Network(), rows(trained, stop)
    loss = judged(drtuned(network, some, solver, path), some.prompts, tools(network, path, solver), None)
    torch.testing.assert_close(gradient(loss.value, network), explicit_sum(network, some, solver, path), rtol=1e-10, atol=1e-12)


def test_ddim_telescopes():
    """c_t = sqrt(ab_0) (sbar_{t-1} - sbar_t): DDIM is Euler in the noise-to-signal ratio."""
    path = PATHS["noise"]
    ratio = path.sigma(GRID) / path.alpha(GRID)
    expected = path.alpha(GRID[-1]) * ratio.diff()
    torch.testing.assert_close(prediction_coefficients(path, SOLVERS["euler"], GRID), expected, rtol=1e-12, atol=1e-14)


def test_a_network_that_ignores_its_input_gets_the_full_gradient(solver, path):
    network, some = Network(sees_input=False), rows(range(T))
    full = rollout_with_gradient(network, some, tools(network, path, solver))
    cut = drtuned(network, some, solver, path)
    assert torch.equal(full, cut)
    expected = gradient(-judge(full, some.prompts).total.mean(), network)
    torch.testing.assert_close(gradient(-judge(cut, some.prompts).total.mean(), network), expected, rtol=1e-12, atol=1e-14)


def test_a_network_that_uses_its_input_does_not(solver, path):
    network, some = Network(), rows(range(T))
    full = gradient(rollout_with_gradient(network, some, tools(network, path, solver)).sum(), network)
    cut = gradient(drtuned(network, some, solver, path).sum(), network)
    assert (full - cut).norm() > 0.01 * full.norm()


@pytest.mark.parametrize("arguments", [{"detach_input": True}, {"recompute": True}, {}])
def test_gradient_options_do_not_change_the_images(solver, path, arguments):
    network = Network()
    with torch.no_grad():
        plain = integrate(network, rows(()).noise, stop_early(GRID, 7), path, solver).x[:, -1]
    got = rollout_with_gradient(network, rows((0, 3, 6), 7), tools(network, path, solver), **arguments)
    assert got.requires_grad
    assert torch.equal(got, plain)


def test_the_state_keeps_its_gradient(solver, path):
    network, some = Network(), rows((0,))
    assert gradient(drtuned(network, some, solver, path).sum(), network).norm() > 1e-3


def test_the_gradient_is_bounded_where_the_full_one_is_not():
    """v = lambda x with a large lambda: through all inputs the gradient grows like a product, otherwise like the states."""
    factor = torch.tensor(-60.0, dtype=torch.float64, requires_grad=True)
    some = rows(range(T))

    def slope(**arguments):
        clean = rollout_with_gradient(lambda x, t: factor * x, some, tools(), **arguments)
        return torch.autograd.grad(clean.sum(), factor)[0].abs().item()

    states = integrate(lambda x, t: factor * x, some.noise, GRID, RectifiedFlow(), SOLVERS["euler"], record=range(T)).x
    steps = GRID.diff().abs()
    bound = sum(steps[i] * states[:, i].abs().sum() for i in range(T)).item()
    assert slope(detach_input=True) <= bound * (1 + 1e-9)
    assert slope() > 5 * slope(detach_input=True)


def test_at_most_k_evaluations_have_a_gradient(solver, path):
    for config in (DRTuneConfig(train_steps=3), DRTuneConfig(train_steps=2, draw="prefix")):
        for seed in range(20):
            network = Network()
            method, given = DRTune(config), tools(network, path, solver, seed)
            items = method.items(rollout(), None, given)
            method.loss("policy", items, given)
            cost = config.cost(solver, GRID)
            assert 0 < network.calls[True] <= cost.with_gradient * len(items)
            assert network.calls[False] <= cost.without * len(items)
            assert network.calls[True] + network.calls[False] == (items.stop + 1) * len(items)


# The draw of S


def test_the_spacing_by_hand():
    assert equally_spaced(1, 3, 25) == (1, 9, 17)
    assert equally_spaced(9, 3, 25) == (9, 17, 25)
    assert starts(3, 25) == 9
    assert starts(5, 25) == 5
    assert equally_spaced(4, 2, 9) == (4, 8)


def draws(config, steps, number=4000):
    rng = torch.Generator().manual_seed(0)
    return [draw_steps(steps, config, rng) for _ in range(number)]


@pytest.mark.parametrize("draw", ["full", "prefix"])
@pytest.mark.parametrize(("steps", "k"), [(25, 3), (25, 5), (8, 3), (10, 1), (7, 7)])
def test_s_is_k_steps_a_constant_stride_apart(draw, steps, k):
    config = DRTuneConfig(train_steps=k, draw=draw, early_stop=0.4 if k < steps else 0.01)
    for trained, stop in draws(config, steps, 300):
        assert len(set(trained)) == k
        assert len({b - a for a, b in pairwise(trained)}) <= 1
        assert all(0 <= i < steps for i in trained)
        assert steps - config.last(steps) <= stop <= steps - 1
        if draw == "prefix":
            assert max(trained) <= stop


def test_the_coverage_of_25_steps_by_3():
    """Every step has probability 1/9, except for the paper's 9 and 17, which have 2/9."""
    counts = Counter(25 - i for trained, _ in draws(DRTuneConfig(), 25) for i in trained)
    for t in range(1, 26):
        assert counts[t] / 4000 == pytest.approx(2 / 9 if t in (9, 17) else 1 / 9, abs=0.02)


def test_the_coverage_is_even_where_k_divides_t():
    counts = Counter(i for trained, _ in draws(DRTuneConfig(train_steps=5), 25) for i in trained)
    assert all(counts[i] / 4000 == pytest.approx(0.2, abs=0.02) for i in range(25))


def test_the_number_of_trained_steps():
    """T = 25, K = 3, m = 10: 2.49 on average, at least 1; m = 20 sometimes leaves none."""
    executed = [sum(i <= stop for i in trained) for trained, stop in draws(DRTuneConfig(), 25)]
    assert sum(executed) / 4000 == pytest.approx(2.49, abs=0.03)
    assert min(executed) == 1
    none = [not any(i <= stop for i in trained) for trained, stop in draws(DRTuneConfig(early_stop=0.8), 25)]
    assert sum(none) / 4000 == pytest.approx(0.033, abs=0.01)
    always = [sum(i <= stop for i in trained) for trained, stop in draws(DRTuneConfig(draw="prefix"), 25)]
    assert set(always) == {3}


def test_a_step_without_trained_steps_has_no_rows():
    assert len(rows_of(rollout(), (8, 9), 7, tools())) == 0
    assert rows_of(rollout(), (3, 6, 9), 7, tools()).trained_steps == (3, 6)


# The methods


def rollout(number=4):
    some = rows((), number=number)
    index = torch.arange(number)
    return Rollout(some.prompts, some.condition, index, index, Trajectory(some.noise[:, None], GRID[:1]), 0)


def loss_gradient(method, network, path, seed=0, solver=SOLVERS["euler"]):
    given = tools(network, path, solver, seed)
    items = method.items(rollout(), None, given)
    return gradient(method.loss("policy", items, given).value, network), items


def test_refl_is_drtune_with_the_stop_alone_trained(solver, path):
    network = Network()
    got, items = loss_gradient(ReFL(ReFLConfig()), network, path, solver=solver)
    assert items.trained_steps == (items.stop,)
    assert items.stop in (8, 9)
    some = replace(rows((items.stop,), items.stop))
    expected = gradient(
        judged(drtuned(network, some, solver, path), some.prompts, tools(network, path, solver), None).value, network
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_draft_1_is_drtune_with_the_last_step_trained_and_no_early_stop(solver, path):
    network = Network()
    got, items = loss_gradient(DRaFT(DRaFTConfig()), network, path, solver=solver)
    assert (items.trained_steps, items.stop) == ((T - 1,), T - 1)
    some = rows((T - 1,))
    expected = gradient(
        judged(drtuned(network, some, solver, path), some.prompts, tools(network, path, solver), None).value, network
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_draft_k_is_plain_autograd_through_the_last_k(solver, path):
    network = Network()
    got, _ = loss_gradient(DRaFT(DRaFTConfig(train_steps=4)), network, path, solver=solver)
    some = rows(range(T - 4, T))
    clean = integrate(network, some.noise, GRID, path, solver, trained_steps=some.trained_steps).x[:, -1]
    torch.testing.assert_close(got, gradient(-judge(clean, some.prompts).total.mean(), network), rtol=1e-12, atol=1e-14)


def test_draft_with_all_steps_is_full_backpropagation(path):
    network = Network()
    got, _ = loss_gradient(DRaFT(DRaFTConfig(train_steps=T)), network, path)
    clean = integrate(network, rows(()).noise, GRID, path, SOLVERS["euler"], trained_steps=range(T)).x[:, -1]
    torch.testing.assert_close(got, gradient(-judge(clean, rows(()).prompts).total.mean(), network), rtol=1e-12, atol=1e-14)


def test_draft_lv_by_hand(path):
    network = Network()
    method = DRaFT(DRaFTConfig(low_variance=2))
    given = tools(network, path, seed=5)
    items = method.items(rollout(), None, given)
    items = replace(items, renoise=items.renoise.double())
    got = gradient(method.loss("policy", items, given).value, network)
    clean = rollout_with_gradient(network, items, tools(network, path))
    losses = [-judge(clean, items.prompts).total.mean()]
    for i in range(2):
        x = path.mix(clean.detach(), items.renoise[:, i], GRID[-2])
        losses.append(-judge(path.clean(x, GRID[-2], network(x, GRID[-2])), items.prompts).total.mean())
    torch.testing.assert_close(got, gradient(sum(losses) / 3, network), rtol=1e-12, atol=1e-14)
    assert not torch.equal(items.renoise[:, 0], items.renoise[:, 1])
    assert torch.equal(items[1:3].renoise, items.renoise[1:3])


def test_alignprop_back_propagates_through_the_last_k(path):
    for seed in range(8):
        network = Network()
        got, items = loss_gradient(AlignProp(AlignPropConfig()), network, path, seed)
        assert tuple(items.trained_steps) == tuple(range(T - len(items.trained_steps), T))
        clean = integrate(network, items.noise, GRID, path, SOLVERS["euler"], trained_steps=items.trained_steps).x[:, -1]
        torch.testing.assert_close(got, gradient(-judge(clean, items.prompts).total.mean(), network), rtol=1e-12, atol=1e-14)
    depths = Counter()
    for seed in range(400):
        items = AlignProp(AlignPropConfig(deepest=0.5)).items(rollout(), None, tools(network, path, seed=seed))
        depths[len(items.trained_steps)] += 1
    assert set(depths) == {1, 2, 3, 4, 5}
    assert min(depths.values()) > 50


def test_recomputing_keeps_the_gradient_and_costs_a_second_evaluation(path):
    network, some = Network(), rows(range(6, T))
    gradients = []
    for recompute in (False, True):
        network.calls.clear()
        clean = rollout_with_gradient(network, some, tools(network, path), recompute=recompute)
        gradients.append(gradient(clean.sum(), network))
        assert network.calls[True] == 4 * 4 * (1 + recompute)
    assert torch.equal(gradients[0], gradients[1])


def test_the_reference_term_is_the_distance_to_the_frozen_network_s_image(path):
    network = Network()
    method, given = DRTune(DRTuneConfig(reference_weight=0.5)), tools(network, path)
    items = method.items(rollout(), None, given)
    loss = method.loss("policy", items, given)
    clean = drtuned(network, items, SOLVERS["euler"], path)
    with torch.no_grad():
        frozen = integrate(
            lambda x, t: network(x, t, adapter=None), items.noise, stop_early(GRID, items.stop), path, SOLVERS["euler"]
        ).x[:, -1]
    distance = (clean - frozen).square().mean()
    assert loss.metrics["reference/distance"].item() == pytest.approx(distance.item())
    expected = -judge(clean, items.prompts).total.mean() + 0.5 * distance
    torch.testing.assert_close(gradient(loss.value, network), gradient(expected, network), rtol=1e-12, atol=1e-14)


# The loss


def test_the_loss_by_hand():
    rewards = torch.tensor([0.2, 0.6, 0.9])
    assert reward_loss(rewards, None).item() == pytest.approx(-1.7 / 3)
    assert reward_loss(rewards, 0.55).item() == pytest.approx(0.35 / 3)


def test_rewards_above_the_hinge_have_no_gradient():
    rewards = torch.tensor([0.2, 0.6], requires_grad=True)
    reward_loss(rewards, 0.5).backward()
    assert rewards.grad.tolist() == [-0.5, 0.0]


def test_images_without_a_score_are_excluded():
    latents = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)

    def sometimes(latents, prompts):
        total = torch.where(torch.tensor([True, False, True]), latents[:, 0], torch.nan)
        return Scores(total, {"a": total, "b": torch.full((3,), torch.nan)}, {"length": torch.ones(3)})

    loss = judged(latents, rows((), number=3).prompts, tools(judge=sometimes), None)
    known = {name: count.item() for name, count in loss.known.items()}
    assert known == {"reward/total": 2, "reward/a": 2, "reward/b": 0, "extra/length": 3}
    means = {name: value.item() for name, value in loss.metrics.items() if known[name]}
    assert means == {"reward/total": 2.0, "reward/a": 2.0, "extra/length": 1.0}
    loss.value.backward()
    assert latents.grad.flatten().tolist() == pytest.approx([-1 / 3, 0.0, -1 / 3])

    hinged = judged(latents, rows((), number=3).prompts, tools(judge=sometimes), 2.0)
    assert hinged.value.item() == pytest.approx(1 / 3), "max(0, 2 - 1), excluded, max(0, 2 - 3)"

    def never(latents, prompts):
        return Scores(torch.where(torch.ones(3) > 0, torch.nan, latents[:, 0]), {})

    loss = judged(latents, rows((), number=3).prompts, tools(judge=never), None)
    assert loss.value.item() == 0
    assert torch.autograd.grad(loss.value, latents)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("config", "steps", "words"),
    [
        (DRTuneConfig(train_steps=9), 8, "train_steps is 9, allowed are 1 to 8 with 8 solver steps"),
        (DRTuneConfig(train_steps=6, draw="prefix"), 8, "train_steps is 6, allowed are 1 to 6 with 8"),
        (DRTuneConfig(train_steps=7, draw="prefix"), 8, "allowed are 1 to 6"),
        (ReFLConfig(window=(0.9, 0.95)), 4, "holds none of 4 solver steps"),
        (DRaFTConfig(train_steps=5), 4, "train_steps is 5, allowed are 1 to 4"),
    ],
)
def test_too_few_solver_steps(config, steps, words):
    if "is 6" in words:
        config.check(RunSettings(steps))
        return
    with pytest.raises(ValueError, match=words):
        config.check(RunSettings(steps))


def test_draft_lv_needs_a_single_step():
    with pytest.raises(ValueError, match="DRaFT-LV repeats a single step"):
        DRaFTConfig(train_steps=2, low_variance=2)

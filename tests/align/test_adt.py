"""ADT (algorithms.md 3.6): start-step limits, gradients of a partial rollout, players that do not touch each other, values."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from align.adt import ADT, AVERAGE, DISCRIMINATOR, ADTConfig, diffusion_loss
from align.image_to_image import draw_trained, prediction_of, sample
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
    players_of,
    prediction_coefficients,
)
from tests.tools import tools as tools_around

F64 = torch.float64
S = 6
GRID = torch.linspace(1, 0, S + 1, dtype=F64) ** 1.2
PATHS = {
    "flow": RectifiedFlow(),
    "noise": VariancePreserving.from_alphas_cumprod(torch.linspace(0.999, 0.01, 1000, dtype=F64)),
    "v": VariancePreserving.from_alphas_cumprod(torch.linspace(0.999, 0.0, 1000, dtype=F64), "v"),
}
SHAPE = (3, 4, 4)


class Network(nn.Module):
    """Two numbers per adapter; counts rows with gradient and without."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict({"policy": nn.Parameter(torch.tensor([0.3, -0.2], dtype=F64))})
        self.calls = Counter()

    def forward(self, x, t, condition, adapter):
        self.calls[torch.is_grad_enabled()] += len(x)
        a, b = self.weights[adapter]
        return a * torch.tanh(x) + b + t.to(x.dtype).reshape(-1, 1, 1, 1) / 2


class Features:
    """A frozen convolution with two layers, as a vision network."""

    channels = (4, 5)

    def __init__(self):
        torch.manual_seed(3)
        self.network = nn.ModuleList([nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 5, 1)]).double().requires_grad_(False).eval()

    def __call__(self, images):
        one = torch.tanh(self.network[0](images))
        return [one, torch.tanh(self.network[1](one))]


class Codec:
    decoded = 0

    def encode(self, prompts):
        raise AssertionError

    def decode(self, latents):
        self.decoded += len(latents)
        return torch.sigmoid(latents)

    def encode_images(self, images):
        raise AssertionError


def rollout(number=5, seed=1):
    x = torch.randn(number, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=F64)
    condition = Condition({"c": torch.arange(number, dtype=F64)[:, None]})
    prompts = [Prompt(str(i), str(i)) for i in range(number)]
    trajectory = Trajectory(x[:, None], torch.zeros(1, dtype=F64))
    return Rollout(prompts, condition, torch.arange(number), torch.arange(number), trajectory)


def adt(**knobs):
    torch.manual_seed(0)
    method = ADT(ADTConfig(features="a network", **{"adversarial_start": 1, **knobs}))
    if method.features is not None:
        method.build_networks(Features.channels)
        for network in method.networks.values():
            network.double()
    return method


def setting(network, path="flow", **knobs):
    knobs = {"grid": GRID, "codec": Codec(), "features": Features(), **knobs}
    return tools_around(network, PATHS[path], parameters=list(network.weights.values()), **knobs)


def rows_of(method, tools, number=5, **changes):
    return replace(method.items(rollout(number), None, tools), **changes)


def test_every_row_has_k_trained_steps_after_its_start():
    start = torch.arange(S).repeat(200)
    trained = draw_trained(start, S, 2, torch.Generator().manual_seed(0))
    assert trained.sum(1).tolist() == start.sub(S).neg().clamp(max=2).tolist()
    assert not (trained & (torch.arange(S) < start[:, None])).any()
    share = trained[start == 0].float().mean(0)
    assert (share - 2 / S).abs().max() < 0.1, "each step equally often"


def test_starts_are_uniform_on_the_grid_or_always_the_noise():
    tools = setting(Network())
    start = adt().items(rollout(4000), None, tools).start
    assert (start.bincount(minlength=S) / 4000 - 1 / S).abs().max() < 0.02
    assert not adt(start="noise").items(rollout(), None, tools).start.any()


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "unipc"])
def test_a_row_that_starts_at_the_noise_is_the_ordinary_solve(path, solver):
    network = Network()
    tools = setting(network, path, solver=SOLVERS[solver])
    rows = rows_of(adt(), tools, start=torch.zeros(5, dtype=torch.int64))
    first = tools.path.mix(rows.clean, rows.noise, GRID[0])
    expected = integrate(lambda x, t: network(x, t, None, "policy"), first, GRID, tools.path, tools.solver).x[:, -1]
    torch.testing.assert_close(sample(rows, "policy", tools, with_gradient=False), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_a_late_start_is_the_solve_of_the_rest_of_the_grid(path, solver):
    network = Network()
    tools = setting(network, path, solver=SOLVERS[solver])
    rows = rows_of(adt(), tools, number=S, start=torch.arange(S))
    found = sample(rows, "policy", tools, with_gradient=False)
    for row, start in enumerate(range(S)):
        x = tools.path.mix(rows.clean[row : row + 1], rows.noise[row : row + 1], GRID[start])
        rest = integrate(lambda x, t: network(x, t, None, "policy"), x, GRID[start:], tools.path, tools.solver)
        torch.testing.assert_close(found[row : row + 1], rest.x[:, -1], rtol=1e-8, atol=1e-8)


def test_a_solver_that_adds_noise_starts_on_its_own_noise():
    network, solver = Network(), SOLVERS["consistency"]
    tools = setting(network, solver=solver)
    rows = rows_of(adt(), tools, number=2, start=torch.tensor([0, 3]))
    found = sample(rows, "policy", tools, with_gradient=False)
    x = tools.path.mix(rows.clean[1:], rows.fresh[1:, 2], GRID[3])
    noise = {step - 3: rows.fresh[1:, step] for step in range(3, S - 1)}
    rest = integrate(lambda x, t: network(x, t, None, "policy"), x, GRID[3:], tools.path, solver, noise=noise).x[:, -1]
    torch.testing.assert_close(found[1:], rest)


def test_limits_of_the_start():
    """At the noise the image does not depend on x_0; at the last step, close to the data, it nearly is x_0."""
    grid = torch.cat([torch.linspace(1, 1e-6, S, dtype=F64), torch.zeros(1, dtype=F64)])
    tools = setting(Network(), grid=grid)
    rows = rows_of(adt(), tools)
    at_noise = replace(rows, start=torch.zeros(5, dtype=torch.int64))
    other = replace(at_noise, clean=at_noise.clean + 7)
    torch.testing.assert_close(sample(at_noise, "policy", tools, False), sample(other, "policy", tools, False))
    at_data = replace(rows, start=torch.full((5,), S - 1))
    torch.testing.assert_close(sample(at_data, "policy", tools, False), rows.clean, rtol=0, atol=1e-5)


def test_the_network_sees_a_row_from_its_start_on_and_has_a_gradient_in_k_steps():
    network = Network()
    tools = setting(network)
    rows = rows_of(adt(train_steps=2), tools, number=S, start=torch.arange(S))
    rows = replace(rows, trained=draw_trained(rows.start, S, 2, tools.rng))
    sample(rows, "policy", tools, with_gradient=True)
    assert network.calls == {True: 2 * (S - 1) + 1, False: sum(range(1, S + 1)) - 2 * (S - 1) - 1}


@pytest.mark.parametrize("path", list(PATHS))
def test_the_gradient_is_that_of_drtune_on_the_rest_of_the_grid(path):
    """dL/d theta = sum over trained steps c_i (d p_i / d theta)^T dL/dx, with the coefficients of the partial solve."""
    network = Network()
    tools = setting(network, path)
    rows = rows_of(adt(), tools, number=1, start=torch.tensor([2]))
    trained = torch.zeros(1, S, dtype=torch.bool)
    trained[0, [3, 5]] = True
    rows = replace(rows, trained=trained)
    weight = torch.randn(SHAPE, dtype=F64, generator=torch.Generator().manual_seed(9))
    (sample(rows, "policy", tools, with_gradient=True) * weight).sum().backward()
    found, network.weights["policy"].grad = network.weights["policy"].grad, None

    coefficients = prediction_coefficients(tools.path, SOLVERS["euler"], GRID[2:])
    states = integrate(
        lambda x, t: network(x, t, None, "policy"),
        tools.path.mix(rows.clean, rows.noise, GRID[2]),
        GRID[2:],
        tools.path,
        SOLVERS["euler"],
        record=range(S - 1),
    ).x
    for step in (3, 5):
        prediction = network(states[:, step - 2].detach(), GRID[step], None, "policy")
        (coefficients[step - 2] * prediction * weight).sum().backward()
    torch.testing.assert_close(found, network.weights["policy"].grad)


@pytest.mark.parametrize("path", list(PATHS))
def test_the_prediction_of_an_image_implies_it(path):
    x, clean = torch.randn(2, 3, *SHAPE, dtype=F64)
    tools = setting(Network(), path)
    for t in (GRID[0], GRID[3], torch.tensor(1e-3, dtype=F64)):
        if path == "noise" or t < 1 or path == "flow":
            torch.testing.assert_close(tools.path.clean(x, t, prediction_of(clean, x, t, tools)), clean)


def test_without_adversarial_weight_it_is_plain_fine_tuning():
    """The same value and gradient as the mean squared error to the path's target; no sampling, no discriminator."""
    network, method = Network(), adt(adversarial_weight=0.0)
    tools = setting(network)
    rows = rows_of(method, tools)
    assert [player for player, _ in method.turns(1, rows)] == ["policy"]
    assert method.features is None
    assert players_of(method) == ["policy"]
    loss = method.loss("policy", rows, tools)
    loss.value.backward()
    found, network.weights["policy"].grad = network.weights["policy"].grad, None
    assert network.calls == {True: 5}
    x = tools.path.mix(rows.clean, rows.diffused, rows.t)
    expected = F.mse_loss(network(x, rows.t, None, "policy").float(), (rows.diffused - rows.clean).float())
    expected.backward()
    assert torch.equal(loss.value, expected)
    assert torch.equal(found, network.weights["policy"].grad)


def test_the_diffusion_loss_is_unguided():
    network = Network()
    tools = replace(setting(network), predict=None)
    assert diffusion_loss(rows_of(adt(), tools), "policy", tools) > 0


@pytest.mark.parametrize("loss", ["hinge", "siamese", "relativistic"])
def test_the_players_do_not_touch_each_other(loss):
    """And the frozen network has no gradient, but passes one on to the images."""
    network, method = Network(), adt(loss=loss, adaptive=False, diffusion_weight=0.0)
    tools = setting(network)
    heads, frozen = method.networks[DISCRIMINATOR], tools.features.network
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    rows = rows_of(method, tools)
    (_, policy_rows), (player, critic_rows) = method.turns(1, rows)
    assert player == DISCRIMINATOR
    value = method.loss("policy", policy_rows, tools).value
    value.backward(inputs=list(network.parameters()))
    assert network.weights["policy"].grad.abs().min() > 0, "the gradient reaches the policy through the frozen network"
    assert all(parameter.grad is None for parameter in heads.parameters())
    assert rows.generated.abs().min() > 0
    torch.testing.assert_close(rows.generated, Codec().decode(sample(rows, "policy", tools, False)))
    network.calls.clear()
    network.weights["policy"].grad = None
    method.loss(DISCRIMINATOR, critic_rows, tools).value.backward()
    assert all(parameter.grad is not None for parameter in heads.parameters())
    assert network.weights["policy"].grad is None
    assert not network.calls, "images are sampled once"
    assert tools.codec.decoded == 5 + 5, "and decoded once, as the real ones are"
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


def test_micro_batches_share_what_was_sampled():
    network, method = Network(), adt()
    tools = setting(network)
    rows = rows_of(method, tools, number=6)
    for part in (rows[:4], rows[4:]):
        method.loss("policy", part, tools)
    torch.testing.assert_close(rows.generated, Codec().decode(sample(rows, "policy", tools, False)))
    whole = method.loss(DISCRIMINATOR, rows, tools).value
    parts = [method.loss(DISCRIMINATOR, part, tools).value for part in (rows[:4], rows[4:])]
    torch.testing.assert_close(whole, (4 * parts[0] + 2 * parts[1]) / 6)


def test_accuracy_and_saturation_of_scores():
    method, tools = adt(), setting(Network())
    rows = rows_of(method, tools, number=4)
    real, fake = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 3.0], [1.5, 1.5]]), torch.tensor([[-1.0], [0.5], [0.9], [0.0]])
    scores = iter([real, fake])
    method.comparison = replace(method.comparison, score=lambda heads, features, reference: next(scores))
    metrics = method.loss(DISCRIMINATOR, rows, tools).metrics
    assert metrics["discriminator/accuracy"] == 0.75
    assert metrics["discriminator/saturated"] == 0.5, "2.5 and 2.1 exceed the margins"


def test_turns_have_augmentations_of_their_own():
    method = adt(discriminator_updates=2)
    tools = setting(Network())
    rows = rows_of(method, tools)
    turns = [items.views[:, items.turn] for _, items in method.turns(1, rows)]
    assert len(turns) == 3
    assert not torch.equal(turns[1], turns[2])
    method.loss("policy", rows, tools)
    values = [method.loss(DISCRIMINATOR, replace(rows, turn=turn), tools).value.item() for turn in (1, 2)]
    assert values[0] != values[1]
    off = adt(augmentation=0.0)
    same = [off.loss(DISCRIMINATOR, replace(rows, turn=turn), tools).value.item() for turn in (1, 2)]
    assert same[0] == same[1]


def test_the_discriminator_learns_to_tell_images_apart_and_not_equal_ones():
    network, method = Network(), adt(augmentation=0.0)
    tools = setting(network)
    optimizer = torch.optim.Adam(method.networks[DISCRIMINATOR].parameters(), 0.01)
    rows = rows_of(method, tools, number=40)
    for generated, expected in ((rows.real, None), (Codec().decode(rows.clean + 1), 1.0)):
        given = replace(rows, generated=generated, turn=1)
        for _ in range(40):
            loss = method.loss(DISCRIMINATOR, given, tools)
            optimizer.zero_grad()
            loss.value.backward()
            optimizer.step()
        if expected is None:
            assert loss.value.item() == pytest.approx(2, abs=0.05), "no score separates equal images"
            assert loss.metrics["discriminator/accuracy"] == 0
        else:
            assert loss.value < 1.9
            assert loss.metrics["discriminator/accuracy"] == expected


def test_the_later_the_start_the_harder_the_images_are_to_tell_apart():
    """A network that is wrong everywhere: an image differs from its x_0 the more, the more steps the sampler took to it."""
    network, method = Network(), adt(discriminator_updates=1, augmentation=0.3)
    tools = setting(network, grid=torch.linspace(1, 0, S + 1, dtype=F64))
    optimizer = torch.optim.Adam(method.networks[DISCRIMINATOR].parameters(), 0.01)

    def given(seed, number):
        start = torch.arange(S).repeat(number // S)
        rows = method.items(rollout(number, seed), None, replace(tools, rng=torch.Generator().manual_seed(seed)))
        # Images of one kind, so that a sample of another kind stands out: x_0 around 1.
        clean = 1 + 0.1 * rows.clean
        rows = replace(rows, clean=clean, real=Codec().decode(clean), start=start, turn=1)
        return replace(rows, generated=Codec().decode(sample(rows, "policy", tools, with_gradient=False)))

    for step in range(60):
        loss = method.loss(DISCRIMINATOR, given(step + 1, 60), tools)
        optimizer.zero_grad()
        loss.value.backward()
        optimizer.step()
    rows = given(1000, 600)

    def rows_from(rows, start):
        """The rows of one start; they were made in turn."""
        return rows[start::S]

    with torch.no_grad():
        accuracy = [
            method.loss(DISCRIMINATOR, rows_from(rows, start), tools).metrics["discriminator/accuracy"].item()
            for start in reversed(range(S))
        ]
    assert all(later >= earlier - 0.05 for earlier, later in pairwise(accuracy)), accuracy
    assert accuracy[0] < 0.75
    assert accuracy[-1] > 0.9


def test_the_adaptive_weight_is_measured_and_kept():
    """|gradient of the diffusion loss| / |gradient of the adversarial loss| over the adapter."""
    network, method = Network(), adt(adaptive_every=3, diffusion_weight=0.01)
    tools = setting(network, step=4)
    rows = rows_of(method, tools)
    gradients = []
    for weights in ({"adversarial_weight": 0.0, "diffusion_weight": 0.01}, {"diffusion_weight": 0.0, "adaptive": False}):
        alone = adt(**weights)
        alone.networks = method.networks
        alone.loss("policy", rows, tools).value.backward(inputs=list(network.parameters()))
        gradients.append(network.weights["policy"].grad)
        network.weights["policy"].grad = None
    expected = (gradients[0].norm() / (gradients[1].norm() + 1e-4)).clamp(0.01, 10).item()
    found = [method.loss("policy", rows, replace(tools, step=step)).metrics["adt/weight"].item() for step in (4, 5, 7)]
    assert 0.01 < expected < 10, "not clipped"
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert method.state["adaptive_weight"].tolist()[1] == 7
    with torch.no_grad():
        network.weights["policy"].mul_(1.5)
    later = [method.loss("policy", rows, replace(tools, step=step)).metrics["adt/weight"].item() for step in (9, 10)]
    assert later[0] == found[2]
    assert later[1] != found[2]


def test_before_its_start_the_adversarial_loss_is_left_out_and_the_discriminator_learns():
    network, method = Network(), adt(adversarial_start=3)
    tools = setting(network, step=2)
    rows = rows_of(method, tools)
    loss = method.loss("policy", rows, tools)
    assert "adt/adversarial" not in loss.metrics
    assert rows.generated.abs().min() > 0
    assert network.calls[True] == 5, "the diffusion loss alone"
    assert [player for player, _ in method.turns(2, rows)] == ["policy", DISCRIMINATOR]


def test_the_average_of_the_heads_is_what_the_policy_learns_from():
    network, method = Network(), adt(discriminator_ema=0.9, adaptive=False)
    assert players_of(method) == ["policy", DISCRIMINATOR]
    assert method.averages[AVERAGE].leader == DISCRIMINATOR
    heads, average = method.networks[DISCRIMINATOR], method.networks[AVERAGE]
    assert all(torch.equal(a, b) for a, b in zip(heads.parameters(), average.parameters(), strict=True))
    tools = setting(network)
    rows = rows_of(method, tools)
    before = method.loss("policy", rows, tools).metrics["adt/adversarial"]
    with torch.no_grad():
        next(iter(heads.parameters())).add_(1)
    assert method.loss("policy", rows, tools).metrics["adt/adversarial"] == before
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(1)
    assert method.loss("policy", rows, tools).metrics["adt/adversarial"] != before


def test_the_reward_acts_on_the_sampled_images():
    network, method = Network(), adt(adversarial_weight=0.0, diffusion_weight=0.0, reward_weight=0.5)
    target = torch.zeros(SHAPE, dtype=F64)

    def judge(latents, prompts):
        total = -(latents - target).square().flatten(1).mean(1)
        return Scores(total, {"close": total})

    tools = setting(network, judge=judge)
    rows = rows_of(method, tools)
    loss = method.loss("policy", rows, tools)
    generated = sample(rows, "policy", tools, False)
    torch.testing.assert_close(loss.value, (0.5 * generated.square().flatten(1).mean(1).mean()))
    assert loss.metrics["reward/total"] == loss.metrics["reward/close"]


def test_the_r1_penalty_adds_to_the_discriminators_loss_alone():
    tools = setting(Network())
    plain, penalised = adt(), adt(r1_weight=2.0)
    rows = rows_of(plain, tools)
    plain.loss("policy", rows, tools)
    without, with_r1 = (method.loss(DISCRIMINATOR, rows, tools) for method in (plain, penalised))
    assert with_r1.metrics["discriminator/r1"] > 0
    torch.testing.assert_close(with_r1.value, without.value + 2 * with_r1.metrics["discriminator/r1"])


def test_bins_are_over_the_time_of_the_start():
    method, tools = adt(), setting(Network(), grid=torch.linspace(1, 0, S + 1, dtype=F64))
    rows = rows_of(method, tools, number=3, start=torch.tensor([0, 0, S - 1]))
    loss = method.loss("policy", rows, tools)
    assert loss.known["start/adversarial/0.8-1"] == 2
    assert loss.known["start/adversarial/0-0.2"] == 1
    assert loss.known["start/adversarial/0.4-0.6"] == 0


def test_settings_that_do_not_fit():
    steps = RunSettings(steps=4)
    with pytest.raises(ValueError, match="train_steps is 5, allowed are 1 to 4"):
        ADTConfig(features="x", train_steps=5).check(steps)
    with pytest.raises(ValueError, match="target 'teacher' needs a section `teacher`"):
        ADTConfig(features="x", target="teacher").check(steps)
    with pytest.raises(ValueError, match="allowed: sum_then_normalize"):
        ADTConfig(features="x", reward_weight=1).check(replace(steps, standardized_rewards=True))
    with pytest.raises(ValueError, match="allowed: at least one above 0"):
        ADTConfig(features="x", diffusion_weight=0, adversarial_weight=0)
    with pytest.raises(ValueError, match="allowed: adaptive: false"):
        ADTConfig(features="x", diffusion_weight=0, adversarial_start=1)
    with pytest.raises(ValueError, match="adversarial_start is 10"):
        ADTConfig(features="x", diffusion_weight=0, adaptive=False)
    cost = ADTConfig(features="x", train_steps=2).cost(SOLVERS["heun"], GRID)
    assert (cost.with_gradient, cost.without) == (5, 2 * (S - 1) + 1)
    plain = ADTConfig(features="x", adversarial_weight=0).cost(SOLVERS["heun"], GRID)
    assert (plain.with_gradient, plain.without) == (1, 0)

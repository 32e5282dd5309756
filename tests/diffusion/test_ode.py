"""What a solve records, where gradient flows, and the coefficients of predictions in the last state."""

from itertools import pairwise

import pytest
import torch

from diffusion import SOLVERS, RectifiedFlow, VariancePreserving, evaluations, integrate, prediction_coefficients, stop_early
from tests.tools import ODE_SOLVERS

F64 = torch.float64
TABLE = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2, 0)
PATHS = {
    "flow": RectifiedFlow(),
    "noise": VariancePreserving.from_alphas_cumprod(TABLE),
    "v": VariancePreserving.from_alphas_cumprod(TABLE, "v"),
}
GRIDS = {
    "noise to data": torch.linspace(1, 0, 7, dtype=F64),
    "interior": torch.tensor([0.95, 0.7, 0.4, 0.35, 0.1], dtype=F64),
}
X = torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


@pytest.fixture(params=ODE_SOLVERS)
def solver(request):
    return SOLVERS[request.param]


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(2)
        self.inner = torch.nn.Parameter(torch.randn(5, 8, dtype=F64, generator=rng) / 2)
        self.outer = torch.nn.Parameter(torch.randn(8, 5, dtype=F64, generator=rng) / 2)

    def forward(self, x, t):
        return torch.tanh(x @ self.inner + t) @ self.outer


def detached(network):
    return lambda x, t: network(x.detach(), t)


def gradient(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


def test_the_last_state_is_recorded_by_default():
    trajectory = integrate(lambda x, t: x, X, GRIDS["interior"], PATHS["flow"], SOLVERS["euler"])
    assert trajectory.x.shape == (2, 1, 5)
    assert trajectory.t.tolist() == [0.1]


def test_recorded_states_are_those_of_the_whole_solve(path, solver):
    network, grid = Network(), GRIDS["noise to data"][1:]
    whole = integrate(network, X, grid, path, solver, record=range(len(grid)))
    some = integrate(network, X, grid, path, solver, record=[4, 0, 2])
    assert torch.equal(whole.t, grid)
    assert torch.equal(whole.x[:, 0], X)
    assert torch.equal(some.t, grid[[0, 2, 4]])
    assert torch.equal(some.x, whole.x[:, [0, 2, 4]])


def test_the_network_is_evaluated_at_the_recorded_states(path):
    evaluated = []

    def predict(x, t):
        evaluated.append(x)
        return torch.tanh(x)

    grid = GRIDS["interior"]
    trajectory = integrate(predict, X, grid, path, SOLVERS["unipc"], record=range(4))
    assert torch.equal(trajectory.x, torch.stack(evaluated, dim=1))


def test_a_solve_starts_late_on_the_end_of_a_grid(path):
    network, grid = Network(), GRIDS["interior"]
    whole = integrate(network, X, grid, path, SOLVERS["heun"], record=[2, 4])
    late = integrate(network, whole.x[:, 0], grid[2:], path, SOLVERS["heun"])
    assert torch.equal(late.x[:, -1], whole.x[:, -1])


def test_stopping_early_is_the_one_step_clean_prediction(path, solver):
    network, grid = Network(), GRIDS["interior"]
    with torch.no_grad():
        x = integrate(network, X, grid[:3], path, solver).x[:, -1]
        expected = path.clean(x, grid[2], network(x, grid[2]))
    early = integrate(network, X, stop_early(grid, 2), path, solver).x[:, -1]
    torch.testing.assert_close(early, expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"record": [0, 5]}, r"record has \[5\].*0 to 4"),
        ({"record": [-1]}, r"record has \[-1\]"),
        ({"trained_steps": [4]}, r"trained_steps has \[4\].*0 to 3"),
    ],
)
def test_indices_outside_the_grid_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        integrate(Network(), X, GRIDS["interior"], PATHS["flow"], SOLVERS["euler"], **arguments)


def test_an_invalid_grid_is_refused():
    with pytest.raises(ValueError, match="fall strictly"):
        integrate(Network(), X, torch.tensor([0.1, 0.9]), PATHS["flow"], SOLVERS["euler"])


def test_without_trained_steps_nothing_has_a_gradient(path, solver):
    x = X.clone().requires_grad_()
    evaluated = []

    def predict(x, t):
        evaluated.append(torch.is_grad_enabled())
        return torch.tanh(x)

    assert not integrate(predict, x, GRIDS["interior"], path, solver).x.requires_grad
    assert not any(evaluated)


def test_only_trained_steps_are_evaluated_with_gradient(path, solver):
    per_step = solver.evaluations
    evaluated = []

    def predict(x, t):
        evaluated.append(torch.is_grad_enabled())
        return torch.tanh(x)

    integrate(predict, X, GRIDS["interior"], path, solver, trained_steps={1, 3})
    assert evaluated == [trained for trained in (False, True, False, True) for _ in range(per_step)]


def test_gradient_bookkeeping_does_not_change_the_states(path, solver, grid):
    network = Network()
    plain = integrate(network, X, grid, path, solver).x
    assert torch.equal(plain, integrate(network, X, grid, path, solver, trained_steps=range(len(grid) - 1)).x)
    assert torch.equal(plain, integrate(detached(network), X, grid, path, solver, trained_steps=[0]).x)


def test_the_state_keeps_the_gradient_of_a_single_early_trained_step(path, solver):
    network = Network()
    x = integrate(detached(network), X, GRIDS["noise to data"], path, solver, trained_steps=[0]).x
    assert gradient(x.sum(), network).norm() > 1e-3


def test_full_backpropagation_is_plain_autograd(grid):
    network, path = Network(), PATHS["flow"]
    x = X
    for t, s in pairwise(grid):
        x = x + (s - t) * network(x, t)
    solved = integrate(network, X, grid, path, SOLVERS["euler"], trained_steps=range(len(grid) - 1)).x[:, -1]
    expected = gradient(x.square().sum(), network)
    torch.testing.assert_close(gradient(solved.square().sum(), network), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("trained", [None, [0], [1, 3]], ids=["all", "first", "two"])
def test_gradient_with_detached_inputs_is_the_sum_over_evaluations(path, solver, grid, trained):
    """dL/dtheta = sum over trained evaluations of c_k (d prediction_k / d theta)^T dL/dx, no product of Jacobians."""
    network, steps = Network(), len(grid) - 1
    trained = range(steps) if trained is None else trained
    evaluated = []

    def predict(x, t):
        evaluated.append((x.detach(), t, torch.is_grad_enabled()))
        return network(x.detach(), t)

    x = integrate(predict, X, grid, path, solver, trained_steps=trained).x[:, -1]
    target = torch.linspace(-1, 1, 10, dtype=F64).reshape(2, 5)
    (upstream,) = torch.autograd.grad((x - target).square().sum(), x, retain_graph=True)
    explicit = sum(
        gradient((c * network(x_k, t_k) * upstream).sum(), network)
        for c, (x_k, t_k, with_grad) in zip(prediction_coefficients(path, solver, grid), evaluated, strict=True)
        if with_grad
    )
    actual = gradient((x - target).square().sum(), network)
    assert actual.norm() > 1e-3
    torch.testing.assert_close(actual, explicit, atol=1e-11, rtol=1e-11)


def test_coefficients_of_euler_are_the_step_lengths(grid):
    coefficients = prediction_coefficients(PATHS["flow"], SOLVERS["euler"], grid)
    torch.testing.assert_close(coefficients, grid.diff(), atol=1e-15, rtol=0)


def test_coefficients_of_ddim_telescope(grid):
    path = PATHS["noise"]
    ratio = path.sigma(grid) / path.alpha(grid)
    coefficients = prediction_coefficients(path, SOLVERS["euler"], grid)
    torch.testing.assert_close(coefficients, path.alpha(grid[-1]) * ratio.diff(), atol=1e-12, rtol=0)


def test_coefficients_of_heun_are_half_steps_twice():
    coefficients = prediction_coefficients(PATHS["flow"], SOLVERS["heun"], GRIDS["noise to data"])
    steps = GRIDS["noise to data"].diff()
    expected = torch.cat([(steps[:-1] / 2).repeat_interleave(2), steps[-1:]])
    torch.testing.assert_close(coefficients, expected, atol=1e-15, rtol=0)


def test_coefficients_of_dpmpp_2m_by_hand():
    """Two steps on the flow, lambda = -log 4, -log 2, 0: x_2 = 3/4 x_1 + 1/4 (3/2 m_1 - 1/2 m_0), m = x - t v."""
    grid = torch.tensor([4 / 5, 2 / 3, 1 / 2], dtype=F64)
    v_0 = 3 / 4 * (2 / 3 - 4 / 5) + 3 / 8 * (2 / 3 - 4 / 5) + 1 / 8 * 4 / 5
    v_1 = -3 / 8 * 2 / 3
    coefficients = prediction_coefficients(PATHS["flow"], SOLVERS["dpmpp_2m"], grid)
    torch.testing.assert_close(coefficients, torch.tensor([v_0, v_1], dtype=F64), atol=1e-15, rtol=0)


def test_coefficients_of_a_flow_sum_to_the_length_of_the_interval(solver, grid):
    """A constant velocity is integrated exactly by every solver."""
    coefficients = prediction_coefficients(PATHS["flow"], solver, grid)
    assert len(coefficients) == evaluations(solver, grid)
    assert coefficients.sum().item() == pytest.approx((grid[-1] - grid[0]).item(), abs=1e-12)


def test_converting_the_prediction_from_a_detached_input_is_another_gradient():
    """Why networks return their native prediction: same states, but the state inside the conversion has no gradient."""
    network, path, grid = Network(), PATHS["v"], GRIDS["interior"]
    as_noise = PATHS["noise"]

    def converted(x, t):
        return path.noise(x.detach(), t, network(x.detach(), t))

    native = integrate(detached(network), X, grid, path, SOLVERS["euler"], trained_steps=range(4)).x
    other = integrate(converted, X, grid, as_noise, SOLVERS["euler"], trained_steps=range(4)).x
    torch.testing.assert_close(native, other, atol=1e-12, rtol=0)
    g, h = gradient(native.sum(), network), gradient(other.sum(), network)
    assert (g - h).norm() > 0.1 * g.norm()


def test_recorded_predictions_are_the_network_s_at_the_recorded_states(path, solver, grid):
    network = Network()
    steps = len(grid) - 1
    whole = integrate(network, X, grid, path, solver, record=range(steps + 1), predictions=True)
    assert whole.prediction.shape == (2, steps, 5), "none at the end of the solve"
    for i in range(steps):
        assert torch.equal(whole.prediction[:, i], network(whole.x[:, i], grid[i]))
    some = integrate(network, X, grid, path, solver, record=[3, 1], predictions=True)
    assert torch.equal(some.prediction, whole.prediction[:, [1, 3]])
    assert integrate(network, X, grid, path, solver, record=[1]).prediction is None


def test_a_recorded_prediction_replays_the_euler_step(path, grid):
    solve = integrate(Network(), X, grid, path, SOLVERS["euler"], record=range(len(grid)), predictions=True)
    for i in range(len(grid) - 1):
        assert torch.equal(solve.x[:, i + 1], path.step(solve.x[:, i], grid[i], grid[i + 1], solve.prediction[:, i]))


def test_noisy_steps_mix_the_clean_prediction_with_the_given_noise(path):
    network, grid = Network(), GRIDS["noise to data"][1:]
    noise = torch.randn(2, 5, dtype=F64, generator=torch.Generator().manual_seed(9))
    solve = integrate(network, X, grid, path, SOLVERS["dpmpp_2m"], record=range(len(grid)), noise={1: noise})
    clean = path.clean(solve.x[:, 1], grid[1], network(solve.x[:, 1], grid[1]))
    expected = path.alpha(grid[2]) * clean + path.sigma(grid[2]) * noise
    torch.testing.assert_close(solve.x[:, 2], expected, rtol=1e-12, atol=1e-14)
    # The multistep solver restarts: the steps after it are those of a solve from that state.
    rest = integrate(network, solve.x[:, 2], grid[2:], path, SOLVERS["dpmpp_2m"])
    assert torch.equal(solve.x[:, -1], rest.x[:, 0])


def test_a_noisy_step_to_the_data_is_the_clean_prediction(path):
    grid = torch.tensor([0.5, 0.0], dtype=F64)
    network = Network()
    solve = integrate(network, X, grid, path, SOLVERS["euler"], noise={0: torch.ones_like(X)})
    torch.testing.assert_close(solve.x[:, 0], path.clean(X, grid[0], network(X, grid[0])), rtol=0, atol=1e-14)


def test_noisy_steps_take_one_evaluation_each(solver):
    grid, calls = GRIDS["noise to data"], []

    def predict(x, t):
        calls.append(t)
        return x

    noise = {0: torch.zeros_like(X), 3: torch.zeros_like(X), 5: torch.zeros_like(X)}
    integrate(predict, X, grid, PATHS["flow"], solver, noise=noise)
    assert len(calls) == evaluations(solver, grid, noisy=noise)
    assert evaluations(SOLVERS["heun"], grid, noisy=[0, 3, 5]) == 3 * 2 + 3
    with pytest.raises(ValueError, match=r"noise has \[6\], which this grid does not have: allowed are 0 to 5"):
        integrate(predict, X, grid, PATHS["flow"], solver, noise={6: X})

"""One step by hand, the order of convergence, infinite lambda at both ends, and the identities between solvers."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from diffusion import SOLVERS, RectifiedFlow, Solver, VariancePreserving, evaluations, integrate
from diffusion.solvers import unic_weights, unipc
from tests.tools import ODE_SOLVERS

F64 = torch.float64
PREDICTOR = Solver(partial(unipc, corrector=False), 1)
PATHS = {
    "flow": RectifiedFlow(),
    "noise": VariancePreserving(lambda t: 1.5 * t),
    "v": VariancePreserving(lambda t: torch.pi / 2 * t, "v"),
    "table": VariancePreserving.from_alphas_cumprod(torch.linspace(0.995, 0.005, 1000, dtype=F64)),
}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


class Gaussian:
    """Data N(mean, std^2): the perfect network and the exact solution of the sampling ODE are closed forms."""

    mean, std = 1.5, 0.4

    def __init__(self, path):
        self.path = path

    def marginal_std(self, t):
        return (self.path.alpha(t) ** 2 * self.std**2 + self.path.sigma(t) ** 2).sqrt()

    def __call__(self, x, t):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        z = (x - alpha * self.mean) / self.marginal_std(t) ** 2
        return self.path.target(self.mean + alpha * self.std**2 * z, sigma * z, t)

    def exact(self, x, t, s):
        z = (x - self.path.alpha(t) * self.mean) / self.marginal_std(t)
        return self.path.alpha(s) * self.mean + self.marginal_std(s) * z


def last(predict, x, grid, path, solver):
    return integrate(predict, x, grid, path, solver).x[:, -1]


def error(path, solver, steps):
    network = Gaussian(path)
    grid = torch.linspace(0.9, 0.1, steps + 1, dtype=F64)
    x = torch.tensor([[-1.0], [0.3], [2.0]], dtype=F64)
    return (last(network, x, grid, path, solver) - network.exact(x, grid[0], grid[-1])).abs().max().item()


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (SOLVERS["euler"], 1),
        (SOLVERS["heun"], 2),
        (SOLVERS["dpmpp_2m"], 2),
        (PREDICTOR, 2),
        (SOLVERS["unipc"], 3),
    ],
    ids=["euler", "heun", "dpmpp_2m", "unipc predictor", "unipc"],
)
def test_order_of_convergence(path, solver, order):
    """Halving the steps divides the error by 2^order, on an interior interval: lambda is infinite at both ends."""
    assert math.log2(error(path, solver, 160) / error(path, solver, 320)) == pytest.approx(order, abs=0.15)


def test_euler_by_hand():
    x = last(lambda x, t: 2 * x, torch.tensor([[1.0]]), torch.tensor([1.0, 0.5, 0.25]), RectifiedFlow(), SOLVERS["euler"])
    assert x.item() == 0.0  # 1 - 0.5 * 2 = 0, and stays there


def test_heun_by_hand():
    x = last(lambda x, t: 2 * x, torch.tensor([[1.0]]), torch.tensor([1.0, 0.75]), RectifiedFlow(), SOLVERS["heun"])
    assert x.item() == 0.625  # slopes 2 and 2 * 0.5, so 1 - 0.25 * 1.5


def test_dpmpp_2m_by_hand():
    """Times with lambda = -log 4, -log 2, 0, so every h is log 2, and clean predictions 3 then 5."""
    clean = iter([3.0, 5.0])

    def predict(x, t):
        return (x - next(clean)) / t

    grid = torch.tensor([4 / 5, 2 / 3, 1 / 2], dtype=F64)
    trajectory = integrate(predict, torch.tensor([[6.0]], dtype=F64), grid, RectifiedFlow(), SOLVERS["dpmpp_2m"], record=[1, 2])
    first = 5 / 6 * 6 + (1 / 3 - 1 / 5 * 5 / 6) * 3
    second = 3 / 4 * first + (1 / 2 - 1 / 3 * 3 / 4) * (5 + (5 - 3) / 2)
    assert trajectory.x.flatten().tolist() == pytest.approx([first, second])


def test_unic_weights_by_hand():
    """h = log 2, r = -1: phi_1 = 1 / 2h, phi_2 = (1 - phi_1) / h, phi_3 = (1/2 - phi_2) / h."""
    h = math.log(2)
    phi_1 = 1 / (2 * h)
    phi_2 = (1 - phi_1) / h
    phi_3 = (1 / 2 - phi_2) / h
    rho_1, rho_2 = unic_weights(torch.tensor(h, dtype=F64), torch.tensor(-1.0, dtype=F64))
    assert (rho_1 + rho_2).item() == pytest.approx(phi_2 / phi_1)
    assert (-rho_1 + rho_2).item() == pytest.approx(2 * phi_3 / phi_1)


def test_unic_gives_a_node_at_infinite_lambda_no_weight():
    h = torch.tensor(0.7, dtype=F64)
    rho_1, rho_2 = unic_weights(h, torch.tensor(-math.inf, dtype=F64))
    far_1, far_2 = unic_weights(h, torch.tensor(-1e9, dtype=F64))
    assert rho_1.item() == 0.0
    assert rho_2.item() == pytest.approx(far_2.item(), abs=1e-8)
    assert far_1.item() == pytest.approx(0.0, abs=1e-8)


def curved():
    """A smooth network whose prediction depends on every element of the state and on the time."""
    weight = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(0)) / 3

    def predict(x, t):
        return torch.tanh(x @ weight.to(x.dtype) + t.to(x.dtype).reshape(-1, 1)).to(x.dtype)

    return predict


def noise(rows=3, dtype=F64):
    return torch.randn(rows, 6, dtype=F64, generator=torch.Generator().manual_seed(1)).to(dtype)


def paper_predictor(path, predict, x, grid):
    """UniP-2 as the paper writes it, with B(h) = e^-h - 1 and D_1 / r_1, one-step at the start and to data."""
    behind = None
    for t, s in pairwise(grid):
        m = path.clean(x, t, predict(x, t))
        if s == 0:
            return m
        lambda_t, lambda_s = path.half_log_snr(t), path.half_log_snr(s)
        h = lambda_s - lambda_t
        b = torch.expm1(-h)
        new = path.sigma(s) / path.sigma(t) * x - path.alpha(s) * b * m
        if behind is not None:
            r = (behind[0] - lambda_t) / h
            new = new - path.alpha(s) * b * 0.5 * (behind[1] - m) / r
        behind, x = (lambda_t, m), new
    return x


@pytest.mark.parametrize("end", [0.0, 0.05])
def test_unipc_predictor_of_order_two_is_dpmpp_2m(path, end):
    grid = torch.linspace(0.95, end, 11, dtype=F64)
    predict = curved()
    expected = paper_predictor(path, predict, noise(), grid)
    for solver in (SOLVERS["dpmpp_2m"], PREDICTOR):
        torch.testing.assert_close(last(predict, noise(), grid, path, solver), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_one_multistep_step_is_ddim(path, name):
    grid = torch.tensor([0.9, 0.4], dtype=F64)
    predict = curved()
    expected = last(predict, noise(), grid, path, SOLVERS["euler"])
    torch.testing.assert_close(last(predict, noise(), grid, path, SOLVERS[name]), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ODE_SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_from_pure_noise_to_data_is_finite_and_ends_with_the_clean_prediction(path, name, steps):
    predict = curved()
    grid = torch.linspace(1, 0, steps + 1, dtype=F64)
    evaluated = []

    def remember(x, t):
        evaluated.append((x, t, predict(x, t)))
        return evaluated[-1][-1]

    x = last(remember, noise(), grid, path, SOLVERS[name])
    assert x.abs().max() < 100  # the noise path divides by alpha(1) = 0.07
    assert len(evaluated) == evaluations(SOLVERS[name], grid)
    torch.testing.assert_close(x, path.clean(*evaluated[-1]), atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_starting_at_infinite_lambda_is_the_limit_of_starting_just_below(name):
    """Of order 1 / lambda: the weight of the infinitely long first step vanishes that slowly."""
    predict, path = curved(), RectifiedFlow()
    grid = torch.linspace(1, 0, 9, dtype=F64)
    exact = last(predict, noise(), grid, path, SOLVERS[name])
    distances = []
    for start in (1e-3, 1e-6, 1e-12):
        grid[0] = 1 - start
        distances.append((last(predict, noise(), grid, path, SOLVERS[name]) - exact).abs().max().item())
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.05


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_a_time_per_sample_is_each_sample_alone(path, name):
    """Three samples on grids of their own, one of which reaches the data a step before the others would."""
    grids = torch.tensor([[0.9, 0.7, 0.4, 0.2], [0.8, 0.5, 0.3, 0.1], [0.95, 0.6, 0.3, 0.0]], dtype=F64).T
    step, predict, x, history = SOLVERS[name].step, curved(), noise(), ()
    for t, s in pairwise(grids):
        x, history = step(path, predict, x, t, s, history)
    for i in range(3):
        alone = last(predict, noise()[i : i + 1], grids[:, i].contiguous(), path, SOLVERS[name])
        torch.testing.assert_close(x[i : i + 1], alone, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ODE_SOLVERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_coarser_states_stay_close(path, name, dtype, tolerance):
    grid = torch.linspace(0.98, 0, 51, dtype=F64)
    x = last(curved(), noise(dtype=dtype), grid, path, SOLVERS[name])
    assert x.dtype == dtype
    exact = last(curved(), noise(dtype=dtype).to(F64), grid, path, SOLVERS[name])
    scale = exact.abs().max()
    torch.testing.assert_close(x.to(F64) / scale, exact / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ODE_SOLVERS)
def test_times_stay_on_the_cpu_whatever_the_device_of_the_state(path, name):
    grid = torch.linspace(0.9, 0, 4, dtype=F64)
    assert last(lambda x, t: x, noise().to("meta"), grid, path, SOLVERS[name]).device.type == "meta"


@pytest.mark.parametrize(
    ("name", "to_data", "above_data"), [("euler", 4, 4), ("heun", 7, 8), ("dpmpp_2m", 4, 4), ("unipc", 4, 4)]
)
def test_evaluations_are_known_before_the_solve(name, to_data, above_data):
    for end, expected in ((0.0, to_data), (0.1, above_data)):
        grid = torch.linspace(1, end, 5, dtype=F64)
        evaluated = []

        def predict(x, t, evaluated=evaluated):
            evaluated.append(t)
            return x

        last(predict, noise(), grid, RectifiedFlow(), SOLVERS[name])
        assert evaluations(SOLVERS[name], grid) == len(evaluated) == expected

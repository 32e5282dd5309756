import math

import pytest
import torch

from diffusion import RectifiedFlow, VariancePreserving, combine

TABLE = torch.tensor([0.9, 0.5, 0.1])


def at(*times):
    return torch.tensor(times if len(times) > 1 else times[0], dtype=torch.float64)


def cosine(t):
    return torch.pi / 2 * t


def almost_cosine(t):
    return 1.5 * t


PATHS = {
    "flow": RectifiedFlow(),
    "noise": VariancePreserving(almost_cosine),
    "v": VariancePreserving(cosine, "v"),
    "table": VariancePreserving.from_alphas_cumprod(TABLE),
}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.fixture
def pair():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 4, 5, 5, dtype=torch.float64, generator=rng)


def test_combine_sums_a_coefficient_per_sample():
    y = torch.ones(2, 3)
    assert combine((at(2.0, 3.0), y), (at(0.5), y)).tolist() == [[2.5] * 3, [3.5] * 3]


def test_combine_keeps_coefficients_finer_than_the_state():
    y = torch.full((1, 1), 256.0, dtype=torch.bfloat16)
    combined = combine((at(1.001), y), (at(-1.0), y))  # in bfloat16, 1.001 is 1
    assert combined.dtype == torch.bfloat16
    assert combined.item() == pytest.approx(0.256, rel=4e-3)


def test_flow_by_hand():
    flow, t = RectifiedFlow(), at(0.25)
    x_0, n = torch.tensor([[2.0]]), torch.tensor([[-6.0]])
    x = flow.mix(x_0, n, t)
    v = flow.target(x_0, n, t)
    assert (x.item(), v.item()) == (0.0, -8.0)
    assert flow.clean(x, t, v).item() == 2.0
    assert flow.noise(x, t, v).item() == -6.0
    assert flow.step(x, t, at(0.125), v).item() == 1.0
    assert flow.half_log_snr(t).item() == pytest.approx(math.log(3))


def test_flow_step_has_coefficient_one_for_the_state():
    times = torch.linspace(1, 0, 1001, dtype=torch.float64)
    a, b = RectifiedFlow().step_coefficients(times[:-1], times[1:])
    assert (a == 1).all()
    assert torch.equal(b, times.diff())


def test_cosine_path_by_hand():
    path, t = VariancePreserving(almost_cosine), at(0.5)
    assert path.alpha(t).item() == pytest.approx(math.cos(0.75))
    assert path.sigma(t).item() == pytest.approx(math.sin(0.75))
    a, b = path.step_coefficients(t, at(0.25))
    assert a.item() == pytest.approx(math.cos(0.375) / math.cos(0.75))
    assert b.item() == pytest.approx(math.sin(0.375) - math.cos(0.375) * math.tan(0.75))


def test_v_is_the_derivative_by_the_angle():
    path, t = VariancePreserving(cosine, "v"), at(1 / 3)
    x_0, n = torch.tensor([[2.0]]).double(), torch.tensor([[-6.0]]).double()
    assert path.target(x_0, n, t).item() == pytest.approx(-6 * math.cos(math.pi / 6) - 2 * math.sin(math.pi / 6))
    h = 1e-6
    difference = (path.mix(x_0, n, t + h) - path.mix(x_0, n, t - h)) / (2 * h * math.pi / 2)
    assert path.target(x_0, n, t).item() == pytest.approx(difference.item(), abs=1e-8)


@pytest.mark.parametrize("t", [at(0.3), at(0.3, 0.6, 0.9)], ids=["scalar", "batch"])
def test_a_perfect_prediction_gives_back_data_noise_and_the_next_state(path, pair, t):
    x_0, n = pair
    x, p, s = path.mix(x_0, n, t), path.target(x_0, n, t), t / 3
    torch.testing.assert_close(path.clean(x, t, p), x_0, atol=1e-12, rtol=0)
    torch.testing.assert_close(path.noise(x, t, p), n, atol=1e-12, rtol=0)
    torch.testing.assert_close(path.step(x, t, s, p), path.mix(x_0, n, s), atol=1e-12, rtol=0)


def test_a_batch_of_times_is_each_sample_alone(path, pair):
    x, p = pair
    t, s = at(0.3, 0.6, 0.9), at(0.1, 0.2, 0.0)
    together = path.step(x, t, s, p)
    for i in range(3):
        assert torch.equal(together[i : i + 1], path.step(x[i : i + 1], t[i], s[i], p[i : i + 1]))


def test_the_step_is_mixing_clean_and_noise_again(path, pair):
    x, p = pair
    t, s = at(0.8), at(0.35)
    expected = path.mix(path.clean(x, t, p), path.noise(x, t, p), s)
    torch.testing.assert_close(path.step(x, t, s, p), expected, atol=1e-12, rtol=0)


def test_slope_moves_the_step_as_its_coefficient_says(path, pair):
    """Changing the prediction at a fixed state changes the slope; the step must change by coefficient times that."""
    x, p = pair
    t, s = at(0.8), at(0.35)
    slope = path.slope(x, t, p + 1) - path.slope(x, t, p)
    step = path.step(x, t, s, p + 1) - path.step(x, t, s, p)
    torch.testing.assert_close(step, path.slope_coefficient(t, s) * slope, atol=1e-12, rtol=0)


def test_slope_is_constant_where_data_and_noise_are(path, pair):
    x_0, n = pair
    slopes = [path.slope(path.mix(x_0, n, t), t, path.target(x_0, n, t)) for t in (at(0.9), at(0.2))]
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-12, rtol=0)


def test_every_occurrence_of_the_state_keeps_its_gradient(path, pair):
    """With a constant prediction the gradient to the state is its coefficient, also in clean and noise."""
    x, p = pair
    x = x.clone().requires_grad_()
    t, s = at(0.8), at(0.35)
    a, _ = path.step_coefficients(t, s)
    (gradient,) = torch.autograd.grad(path.step(x, t, s, p).sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, a.item()))
    clean, noise = path.clean(x, t, p), path.noise(x, t, p)
    (gradient,) = torch.autograd.grad(path.mix(clean, noise, s).sum(), x, allow_unused=True)
    torch.testing.assert_close(gradient, torch.full_like(x, a.item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_keeps_its_dtype(path, pair, dtype):
    x, p = pair.to(dtype)
    t = at(0.8)
    results = path.clean(x, t, p), path.noise(x, t, p), path.mix(x, p, t), path.target(x, p, t)
    assert {r.dtype for r in results} == {dtype}


def test_half_log_snr_is_infinite_at_both_ends_of_the_flow():
    assert RectifiedFlow().half_log_snr(at(1.0, 0.5, 0.0)).tolist() == [-math.inf, 0.0, math.inf]


def test_table_is_exact_at_its_own_times_and_at_the_data():
    path = VariancePreserving.from_alphas_cumprod(TABLE)
    times = torch.arange(4, dtype=torch.float64) / 3
    torch.testing.assert_close(
        path.alpha(times) ** 2, torch.tensor([1.0, *TABLE.double()], dtype=torch.float64), atol=1e-14, rtol=0
    )
    assert path.sigma(at(0.0)).item() == 0.0


def test_table_is_variance_preserving_and_monotone_between_its_times():
    path = VariancePreserving.from_alphas_cumprod(TABLE)
    times = torch.linspace(0, 1, 301, dtype=torch.float64)
    torch.testing.assert_close(path.alpha(times) ** 2 + path.sigma(times) ** 2, torch.ones_like(times))
    assert (path.alpha(times).diff() < 0).all()
    half = path.angle(at(0.5)).item()
    assert half == pytest.approx((math.acos(math.sqrt(0.9)) + math.acos(math.sqrt(0.5))) / 2)


def test_table_takes_single_precision_times():
    path = VariancePreserving.from_alphas_cumprod(TABLE)
    assert path.alpha(torch.rand(3)).dtype == torch.float64


def test_zero_terminal_snr_works_with_v():
    path = VariancePreserving.from_alphas_cumprod(torch.tensor([0.9, 0.5, 0.0]), "v")
    x, v, t = torch.tensor([[3.0]]), torch.tensor([[-2.0]]), at(1.0)
    assert path.clean(x, t, v).item() == pytest.approx(2.0)
    assert path.noise(x, t, v).item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VariancePreserving.from_alphas_cumprod(torch.tensor([0.9, 0.0])), "needs 'v'"),
        (lambda: VariancePreserving.from_alphas_cumprod(torch.tensor([0.5, 0.9])), r"at training step 1 it is 0\.9"),
        (lambda: VariancePreserving.from_alphas_cumprod(torch.tensor([1.5, 0.9])), r"at training step 0 it is 1\.5"),
        (lambda: VariancePreserving.from_alphas_cumprod(TABLE, "velocity"), "'velocity' is not known"),
        (lambda: VariancePreserving(lambda t: 0.1 + t), r"got angle 0\.1"),
    ],
)
def test_an_invalid_path_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()

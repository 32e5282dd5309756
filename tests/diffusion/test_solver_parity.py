"""The solvers against diffusers' schedulers on the schedulers' own grids, with a fixed function as network."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusion import SOLVERS, RectifiedFlow, VariancePreserving, integrate, table_grid, time_grid

STEPS = [1, 2, 5, 8, 20, 50]
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(1))


def network(x, t):
    return torch.tanh(0.7 * x + BIAS) * torch.cos(3 * t.float()) + 0.3 * BIAS


def solve(grid, path, name, predict=network):
    return integrate(predict, X, grid, path, SOLVERS[name]).x[:, -1]


def assert_close(ours, theirs):
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def run_scheduler(scheduler, times, predict=network):
    """The scheduler's own loop; times holds the network's time for each of its timesteps."""
    x = X
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(predict(x, t), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_the_flow(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    grid = time_grid(scheduler.sigmas)
    assert_close(solve(grid, RectifiedFlow(), "euler"), run_scheduler(scheduler, grid[:-1]))


@pytest.mark.parametrize("steps", STEPS)
def test_heun_on_the_flow(steps):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    grid = time_grid([*scheduler.sigmas[:-1].unique().flip(0), 0.0])
    times = [grid[0], *grid[1:-1].repeat_interleave(2)]
    assert_close(solve(grid, RectifiedFlow(), "heun"), run_scheduler(scheduler, times))


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "scheduler_class"), [("dpmpp_2m", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)]
)
def test_multistep_on_the_flow(steps, shift, name, scheduler_class):
    scheduler = scheduler_class(**FLOW, flow_shift=shift)
    scheduler.set_timesteps(steps)
    grid = time_grid(scheduler.sigmas)
    assert_close(solve(grid, RectifiedFlow(), name), run_scheduler(scheduler, grid[:-1]))


@pytest.mark.parametrize("steps", STEPS)
def test_unipc_without_its_corrector_is_dpmpp_2m_on_the_flow(steps):
    scheduler = UniPCMultistepScheduler(**FLOW, flow_shift=3.0, disable_corrector=list(range(steps)))
    scheduler.set_timesteps(steps)
    grid = time_grid(scheduler.sigmas)
    assert_close(solve(grid, RectifiedFlow(), "dpmpp_2m"), run_scheduler(scheduler, grid[:-1]))


PREDICTIONS = [("noise", "epsilon"), ("v", "v_prediction")]


def table(scheduler, prediction):
    """The scheduler's path, and a network for it: bounded as v, so that as noise its clean prediction stays bounded."""
    as_v = VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod, "v")
    if prediction == "v":
        return as_v, network
    as_noise = VariancePreserving.from_alphas_cumprod(scheduler.alphas_cumprod)
    return as_noise, lambda x, t: as_v.noise(x, t, network(x, t))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("prediction", "theirs"), PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_euler_on_the_table_is_ddim(steps, prediction, theirs, spacing, set_alpha_to_one):
    """Not "linspace": DDIM then steps to timestep - 1000 // steps, which is not where it evaluates next."""
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION,
        clip_sample=False,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=1,
        prediction_type=theirs,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    grid = table_grid(scheduler.timesteps, end=-1 if set_alpha_to_one else 0)
    path, predict = table(scheduler, prediction)
    assert_close(solve(grid, path, "euler", predict), run_scheduler(scheduler, grid[:-1], predict))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("prediction", "theirs"), PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("name", "scheduler_class"), [("dpmpp_2m", DPMSolverMultistepScheduler), ("unipc", UniPCMultistepScheduler)]
)
def test_multistep_on_the_table(steps, prediction, theirs, spacing, name, scheduler_class):
    scheduler = scheduler_class(**STABLE_DIFFUSION, steps_offset=1, prediction_type=theirs, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    grid = table_grid(scheduler.timesteps)
    path, predict = table(scheduler, prediction)
    assert_close(solve(grid, path, name, predict), run_scheduler(scheduler, grid[:-1], predict))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("prediction", "theirs"), PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_heun_on_the_table(steps, prediction, theirs, spacing):
    """HeunDiscreteScheduler's state is x / alpha; its network sees the same x as ours."""
    scheduler = HeunDiscreteScheduler(**STABLE_DIFFUSION, steps_offset=1, prediction_type=theirs, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    path, predict = table(scheduler, prediction)
    grid = table_grid(scheduler.timesteps[:1] if steps == 1 else scheduler.timesteps.unique().flip(0))
    times = [grid[0], *grid[1:-1].repeat_interleave(2)]
    x = X / path.alpha(grid[0]).float()
    for timestep, t in zip(scheduler.timesteps, times, strict=True):
        x = scheduler.step(predict(scheduler.scale_model_input(x, timestep), t), timestep, x).prev_sample
    assert_close(solve(grid, path, "heun", predict), x)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_consistency_sampling_on_the_flow(steps, shift):
    """FlowMatchLCMScheduler on FLUX's even times, with the noise that its random generator draws."""
    scheduler = FlowMatchLCMScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    grid = time_grid(scheduler.sigmas)
    rng, x = torch.Generator().manual_seed(0), X
    for timestep, t in zip(scheduler.timesteps, grid[:-1], strict=True):
        x = scheduler.step(network(x, t), timestep, x, generator=rng).prev_sample
    rng = torch.Generator().manual_seed(0)
    noise = {i: torch.randn(X.shape, generator=rng) for i in range(steps - 1)}
    assert_close(integrate(network, X, grid, RectifiedFlow(), SOLVERS["consistency"], noise=noise).x[:, -1], x)


def test_consistency_sampling_refuses_to_run_without_noise():
    with pytest.raises(ValueError, match=r"noise lacks \[0, 2\]"):
        integrate(network, X, torch.tensor([1, 0.7, 0.5, 0.2, 0]), RectifiedFlow(), SOLVERS["consistency"], noise={1: X})

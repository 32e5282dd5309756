import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusion import (
    dpmpp_flow_grid,
    flow_grid,
    resolution_shift,
    shift_times,
    spaced_timesteps,
    stop_early,
    table_grid,
    time_grid,
    unipc_flow_grid,
)

STEPS = [1, 2, 4, 8, 28, 50]


def assert_same_grid(grid, sigmas):
    assert grid.dtype == torch.float64
    torch.testing.assert_close(grid, sigmas.double(), atol=1e-6, rtol=0)


def test_time_grid_converts():
    grid = time_grid([1.0, 0.25, 0.0])
    assert grid.dtype == torch.float64
    assert grid.tolist() == [1.0, 0.25, 0.0]
    assert torch.equal(time_grid(grid), grid)


@pytest.mark.parametrize(
    "times", [[], [1.0], [[1.0, 0.0]], [0.0, 1.0], [1.0, 0.5, 0.5], [1.1, 0.0], [1.0, -0.1], [1.0, math.nan]]
)
def test_an_invalid_grid_is_refused(times):
    with pytest.raises(ValueError, match="time grid"):
        time_grid(times)


def test_stop_early_ends_with_a_jump_to_the_data():
    grid = time_grid([1.0, 0.75, 0.5, 0.25, 0.0])
    assert stop_early(grid, 2).tolist() == [1.0, 0.75, 0.5, 0.0]
    assert torch.equal(stop_early(grid, 3), grid)
    with pytest.raises(ValueError, match="time grid"):
        stop_early(grid, 4)


def test_shift_by_hand():
    t = torch.tensor([1.0, 0.5, 0.25, 0.0])
    torch.testing.assert_close(shift_times(t, 3.0), torch.tensor([1.0, 0.75, 0.5, 0.0]))
    assert torch.equal(shift_times(t, 1.0), t)


def test_resolution_shift_by_hand():
    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
    assert resolution_shift(2176) == pytest.approx(math.exp(0.825))


def test_resolution_shift_is_the_pipelines():
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    assert math.log(resolution_shift(1024, 128, 2048, 0.4, 1.3)) == pytest.approx(calculate_shift(1024, 128, 2048, 0.4, 1.3))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_grid_with_a_static_shift(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    assert_same_grid(flow_grid(steps, shift), scheduler.sigmas)


@pytest.mark.parametrize("steps", STEPS)
def test_flow_grid_with_dynamic_shifting(steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(steps, mu=0.9)
    assert_same_grid(flow_grid(steps, math.exp(0.9), last=1 / 1000), scheduler.sigmas)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.9)  # as FLUX does
    assert_same_grid(flow_grid(steps, math.exp(0.9), last=1 / steps), scheduler.sigmas)


def test_flow_grid_with_a_terminal():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=0.9)
    assert_same_grid(flow_grid(8, math.exp(0.9), last=1 / 8, terminal=0.02), scheduler.sigmas)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_multistep_flow_grids(steps, shift):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    unipc, dpmpp = UniPCMultistepScheduler(**flow), DPMSolverMultistepScheduler(**flow)
    unipc.set_timesteps(steps)
    dpmpp.set_timesteps(steps)
    assert_same_grid(unipc_flow_grid(steps, shift), unipc.sigmas)
    assert_same_grid(dpmpp_flow_grid(steps, shift), dpmpp.sigmas)


def test_multistep_flow_grids_start_below_pure_noise():
    assert unipc_flow_grid(8)[0].item() == 1 - 1e-6
    assert dpmpp_flow_grid(8, 3.0)[0].item() == pytest.approx(0.99967, abs=5e-6)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_are_ddims(spacing):
    for steps in range(1, 101):
        scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()[:steps]  # for "trailing" with 61 steps diffusers adds a 62nd at -1
        assert spaced_timesteps(steps, spacing, offset=1).tolist() == expected, steps


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_timesteps_are_the_multistep_schedulers(spacing, scheduler_class):
    scheduler = scheduler_class(timestep_spacing=spacing, steps_offset=1)
    for steps in range(1, 101):
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.tolist()[:steps]
        assert spaced_timesteps(steps, spacing, offset=1, multistep=True).tolist() == expected, steps


def test_an_unknown_spacing_is_refused():
    with pytest.raises(ValueError, match="'karras' is not known"):
        spaced_timesteps(4, "karras")


def test_table_grid_by_hand():
    steps = torch.tensor([749, 499, 249])
    assert table_grid(steps).tolist() == [0.75, 0.5, 0.25, 0.0]
    assert table_grid(steps, end=0).tolist() == [0.75, 0.5, 0.25, 0.001]
    assert table_grid(torch.tensor([3, 1]), num_train_timesteps=4).tolist() == [1.0, 0.5, 0.0]


def test_table_grid_refuses_a_last_step_of_length_zero():
    with pytest.raises(ValueError, match="fall strictly"):
        table_grid(torch.tensor([500, 0]), end=0)

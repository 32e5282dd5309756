"""`Tools` of an objective around a toy network."""

import torch

from diffusion import SOLVERS, RectifiedFlow, Teacher, Tools

ODE_SOLVERS = [name for name, solver in SOLVERS.items() if not solver.renoises]


def never_judged(latents, prompts):
    raise AssertionError("this objective has no reward")


def tools(
    predict=None,
    path=None,
    *,
    step=1,
    seed=0,
    solver=SOLVERS["euler"],
    grid=None,
    judge=never_judged,
    codec=None,
    teacher_grid=None,
    features=None,
    parameters=(),
):
    """The teacher is `predict` with adapter None, without guidance."""
    grid = torch.linspace(1, 0, 6, dtype=torch.float64) if grid is None else grid
    teacher = Teacher(
        lambda x, t, condition, scale: predict(x, t, condition, None),
        SOLVERS["euler"],
        grid if teacher_grid is None else teacher_grid,
        (1.0, 1.0),
    )
    rng = torch.Generator().manual_seed(seed)
    return Tools(
        step,
        predict,
        predict,
        path or RectifiedFlow(),
        solver,
        grid,
        judge,
        codec,
        rng,
        teacher,
        lambda player: parameters,
        features,
    )

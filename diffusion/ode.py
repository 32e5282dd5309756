"""A whole solve: the states on the grid, with gradient in chosen steps only."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from diffusion.grid import time_grid
from diffusion.path import Path
from diffusion.sde import NoisyStep, renoise
from diffusion.solvers import History, Predictor, Solver, evaluations, noisy_steps
from diffusion.types import Trajectory


def integrate(
    predict: Predictor,
    x: Tensor,
    grid: Tensor,
    path: Path,
    solver: Solver,
    *,
    record: Sequence[int] | None = None,
    predictions: bool = False,
    trained_steps: Collection[int] = (),
    noise: Mapping[int, Tensor] | None = None,
    noisy_step: NoisyStep = renoise,
) -> Trajectory:
    """Solve the sampling ODE from x [B, ...] at grid[0] to grid[-1]; grid [S+1] as `time_grid` takes it.

    record: which states to return, as grid indices 0..S, in any order; None for the last one only. They are the states
    the network was evaluated at, which in UniPC are the predicted, not the corrected ones.

    predictions: also return the network's native predictions at the recorded states; the end of the solve has none.

    trained_steps: which steps, 0..S-1, evaluate the network with gradient. The others do so under no_grad, but the state
    itself keeps its gradient from step to step, so a trained step influences the end of the solve differentiably even if no
    later one is trained. With no trained step nothing has a gradient, not even with respect to x.

    noise: {step: standard normal noise [B, ...]}: these steps are `noisy_step`s, one evaluation each, and a multistep solver
    restarts with an empty history after them. The `consistency` solver needs it for every step but the last.

    To start late, pass the end of a grid; to stop early, see `stop_early`. To cut the gradient at the network's input,
    pass `lambda x, t: predict(x.detach(), t)`.

    Raises ValueError for an invalid grid, an empty record, indices outside the ranges above, and missing noise.
    """
    grid = time_grid(grid)
    steps = len(grid) - 1
    record = [steps] if record is None else sorted(set(record))
    noise = {} if noise is None else noise
    if not record:
        raise ValueError("record is empty: at least one state must be recorded")
    _check_indices("record", record, steps)
    _check_indices("trained_steps", trained_steps, steps - 1)
    _check_indices("noise", noise, steps - 1)
    if missing := [i for i in noisy_steps(solver, steps) if i not in noise]:
        raise ValueError(f"noise lacks {missing}, steps after which this solver adds noise")
    history: History = ()
    states, predicted = [], []
    with torch.set_grad_enabled(len(trained_steps) > 0):
        for i in range(steps):
            evaluate = _StepPredictor(predict, i in trained_steps)
            if i in record:
                states.append(x)
            if i in noise:
                x, history = noisy_step(path, x, grid[i], grid[i + 1], evaluate(x, grid[i]), noise[i]), ()
            else:
                x, history = solver.step(path, evaluate, x, grid[i], grid[i + 1], history)
            if predictions and i in record:
                predicted.append(evaluate.first)
        if steps in record:
            states.append(x)
        return Trajectory(torch.stack(states, dim=1), grid[record], torch.stack(predicted, dim=1) if predicted else None)


def prediction_coefficients(path: Path, solver: Solver, grid: Tensor) -> Tensor:
    """The coefficient of each network evaluation in the last state when network inputs are detached, [E] float64.

    The gradient of a loss L(x_S) is then `sum_k c_k (d prediction_k / d parameters)^T dL/dx_S`, with no product of
    Jacobians. A step is linear in the state and the predictions, so the recursion is the solver itself, run on
    coefficients: the k-th prediction is the k-th unit vector. On the flow path Euler's c_k is t_{k+1} - t_k; DDIM's is
    `alpha_S (sigma_{k+1} / alpha_{k+1} - sigma_k / alpha_k)`.
    """
    units = torch.eye(evaluations(solver, grid), dtype=torch.float64)
    remaining = iter(units)
    return integrate(lambda x, t: next(remaining)[None], torch.zeros_like(units[:1]), grid, path, solver).x[0, -1]


class _StepPredictor:
    """A predictor for one step, with or without gradient, and its first prediction: the one at the step's start."""

    def __init__(self, predict: Predictor, with_gradient: bool) -> None:
        self._predict = predict
        self._with_gradient = with_gradient
        self._first: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._with_gradient):
            prediction = self._predict(x, t)
        if self._first is None:
            self._first = prediction
        return prediction

    @property
    def first(self) -> Tensor:
        assert self._first is not None
        return self._first


def _check_indices(name: str, indices: Collection[int], last: int) -> None:
    if outside := [i for i in indices if not 0 <= i <= last]:
        raise ValueError(f"{name} has {outside}, which this grid does not have: allowed are 0 to {last}")

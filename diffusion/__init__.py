"""The mathematics and the nouns. torch only; every other room may import this one, and this one imports none.

types.py      prompts, conditions, trajectories, rollouts, scores; the Protocols between rooms
path.py       how noise and data mix, the network's native prediction, and what follows from it
solvers.py    euler, heun, dpmpp_2m, unipc: one step each, and the registry SOLVERS
ode.py        a whole solve, with gradient only where asked; the coefficient of each prediction in its end
grid.py       which times a solve visits: time grids, shift, diffusers' own choices
guidance.py   classifier-free guidance
noise.py      per-sample seeds and noise
"""

from diffusion.grid import (
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
from diffusion.guidance import guidance_evaluations, guide, guided
from diffusion.noise import sample_noise, sample_seed
from diffusion.ode import integrate, prediction_coefficients
from diffusion.path import Path, RectifiedFlow, VariancePreserving, combine
from diffusion.solvers import SOLVERS, History, Node, Predictor, Solver, Step, evaluations
from diffusion.types import (
    Codec,
    Condition,
    Items,
    Judge,
    Loss,
    Objective,
    Predict,
    Prompt,
    RewardModel,
    Rollout,
    Sampling,
    Scores,
    Trajectory,
)

__all__ = [
    "SOLVERS",
    "Codec",
    "Condition",
    "History",
    "Items",
    "Judge",
    "Loss",
    "Node",
    "Objective",
    "Path",
    "Predict",
    "Predictor",
    "Prompt",
    "RectifiedFlow",
    "RewardModel",
    "Rollout",
    "Sampling",
    "Scores",
    "Solver",
    "Step",
    "Trajectory",
    "VariancePreserving",
    "combine",
    "dpmpp_flow_grid",
    "evaluations",
    "flow_grid",
    "guidance_evaluations",
    "guide",
    "guided",
    "integrate",
    "prediction_coefficients",
    "resolution_shift",
    "sample_noise",
    "sample_seed",
    "shift_times",
    "spaced_timesteps",
    "stop_early",
    "table_grid",
    "time_grid",
    "unipc_flow_grid",
]

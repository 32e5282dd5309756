"""Mathematics, data types and the Protocols between rooms. torch only; every other room may import it, and it imports none.

types.py      prompts, plans, conditions, trajectories, rollouts, scores, losses
protocols.py  what rooms expect of each other: networks, adapters, rewards, sources of rollouts
objective.py  what a training method is
path.py       how noise and data mix, the network's native prediction, and what follows from it
solvers.py    euler, heun, dpmpp_2m, unipc: one step each, and the registry SOLVERS
sde.py        steps that add fresh noise
ode.py        a whole solve, with gradient in chosen steps; the coefficient of each prediction in the last state
grid.py       the times of a solve: time grids, shift, the grids of diffusers' schedulers
guidance.py   classifier-free guidance
noise.py      per-sample seeds and noise

discriminator.py  heads on the features of a frozen vision network, adversarial losses and their weight
augment.py        differentiable augmentation of what a discriminator sees
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
from diffusion.objective import Items, Objective, ObjectiveConfig, Teacher, Tools, adapter_names, players_of
from diffusion.ode import integrate, prediction_coefficients
from diffusion.path import Path, RectifiedFlow, VariancePreserving, combine
from diffusion.protocols import AdapterSet, Codec, Generator, ImageFeatures, Judge, Predict, RewardModel, Source
from diffusion.sde import NoisyStep, renoise
from diffusion.solvers import SOLVERS, History, Node, Predictor, Solver, Step, evaluations, noisy_steps
from diffusion.types import (
    About,
    Condition,
    Cost,
    Drawn,
    Follows,
    Group,
    Loss,
    Plan,
    Prompt,
    Rollout,
    RunSettings,
    Scores,
    Trained,
    Trajectory,
)

__all__ = [
    "SOLVERS",
    "About",
    "AdapterSet",
    "Codec",
    "Condition",
    "Cost",
    "Drawn",
    "Follows",
    "Generator",
    "Group",
    "History",
    "ImageFeatures",
    "Items",
    "Judge",
    "Loss",
    "Node",
    "NoisyStep",
    "Objective",
    "ObjectiveConfig",
    "Path",
    "Plan",
    "Predict",
    "Predictor",
    "Prompt",
    "RectifiedFlow",
    "RewardModel",
    "Rollout",
    "RunSettings",
    "Scores",
    "Solver",
    "Source",
    "Step",
    "Teacher",
    "Tools",
    "Trained",
    "Trajectory",
    "VariancePreserving",
    "adapter_names",
    "combine",
    "dpmpp_flow_grid",
    "evaluations",
    "flow_grid",
    "guidance_evaluations",
    "guide",
    "guided",
    "integrate",
    "noisy_steps",
    "players_of",
    "prediction_coefficients",
    "renoise",
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

"""The dry run: the complete experiment, and estimates of a step's network evaluations and the run's memory."""

from __future__ import annotations

import torch
import yaml

from diffusion import SOLVERS, evaluations, guidance_evaluations
from generators import resolve
from generators.outline import Outline
from runtime.experiment.checks import shape_of_adapter
from runtime.experiment.config import Experiment, new_objective
from runtime.roles.build import roles_of_adapters

OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
"""The networks of a pipeline folder other than the transformer."""


def plan_text(experiment: Experiment, executor: str, generator: Outline) -> str:
    """The output of `odeon launch --dry-run`. Counts are upper bounds, for the plan of the first step."""
    rollouts = experiment.rollouts
    objective = new_objective(experiment)
    plan = objective.plan(1, rollouts.steps)
    solver, grid = SOLVERS[rollouts.solver], torch.linspace(1, 0, rollouts.steps + 1)
    factor = guidance_evaluations(experiment.generator.guidance)
    images = rollouts.groups_per_step * plan.group_size
    drawn = images * evaluations(solver, grid, plan.noisy) if plan.source in ("policy", "teacher") else 0
    cost = experiment.objective.cost(solver, grid)
    without = (drawn + rollouts.groups_per_step * cost.without) * factor
    with_gradient = rollouts.groups_per_step * cost.with_gradient * factor
    rank, layers = shape_of_adapter(experiment, generator)
    adapters = len(roles_of_adapters(experiment, objective)) * rank * sum(sum(generator.linear[layer]) for layer in layers)
    base = generator.parameters * {"float32": 4, "bfloat16": 2}[experiment.generator.dtype] / 2**20
    folder = resolve(experiment.generator.weights, experiment.generator.family)
    others = sum(file.stat().st_size for name in OTHERS for file in (folder / name).glob("*.safetensors")) / 2**20
    processes = 1 if executor == "inline" else rollouts.workers + 1
    return "\n".join(
        [
            yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
            f"# a step: {images} images, at most {without:,} network evaluations without gradient and",
            f"#   {with_gradient:,} with gradient",
            f"# memory of each of {processes} processes: transformer {base:,.0f} MiB, text encoders and VAE "
            + (f"{others:,.0f} MiB," if others else "as much as their files,"),
            "#   libraries about 500 MiB, and the activations of a micro-batch;",
            f"#   adapters {adapters * 4 / 2**20:,.0f} MiB, and in the learner gradient and optimiser three times that",
        ]
    )

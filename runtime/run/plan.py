"""The dry run: the complete experiment, and estimates of a step's network evaluations and the run's memory."""

from __future__ import annotations

import torch
import yaml

from diffusion import SOLVERS, Plan, evaluations, guidance_evaluations, noisy_steps
from generators import resolve
from generators.outline import Outline
from runtime.experiment.checks import shape_of_adapter
from runtime.experiment.config import Experiment, SamplingSection, new_objective
from runtime.roles.build import roles_of_adapters

OTHERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
"""The networks of a pipeline folder other than the transformer."""


def drawn_evaluations(experiment: Experiment, plan: Plan) -> int:
    """Network evaluations of one image's solve by a worker; a stored trajectory needs none."""
    if plan.source not in ("policy", "teacher"):
        return 0
    sampling: SamplingSection = experiment.teacher_sampling if plan.source == "teacher" else experiment.rollouts
    teachers = plan.source == "teacher" and experiment.teacher_sampling.guidance_range != (1, 1)
    students = plan.source == "policy" and experiment.generator.guidance != 1
    solver, grid = SOLVERS[sampling.solver], torch.linspace(1, 0, sampling.steps + 1)
    return evaluations(solver, grid, [*plan.noisy, *noisy_steps(solver, sampling.steps)]) * (2 if teachers or students else 1)


def plan_text(experiment: Experiment, executor: str, generator: Outline) -> str:
    """The output of `odeon launch --dry-run`. Counts are upper bounds, for the plan of the first step."""
    rollouts = experiment.rollouts
    objective = new_objective(experiment)
    plan = objective.plan(1, rollouts.steps)
    solver, grid = SOLVERS[rollouts.solver], torch.linspace(1, 0, rollouts.steps + 1)
    factor = guidance_evaluations(experiment.generator.guidance)
    images = rollouts.groups_per_step * plan.group_size
    cost = experiment.objective.cost(solver, grid)
    without = images * drawn_evaluations(experiment, plan) + rollouts.groups_per_step * cost.without * factor
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

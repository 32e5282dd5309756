"""Every training method an experiment can name, and its objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import align
import distill
from diffusion.objective import Objective

if TYPE_CHECKING:
    from runtime.experiment.config import Experiment

ALGORITHMS: dict[str, Any] = {**align.ALGORITHMS, **distill.ALGORITHMS}
"""{`objective.algorithm`: the objective's class, with its pydantic `Config`}"""


def new_objective(experiment: Experiment) -> Objective:
    """The experiment's objective; its networks' first values depend on the experiment's seed alone, in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        return ALGORITHMS[experiment.objective.algorithm](experiment.objective)

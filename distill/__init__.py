"""Few-step distillation: one algorithm a file, each an `Objective` of diffusion/objective.py. Imports diffusion/ alone."""

from typing import Any

ALGORITHMS: dict[str, Any] = {}
"""{name in an experiment's `objective.algorithm`: the objective, with its pydantic `Config`}; none is built yet"""
